//! Compares tcpclose with no tool and with tcplife: the costs per connection.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufReader, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    time::{ClockId, clock_gettime},
};
use serde_json::{Value, json};

use super::{
    Bench,
    bed::{Bed, CLOSES, Ends, LoadExtent},
    output::Totals,
    programs::{self, Cost, Program},
    table,
    tool::{Kind, Tracer},
};
use crate::command::{self, say};

#[derive(clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long each phase of a round takes
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Options of tcpclose to measure side by side, with commas: `default`, a value of `--stack`, or `dwarf`
    /// for `--call-graph dwarf`
    #[arg(long, value_name = "WHICH", value_delimiter = ',', default_value = "default,none",
        value_parser = ["default", "none", "user", "kernel", "both", "dwarf"])]
    stack: Vec<String>,
    /// How connections end
    #[arg(long, value_delimiter = ',', default_value = "rst,fin")]
    ends: Vec<Ends>,
}

/// More bytes than a round writes.
const MEMORY: u64 = 4 << 30;

/// A measured figure.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Figure {
    Rate,
    Ratio,
    BpfTime,
    CpuTime,
    SystemTime,
    Written,
    WriteTime,
    AgainstPeer,
    Expected,
    Closes,
    Resets,
    Lost,
    LostStacks,
    Ready,
    Resident,
    Maps,
}

impl Figure {
    const ALL: [Self; 16] = [
        Self::Rate,
        Self::Ratio,
        Self::BpfTime,
        Self::CpuTime,
        Self::SystemTime,
        Self::Written,
        Self::WriteTime,
        Self::AgainstPeer,
        Self::Expected,
        Self::Closes,
        Self::Resets,
        Self::Lost,
        Self::LostStacks,
        Self::Ready,
        Self::Resident,
        Self::Maps,
    ];

    /// Its name in JSON and in the table, its method, and its number of significant decimals.
    fn description(self) -> (&'static str, &'static str, &'static str, usize) {
        match self {
            Self::Rate => ("connections_per_second", "connections/s", "64 at a time, on loopback", 0),
            Self::Ratio => ("of_untraced", "... of untraced", "median of the rounds' ratios", 2),
            Self::BpfTime => (
                "bpf_us",
                "BPF time, us/connection",
                "both ends; run_time_ns of the tool's programs, in a load of its own",
                2,
            ),
            Self::CpuTime => {
                ("cpu_us", "CPU time of the tool, us/connection", "whole process, until idle again", 2)
            }
            Self::SystemTime => ("system_us", "... in the kernel, us", "mostly for writing the output", 2),
            Self::Written => ("written_bytes", "bytes written/connection", "both ends", 0),
            Self::WriteTime => {
                ("write_us", "... CPU time to write them, us", "a floor: as many bytes, by a plain write", 2)
            }
            Self::AgainstPeer => {
                ("of_tcplife", "BPF + CPU time, of tcplife's", "median of the rounds' ratios", 2)
            }
            Self::Expected => ("closes_expected", "closes expected", "all rounds; two a connection", 0),
            Self::Closes => ("closes", "closes written", "all rounds; of the load's connections", 0),
            Self::Resets => ("resets", "resets written", "all rounds; RST ends have two a connection", 0),
            Self::Lost => ("lost", "lost", "all rounds; as the tool reports", 0),
            Self::LostStacks => ("stacks_lost", "stacks lost", "all rounds; as the tool reports", 0),
            Self::Ready => ("ready_ms", "start to ready, ms", "from exec to --ready-file", 0),
            Self::Resident => ("peak_resident_mib", "peak resident, MiB", "VmHWM; mapped rings count", 1),
            Self::Maps => ("maps_mib", "BPF maps, MiB", "memlock of the maps that it holds", 1),
        }
    }

    /// The figure of all rounds.
    fn of_rounds(self, rounds: &[f64]) -> Option<f64> {
        match self {
            Self::Expected | Self::Closes | Self::Resets | Self::Lost | Self::LostStacks => {
                (!rounds.is_empty()).then(|| rounds.iter().sum())
            }
            _ => table::median(rounds),
        }
    }
}

