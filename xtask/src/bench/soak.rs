//! Memory and losses over many ends.

use std::{fs::File, io::BufReader, time::Duration};

use anyhow::Result;
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
use crate::command::say;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many ends of connections; each connection has two
    #[arg(long, value_name = "N", default_value_t = 10_000_000)]
    ends: u64,
    /// How many rows to print
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    rows: u64,
    /// More options of tcpclose, in one word
    #[arg(long, value_name = "OPTIONS", default_value = "", allow_hyphen_values = true)]
    options: String,
}

/// Number of connections after which the output is counted and truncated, so that it fits on a disk.
const SLICE: u64 = 25_600;

pub(crate) fn measure(bench: &mut Bench, args: &Args) -> Result<Value> {
    let options: Vec<_> = args.options.split_whitespace().collect();
    let command = tcpclose(bench.tool()?, &options)?;
    let bed = &mut bench.bed;
    bed.renew()?;
    let mut tracer = Tracer::start(bed, Kind::Tcpclose, &command)?;
    let connections = args.ends.div_ceil(2);
    let slices = connections.div_ceil(SLICE);
    let (mut totals, mut expected, mut made) = (Totals::default(), 0, 0);
    let mut rows = Vec::<Row>::new();
    for slice in 0..slices {
        // RSTs, which are the more expensive end, and FINs every fourth time.
        let ends = if slice % 4 == 3 { Ends::Fin } else { Ends::Rst };
        let load = bed.churn(LoadExtent::Connections(SLICE), ends)?;
        tracer.settle()?;
        made += u64::from(load.connections);
        expected += u64::from(load.connections * CLOSES);
        let output = BufReader::with_capacity(1 << 20, File::open(bed.path("output"))?);
        totals.read(Kind::Tcpclose, output, bed.inode, &[load.port])?;
        tracer.cut_output()?;
        if slice % slices.div_ceil(args.rows) == 0 || slice + 1 == slices {
            say(&format!("{} of {} ends", made * 2, slices * SLICE * 2));
            rows.push(vec![
                ("ends", json!(made * 2)),
                ("closes expected", json!(expected)),
                ("written", json!(totals.closes)),
                ("lost", json!(totals.lost)),
                ("stacks lost", json!(totals.lost_stacks)),
                ("resident MiB", rounded(tracer.resident()?, 1)),
                ("of it anonymous", rounded(tracer.anonymous()?, 1)),
                ("CPU us/connection", rounded(tracer.cpu_since(Duration::ZERO, made)?, 2)),
            ]);
        }
    }
    tracer.stop()?;
    table::print(&rows);
    Ok(table::json(&rows))
}
