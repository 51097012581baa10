//! Runs the tests on other kernels: Debian's, booted in QEMU, with the same programs that run on this host.

mod debian;
mod image;
mod plan;
mod vm;

use std::{
    fmt::Write,
    iter,
    path::Path,
    sync::{Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, bail};

use self::debian::Kernel;
use self::plan::List;
pub(crate) use self::plan::{Extent, Plan, is_left_out};
use crate::{command::say, platform::Platform, report::Report, workspace::Workspace};

/// The kernels on which the tests run.
static KERNELS: [Entry; 4] = [
    Entry {
        name: "5.10",
        suite: "bullseye",
        may_lack: &[
            "EveryReset",
            "ReasonsOfOwnResets",
            "Cookies",
            "PacketOfReset",
            "Mptcp",
            "UringShutdown",
            "UnlockedMaps",
        ],
        arm64_may_lack: &PROGRAMS_ON_FUNCTIONS,
    },
    Entry {
        name: "6.1",
        suite: "bookworm",
        may_lack: &["EveryReset", "ReasonsOfOwnResets"],
        arm64_may_lack: &PROGRAMS_ON_FUNCTIONS,
    },
    Entry { name: "6.12", suite: "trixie", may_lack: &[], arm64_may_lack: &[] },
    Entry { name: "newest", suite: "sid", may_lack: &[], arm64_may_lack: &[] },
];

/// Features that arm64 has since 6.4.
const PROGRAMS_ON_FUNCTIONS: [&str; 2] = ["FunctionReturns", "PacketOfReset"];

pub(crate) struct Entry {
    /// Its name for `--kernel`.
    name: &'static str,
    /// The Debian suite whose newest kernel it is.
    suite: &'static str,
    /// Features that it may lack, by their names in `tests/src/features.rs`. If another feature is missing, a
    /// test fails.
    may_lack: &'static [&'static str],
    /// Further features that it may lack on arm64.
    arm64_may_lack: &'static [&'static str],
}

impl Entry {
    fn may_lack_on(&self, platform: &Platform) -> Vec<&'static str> {
        let more = if platform.debian == "arm64" { self.arm64_may_lack } else { &[] };
        [self.may_lack, more].concat()
    }
}

/// The variable that lists features the kernel may lack (`tests/src/features.rs`).
const MAY_LACK: &str = "TCPCLOSE_TESTS_MAY_LACK";
/// The variable that limits for how long pid 1 starts test programs (`tests/src/bin/init.rs`).
const SECONDS: &str = "TCPCLOSE_TESTS_SECONDS";
/// The variable that says how many programs it starts whatever the time.
const SHARE: &str = "TCPCLOSE_TESTS_SHARE";

/// Machines that run at the same time. Tests sometimes wait for timers, which leaves a processor to others.
const AT_ONCE: usize = 2;

/// Lines of the console that are shown if a machine did not finish.
const TAIL: usize = 40;

/// The names of kernels, for messages.
pub(crate) fn names() -> Vec<&'static str> {
    KERNELS.iter().map(|entry| entry.name).collect()
}

/// Kernels that are being fetched, while tests are built or run.
pub(crate) struct Fetching(JoinHandle<Result<Vec<(&'static Entry, Kernel)>>>);

/// Begins to fetch some kernels, or all if none is named.
pub(crate) fn fetch(platform: &'static Platform, chosen: &[String]) -> Result<Fetching> {
    if let Some(unknown) = chosen.iter().find(|name| !names().contains(&name.as_str())) {
        bail!("there is no kernel {unknown}; there are {}", names().join(", "));
    }
    let is_wanted = |entry: &&Entry| chosen.is_empty() || chosen.iter().any(|one| one == entry.name);
    let wanted: Vec<_> = KERNELS.iter().filter(is_wanted).collect();
    let fetch = move |entry: &'static Entry| Ok((entry, Kernel::of_suite(platform, entry.suite)?));
    Ok(Fetching(thread::spawn(move || wanted.into_iter().map(fetch).collect())))
}

/// Runs the tests on kernels, and reports the results of each.
pub(crate) fn run(workspace: &Workspace, plan: &Plan, kernels: Fetching) -> Result<Vec<(String, Report)>> {
    let folder = workspace.target.join("kernels");
    let platform = plan.platform;
    let common = image::common(&folder, plan)?;
    let machine = Machine { platform, folder: &folder, common: &common };
    // All are fetched before a machine starts, so that no machine waits for the network.
    let kernels = kernels.0.join().map_err(|_| anyhow!("the thread that fetches kernels panicked"))??;
    let start = Instant::now();
    let queue = Mutex::new(kernels.iter().enumerate());
    let next = || {
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        let rounds = u32::try_from(queue.len().div_ceil(AT_ONCE)).unwrap_or(u32::MAX);
        let time = plan.time.map(|time| time.saturating_sub(start.elapsed()) / rounds.max(1));
        queue.next().map(|(index, (entry, kernel))| (entry, kernel, plan.list(index, kernels.len()), time))
    };
    thread::scope(|scope| {
        let worker = || {
            iter::from_fn(next)
                .map(|(entry, kernel, tests, time)| machine.test(entry, kernel, &tests, time))
                .collect::<Result<Vec<_>>>()
        };
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(worker)).collect();
        let mut reports = Vec::new();
        for worker in workers {
            reports.extend(worker.join().map_err(|_| anyhow!("the thread of a machine panicked"))??);
        }
        reports.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(reports)
    })
}

/// The parameters that all machines share.
struct Machine<'a> {
    platform: &'a Platform,
    folder: &'a Path,
    common: &'a [u8],
}

impl Machine<'_> {
    /// Boots a kernel, and reports the results of the tests there. When the time is over, no more programs
    /// are started, except those of this machine's share.
    fn test(
        &self,
        entry: &Entry,
        kernel: &Kernel,
        tests: &List,
        time: Option<Duration>,
    ) -> Result<(String, Report)> {
        let start = Instant::now();
        let own = image::own(self.folder, kernel, &tests.lines)?;
        // The kernel passes arguments that it does not know to pid 1 as variables.
        let mut variables = format!("{MAY_LACK}={}", entry.may_lack_on(self.platform).join(","));
        if let Some(time) = time {
            let _ = write!(variables, " {SECONDS}={} {SHARE}={}", time.as_secs(), tests.share);
        }
        let left = vm::run(self.platform, self.folder, kernel, &[self.common, &own], &variables)?;
        let mut report = Report::parse(&left.results);
        report.refuse_other_skips();
        if left.stopped {
            report.problems.insert(0, "the machine hung and was stopped".to_owned());
        }
        let place = format!("kernel {}", kernel.release);
        let mut told = format!(
            "{place}: {} ({} s, {} s of processor time)\n",
            report.summary(),
            start.elapsed().as_secs(),
            left.processor
        );
        for (test, output) in &report.failed {
            let _ = writeln!(told, "---- {test} on {place} ----\n{output}");
        }
        if !report.problems.is_empty() {
            let lines: Vec<_> = left.console.lines().collect();
            let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n");
            let _ = writeln!(told, "---- end of the console of {place} ----\n{tail}");
        }
        say(told.trim_end());
        Ok((place, report))
    }
}