/// A tool, the command that starts it, and its measurements.
struct Candidate {
    heading: String,
    kind: Kind,
    command: Vec<String>,
    figures: BTreeMap<Figure, Vec<f64>>,
    /// The cost of each program per connection, in each round.
    programs: BTreeMap<String, Vec<Program>>,
    fault: Option<String>,
}

impl Candidate {
    fn new(heading: String, kind: Kind, command: &[&str]) -> Self {
        Self {
            heading,
            kind,
            command: command.iter().map(|&word| word.to_owned()).collect(),
            figures: BTreeMap::new(),
            programs: BTreeMap::new(),
            fault: None,
        }
    }

    fn note(&mut self, figure: Figure, value: f64) {
        self.figures.entry(figure).or_default().push(value);
    }

    fn rounds(&self, figure: Figure) -> &[f64] {
        self.figures.get(&figure).map(Vec::as_slice).unwrap_or_default()
    }

    fn cell(&self, figure: Figure) -> String {
        match figure.of_rounds(self.rounds(figure)) {
            Some(value) => format!("{value:.*}", figure.description().3),
            None => "-".to_owned(),
        }
    }
}

/// All measurements of one way of ending connections.
struct Comparison {
    ends: Ends,
    untraced: Vec<f64>,
    candidates: Vec<Candidate>,
}

/// Measures everything and prints it.
pub(crate) fn measure(bench: &mut Bench, args: &Args) -> Result<Value> {
    let mut comparisons = Vec::new();
    for &ends in &args.ends {
        let candidates = candidates(args, &bench.tools)?;
        comparisons.push(Comparison { ends, untraced: Vec::new(), candidates });
    }
    // The first time that a virtual machine touches a page of its memory, its host has to find one. Until
    // then, writing a file takes five to ten times as long.
    time_to_write(&bench.bed.path("plain"), MEMORY)?;
    for round in 1..=args.rounds {
        say(&format!("round {round} of {}", args.rounds));
        for comparison in &mut comparisons {
            measure_round(&mut bench.bed, comparison, args.seconds, round)?;
        }
    }
    println!(
        "{} rounds, each {} s without a tool and {} s with each; medians, unless it says `all rounds`",
        args.rounds, args.seconds, args.seconds
    );
    for comparison in &comparisons {
        print(comparison);
    }
    let faults: Vec<_> = comparisons
        .iter()
        .flat_map(|one| one.candidates.iter().map(move |candidate| (one, candidate)))
        .filter_map(|(one, it)| {
            Some(format!("\n  {}, {} ends: {}", it.heading, one.ends.name(), it.fault.as_ref()?))
        })
        .collect();
    ensure!(faults.is_empty(), "these could not be measured:{}", faults.concat());
    Ok(json!({
        "rounds": args.rounds,
        "seconds": args.seconds,
        "comparisons": comparisons.iter().map(to_json).collect::<Vec<_>>(),
    }))
}

fn candidates(args: &Args, tools: &[PathBuf]) -> Result<Vec<Candidate>> {
    let mut candidates = Vec::new();
    for (index, tool) in tools.iter().enumerate() {
        let path = tool.to_str().context("the path of the tool is not UTF-8")?;
        for stack in &args.stack {
            let options: &[&str] = match stack.as_str() {
                "default" => &[],
                "dwarf" => &["--call-graph", "dwarf"],
                other => &["--stack", other],
            };
            let name = if options.is_empty() { "default".to_owned() } else { options.join(" ") };
            let heading = if tools.len() == 1 { name } else { format!("{}: {name}", index + 1) };
            let command = [&[path, "--output", "json"], options].concat();
            candidates.push(Candidate::new(heading, Kind::Tcpclose, &command));
        }
    }
    match command::find("tcplife") {
        Some(path) => {
            let path = path.to_str().context("the path of tcplife is not UTF-8")?;
            candidates.push(Candidate::new("tcplife".to_owned(), Kind::Tcplife, &[path]));
        }
        None => say("tcplife is not installed; `sudo apt-get install libbpf-tools` installs it"),
    }
    Ok(candidates)
}

