//! Results of tests, parsed from their output: of one machine, and over all machines.

use std::collections::{BTreeMap, BTreeSet};

/// Start of the line that a test prints if it cannot run here; the reason follows.
const SKIPPED: &str = "skipped: ";
/// Start of the reason if the kernel lacks a feature (`tests/src/features.rs`).
const LACKING: &str = "here is no ";

/// Results of the tests on one machine.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// Tests that passed and were not skipped.
    pub(crate) passed: BTreeSet<String>,
    /// Tests that failed, with their output.
    pub(crate) failed: BTreeMap<String, String>,
    /// Tests that failed at first and passed when they were run again.
    pub(crate) repeated: BTreeSet<String>,
    /// Tests that could not run, with the reason.
    pub(crate) skipped: BTreeMap<String, String>,
    /// Programs that were not run at all, with the reason.
    pub(crate) unrun: BTreeMap<String, String>,
    /// Other problems.
    pub(crate) problems: Vec<String>,
}

impl Report {
    /// Reads the output of several test programs, some of them run more than once. Each is enclosed in
    /// `=== NAME` and `=== NAME ended: …`; `=== all` follows the last one.
    pub(crate) fn parse(text: &str) -> Self {
        let mut report = Self::default();
        let mut outputs = BTreeMap::<String, String>::new();
        let mut program = None;
        // The test whose output is being read.
        let mut speaker = None;
        let (mut expected, mut told) = (0, 0);
        let mut complete = false;
        for line in text.lines() {
            if let Some(mark) = line.strip_prefix("=== ") {
                speaker = None;
                if let Some((name, why)) = mark.split_once(" not run: ") {
                    report.unrun.insert(name.to_owned(), why.to_owned());
                    continue;
                }
                match mark.split_once(" ended: ") {
                    _ if mark == "all" => complete = true,
                    None => program = Some(mark.to_owned()),
                    Some((name, how)) => {
                        if how != "exit status: 0" && !report.failed.keys().any(|test| is_of(test, name)) {
                            report.problems.push(format!("{name} ended with {how}"));
                        }
                        program = None;
                    }
                }
                continue;
            }
            let Some(program) = &program else { continue };
            let qualified = |test: &str| format!("{program}::{test}");
            if let Some(test) = line.strip_prefix("---- ").and_then(|line| line.strip_suffix(" stdout ----"))
            {
                speaker = Some(qualified(test));
            } else if ["failures:", "successes:"].contains(&line) || line.starts_with("test result: ") {
                speaker = None;
            } else if let Some(speaker) = &speaker {
                let output = outputs.entry(speaker.clone()).or_default();
                output.push_str(line);
                output.push('\n');
            } else if let Some(count) = number_of_tests(line) {
                expected += count;
            } else if let Some((test, result)) =
                line.strip_prefix("test ").and_then(|line| line.split_once(" ... "))
            {
                told += 1;
                match result {
                    "ok" => {
                        if report.failed.remove(&qualified(test)).is_some() {
                            report.repeated.insert(qualified(test));
                        }
                        report.passed.insert(qualified(test));
                    }
                    "FAILED" => drop(report.failed.insert(qualified(test), String::new())),
                    _ => drop(report.skipped.insert(qualified(test), result.to_owned())),
                }
            }
        }
        for (test, output) in outputs {
            if let Some(failed) = report.failed.get_mut(&test) {
                *failed = output;
            } else if let Some(reason) = output.lines().find_map(|line| line.strip_prefix(SKIPPED)) {
                report.passed.remove(&test);
                report.skipped.insert(test, reason.to_owned());
            }
        }
        if !complete || told != expected {
            report.problems.push(format!("{told} of {expected} tests reported a result"));
        }
        report
    }

    /// Turns every skip into a problem unless its reason is a feature that the kernel lacks: the machines
    /// have everything else.
    pub(crate) fn refuse_other_skips(&mut self) {
        let others = self.skipped.iter().filter(|(_, reason)| !reason.starts_with(LACKING));
        self.problems.extend(others.map(|(test, reason)| format!("{test} may not be skipped: {reason}")));
    }

