//! JSON lines that rsyslog takes onward, while it is stopped, killed and started again.

use std::{
    collections::HashSet,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::{signal::Signal, stat::Mode},
    unistd::mkfifo,
};
use serde_json::Value;
use tcpclose_tests::{
    bed::Bed, netns::Namespace, program::Program, scenario::routes, scratch::Scratch, servers::is_missing,
    tool::Launch, until,
};

use crate::{CONNECTIONS, end_connections};

const RSYSLOGD: &str = "/usr/sbin/rsyslogd";

/// The folder in the configuration.
const FOLDER: &str = "/var/log/tcpclose";

/// Where it puts lines, in that folder.
const COLLECTED: &str = "collected.jsonl";

/// The length at which rsyslog cuts a line, unless it is told otherwise.
const USUAL_LIMIT: usize = 8 << 10;

/// rsyslog with `deploy/rsyslog/tcpclose.conf`, and the folder that it works in.
struct Collector {
    /// First, so that it has ended before its folder is removed.
    running: Option<Program>,
    namespace: Namespace,
    folder: Scratch,
    configuration: PathBuf,
}

impl Collector {
    /// Prepares it, and does not start it.
    fn new() -> Result<Self> {
        let folder = Scratch::new()?;
        let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/rsyslog/tcpclose.conf");
        let shipped = fs::read_to_string(shipped)?;
        ensure!(shipped.contains(FOLDER), "the configuration does not use {FOLDER}");
        let place = folder.path().display().to_string();
        // On a host, the main configuration names the folder for the positions in files.
        let text = format!("global(workDirectory=\"{place}\")\n{}", shipped.replace(FOLDER, &place));
        let configuration = folder.path().join("rsyslog.conf");
        fs::write(&configuration, text)?;
        let collector = Self { namespace: Namespace::new()?, folder, configuration, running: None };
        let checked = collector.command().arg("-N1").output()?;
        let said = String::from_utf8_lossy(&checked.stderr);
        ensure!(checked.status.success(), "rsyslogd refuses the configuration: {said}");
        Ok(collector)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(RSYSLOGD);
        command.arg("-n").arg("-i").arg(self.folder.path().join("pid")).arg("-f").arg(&self.configuration);
        command
    }

    fn start(&mut self) -> Result<()> {
        self.running = Some(Program::start(&self.namespace, self.command())?);
        Ok(())
    }

    /// Ends it by this signal.
    fn end(&mut self, signal: Signal) -> Result<()> {
        let mut running = self.running.take().context("the collector does not run")?;
        running.signal(signal)?;
        running.ended()?;
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// How far it has read a file. Of several descriptors, the one that has come furthest reads the lines.
    fn position(&self, file: &Path) -> Result<Option<u64>> {
        let process = format!("/proc/{}", self.running.as_ref().context("the collector does not run")?.pid());
        let mut furthest = None;
        for entry in fs::read_dir(format!("{process}/fd"))? {
            let name = entry?.file_name();
            let link = Path::new(&process).join("fd").join(&name);
            // A descriptor may be closed meanwhile.
            if fs::read_link(link).is_ok_and(|target| target == file)
                && let Ok(text) = fs::read_to_string(Path::new(&process).join("fdinfo").join(&name))
            {
                let position = text.lines().find_map(|line| line.strip_prefix("pos:"));
                furthest = furthest.max(position.and_then(|position| position.trim().parse().ok()));
            }
        }
        Ok(furthest)
    }

    /// Waits until `file` has so many lines, and all have been collected. Returns the lines of the file, and
    /// those that have been collected.
    fn wait_for(&self, file: &Path, goal: usize) -> Result<(Vec<String>, Vec<String>)> {
        until("every line has been written and collected", || {
            let (written, collected) = (lines(file)?, lines(&self.path(COLLECTED))?);
            let known: HashSet<&String> = collected.iter().collect();
            let is_complete = written.len() >= goal && written.iter().all(|line| known.contains(line));
            Ok(is_complete.then_some((written, collected)))
        })
    }
}

/// The whole lines of a file, none if it does not exist.
fn lines(file: &Path) -> Result<Vec<String>> {
    let text = if file.exists() { fs::read_to_string(file)? } else { String::new() };
    Ok(text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')).map(str::to_owned).collect())
}

#[test]
fn rsyslog_collects_every_line_although_it_is_killed() -> Result<()> {
    if is_missing(&[RSYSLOGD]) {
        return Ok(());
    }
    let mut collector = Collector::new()?;
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let file = collector.path("lines.jsonl");
    let launch = Launch::new()?.trace(bed.namespaces()).into_file(&file)?;
    // Stacks of both kinds make lines long.
    let tool = launch.args(["--stack", "both"]).start()?;
    collector.start()?;

    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let goal = lines(&file)?.len() + 4 * CONNECTIONS;
        end_connections(&mut bed)?;
        collector.end(signal)?;
        end_connections(&mut bed)?;
        collector.start()?;
        let (written, collected) = collector.wait_for(&file, goal)?;
        if signal == Signal::SIGTERM {
            ensure!(collected == written, "some lines arrived twice, or in another order");
        }
    }
    // When it is killed again, it has read lines and cannot write them, because nobody reads this pipe.
    collector.end(Signal::SIGTERM)?;
    let old = file.metadata()?.len();
    let (output, aside) = (collector.path(COLLECTED), collector.path("aside"));
    fs::rename(&output, &aside)?;
    mkfifo(&output, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let goal = lines(&file)?.len() + 4 * CONNECTIONS;
    collector.start()?;
    end_connections(&mut bed)?;
    until("some lines have been read", || Ok((collector.position(&file)? > Some(old)).then_some(())))?;
    end_connections(&mut bed)?;
    until("every line has been written", || Ok((lines(&file)?.len() >= goal).then_some(())))?;
    collector.end(Signal::SIGKILL)?;
    fs::rename(&aside, &output)?;
    collector.start()?;
    let (mut written, _) = collector.wait_for(&file, goal)?;
    ensure!(written.iter().any(|line| line.len() > USUAL_LIMIT), "no line is long");

    // As logrotate does with `copytruncate`. The tool goes on at the new end of the file.
    File::options().write(true).open(&file)?.set_len(0)?;
    end_connections(&mut bed)?;
    let (new, collected) = collector.wait_for(&file, 2 * CONNECTIONS)?;
    written.extend(new);
    tool.stop()?;
    let mut seen = HashSet::new();
    let once: Vec<_> = collected.iter().filter(|line| seen.insert(*line)).collect();
    ensure!(once == written.iter().collect::<Vec<_>>(), "what has arrived is not what was written");
    let numbers = written.iter().map(|line| {
        let line: Value = serde_json::from_str(line)?;
        line["seq"].as_u64().context("a line without a number")
    });
    let numbers = numbers.collect::<Result<Vec<_>>>()?;
    ensure!(numbers.iter().copied().eq(1..=numbers.len() as u64), "numbers are missing: {numbers:?}");
    ensure!(!collector.path("rejected").exists(), "rsyslog takes some lines for invalid JSON");
    Ok(())
}
