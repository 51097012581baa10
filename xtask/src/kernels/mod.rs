//! The tests on other kernels: Debian's, booted in QEMU, with the very programs that run on this host.

mod debian;
mod image;
mod plan;
mod vm;

use std::{
    fmt::Write,
    iter,
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
    time::Instant,
};

use anyhow::{Result, anyhow, bail};

use self::debian::Kernel;
pub(crate) use self::plan::{Extent, Plan};
use crate::{command::say, platform::Platform, report::Report, workspace::Workspace};

/// The kernels that tests run on: what each is called here, and the suite whose newest kernel it is.
const KERNELS: [(&str, &str); 4] =
    [("5.10", "bullseye"), ("6.1", "bookworm"), ("6.12", "trixie"), ("newest", "sid")];

/// Machines that run at a time. Tests wait for timers now and then, which leaves a processor to others.
const AT_ONCE: usize = 2;

/// Lines of the console that are shown when a machine did not come to its end.
const TAIL: usize = 40;

/// The names of kernels, for messages.
pub(crate) fn names() -> Vec<&'static str> {
    KERNELS.iter().map(|(name, _)| *name).collect()
}

/// Runs the tests on some kernels, or on all if none is named, and says how each went.
pub(crate) fn run(workspace: &Workspace, plan: &Plan, chosen: &[String]) -> Result<Vec<(String, Report)>> {
    if let Some(unknown) = chosen.iter().find(|name| !names().contains(&name.as_str())) {
        bail!("there is no kernel {unknown}; there are {}", names().join(", "));
    }
    let folder = workspace.target.join("kernels");
    if folder.starts_with("/tmp") || folder.starts_with("/run") {
        // They keep their paths in the machines, which mount file systems of their own there.
        bail!(
            "the test programs are below {}, which the virtual machines would not see: move the repository, or set \
             CARGO_TARGET_DIR",
            workspace.target.display()
        );
    }
    let platform = plan.platform;
    let common = image::common(&folder, plan)?;
    let wanted = KERNELS.iter().filter(|(name, _)| chosen.is_empty() || chosen.iter().any(|one| one == name));
    let machine = Machine { platform, folder: &folder, common: &common };
    // All is fetched before anything is started: no machine waits for the network.
    let kernels = wanted.map(|(_, suite)| Kernel::of_suite(platform, suite)).collect::<Result<Vec<_>>>()?;
    let queue = Mutex::new(kernels.iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    thread::scope(|scope| {
        let worker = || iter::from_fn(next).map(|kernel| machine.test(kernel)).collect::<Result<Vec<_>>>();
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(worker)).collect();
        let mut reports = Vec::new();
        for worker in workers {
            reports.extend(worker.join().map_err(|_| anyhow!("a machine's keeper panicked"))??);
        }
        reports.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(reports)
    })
}

/// What all machines have in common.
struct Machine<'a> {
    platform: &'a Platform,
    folder: &'a Path,
    common: &'a [u8],
}

impl Machine<'_> {
    /// Boots a kernel, and says how the tests went there.
    fn test(&self, kernel: &Kernel) -> Result<(String, Report)> {
        let start = Instant::now();
        let modules = image::modules(self.folder, kernel)?;
        let left = vm::run(self.platform, self.folder, kernel, &[self.common, &modules], "")?;
        let mut report = Report::parse(&left.results);
        if left.stopped {
            report.problems.insert(0, "the machine hung and was stopped".to_owned());
        }
        let place = format!("kernel {}", kernel.release);
        let mut told = format!("{place}: {} ({} s)\n", report.summary(), start.elapsed().as_secs());
        for (test, output) in &report.failed {
            let _ = writeln!(told, "---- {test} on {place} ----\n{output}");
        }
        if !report.problems.is_empty() {
            let lines: Vec<_> = left.console.lines().collect();
            let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n");
            let _ = writeln!(told, "---- the end of the console of {place} ----\n{tail}");
        }
        say(told.trim_end());
        Ok((place, report))
    }
}
