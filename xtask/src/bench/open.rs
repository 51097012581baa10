//! The cost of a close while many other connections are open.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{
    Bench,
    bed::{Bed, CLOSES, Ends, LoadExtent, available_memory},
    compare::{tcpclose, totals},
    programs::{self, Cost},
    table,
    table::{Row, rounded},
    tool::{Kind, Tracer},
};
use crate::command::say;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many connections are open; each is two sockets, as both ends are on this host
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1000,100000,1000000")]
    connections: Vec<u64>,
    /// How long connections are opened and closed beside them
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
}

/// Kernel memory of an open connection in KiB, both ends with their files. Measured: 7.5 on 6.18.
const CONNECTION_KIB: f64 = 9.0;

/// Memory that must be left to other processes, in MiB.
const RESERVE: f64 = 2048.0;

/// The range of `--connections`.
const TABLE: std::ops::RangeInclusive<u64> = 65_536..=4_194_304;

pub(crate) fn measure(bench: &mut Bench, args: &Args) -> Result<Value> {
    let tool = bench.tool()?.to_owned();
    let mut rows = Vec::<Row>::new();
    for &connections in &args.connections {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let needed = connections as f64 * CONNECTION_KIB / 1024.0 + RESERVE;
        let available = available_memory()?;
        if available < needed {
            say(&format!(
                "{connections} connections are left out: they need {needed:.0} MiB, and {available:.0} MiB \
                 are available"
            ));
            continue;
        }
        say(&format!("opening {connections} connections"));
        // Room for both ends of each, and for those that are opened and closed in addition.
        let table = (connections * 5 / 2).clamp(*TABLE.start(), *TABLE.end());
        let command = tcpclose(&tool, &["--connections", &table.to_string()])?;
        rows.push(row(&mut bench.bed, &command, connections, table, args.seconds)?);
    }
    table::print(&rows);
    Ok(table::json(&rows))
}

fn row(bed: &mut Bed, command: &[String], connections: u64, table: u64, seconds: u32) -> Result<Row> {
    bed.renew()?;
    let mut tracer = Tracer::start(bed, Kind::Tcpclose, command)?;
    let held = bed.hold(connections, false)?;
    let cost = Cost::measure(&mut tracer, bed, LoadExtent::Seconds(seconds), Ends::Rst)?;
    let (resident, maps) = (tracer.peak_resident()?, programs::maps(&tracer)?);
    tracer.stop()?;
    let totals = totals(bed, Kind::Tcpclose, &cost.ports())?;
    // The start is measured as well while they are open.
    let mut late = Tracer::start(bed, Kind::Tcpclose, command)?;
    let ready = late.ready.context("tcpclose did not say when it was ready")?;
    late.stop()?;
    Ok(vec![
        ("open connections", json!(held.connections)),
        ("--connections", json!(table)),
        ("connections/s", rounded(cost.load.rate(), 0)),
        ("BPF us/connection", rounded(cost.bpf(), 2)),
        ("CPU us/connection", rounded(cost.cpu, 2)),
        ("closes expected", json!(cost.connections() * CLOSES)),
        ("written", json!(totals.closes)),
        ("lost", json!(totals.lost)),
        ("ready ms", rounded(ready.as_secs_f64() * 1e3, 0)),
        ("peak resident MiB", rounded(resident, 1)),
        ("maps MiB", rounded(maps, 1)),
    ])
}
