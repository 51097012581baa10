//! Measuring what tracing costs: the connections that a load generator makes, what the tool's programs and
//! the tool itself spend on each, and what is written of them. Rounds without and with each tool alternate
//! and medians are told, because machines are noisy; figures of different runs do not compare.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    io::{BufRead, BufReader},
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    apt::{self, Package},
    command::{self, line, say},
    run, tools,
    workspace::{Workspace, cargo_program},
};

/// How often each is measured.
const ROUNDS: usize = 5;

/// How long anything may take that ends by itself. Nothing is measured against it.
const PATIENCE: Duration = Duration::from_mins(1);

/// A tool that has done nothing for so long is through: more than the time it lets records gather.
const QUIET: Duration = Duration::from_millis(400);

/// How long one tick of the times in `/proc/PID/stat` is: `USER_HZ`, 100 on every architecture this builds
/// for.
const TICK: Duration = Duration::from_millis(10);

const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Only for the names of programs: whose they are, and their times, the kernel tells in `/proc/PID/fdinfo`.
const BPFTOOL: Package = Package { name: "bpftool", purpose: "which knows the names of BPF programs" };

/// Measure what tracing costs, per connection
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long each of the phases of a round takes
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Stacks to take; several, with commas, are measured side by side. `dwarf` is `user` with `--call-graph dwarf`
    #[arg(long, value_name = "WHICH", value_delimiter = ',', default_value = "user",
        value_parser = ["none", "user", "kernel", "both", "dwarf"])]
    stack: Vec<String>,
    /// Measure tcplife and tcpstates of libbpf-tools as well, where they are installed
    #[arg(long)]
    peers: bool,
    /// What was built already: the tool and the load generator
    #[arg(long, hide = true, num_args = 2)]
    built: Vec<PathBuf>,
}

/// Builds, becomes root, and measures.
pub(crate) fn bench(workspace: &Workspace, args: &Args) -> Result<()> {
    if let [tcpclose, load] = &args.built[..] {
        return measure(args, tcpclose, load);
    }
    tools::for_testing()?;
    if command::find("bpftool").is_none() && !apt::install(&[BPFTOOL]).unwrap_or(false) {
        say("there is no bpftool and none to be had: programs are shown by their tags");
    }
    let tcpclose = run::build_all(workspace)?;
    let load = build_load(workspace)?;
    if command::is_root() {
        return measure(args, &tcpclose, &load);
    }
    let mut sudo = Command::new(command::sudo("measuring")?);
    sudo.arg("--").arg(env::current_exe()?).args(["bench", "--seconds", &args.seconds.to_string()]);
    sudo.args(["--stack", &args.stack.join(",")]).args(args.peers.then_some("--peers"));
    sudo.arg("--built").args([tcpclose, load]);
    Err(sudo.exec()).with_context(|| format!("cannot start {}", line(&sudo)))
}

