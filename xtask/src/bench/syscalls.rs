//! System calls of the tool per thousand events, counted by strace.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{
    Bench,
    bed::{Ends, LoadExtent},
    compare::{tcpclose, totals},
    table,
    table::{Row, rounded},
    tool::{Kind, Tracer, field},
};
use crate::{
    apt::{self, Package},
    command,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long connections are opened and closed
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
}

const STRACE: Package = Package { name: "strace", purpose: "strace, which counts system calls" };

/// The time that strace may take to attach.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn measure(bench: &mut Bench, args: &Args) -> Result<Value> {
    if command::find("strace").is_none() {
        ensure!(apt::install(&[STRACE])?, "there is no strace, and apt-get does not offer it");
    }
    let mut rows = Vec::<Row>::new();
    for ends in [Ends::Rst, Ends::Fin] {
        rows.extend(count(bench, args, ends)?);
    }
    table::print(&rows);
    println!("\nstrace slows the tool down, and a slower tool reads more records at a time.");
    Ok(table::json(&rows))
}

fn count(bench: &mut Bench, args: &Args, ends: Ends) -> Result<Vec<Row>> {
    let command = tcpclose(bench.tool()?, &[])?;
    let bed = &mut bench.bed;
    bed.renew()?;
    let mut tracer = Tracer::start(bed, Kind::Tcpclose, &command)?;
    tracer.settle()?;
    let file = bed.path("strace");
    let mut strace = Command::new("strace");
    strace.args(["--follow-forks", "--summary-only", "--summary-columns=calls,name", "--output"]);
    strace.arg(&file).args(["--attach", &tracer.pid().to_string()]);
    let mut strace = strace.stderr(Stdio::null()).spawn().context("cannot start strace")?;
    let status = Path::new("/proc").join(tracer.pid().to_string()).join("status");
    let start = Instant::now();
    while field(&fs::read_to_string(&status)?, "TracerPid") == Some("0") {
        ensure!(start.elapsed() < PATIENCE, "strace did not attach within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(5));
    }
    let load = bed.churn(LoadExtent::Seconds(args.seconds), ends)?;
    tracer.settle()?;
    kill(Pid::from_raw(i32::try_from(strace.id())?), Signal::SIGINT)?;
    strace.wait()?;
    tracer.stop()?;
    let totals = totals(bed, Kind::Tcpclose, &[load.port])?;
    let events = totals.closes + totals.resets;
    ensure!(events > 0, "the tool wrote no event");
    let text = fs::read_to_string(&file)?;
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    let row = |(name, calls): (&str, u64)| {
        vec![
            ("ends", json!(ends.name())),
            ("system call", json!(name)),
            ("calls", json!(calls)),
            ("events", json!(events)),
            ("calls for 1000 events", rounded(calls as f64 * 1e3 / events as f64, 2)),
        ]
    };
    let calls = calls(&text);
    ensure!(!calls.is_empty(), "strace counted no system call; it printed: {text}");
    Ok(calls.into_iter().map(row).collect())
}

/// Parses the table that strace prints: numbers of calls, and names.
fn calls(text: &str) -> Vec<(&str, u64)> {
    let row = |line: &str| -> Option<(usize, u64)> {
        let (calls, name) = line.trim().split_once(char::is_whitespace)?;
        Some((name.trim().len(), calls.parse().ok()?))
    };
    text.lines()
        .filter_map(|line| {
            let (length, calls) = row(line)?;
            let line = line.trim_end();
            Some((&line[line.len() - length..], calls))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_strace_is_read() {
        let text = "    calls syscall\n--------- ----------------\n      120 write\n        7 epoll_wait\n\
                    --------- ----------------\n      127 total\n";
        assert_eq!(calls(text), [("write", 120), ("epoll_wait", 7), ("total", 127)]);
    }
}
