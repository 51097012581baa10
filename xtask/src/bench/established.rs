//! Latency and throughput of established connections with and without the tool.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{
    Bench,
    bed::Bed,
    compare::tcpclose,
    table,
    table::{Row, rounded},
    tool::{Kind, Tracer},
};
use crate::command::say;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long each phase takes
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
}

/// The figures of the load generator: its mode, its field, the name of the row, and decimals.
const FIGURES: [(&str, &str, &str, i32); 3] = [
    ("ping", "p50_us", "round trip, median, us", 2),
    ("ping", "p99_us", "round trip, 99th percentile, us", 2),
    ("bulk", "mib_per_second", "throughput, MiB/s", 0),
];

pub(crate) fn measure(bench: &mut Bench, args: &Args) -> Result<Value> {
    let command = tcpclose(bench.tool()?, &[])?;
    let bed = &mut bench.bed;
    bed.renew()?;
    let seconds = args.seconds.to_string();
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        say(&format!("round {round} of {}", args.rounds));
        let traced = |bed: &Bed| -> Result<[f64; 3]> {
            let mut tracer = Tracer::start(bed, Kind::Tcpclose, &command)?;
            tracer.settle()?;
            let figures = figures(bed, &seconds)?;
            tracer.stop()?;
            Ok(figures)
        };
        // Every other round runs in the opposite order.
        if round % 2 == 1 {
            without.push(figures(bed, &seconds)?);
            with.push(traced(bed)?);
        } else {
            with.push(traced(bed)?);
            without.push(figures(bed, &seconds)?);
        }
    }
    let mut rows = Vec::<Row>::new();
    for (index, (_, _, name, decimals)) in FIGURES.into_iter().enumerate() {
        let column = |rounds: &[[f64; 3]]| rounds.iter().map(|round| round[index]).collect::<Vec<_>>();
        let (without, with) = (column(&without), column(&with));
        let ratios: Vec<_> = with.iter().zip(&without).map(|(with, without)| with / without).collect();
        let median = |values: &[f64]| table::median(values).context("nothing was measured");
        rows.push(vec![
            ("established connections", json!(name)),
            ("untraced", rounded(median(&without)?, decimals)),
            ("traced", rounded(median(&with)?, decimals)),
            ("median of ratios", rounded(median(&ratios)?, 3)),
        ]);
    }
    table::print(&rows);
    Ok(table::json(&rows))
}

fn figures(bed: &Bed, seconds: &str) -> Result<[f64; 3]> {
    let ping = bed.load(&["ping", "--seconds", seconds])?;
    let bulk = bed.load(&["bulk", "--seconds", seconds])?;
    let mut values = [0.0; 3];
    for (value, (mode, field, ..)) in values.iter_mut().zip(FIGURES) {
        let report = if mode == "ping" { &ping } else { &bulk };
        *value = report[field].as_f64().with_context(|| format!("the load generator reports no {field}"))?;
    }
    Ok(values)
}
