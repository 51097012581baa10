//! CPU time and memory while many sockets linger in `CLOSE_WAIT`.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use serde_json::{Value, json};

use super::{
    Bench,
    compare::tcpclose,
    table,
    table::{Row, rounded},
    tool::{Kind, Tracer},
};
use crate::command::say;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many sockets linger
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    sockets: u64,
    /// How long to watch
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
}

/// The period that each row covers.
const WINDOW: Duration = Duration::from_secs(5);

pub(crate) fn measure(bench: &mut Bench, args: &Args) -> Result<Value> {
    let command = tcpclose(bench.tool()?, &[])?;
    let bed = &mut bench.bed;
    bed.renew()?;
    let mut tracer = Tracer::start(bed, Kind::Tcpclose, &command)?;
    say(&format!("leaving {} sockets in CLOSE_WAIT", args.sockets));
    let held = bed.hold(args.sockets, true)?;
    let start = Instant::now();
    let mut rows = Vec::<Row>::new();
    let (mut cpu, mut written) = (tracer.cpu()?, 0);
    while start.elapsed().as_secs() < args.seconds {
        let window = Instant::now();
        thread::sleep(WINDOW);
        let now = tracer.cpu()?;
        let output = fs::metadata(bed.path("output"))?.len();
        rows.push(vec![
            ("seconds", rounded(start.elapsed().as_secs_f64(), 0)),
            ("lingering sockets", json!(held.connections)),
            (
                "CPU ms/s",
                rounded(now.saturating_sub(cpu).as_secs_f64() * 1e3 / window.elapsed().as_secs_f64(), 1),
            ),
            ("KiB/s written", json!((output - written) / 1024 / WINDOW.as_secs())),
            ("resident MiB", rounded(tracer.resident()?, 1)),
        ]);
        (cpu, written) = (now, output);
    }
    tracer.stop()?;
    table::print(&rows);
    Ok(table::json(&rows))
}