/// Builds the load generator, with the frame pointers that the kernel walks its stack along: without them a
/// stack would cost less than it does elsewhere. Without debug information, like the servers that people run: with
/// it each stack is told with three times as many frames, most of them merged ones.
fn build_load(workspace: &Workspace) -> Result<PathBuf> {
    let target = workspace.target.join("tests");
    let mut cargo = workspace.with_cargo(&cargo_program(), "build", &target);
    let flags = env::var("RUSTFLAGS").unwrap_or_default() + " -C force-frame-pointers=yes";
    cargo.env("RUSTFLAGS", flags.trim_start()).env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo.env("CARGO_PROFILE_RELEASE_DEBUG", "none");
    cargo.args(["--package", "tcpclose-tests", "--bin", "load", "--release"]);
    command::run_build(&mut cargo).context("the load generator was not built")?;
    Ok(target.join("release/load"))
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Figure {
    Rate,
    Ratio,
    BpfTime,
    CpuTime,
    LinesExpected,
    LinesWritten,
    Lost,
    LostStacks,
    Start,
    Resident,
    Maps,
}

impl Figure {
    const ALL: [Self; 11] = [
        Self::Rate,
        Self::Ratio,
        Self::BpfTime,
        Self::CpuTime,
        Self::LinesExpected,
        Self::LinesWritten,
        Self::Lost,
        Self::LostStacks,
        Self::Start,
        Self::Resident,
        Self::Maps,
    ];

    /// Its name, how it is measured, and how many decimals of it are worth telling.
    fn description(self) -> (&'static str, &'static str, usize) {
        match self {
            Self::Rate => ("connections/s", "64 at a time on loopback, each reset by its client", 0),
            Self::Ratio => ("... of those without a tool", "median of the rounds' ratios", 2),
            Self::BpfTime => ("BPF time, us/connection", "both ends; run_time_ns of the tool's programs", 2),
            Self::CpuTime => {
                ("CPU time of the tool, us/connection", "utime + stime until it is idle again", 2)
            }
            Self::LinesExpected => ("lines expected", "all rounds; by what the tool writes a connection", 0),
            Self::LinesWritten => ("lines written", "all rounds; those of the load's connections", 0),
            Self::Lost => ("lost, as the tool counts", "all rounds; its `lost` lines", 0),
            Self::LostStacks => {
                ("stacks lost", "all rounds; `lost` lines again, but the events are there", 0)
            }
            Self::Start => ("start to ready, ms", "from exec to --ready-file", 1),
            Self::Resident => ("most resident memory, MiB", "VmHWM; mapped rings count", 1),
            Self::Maps => ("memory of its maps, MiB", "memlock of the maps it holds", 1),
        }
    }

    /// The figure of all rounds.
    fn of_rounds(self, rounds: &[f64]) -> Option<f64> {
        match self {
            Self::LinesExpected | Self::LinesWritten | Self::Lost | Self::LostStacks => {
                Some(rounds.iter().sum())
            }
            _ => median(rounds),
        }
    }
}

/// A tool, how it is started, and what was measured of it.
struct Candidate {
    heading: String,
    command: Vec<String>,
    /// Whether it is tcpclose, and not one of its peers.
    is_ours: bool,
    /// Lines it writes of each connection.
    lines: f64,
    figures: BTreeMap<Figure, Vec<f64>>,
    /// Of each program, for each round: runs and nanoseconds a connection.
    programs: BTreeMap<String, Vec<(f64, f64)>>,
    faults: BTreeMap<Figure, String>,
}

impl Candidate {
    fn new(heading: &str, command: &[&str], is_ours: bool, lines: f64) -> Self {
        Self {
            heading: heading.to_owned(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            is_ours,
            lines,
            figures: BTreeMap::new(),
            programs: BTreeMap::new(),
            faults: BTreeMap::new(),
        }
    }

    /// Takes down a figure of one round, or why there is none.
    fn note(&mut self, figure: Figure, value: Result<f64>) {
        match value {
            Ok(value) => self.figures.entry(figure).or_default().push(value),
            Err(error) => {
                self.faults.entry(figure).or_insert_with(|| format!("{error:#}"));
            }
        }
    }

    fn cell(&self, figure: Figure) -> String {
        let rounds = self.figures.get(&figure).map(Vec::as_slice).unwrap_or_default();
        match figure.of_rounds(rounds) {
            Some(_) if rounds.is_empty() => "-".into(),
            Some(value) => format!("{value:.*}", figure.description().2),
            None => if self.faults.contains_key(&figure) { "?" } else { "-" }.into(),
        }
    }
}

fn candidates(args: &Args, tcpclose: &Path) -> Result<Vec<Candidate>> {
    let tcpclose = tcpclose.to_str().context("the path of the tool is not UTF-8")?;
    let mut candidates = Vec::new();
    for stack in &args.stack {
        // At each end a close, and at each end a reset: sent, or received.
        let options = if stack == "dwarf" { ["--call-graph", "dwarf"] } else { ["--stack", stack] };
        let command = [&[tcpclose, "--output", "json"][..], &options].concat();
        candidates.push(Candidate::new(&options.join(" "), &command, true, 4.0));
    }
    if args.peers {
        // An end's life is one line of tcplife; of tcpstates, each of its three changes of state is one.
        for (program, lines) in [("tcplife", 2.0), ("tcpstates", 6.0)] {
            match command::find(program).and_then(|path| Some(path.to_str()?.to_owned())) {
                Some(path) => candidates.push(Candidate::new(program, &[&path], false, lines)),
                None => say(&format!("{program} is not here; `sudo apt-get install libbpf-tools` brings it")),
            }
        }
    }
    Ok(candidates)
}

/// Measures everything, prints it, and fails if something could not be measured.
fn measure(args: &Args, tcpclose: &Path, load: &Path) -> Result<()> {
    let mut candidates = candidates(args, tcpclose)?;
    let bed = Bed::lay(load)?;
    fs::write(STATS, "1").with_context(|| format!("cannot write to {STATS}, so no BPF time"))?;
    bed.load(1)?; // Whatever the first connections of all have to wait for is not the first round's.
    let mut untraced = Vec::new();
    for round in 0..ROUNDS {
        if round > 0 && candidates.iter().all(|one| one.faults.contains_key(&Figure::Rate)) {
            break;
        }
        say(&format!("round {} of {ROUNDS}", round + 1));
        let without = bed.load(args.seconds)?.rate;
        untraced.push(without);
        // Every other round the other way round, so that nobody always comes last.
        let mut order: Vec<_> = candidates.iter_mut().collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for candidate in order {
            // What failed once would only fail again, and take its time.
            if !candidate.faults.contains_key(&Figure::Rate)
                && let Err(error) = traced(&bed, candidate, args.seconds, without)
            {
                candidate.note(Figure::Rate, Err(error));
            }
        }
    }
    for candidate in candidates.iter_mut().filter(|candidate| candidate.is_ours) {
        if candidate.faults.contains_key(&Figure::Rate) {
            continue;
        }
        for _ in 0..ROUNDS {
            let start = start_to_ready(&bed, candidate);
            candidate.note(Figure::Start, start);
        }
    }
    print(args, &untraced, &candidates);
    let faults: Vec<_> = candidates
        .iter()
        .flat_map(|one| one.faults.iter().map(move |(figure, fault)| (one, figure, fault)))
        .map(|(one, figure, fault)| format!("\n  {}, {}: {fault}", one.heading, figure.description().0))
        .collect();
    ensure!(faults.is_empty(), "could not be measured:{}", faults.concat());
    Ok(())
}

/// One phase with a tool.
fn traced(bed: &Bed, candidate: &mut Candidate, seconds: u32, without: f64) -> Result<()> {
    let mut tracer = Tracer::start(bed, candidate)?;
    tracer.settle().context("waiting until it is ready")?;
    let (cpu_before, programs_before) = (tracer.cpu(), tracer.programs());
    let Load { rate, connections, port } = bed.load(seconds)?;
    tracer.settle().context("waiting until it has written everything")?;
    candidate.note(Figure::Rate, Ok(rate));
    candidate.note(Figure::Ratio, Ok(rate / without));
    let cpu = tracer
        .cpu()
        .and_then(|after| Ok(after.saturating_sub(cpu_before?).as_secs_f64() * 1e6 / connections));
    candidate.note(Figure::CpuTime, cpu);
    let programs = tracer.programs().and_then(|after| Ok(spent(&programs_before?, &after, connections)));
    match programs {
        Ok(programs) => {
            let all = programs.iter().map(|(_, (_, time))| time).sum::<f64>() / 1e3;
            candidate.note(Figure::BpfTime, Ok(all));
            for (name, spent) in programs {
                candidate.programs.entry(name).or_default().push(spent);
            }
        }
        Err(error) => candidate.note(Figure::BpfTime, Err(error)),
    }
    candidate.note(Figure::Resident, tracer.most_resident());
    candidate.note(Figure::Maps, tracer.maps());
    tracer.stop()?;
    candidate.note(Figure::LinesExpected, Ok(candidate.lines * connections));
    match lines(bed, candidate.is_ours, port) {
        Ok(lines) => {
            candidate.note(Figure::LinesWritten, Ok(lines.written));
            candidate.note(Figure::Lost, Ok(lines.lost));
            if candidate.is_ours {
                candidate.note(Figure::LostStacks, Ok(lines.stacks));
            }
        }
        Err(error) => candidate.note(Figure::LinesWritten, Err(error)),
    }
    Ok(())
}

/// Milliseconds from exec until every program is attached.
fn start_to_ready(bed: &Bed, candidate: &Candidate) -> Result<f64> {
    let start = Instant::now();
    let mut tracer = Tracer::start(bed, candidate)?;
    let took = start.elapsed();
    tracer.stop()?;
    Ok(took.as_secs_f64() * 1e3)
}

/// What each program spent on a connection between two looks: runs, and nanoseconds.
fn spent(before: &[Program], after: &[Program], connections: f64) -> Vec<(String, (f64, f64))> {
    let of = |program: &Program| {
        let old = before.iter().find(|old| old.id == program.id);
        let (runs, time) = old.map_or((0.0, 0.0), |old| (old.runs, old.time));
        ((program.runs - runs) / connections, (program.time - time) / connections)
    };
    after.iter().map(|program| (program.name.clone(), of(program))).collect()
}

/// What a tool wrote.
#[derive(Default)]
struct Lines {
    /// Lines of the load's connections.
    written: f64,
    /// What it says it lost, stacks left out.
    lost: f64,
    /// Stacks that it says it lost.
    stacks: f64,
}

/// Counts the lines that a tool wrote of the load's connections, and adds up what it says it lost.
fn lines(bed: &Bed, is_ours: bool, port: f64) -> Result<Lines> {
    let namespace = format!(r#""netns":{}"#, bed.inode);
    let port = port.to_string();
    // The peers tell of no namespace. Two addresses, because the listener is not a connection.
    let of_load = |line: &str| {
        if is_ours {
            line.contains(&namespace)
        } else {
            line.matches("127.0.0.1").count() == 2 && line.split_whitespace().any(|word| word == port)
        }
    };
    let mut lines = Lines::default();
    for file in [bed.output(), bed.errors()] {
        for line in BufReader::new(File::open(file)?).lines() {
            let line = line.context("reading what it wrote")?;
            if line.starts_with(r#"{"event":"lost""#) {
                let count = number_after(&line, r#""count":"#).context("a `lost` line has no count")?;
                let is_stacks = line.contains(r#""where":"stacks""#);
                *(if is_stacks { &mut lines.stacks } else { &mut lines.lost }) += count;
            } else if of_load(&line) {
                lines.written += 1.0;
            } else if !is_ours {
                lines.lost += number_after(&line, "lost ").unwrap_or(0.0);
            }
        }
    }
    Ok(lines)
}

/// What the load generator says of itself.
struct Load {
    /// Connections a second.
    rate: f64,
    connections: f64,
    /// Where it accepted them.
    port: f64,
}

/// What measuring takes: a network namespace of its own, a folder, and a setting of the kernel.
struct Bed {
    name: String,
    folder: PathBuf,
    inode: u64,
    load: PathBuf,
    janitor: Child,
}

/// Waits until nobody holds the other end of its input any more, and then puts things back. Its arguments:
/// the namespace, the folder, the setting, and its file.
const JANITOR: &str =
    r#"trap "" HUP INT TERM; cat; ip netns delete "$1" 2>/dev/null; rm -r "$2"; echo "$3" >"$4""#;

impl Bed {
    fn lay(load: &Path) -> Result<Self> {
        let name = format!("tcpclose-bench-{}", std::process::id());
        let folder = env::temp_dir().join(&name);
        let stats =
            fs::read_to_string(STATS).with_context(|| format!("cannot read {STATS}, so no BPF time"))?;
        fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        // A process of its own: it does its work however this one ends, with Ctrl-C for example.
        let mut janitor = Command::new("sh");
        janitor.args(["-c", JANITOR, "sh", &name]).arg(&folder).args([stats.trim(), STATS]);
        let janitor = janitor.stdin(Stdio::piped()).spawn().context("cannot start sh")?;
        command::run(Command::new("ip").args(["netns", "add", &name]))?;
        let inode = fs::metadata(Path::new("/run/netns").join(&name))?.ino();
        let bed = Self { name, folder, inode, load: load.to_owned(), janitor };
        command::run(Command::new("ip").args(["-n", &bed.name, "link", "set", "lo", "up"]))?;
        Ok(bed)
    }

    /// Makes connections for so long.
    fn load(&self, seconds: u32) -> Result<Load> {
        let mut load = Command::new("ip");
        load.args(["netns", "exec", &self.name]).arg(&self.load).args(["--seconds", &seconds.to_string()]);
        let output = load.stderr(Stdio::inherit()).output().context("cannot start ip")?;
        ensure!(output.status.success(), "this command failed ({}): {}", output.status, line(&load));
        let text = String::from_utf8_lossy(&output.stdout);
        let number =
            |key| number_after(&text, key).with_context(|| format!("the load generator says {text:?}"));
        let connections = number(r#""connections":"#)?;
        let rate = connections / number(r#""seconds":"#)?;
        Ok(Load { rate, connections, port: number(r#""port":"#)? })
    }

    fn output(&self) -> PathBuf {
        self.folder.join("output")
    }

    fn errors(&self) -> PathBuf {
        self.folder.join("errors")
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        // There is nothing that could be done about it.
        let _ = self.janitor.wait();
    }
}

/// A BPF program: its times so far.
struct Program {
    id: String,
    name: String,
    runs: f64,
    time: f64,
}

/// A tool that runs; killed on drop.
struct Tracer {
    child: Child,
    process: PathBuf,
    output: PathBuf,
    errors: PathBuf,
}

/// Mounts tracefs for this process alone, unless it is there, and becomes the program.
const WITH_TRACEFS: &str = r#"mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null; exec "$0" "$@""#;

impl Tracer {
    /// Starts it; one of ours is ready then.
    fn start(bed: &Bed, candidate: &Candidate) -> Result<Self> {
        let ready = bed.folder.join("ready");
        // Not there the first time.
        let _ = fs::remove_file(&ready);
        let (output, errors) = (bed.output(), bed.errors());
        let mut tool = if candidate.is_ours {
            let mut tool = Command::new(&candidate.command[0]);
            tool.arg("--ready-file").arg(&ready);
            tool
        } else {
            // They want tracefs where it belongs, and do not see to that themselves as tcpclose does.
            let mut unshare = Command::new("unshare");
            unshare.args(["--mount", "sh", "-c", WITH_TRACEFS, &candidate.command[0]]);
            unshare
        };
        tool.args(&candidate.command[1..]);
        tool.stdin(Stdio::null()).stdout(File::create(&output)?).stderr(File::create(&errors)?);
        let child = tool.spawn().with_context(|| format!("cannot start {}", line(&tool)))?;
        let process = Path::new("/proc").join(child.id().to_string());
        let mut tracer = Self { child, process, output, errors };
        if candidate.is_ours {
            tracer.until("it is ready", Duration::from_micros(200), |_| Ok(ready.exists()))?;
        }
        Ok(tracer)
    }

    /// Waits for something; that the tool ends is an error.
    fn until(
        &mut self,
        what: &str,
        every: Duration,
        mut is_so: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<()> {
        let start = Instant::now();
        while !is_so(self)? {
            if let Some(status) = self.child.try_wait()? {
                let said = fs::read_to_string(&self.errors).unwrap_or_default();
                bail!("it ended by itself ({status}) and said: {}", said.trim());
            }
            ensure!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain until {what}");
            thread::sleep(every);
        }
        Ok(())
    }

    /// Waits until it has programs loaded and does nothing for a while.
    fn settle(&mut self) -> Result<()> {
        let mut last = None;
        let mut since = Instant::now();
        self.until("it does nothing", Duration::from_millis(20), |tracer| {
            let now = (tracer.cpu()?, tracer.held("bpf-prog")?.len(), fs::metadata(&tracer.output)?.len());
            if last != Some(now) {
                last = Some(now);
                since = Instant::now();
            }
            Ok(now.1 > 0 && since.elapsed() >= QUIET)
        })
    }

    /// The CPU time it has had, all its threads.
    fn cpu(&self) -> Result<Duration> {
        let file = self.process.join("stat");
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        // The name before it may have spaces and parentheses of its own.
        let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
        let ticks = fields.skip(11).take(2).map(str::parse).collect::<Result<Vec<u32>, _>>()?;
        ensure!(ticks.len() == 2, "{} has no utime and stime", file.display());
        Ok(TICK * ticks.iter().sum())
    }

    /// What the kernel says of the descriptors of this kind that it holds.
    fn held(&self, kind: &str) -> Result<Vec<String>> {
        let folder = self.process.join("fd");
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let entry = entry?;
            // One that is closed meanwhile is not held.
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            if target.to_string_lossy() == format!("anon_inode:{kind}")
                && let Ok(text) = fs::read_to_string(self.process.join("fdinfo").join(entry.file_name()))
            {
                found.push(text);
            }
        }
        Ok(found)
    }

    fn programs(&self) -> Result<Vec<Program>> {
        let mut programs = BTreeMap::new();
        for text in self.held("bpf-prog")? {
            let value =
                |name| field(&text, name).with_context(|| format!("this kernel shows no {name} in fdinfo"));
            let (id, tag) = (value("prog_id")?, value("prog_tag")?);
            let (runs, time) = (value("run_cnt")?.parse()?, value("run_time_ns")?.parse()?);
            let name = program_name(id).unwrap_or_else(|| tag.to_owned());
            programs.insert(id.to_owned(), Program { id: id.to_owned(), name, runs, time });
        }
        ensure!(!programs.is_empty(), "it holds no BPF program");
        Ok(programs.into_values().collect())
    }

    /// MiB of all its maps.
    fn maps(&self) -> Result<f64> {
        let mut maps = BTreeMap::new();
        for text in self.held("bpf-map")? {
            let value =
                |name| field(&text, name).with_context(|| format!("this kernel shows no {name} in fdinfo"));
            maps.insert(value("map_id")?.to_owned(), value("memlock")?.parse::<f64>()?);
        }
        Ok(maps.values().sum::<f64>() / 1_048_576.0)
    }

    /// MiB it had in memory at its peak.
    fn most_resident(&self) -> Result<f64> {
        let text = fs::read_to_string(self.process.join("status"))?;
        let kib = field(&text, "VmHWM")
            .and_then(|value| value.strip_suffix(" kB"))
            .context("no VmHWM in status")?;
        Ok(kib.parse::<f64>()? / 1024.0)
    }

    /// Ends it as Ctrl-C would, so that it writes what it still has.
    fn stop(&mut self) -> Result<()> {
        command::run(Command::new("kill").args(["-INT", &self.child.id().to_string()]))?;
        let start = Instant::now();
        while self.child.try_wait()?.is_none() {
            ensure!(start.elapsed() < PATIENCE, "it does not end {PATIENCE:?} after SIGINT");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // It has ended already, unless something failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A line `NAME:<tab>VALUE` of a file in `/proc`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| line.strip_prefix(name)?.strip_prefix(':');
    text.lines().find_map(value).map(str::trim)
}

/// The name of a program; fdinfo does not tell.
fn program_name(id: &str) -> Option<String> {
    let shown = command::output(Command::new(command::find("bpftool")?).args(["prog", "show", "id", id]))?;
    shown.split_once(" name ")?.1.split_whitespace().next().map(str::to_owned)
}

/// The number that follows a key.
fn number_after(text: &str, key: &str) -> Option<f64> {
    let rest = text.split_once(key)?.1;
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    rest[..end].parse().ok()
}

fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn print(args: &Args, untraced: &[f64], candidates: &[Candidate]) {
    println!(
        "{ROUNDS} rounds, each {} s without a tool and {} s with each; medians unless it says `all rounds`\n",
        args.seconds, args.seconds
    );
    let mut rows = vec![vec![String::new(), "no tool".into()]];
    rows[0].extend(candidates.iter().map(|one| one.heading.clone()));
    rows[0].push("how".into());
    for figure in Figure::ALL {
        let (name, method, decimals) = figure.description();
        let untraced = median(untraced).filter(|_| figure == Figure::Rate);
        let mut row =
            vec![name.into(), untraced.map_or_else(String::new, |value| format!("{value:.decimals$}"))];
        row.extend(candidates.iter().map(|one| one.cell(figure)));
        row.push(method.into());
        rows.push(row);
    }
    print_table(&rows);
    println!();
    let mut rows =
        vec![["", "program", "runs/connection", "ns/run", "us/connection"].map(str::to_owned).to_vec()];
    for one in candidates {
        for (name, rounds) in &one.programs {
            let middle = |of: fn(&(f64, f64)) -> f64| median(&rounds.iter().map(of).collect::<Vec<_>>());
            let (runs, time) = (middle(|round| round.0), middle(|round| round.1));
            let (runs, time) = (runs.unwrap_or_default(), time.unwrap_or_default());
            let each = if runs > 0.0 { format!("{:.0}", time / runs) } else { "-".into() };
            let all = format!("{:.2}", time / 1e3);
            rows.push(vec![one.heading.clone(), name.clone(), format!("{runs:.2}"), each, all]);
        }
    }
    print_table(&rows);
}

/// Aligned: columns with a number in them to the right, others to the left.
fn print_table(rows: &[Vec<String>]) {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let is_number = |column: usize| rows[1..].iter().any(|row| row[column].parse::<f64>().is_ok());
    for row in rows {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = width(column);
            if is_number(column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        println!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_from_flat_json_and_from_words() {
        let text = r#"{"connections":17003,"seconds":1.000045}"#;
        assert_eq!(number_after(text, r#""connections":"#), Some(17003.0));
        assert_eq!(number_after(text, r#""seconds":"#), Some(1.000_045));
        assert_eq!(number_after(text, r#""count":"#), None);
        assert_eq!(number_after("lost 12 events on CPU #0", "lost "), Some(12.0));
    }

    #[test]
    fn fields_of_proc_are_found_by_their_whole_name() {
        let text = "prog_tag:\t55f3\nprog_id:\t960\nVmHWM:\t    5120 kB\n";
        assert_eq!(field(text, "prog_id"), Some("960"));
        assert_eq!(field(text, "VmHWM"), Some("5120 kB"));
        assert_eq!(field(text, "prog"), None);
    }

    #[test]
    fn a_median_is_one_of_the_values() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn what_ran_before_the_load_does_not_count() {
        let program = |runs, time| Program { id: "1".into(), name: "set_state".into(), runs, time };
        let spent = spent(&[program(10.0, 1000.0)], &[program(30.0, 5000.0)], 4.0);
        assert_eq!(spent, [("set_state".to_owned(), (5.0, 1000.0))]);
    }
}
