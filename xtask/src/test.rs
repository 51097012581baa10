//! Runs the tests.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use clap::builder::ArgPredicate;

use crate::{
    command::{self, say},
    ebpf,
    kernels::{self, Extent},
    lint,
    platform::Platform,
    report::{self, Report},
    rotel, run,
    suite::{self, Suite},
    tools,
    workspace::Workspace,
};

/// Which tests run, and where.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only tests whose name contains one of these, and no lints
    filters: Vec<String>,
    /// Run the tests with root on four other kernels as well, each scenario over one route
    #[arg(long)]
    kernels: bool,
    /// Run them on this kernel only: 5.10, 6.1, 6.12, newest. Can be repeated
    #[arg(long, value_name = "KERNEL", conflicts_with = "kernels")]
    kernel: Vec<String>,
    /// With --kernels or --kernel: the platform of these kernels, as rustc calls it, if it is not this one;
    /// no test then runs on this host
    #[arg(long, value_name = "TRIPLE", value_parser = Platform::parse)]
    target: Option<&'static Platform>,
    /// With --kernels or --kernel: each scenario over every route
    #[arg(long)]
    all_routes: bool,
    /// With --kernels or --kernel: for how long test programs are started there, all machines together.
    /// Programs that are left over are reported, and count as failed if no machine ran them. 0 means without
    /// limit
    #[arg(long, default_value_t = 4, default_value_if("all_routes", ArgPredicate::Equals("true".into()), "0"))]
    minutes: u64,
    /// More arguments for the test programs, such as --nocapture
    #[arg(last = true)]
    more: Vec<String>,
}

/// Runs lints and all tests, or the tests that were selected. Each step runs even if an earlier one failed.
pub(crate) fn test(workspace: &Workspace, args: &Args) -> Result<()> {
    let platform = args.target.unwrap_or_else(Platform::host);
    let here = args.kernel.is_empty() && platform.is_host();
    let elsewhere = args.kernels || !args.kernel.is_empty();
    ensure!(
        here || elsewhere,
        "--target needs --kernel or --kernels, which select the kernels of that platform"
    );
    let everything = args.filters.is_empty() && here;
    tools::for_testing(platform)?;
    tools::for_platform(platform)?;
    let mut failed = Vec::new();
    let mut kernels = None;
    if elsewhere {
        let found = tools::for_machines(platform).and_then(|()| kernels::fetch(platform, &args.kernel));
        match found {
            Ok(fetching) => kernels = Some(fetching),
            Err(error) => note("kernels", Err(error), &mut failed),
        }
    }
    let tools = tools::for_building()?;
    if everything {
        note("lints", lint::lint(workspace, &tools), &mut failed);
    }
    ebpf::build(workspace, &tools)?;
    let tcpclose = run::build_user_half(workspace, platform, true, Some(run::FEATURES))?;

    if here {
        let mut plain = suite::cargo(workspace, "test");
        plain.args(["--workspace", "--exclude", suite::PACKAGE, "--features", run::FEATURES]);
        plain.args(["--no-fail-fast", "--"]);
        note("tests without root", command::run(plain.args(&args.filters).args(&args.more)), &mut failed);
    }

    // In CI, where nobody reads that a test was skipped, it has to be there.
    let rotel = match here.then(rotel::find_or_install).transpose() {
        Err(error) if !command::is_ci() => {
            say(&format!("a test is skipped: {error:#}"));
            None
        }
        rotel => rotel?,
    };
    let suite = Suite::build(workspace, platform, rotel)?;
    // A skipped test counts as passed, and prints why it was skipped.
    let more = [&["--show-output".to_owned()], &*args.more].concat();
    let mut reports = Vec::new();
    if here {
        let report = Report::parse(&suite.run_here(&tcpclose, &[&*args.filters, &*more].concat())?);
        say(&format!("tests with root: {}", report.summary()));
        reports.push(("this host".to_owned(), report));
    }
    if let Some(fetching) = kernels {
        let plan = kernels::Plan {
            platform,
            suite: &suite,
            tcpclose: &tcpclose,
            extent: if args.all_routes { Extent::Full } else { Extent::Brief },
            filters: &args.filters,
            more: &more,
            time: (args.minutes > 0).then(|| Duration::from_secs(60 * args.minutes)),
        };
        match kernels::run(workspace, &plan, fetching) {
            Ok(found) => reports.extend(found),
            Err(error) => note("kernels", Err(error), &mut failed),
        }
    }
    report_oddities(&reports);
    // If no machine ran, an earlier message says so.
    if let [(_, this_host), kernels @ ..] = reports.as_slice()
        && everything
        && !kernels.is_empty()
    {
        report_never_run(this_host, kernels, &mut failed);
    }
    failed.extend(reports.iter().filter(|(_, report)| !report.is_good()).map(|(place, _)| place.clone()));
    if !failed.is_empty() {
        bail!("failed, see above: {}", failed.join(", "));
    }
    Ok(())
}

fn note(what: &str, result: Result<()>, failed: &mut Vec<String>) {
    if let Err(error) = result {
        say(&format!("{error:#}"));
        failed.push(what.to_owned());
    }
}

/// Reports tests that were skipped, with the reason, and tests that passed at the second attempt only.
fn report_oddities(reports: &[(String, Report)]) {
    for (place, report) in reports {
        for test in &report.repeated {
            say(&format!("passed at the second attempt on {place}: {test}"));
        }
        for (test, reason) in &report.skipped {
            say(&format!("skipped on {place}: {test}: {reason}"));
        }
        for (program, reason) in &report.unrun {
            say(&format!("not run on {place}: all tests of {program}: {reason}"));
        }
    }
}

/// A test that ran on none of the `kernels`, and is not excluded there on purpose, is a failure.
fn report_never_run(this_host: &Report, kernels: &[(String, Report)], failed: &mut Vec<String>) {
    let mut never = report::never_run(kernels);
    for scenario in report::never_begun(this_host, kernels) {
        if !kernels::is_left_out(scenario) {
            never.entry(scenario).or_default().push("it was not started".to_owned());
        }
    }
    for (test, reasons) in &never {
        say(&format!("{test} ran on none of the kernels: {}", reasons.join("; ")));
    }
    if !never.is_empty() {
        failed.push("tests that ran on none of the kernels".to_owned());
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn minutes(words: &[&str]) -> u64 {
        Line::parse_from([&["test", "--kernels"], words].concat()).args.minutes
    }

    /// A flag that is not given has a value too, `false`.
    #[test]
    fn only_all_routes_have_no_time_limit() {
        assert_eq!(minutes(&[]), 4);
        assert_eq!(minutes(&["--all-routes"]), 0);
        assert_eq!(minutes(&["--all-routes", "--minutes", "3"]), 3);
    }
}
