//! The behaviour of the tool when nobody reads its output, as in `tcpclose -o json | sleep 1000`: whether
//! connections are slowed, whether memory stays bounded, and whether the losses are reported once somebody
//! reads again.

use std::{
    io::{BufReader, pipe},
    thread,
};

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use super::{
    Bench,
    bed::{CLOSES, Ends, LoadExtent},
    compare::tcpclose,
    output::Totals,
    table,
    table::{Row, rounded},
    tool::{Kind, Tracer},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many phases without and with the tool
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long each phase takes
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
}

pub(crate) fn measure(bench: &mut Bench, args: &Args) -> Result<Value> {
    let command = tcpclose(bench.tool()?, &[])?;
    let bed = &mut bench.bed;
    let extent = LoadExtent::Seconds(args.seconds);
    let mut untraced = Vec::new();
    for _ in 0..args.rounds {
        bed.renew()?;
        untraced.push(bed.churn(extent, Ends::Rst)?.rate());
    }
    bed.renew()?;
    let (reader, writer) = pipe().context("cannot make a pipe")?;
    let mut tracer = Tracer::start_with(bed, Kind::Tcpclose, &command, writer.into())?;
    let mut rows = Vec::<Row>::new();
    let (mut rates, mut expected, mut port) = (Vec::new(), 0, 0);
    for _ in 0..args.rounds {
        let cpu = tracer.cpu()?;
        let load = bed.churn(extent, Ends::Rst)?;
        port = load.port;
        expected += u64::from(load.connections * (CLOSES + Ends::Rst.resets()));
        rates.push(load.rate());
        let cpu = tracer.cpu_since(cpu, load.connections.into())?;
        rows.push(vec![
            ("connections/s", rounded(load.rate(), 0)),
            ("events expected so far", json!(expected)),
            ("CPU us/connection", rounded(cpu, 2)),
            ("resident MiB", rounded(tracer.resident()?, 1)),
        ]);
    }
    let inode = bed.inode;
    let counting = thread::spawn(move || {
        let mut totals = Totals::default();
        totals.read(Kind::Tcpclose, BufReader::new(reader), inode, &[port]).map(|()| totals)
    });
    tracer.stop().context("while its output was read again")?;
    let totals = counting.join().map_err(|_| anyhow!("the reader of its output panicked"))??;
    table::print(&rows);
    let (without, with) = (table::median(&untraced), table::median(&rates));
    let (without, with) = without.zip(with).context("nothing was measured")?;
    let written = totals.closes + totals.resets;
    // Negative if the tool does not report a loss.
    let surplus = i128::from(written + totals.lost) - i128::from(expected);
    println!(
        "\nuntraced: {without:.0} connections/s, traced with nobody reading: {with:.0}, ratio {:.2}\n\
         events expected: {expected}, written: {}, reported as lost: {}, together {surplus:+}",
        with / without,
        written,
        totals.lost,
    );
    Ok(json!({
        "untraced_per_second": without,
        "traced_per_second": with,
        "events_expected": expected,
        "events_written": written,
        "lost": totals.lost,
        "surplus": i64::try_from(surplus)?,
        "phases": table::json(&rows),
    }))
}
