//! Runs a test program, and repeats those of its failed tests that have an excuse. This is the only place
//! where failed tests are repeated. `cargo xtask test` lists the tests that passed at the second attempt.

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};

use crate::{blind_spot::BlindSpot, window::PATIENCE};

/// If more tests of a program fail, none is repeated, because something is broken. A single loss fails all
/// tests that run at that time and share a tool, and there are eight on two processors.
const MOST_REPEATED: usize = 12;

/// Number of tests of a program that run concurrently per processor. Most of them wait for timers of the
/// kernel, or for the tool to read its ring buffer.
const TESTS_PER_PROCESSOR: usize = 4;

/// The variable from which libtest reads how many tests may run concurrently.
const THREADS_VARIABLE: &str = "RUST_TEST_THREADS";

/// This test program accounts for the blind spot itself, end by end, and fails if it took more than one end in
/// ten thousand: nothing in it has another excuse.
const NEVER_REPEATED: &str = "crowd";

/// The reason why a failed test may be repeated.
#[derive(Debug)]
pub enum Excuse {
    /// The processor is emulated. It may be taken away for longer than the tool waits for a record.
    Emulation,
    /// While the program ran, the end of a connection fell into the kernel's blind spot, or the hypervisor
    /// took the processors away for as long as the tool waits for a record.
    Host {
        /// `None` without tracefs, where nothing is recorded.
        blind_spot: Option<BlindSpot>,
        /// How long the processors had been away before, all together.
        stolen: Duration,
    },
    /// There is no excuse.
    None,
}

impl Excuse {
    /// The excuse that applies on a host, starting now.
    pub fn of_host(program: &str) -> Self {
        if program == NEVER_REPEATED {
            return Self::None;
        }
        Self::Host { blind_spot: BlindSpot::watch().ok(), stolen: stolen().unwrap_or_default() }
    }

    fn applies(&self) -> Result<Option<String>> {
        Ok(match self {
            Self::Emulation => Some("the processor is emulated".to_owned()),
            Self::Host { blind_spot, stolen: before } => {
                let hidden = blind_spot.as_ref().map(BlindSpot::hidden).transpose()?;
                let stolen = stolen().unwrap_or_default().saturating_sub(*before);
                if let Some(hidden) = hidden.filter(|hidden| hidden.events > 0) {
                    Some(format!("the kernel ran no BPF program for {hidden:?}"))
                } else {
                    (stolen >= PATIENCE)
                        .then(|| format!("the hypervisor took the processors away for {stolen:?}"))
                }
            }
            Self::None => None,
        })
    }
}

/// How long the hypervisor has taken the processors away since this machine was started, all together.
fn stolen() -> Option<Duration> {
    let ticks = stolen_ticks(&fs::read_to_string("/proc/stat").ok()?)?;
    let per_second = u64::try_from(sysconf(SysconfVar::CLK_TCK).ok()??).ok()?;
    Some(Duration::from_millis(ticks * 1_000 / per_second))
}

/// The same in clock ticks: the eighth number in the first line of `/proc/stat`.
fn stolen_ticks(statistics: &str) -> Option<u64> {
    statistics.strip_prefix("cpu ")?.split_whitespace().nth(7)?.parse().ok()
}

/// Makes a test program run more tests concurrently than there are processors, unless the user has set a
/// number.
pub fn share_processors(command: &mut Command) {
    if env::var_os(THREADS_VARIABLE).is_none() {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        command.env(THREADS_VARIABLE, (TESTS_PER_PROCESSOR * processors).to_string());
    }
}

/// Runs the program that `command` creates with these arguments. Copies its standard output to `results`,
/// between a line that names the program and one that reports how it ended (`xtask/src/report.rs` reads
/// both). Failed tests that `excuse` applies to are then run once more, one at a time. Returns how the
/// program ended the last time.
pub fn run(
    name: &str,
    command: impl Fn() -> Command,
    arguments: &[String],
    excuse: &Excuse,
    results: &mut impl Write,
) -> Result<ExitStatus> {
    let (status, failed) = run_once(name, command().args(arguments), results)?;
    if !(1..=MOST_REPEATED).contains(&failed.len()) {
        return Ok(status);
    }
    let Some(reason) = excuse.applies()? else { return Ok(status) };
    writeln!(results, "running {} once more: {reason}", failed.join(", "))?;
    let alone = ["--exact", "--test-threads=1", "--show-output"];
    Ok(run_once(name, command().args(alone).args(failed), results)?.0)
}

/// Runs a program once, and returns its exit status and the names of its failed tests.
fn run_once(
    name: &str,
    command: &mut Command,
    results: &mut impl Write,
) -> Result<(ExitStatus, Vec<String>)> {
    writeln!(results, "=== {name}")?;
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let output = child.stdout.take().context("a test program has no standard output")?;
    let mut failed = Vec::new();
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        results.write_all(&line)?;
        results.write_all(b"\n")?;
        let line = String::from_utf8_lossy(&line);
        let test = line.strip_prefix("test ").and_then(|line| line.strip_suffix(" ... FAILED"));
        failed.extend(test.map(str::to_owned));
    }
    let status = child.wait()?;
    writeln!(results, "=== {name} ended: {status}")?;
    results.flush()?;
    Ok((status, failed))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::{Excuse, run, stolen_ticks};

    #[test]
    fn stolen_time_is_the_eighth_number_of_the_first_line() {
        let statistics = "cpu  406488 215683 123318 60103 3052 0 1985 7098 9 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n";
        assert_eq!(stolen_ticks(statistics), Some(7_098));
        assert_eq!(stolen_ticks("cpu  1 2 3"), None);
    }

    /// Runs a program that fails only the first time, as `cargo test` would, and returns the arguments of
    /// each run.
    fn attempts(excuse: &Excuse) -> String {
        let script = r#"echo "args: $*"; case "$*" in *--exact*) echo "test a::b ... ok";;
            *) echo "test a::b ... FAILED"; echo "test a::c ... ok"; exit 1;; esac"#;
        let command = || {
            let mut command = Command::new("sh");
            command.args(["-c", script, "sh"]);
            command
        };
        let mut results = Vec::new();
        run("a", command, &["a::".to_owned()], excuse, &mut results).unwrap();
        String::from_utf8(results).unwrap()
    }

    #[test]
    fn what_failed_is_run_once_more_where_it_has_an_excuse() {
        let first = "=== a\nargs: a::\ntest a::b ... FAILED\ntest a::c ... ok\n=== a ended: exit status: 1\n";
        assert_eq!(attempts(&Excuse::None), first);
        let rest = "running a::b once more: the processor is emulated\n=== a\n\
            args: --exact --test-threads=1 --show-output a::b\ntest a::b ... ok\n\
            === a ended: exit status: 0\n";
        assert_eq!(attempts(&Excuse::Emulation), format!("{first}{rest}"));
    }
}
