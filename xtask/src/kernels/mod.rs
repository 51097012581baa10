//! The tests on other kernels: Debian's, booted in QEMU, with the very programs that run on this host.

mod debian;
mod image;
mod vm;

use std::{path::Path, time::Instant};

use anyhow::{Result, bail};

use self::debian::Kernel;
use crate::{command::say, report::Report, suite::Suite, workspace::Workspace};

/// The kernels that tests run on: what each is called here, and the suite whose newest kernel it is.
const KERNELS: [(&str, &str); 4] =
    [("5.10", "bullseye"), ("6.1", "bookworm"), ("6.12", "trixie"), ("newest", "sid")];

/// Lines of the console that are shown when a machine did not come to its end.
const TAIL: usize = 40;

/// What is run where.
pub(crate) struct Plan<'a> {
    pub(crate) suite: &'a Suite,
    pub(crate) tcpclose: &'a Path,
    /// Arguments for each test program.
    pub(crate) arguments: &'a [String],
}

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
    let common = image::common(&folder, plan.suite, plan.tcpclose, plan.arguments)?;
    let mut reports = Vec::new();
    for (name, suite) in KERNELS {
        if !chosen.is_empty() && !chosen.iter().any(|one| one == name) {
            continue;
        }
        let start = Instant::now();
        let kernel = Kernel::of_suite(suite)?;
        let modules = image::modules(&folder, &kernel)?;
        let left = vm::run(&folder, &kernel, &[&common, &modules], "")?;
        let mut report = Report::parse(&left.results);
        if left.stopped {
            report.problems.insert(0, "the machine hung and was stopped".to_owned());
        }
        let place = format!("kernel {}", kernel.release);
        say(&format!("{place}: {} ({} s)", report.summary(), start.elapsed().as_secs()));
        for (test, output) in &report.failed {
            println!("---- {test} on {place} ----\n{output}");
        }
        if !report.problems.is_empty() {
            println!("---- the end of the console of {place} ----");
            let lines: Vec<_> = left.console.lines().collect();
            println!("{}", lines[lines.len().saturating_sub(TAIL)..].join("\n"));
        }
        reports.push((place, report));
    }
    Ok(reports)
}