    /// Every test that was started.
    fn tests(&self) -> impl Iterator<Item = &str> {
        let tests = self.passed.iter().chain(self.failed.keys()).chain(self.skipped.keys());
        tests.map(String::as_str)
    }

    /// Whether nothing failed.
    pub(crate) fn is_good(&self) -> bool {
        self.failed.is_empty() && self.problems.is_empty()
    }

    /// A summary in one line.
    pub(crate) fn summary(&self) -> String {
        let mut words = vec![format!("{} passed", self.passed.len())];
        for (count, what) in [
            (self.repeated.len(), "of them at the second attempt"),
            (self.failed.len(), "failed"),
            (self.skipped.len(), "skipped"),
            (self.unrun.len(), "programs not run"),
        ] {
            if count > 0 {
                words.push(format!("{count} {what}"));
            }
        }
        words.extend(self.problems.iter().cloned());
        words.join(", ")
    }
}

/// Tests that were skipped on every machine, and programs that ran on none, each with machines and reasons.
pub(crate) fn never_run(reports: &[(String, Report)]) -> BTreeMap<&str, Vec<String>> {
    let mut never = BTreeMap::<&str, Vec<String>>::new();
    for (place, report) in reports {
        for (test, reason) in report.skipped.iter().chain(&report.unrun) {
            let ran = reports
                .iter()
                .flat_map(|(_, report)| report.passed.iter().chain(report.failed.keys()))
                .any(|one| one == test || is_of(one, test));
            if !ran {
                never.entry(test).or_default().push(format!("{place}: {reason}"));
            }
        }
    }
    never
}

/// Scenarios that were started here over any route, and on no other machine over any route, although their
/// programs ran there.
pub(crate) fn never_begun<'a>(here: &'a Report, elsewhere: &[(String, Report)]) -> BTreeSet<&'a str> {
    let others = || elsewhere.iter().map(|(_, report)| report);
    let begun: BTreeSet<_> = others().flat_map(Report::tests).map(scenario).collect();
    let is_unrun = |test| others().any(|report| report.unrun.keys().any(|program| is_of(test, program)));
    here.tests().map(scenario).filter(|test| !begun.contains(test) && !is_unrun(test)).collect()
}

/// The name of a test without its route, which is the last part.
fn scenario(test: &str) -> &str {
    match test.rsplit_once("::") {
        Some((scenario, route)) if route.starts_with("loopback_") || route.starts_with("veth_") => scenario,
        _ => test,
    }
}

fn is_of(test: &str, program: &str) -> bool {
    test.strip_prefix(program).is_some_and(|rest| rest.starts_with("::"))
}