fn measure_round(bed: &mut Bed, comparison: &mut Comparison, seconds: u32, round: u32) -> Result<()> {
    let (ends, extent) = (comparison.ends, LoadExtent::Seconds(seconds));
    bed.renew()?;
    let untraced = bed.churn(extent, ends)?.rate();
    comparison.untraced.push(untraced);
    // Every other round runs in the opposite order, so that no tool always comes last.
    let mut order: Vec<_> = comparison.candidates.iter_mut().collect();
    if round.is_multiple_of(2) {
        order.reverse();
    }
    for candidate in order {
        // A candidate that has failed once would only fail again, and take its time.
        if candidate.fault.is_none()
            && let Err(error) = traced(bed, candidate, extent, ends, untraced)
        {
            candidate.fault = Some(format!("{error:#}"));
        }
    }
    let cost = |candidate: &Candidate| -> Option<f64> {
        Some(candidate.rounds(Figure::BpfTime).last()? + candidate.rounds(Figure::CpuTime).last()?)
    };
    let is_peer = |candidate: &&Candidate| candidate.kind == Kind::Tcplife && candidate.fault.is_none();
    if let Some(peer) = comparison.candidates.iter().find(is_peer).and_then(cost) {
        for candidate in comparison.candidates.iter_mut().filter(|it| it.fault.is_none()) {
            if let Some(own) = cost(candidate) {
                candidate.note(Figure::AgainstPeer, own / peer);
            }
        }
    }
    Ok(())
}

/// One phase with a tool.
fn traced(
    bed: &mut Bed,
    candidate: &mut Candidate,
    extent: LoadExtent,
    ends: Ends,
    untraced: f64,
) -> Result<()> {
    bed.renew()?;
    let mut tracer = Tracer::start(bed, candidate.kind, &candidate.command)?;
    let cost = Cost::measure(&mut tracer, bed, extent, ends)?;
    candidate.note(Figure::Rate, cost.load.rate());
    candidate.note(Figure::Ratio, cost.load.rate() / untraced);
    candidate.note(Figure::CpuTime, cost.cpu);
    candidate.note(Figure::SystemTime, cost.system);
    candidate.note(Figure::BpfTime, cost.bpf());
    let (connections, ports) = (cost.connections(), cost.ports());
    for program in cost.programs {
        candidate.programs.entry(program.name.clone()).or_default().push(program);
    }
    candidate.note(Figure::Resident, tracer.peak_resident()?);
    candidate.note(Figure::Maps, programs::maps(&tracer)?);
    if let Some(ready) = tracer.ready {
        candidate.note(Figure::Ready, ready.as_secs_f64() * 1e3);
    }
    tracer.stop()?;
    let written = fs::metadata(bed.path("output"))?.len();
    let connections = f64::from(connections);
    #[expect(clippy::cast_precision_loss, reason = "a size far below 2^52")]
    candidate.note(Figure::Written, written as f64 / connections);
    candidate.note(
        Figure::WriteTime,
        time_to_write(&bed.path("plain"), written)?.as_secs_f64() * 1e6 / connections,
    );
    let totals = totals(bed, candidate.kind, &ports)?;
    candidate.note(Figure::Expected, f64::from(CLOSES) * connections);
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    for (figure, count) in [
        (Figure::Closes, totals.closes),
        (Figure::Resets, totals.resets),
        (Figure::Lost, totals.lost),
        (Figure::LostStacks, totals.lost_stacks),
    ] {
        candidate.note(figure, count as f64);
    }
    Ok(())
}

/// The CPU time of this thread for writing this many bytes to a new file, most of which the kernel takes for
/// copying them to the page cache.
fn time_to_write(path: &Path, bytes: u64) -> Result<Duration> {
    // Like the blocks of tcpclose, they do not end with a page: the page cache takes larger pieces of memory for
    // those that do, and a virtual machine's host may have to find all of it.
    static BLOCK: [u8; (1 << 18) - 1000] = [b' '; (1 << 18) - 1000];
    let now = || Ok::<_, Errno>(Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?));
    let mut file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let start = now()?;
    let mut left = bytes;
    while left > 0 {
        let size = BLOCK.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        file.write_all(&BLOCK[..size])?;
        left -= size as u64;
    }
    let taken = now()?.saturating_sub(start);
    fs::remove_file(path)?;
    Ok(taken)
}

