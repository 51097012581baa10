//! The tests that a virtual machine runs, and how it runs them.

use std::{cmp::Reverse, collections::BTreeSet, fmt::Write, path::Path, time::Duration};

use super::image;
use crate::{platform::Platform, suite::Suite};

/// Test programs that do not run in virtual machines: tests of the tests' own code; the crowd, which an
/// emulated processor cannot finish within the time limits; and tests with programs that the machine does not
/// contain (nginx, Redis, Python, Java, gdb, compilers, podman, Prometheus, rsyslog).
const LEFT_OUT: [&str; 10] = [
    "tcpclose_tests",
    "harness",
    "crowd",
    "cases",
    "collector",
    "diagnose",
    "stacks",
    "containers",
    "hostile",
    "metrics",
];

/// A test that needs bash, which the machine does not contain.
const NEEDS_BASH: &str = "completions_are_scripts_of_the_shell";

/// A test that needs grep and ls, which it does not contain either.
const NEEDS_GREP: &str = "a_running_trace_is_restricted";

/// The test program that changes the machine irreversibly, and therefore runs last.
const LAST: &str = "lockdown";

/// The test program that runs a second time, with a tcpclose that does not use BTF.
const WITHOUT_TYPES: &str = "close";
/// The variable for that (`tests/src/features.rs`).
const WITHOUT_TYPES_VARIABLE: &str = "TCPCLOSE_TESTS_BTF=none";
/// The scenarios of that second run if time is short: one for each way in which a connection ends.
const ENOUGH_WITHOUT_TYPES: [&str; 6] = [
    "client_closes_first",
    "client_is_killed",
    "client_closes_with_unread_data",
    "client_lingers_not",
    "nobody_listens",
    "older_connection_is_reset",
];

/// Routes between client and server that are left out if time is short. The remaining route, `veth_ipv6`, is
/// the one with the most code between the ends.
const OTHER_ROUTES: [&str; 5] =
    ["loopback_ipv4", "loopback_ipv6", "loopback_mapped", "veth_ipv4", "veth_mapped"];

/// The test program whose tests run one at a time. The kernel skips a program on a function that another task
/// is just executing, and the time to live is null then; with two tests on one emulated processor, that
/// happens.
const ALONE: &str = "ttl";

/// Test programs that are not in the share of the oldest kernel, on which a test of each cannot run.
const NOT_ON_THE_OLDEST: [&str; 2] = ["degraded", "faults"];

/// About how many seconds each program took on an emulated processor. Shares are balanced by it.
const COSTS: [(&str, u32); 18] = [
    ("cli", 83),
    ("close", 118),
    ("close-without-types", 46),
    ("compat", 20),
    ("degraded", 190),
    ("faults", 90),
    ("features", 1),
    ("linger", 95),
    ("load", 77),
    ("mptcp", 32),
    ("options", 197),
    ("orphans", 25),
    ("ownership", 83),
    ("recipes", 86),
    ("replay", 21),
    ("stray", 57),
    ("timeouts", 43),
    ("ttl", 40),
];

/// The cost of a program that is not listed there.
const USUAL_COST: u32 = 50;

/// A program and its only scenario that requires the loopback, with one of those routes.
const OVER_LOOPBACK: (&str, &str) = ("close", "client_connects_to_itself::loopback_ipv6");

/// Further tests that are left out if time is short, because they do not depend on the kernel.
const LESS: [&str; 15] = [
    NEEDS_BASH,
    NEEDS_GREP,
    "a_closed_pipe_is_no_error",
    "a_command_that_cannot_be_started",
    "closed_stdout_ends_it",
    "count_ends_it",
    "doctor_prints_a_page",
    "duration_ends_it",
    "filters_keep_others_out",
    "filters_leave_out_what_does_not_match",
    "neither_a_wakeup_nor_a_system_call_for_each_record",
    "other_commands_answer",
    "schema_is_json",
    "signals_end_it",
    "wrong_usage",
];

/// Whether a test is left out on purpose.
pub(crate) fn is_left_out(test: &str) -> bool {
    let program = test.split("::").next().unwrap_or_default();
    LEFT_OUT.contains(&program) || LESS.iter().any(|name| test.contains(name))
}

/// How many tests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Every scenario once.
    Brief,
    /// Every scenario over every route.
    Full,
}

/// The tests of a machine.
pub(crate) struct Plan<'a> {
    /// The platform that everything is built for.
    pub(crate) platform: &'static Platform,
    pub(crate) suite: &'a Suite,
    pub(crate) tcpclose: &'a Path,
    pub(crate) extent: Extent,
    /// Names of tests must contain one of these; if there are none, all tests run.
    pub(crate) filters: &'a [String],
    /// More arguments for each test program.
    pub(crate) more: &'a [String],
    /// The time limit for all machines together, if there is one.
    pub(crate) time: Option<Duration>,
}