/// The number in `running 12 tests`.
fn number_of_tests(line: &str) -> Option<usize> {
    line.strip_prefix("running ")?
        .strip_suffix(" tests")
        .or(line.strip_prefix("running ")?.strip_suffix(" test"))?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "=== close\n\nrunning 2 tests\ntest a ... ok\ntest b::c ... ok\n\nsuccesses:\n\n\
        ---- b::c stdout ----\nskipped: no nft\n\n\nsuccesses:\n    a\n    b::c\n\n\
        test result: ok. 2 passed; 0 failed\n\n=== close ended: exit status: 0\n=== all\n";

    #[test]
    fn skipped_tests_have_not_passed() {
        let report = Report::parse(GOOD);
        assert!(report.is_good(), "{report:?}");
        assert_eq!(report.summary(), "1 passed, 1 skipped");
        assert_eq!(report.skipped["close::b::c"], "no nft");
    }

    #[test]
    fn only_what_the_kernel_lacks_may_be_missed() {
        let told = |text: &str| {
            let mut report = Report::parse(text);
            report.refuse_other_skips();
            report.problems
        };
        assert_eq!(told(GOOD), ["close::b::c may not be skipped: no nft"]);
        assert_eq!(told(&GOOD.replace("no nft", "here is no MPTCP")), [""; 0]);
        let ignored = GOOD.replace("test a ... ok", "test a ... ignored");
        assert!(told(&ignored).contains(&"close::a may not be skipped: ignored".to_owned()));
    }

    #[test]
    fn failed_tests_keep_their_output() {
        let text = "=== stray\nrunning 1 test\ntest a ... FAILED\n\nfailures:\n\n\
            ---- a stdout ----\nError: it\nbroke\n\nfailures:\n    a\n\ntest result: FAILED. 0 passed\n\
            === stray ended: exit status: 101\n=== all\n";
        let report = Report::parse(text);
        assert_eq!(report.failed["stray::a"].trim(), "Error: it\nbroke");
        assert_eq!(report.summary(), "0 passed, 1 failed");
    }

    #[test]
    fn what_passes_again_has_passed() {
        let run = |result: &str, status: i32| {
            format!("=== a\nrunning 1 test\ntest t ... {result}\n=== a ended: exit status: {status}\n")
        };
        let again = Report::parse(&[&run("FAILED", 101), &run("ok", 0), "=== all\n"].concat());
        assert!(again.is_good(), "{again:?}");
        assert_eq!(again.summary(), "1 passed, 1 of them at the second attempt");
        let never = Report::parse(&[&run("FAILED", 101), &run("FAILED", 101), "=== all\n"].concat());
        assert_eq!(never.summary(), "0 passed, 1 failed");
    }

    #[test]
    fn missing_results_are_a_problem() {
        let cut = GOOD.split_once("test b::c").unwrap().0;
        let report = Report::parse(cut);
        assert!(!report.is_good());
        assert_eq!(report.summary(), "1 passed, 1 of 2 tests reported a result");
        assert!(!Report::parse("").is_good());
        let died =
            "=== close\nrunning 1 test\ntest a ... ok\n=== close ended: signal: 11 (SIGSEGV)\n=== all\n";
        assert_eq!(Report::parse(died).problems, ["close ended with signal: 11 (SIGSEGV)"]);
    }

    #[test]
    fn programs_that_were_not_run_are_told() {
        let late = GOOD.replace("=== all", "=== ttl not run: its time was over\n=== all");
        let late = Report::parse(&late);
        assert!(late.is_good(), "{late:?}");
        assert_eq!(late.summary(), "1 passed, 1 skipped, 1 programs not run");
        let ttl = Report::parse(&GOOD.replace("close", "ttl").replace("b::c stdout", "x"));
        let reports = [("here".to_owned(), late), ("there".to_owned(), ttl)];
        assert_eq!(never_run(&reports[..1])["ttl"], ["here: its time was over"]);
        assert!(!never_run(&reports).contains_key("ttl"));
    }

    #[test]
    fn what_was_begun_only_here_is_told() {
        let report = |tests: &[&str]| Report {
            passed: tests.iter().map(|test| (*test).to_owned()).collect(),
            ..Report::default()
        };
        let here =
            report(&["close::a::loopback_ipv4", "close::a::veth_ipv6", "close::b::loopback_ipv4", "list::c"]);
        let mut there = [("there".to_owned(), report(&["close::a::veth_ipv6"]))];
        assert_eq!(never_begun(&here, &there), BTreeSet::from(["close::b", "list::c"]));
        there[0].1.unrun.insert("list".to_owned(), "its time was over".to_owned());
        assert_eq!(never_begun(&here, &there), BTreeSet::from(["close::b"]));
    }

    #[test]
    fn what_ran_somewhere_has_run() {
        let skipped = || Report::parse(GOOD);
        let ran = Report::parse(&GOOD.replace("skipped: no nft", "all well"));
        assert_eq!(never_run(&[("here".into(), skipped()), ("there".into(), ran)]).len(), 0);
        let never = [("here".into(), skipped()), ("there".into(), skipped())];
        assert_eq!(never_run(&never)["close::b::c"], ["here: no nft", "there: no nft"]);
    }
}