/// The output of a tool that has ended.
pub(crate) fn totals(bed: &Bed, kind: Kind, ports: &[u16]) -> Result<Totals> {
    let mut totals = Totals::default();
    for name in ["output", "errors"] {
        let file = File::open(bed.path(name)).with_context(|| format!("cannot open its {name}"))?;
        totals.read(kind, BufReader::with_capacity(1 << 20, file), bed.inode, ports)?;
    }
    Ok(totals)
}

fn print(comparison: &Comparison) {
    println!("\n{} ends\n", comparison.ends.name());
    let mut heading = vec![String::new(), "no tool".into()];
    heading.extend(comparison.candidates.iter().map(|one| one.heading.clone()));
    heading.push("how".into());
    let mut rows = vec![heading];
    for figure in Figure::ALL {
        let (_, name, method, decimals) = figure.description();
        let untraced = table::median(&comparison.untraced).filter(|_| figure == Figure::Rate);
        let mut row =
            vec![name.into(), untraced.map_or_else(String::new, |value| format!("{value:.decimals$}"))];
        row.extend(comparison.candidates.iter().map(|one| one.cell(figure)));
        row.push(method.into());
        rows.push(row);
    }
    table::print_cells(&rows);
    println!();
    let mut rows =
        vec![["", "program", "runs/connection", "ns/run", "us/connection"].map(str::to_owned).to_vec()];
    for one in &comparison.candidates {
        for (name, rounds) in &one.programs {
            let (runs, nanoseconds) = medians(rounds);
            let each = if runs > 0.0 { format!("{:.0}", nanoseconds / runs) } else { "-".into() };
            let all = format!("{:.2}", nanoseconds / 1e3);
            rows.push(vec![one.heading.clone(), name.clone(), format!("{runs:.2}"), each, all]);
        }
    }
    table::print_cells(&rows);
}

/// Median number of runs and of nanoseconds per connection.
fn medians(rounds: &[Program]) -> (f64, f64) {
    let of = |value: fn(&Program) -> f64| {
        table::median(&rounds.iter().map(value).collect::<Vec<_>>()).unwrap_or_default()
    };
    (of(|program| program.runs), of(|program| program.nanoseconds))
}

fn to_json(comparison: &Comparison) -> Value {
    let candidates = comparison.candidates.iter().map(|one| {
        let figures = Figure::ALL.into_iter().filter_map(|figure| {
            let rounds = one.rounds(figure);
            let value = figure.of_rounds(rounds)?;
            Some((figure.description().0.to_owned(), json!({"value": value, "rounds": rounds})))
        });
        let programs = one.programs.iter().map(|(name, rounds)| {
            let (runs, nanoseconds) = medians(rounds);
            json!({"name": name, "runs": runs, "ns": nanoseconds})
        });
        json!({
            "name": one.heading,
            "command": one.command,
            "figures": figures.collect::<serde_json::Map<_, _>>(),
            "programs": programs.collect::<Vec<_>>(),
        })
    });
    json!({
        "ends": comparison.ends.name(),
        "untraced": comparison.untraced,
        "candidates": candidates.collect::<Vec<_>>(),
    })
}

/// The command of tcpclose with JSON output and these options.
pub(crate) fn tcpclose(tool: &Path, options: &[&str]) -> Result<Vec<String>> {
    let path = tool.to_str().context("the path of the tool is not UTF-8")?;
    Ok([&[path, "--output", "json"], options].concat().iter().map(|&word| word.to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_summed_and_times_are_medians() {
        let rounds = [3.0, 1.0, 2.0];
        assert_eq!(Figure::Lost.of_rounds(&rounds), Some(6.0));
        assert_eq!(Figure::BpfTime.of_rounds(&rounds), Some(2.0));
        assert_eq!(Figure::Lost.of_rounds(&[]), None);
    }
}