impl Plan<'_> {
    /// The list that `tests/src/bin/init.rs` executes on one of several machines, the oldest kernel's first.
    /// Each machine has a share of the programs, which it runs whether or not it has time, so that every
    /// program runs on one of the machines; the others follow, those that take less time first. A single
    /// machine has no share. The last program comes last, and always runs.
    pub(crate) fn list(&self, machine: usize, machines: usize) -> List {
        let lines = self.lines();
        let (last, others): (Vec<_>, Vec<_>) = lines.lines().partition(|line| name(line) == LAST);
        let names: BTreeSet<_> = others.iter().map(|line| name(line)).collect();
        let share = shares(&names, machines).swap_remove(machine);
        let (own, mut rest): (Vec<_>, Vec<_>) =
            others.into_iter().partition(|line| share.contains(name(line)));
        rest.sort_by_key(|line| cost(name(line)));
        let share = if machines > 1 { own.len() } else { 0 };
        List { lines: [own, rest, last].concat().iter().flat_map(|line| [*line, "\n"]).collect(), share }
    }

    fn lines(&self) -> String {
        let mut list = String::new();
        let mut add = |name: &str, variables: &str, program: &Path, arguments: &[&str]| {
            let more: Vec<_> = self.more.iter().map(String::as_str).collect();
            let arguments = [arguments, &more].concat().join(" ");
            // Writing to a string does not fail.
            let _ = writeln!(list, "{name} {variables}{} {arguments}", image::place(program).display());
        };
        let filters: Vec<_> = self.filters.iter().map(String::as_str).collect();
        let routes = match self.extent {
            Extent::Brief => [skip(&OTHER_ROUTES), skip(&LESS)].concat(),
            Extent::Full => skip(&[NEEDS_BASH, NEEDS_GREP]),
        };
        let tests: Vec<_> = self.suite.tests().filter(|(name, _)| !LEFT_OUT.contains(name)).collect();
        for (name, program) in tests.iter().filter(|(name, _)| *name != LAST) {
            let alone: &[&str] = if *name == ALONE { &["--test-threads=1"] } else { &[] };
            add(name, "", program, &[alone, filters.as_slice(), &routes].concat());
            let (of, scenario) = OVER_LOOPBACK;
            let is_wanted = filters.is_empty() || filters.iter().any(|filter| scenario.contains(filter));
            if *name == of && self.extent == Extent::Brief && is_wanted {
                add(name, "", program, &["--exact", scenario]);
            }
        }
        for (name, program) in tests.iter().filter(|(name, _)| *name == WITHOUT_TYPES) {
            // Without BTF network namespaces are not known, so tests must not run in parallel.
            let chosen = match self.extent {
                Extent::Brief if filters.is_empty() => ENOUGH_WITHOUT_TYPES.to_vec(),
                _ => filters.clone(),
            };
            let arguments = [&["--test-threads=1"], chosen.as_slice(), &skip(&OTHER_ROUTES)].concat();
            add(&format!("{name}-without-types"), &format!("{WITHOUT_TYPES_VARIABLE} "), program, &arguments);
        }
        for (name, program) in tests.iter().filter(|(name, _)| *name == LAST) {
            add(name, "", program, &filters);
        }
        list
    }
}

/// The programs that a machine runs.
pub(crate) struct List {
    /// One line for each.
    pub(crate) lines: String,
    /// How many of the first lines do not depend on the time.
    pub(crate) share: usize,
}

/// The name of the program of a line.
fn name(line: &str) -> &str {
    line.split(' ').next().unwrap_or_default()
}

fn cost(name: &str) -> u32 {
    COSTS.iter().find(|(known, _)| *known == name).map_or(USUAL_COST, |(_, cost)| *cost)
}

/// Distributes programs to machines, so that each has about as much to do: the most expensive first, each to
/// the machine that has the least.
fn shares<'a>(names: &BTreeSet<&'a str>, machines: usize) -> Vec<BTreeSet<&'a str>> {
    let mut names: Vec<_> = names.iter().copied().collect();
    names.sort_by_key(|name| Reverse(cost(name)));
    let mut shares = vec![(0, BTreeSet::new()); machines.max(1)];
    for name in names {
        let first = usize::from(NOT_ON_THE_OLDEST.contains(&name) && machines > 1);
        if let Some((load, share)) = shares[first..].iter_mut().min_by_key(|(load, _)| *load) {
            *load += cost(name);
            share.insert(name);
        }
    }
    shares.into_iter().map(|(_, share)| share).collect()
}

fn skip(names: &[&'static str]) -> Vec<&'static str> {
    names.iter().flat_map(|name| ["--skip", name]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_is_in_one_share_and_the_shares_are_alike() {
        let names: BTreeSet<_> = COSTS.iter().map(|(name, _)| *name).collect();
        let shares = shares(&names, 4);
        let mut all: Vec<_> = shares.iter().flatten().copied().collect();
        all.sort_unstable();
        assert_eq!(all, names.iter().copied().collect::<Vec<_>>());
        assert!(NOT_ON_THE_OLDEST.iter().all(|name| !shares[0].contains(name)));
        let loads = shares.iter().map(|share| share.iter().map(|name| cost(name)).sum::<u32>());
        let (least, most) = (loads.clone().min().unwrap(), loads.max().unwrap());
        assert!(most < least + least / 5, "{shares:?}");
    }
}
