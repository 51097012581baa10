//! Instructions per event that the tool executes, counted by callgrind on replayed records. Instruction
//! counts do not depend on the load of the machine.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    Bench,
    bed::{Bed, Ends, LoadExtent},
    compare::tcpclose,
    table,
    table::{Row, rounded},
    tool::{Kind, Tracer},
};
use crate::{
    apt::{self, Package},
    command::{self, line},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many connections to record
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    connections: u64,
    /// How many of the most expensive functions to show
    #[arg(long, value_name = "N", default_value_t = 25)]
    functions: usize,
}

const VALGRIND: Package = Package { name: "valgrind", purpose: "callgrind, which counts instructions" };

pub(crate) fn measure(bench: &mut Bench, args: &Args) -> Result<Value> {
    if command::find("valgrind").is_none() {
        ensure!(apt::install(&[VALGRIND])?, "there is no valgrind, and apt-get does not offer it");
    }
    let tool = bench.tool()?.to_owned();
    let can_replay = command::output(Command::new(&tool).args(["replay", "--help"])).is_some();
    ensure!(can_replay, "{} has no command `replay`, which this measurement needs", tool.display());
    let bed = &mut bench.bed;
    let mut rows = Vec::<Row>::new();
    for ends in [Ends::Rst, Ends::Fin] {
        // Two recordings, so that the cost of starting is not counted: the second has ten times as many
        // connections.
        let few = replay(bed, &tool, args.connections / 10, ends)?;
        let many = replay(bed, &tool, args.connections, ends)?;
        ensure!(many.events > few.events, "the longer recording has no more events than the shorter one");
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
        let each = (many.instructions - few.instructions) as f64 / (many.events - few.events) as f64;
        rows.push(vec![
            ("ends", json!(ends.name())),
            ("events", json!(many.events)),
            ("instructions", json!(many.instructions)),
            ("instructions/event", rounded(each, 0)),
        ]);
        println!("{} ends\n{}", ends.name(), functions(bed, args.functions)?);
    }
    table::print(&rows);
    Ok(table::json(&rows))
}

struct Replay {
    events: u64,
    instructions: u64,
}

/// Records the events of this many connections, and replays them under callgrind.
fn replay(bed: &mut Bed, tool: &Path, connections: u64, ends: Ends) -> Result<Replay> {
    bed.renew()?;
    let record = bed.path("record");
    // The file does not exist the first time.
    let _ = fs::remove_file(&record);
    let record = record.to_str().context("the path of the recording is not UTF-8")?;
    let mut tracer = Tracer::start(bed, Kind::Tcpclose, &tcpclose(tool, &["--record", record])?)?;
    bed.churn(LoadExtent::Connections(connections), ends)?;
    tracer.settle()?;
    tracer.stop()?;

    let output = bed.path("replayed");
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--quiet"]);
    valgrind.arg(format!("--callgrind-out-file={}", bed.path("callgrind").display()));
    valgrind.arg(tool).args(["replay", record, "--output", "json"]);
    valgrind.stdin(Stdio::null()).stdout(File::create(&output)?);
    let status = valgrind.status().context("cannot start valgrind")?;
    ensure!(status.success(), "this command failed ({status}): {}", line(&valgrind));
    let events = BufReader::new(File::open(&output)?).split(b'\n').count() as u64;
    let profile = fs::read_to_string(bed.path("callgrind"))?;
    Ok(Replay { events, instructions: instructions(&profile).context("callgrind wrote no totals")? })
}

/// The total in callgrind's output.
fn instructions(profile: &str) -> Option<u64> {
    let total =
        profile.lines().find_map(|line| line.strip_prefix("totals: ").or(line.strip_prefix("summary: ")))?;
    total.split_whitespace().next()?.parse().ok()
}

/// The most expensive functions.
fn functions(bed: &Bed, count: usize) -> Result<String> {
    let mut annotate = Command::new("callgrind_annotate");
    let text = command::output(annotate.arg("--auto=no").arg(bed.path("callgrind")))
        .with_context(|| format!("this command failed: {}", line(&annotate)))?;
    let rows = text.lines().skip_while(|line| !line.contains("file:function")).skip(2).take(count);
    Ok(rows.map(|row| row.to_owned() + "\n").collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_of_callgrind_is_read() {
        assert_eq!(instructions("version: 1\nevents: Ir\n\n1 2\ntotals: 123456\n"), Some(123_456));
        assert_eq!(instructions("events: Ir\n"), None);
    }
}
