//! Which tests a virtual machine runs, and how.

use std::{fmt::Write, path::Path, time::Duration};

use super::image;
use crate::{platform::Platform, suite::Suite};

/// Test programs that are of no use there: the tests of the tests' own code, a crowd, which does so much at once that an
/// emulated processor comes to the end of everybody's patience, and cases of programs that are no part of the machine
/// (nginx, Python, Java), which are about reading those programs.
const LEFT_OUT: [&str; 4] = ["tcpclose_tests", "harness", "crowd", "cases"];

/// The test program that spoils the machine.
const LAST: &str = "lockdown";

/// The test program that is run a second time, by a tool that is not to look at the kernel's description of its types.
const WITHOUT_TYPES: &str = "close";
/// What has the tests do that (`tests/src/features.rs`).
const WITHOUT_TYPES_VARIABLE: &str = "TCPCLOSE_TESTS_BTF=none";
/// The scenarios that are enough for that when there is little time: one of each way to end.
const ENOUGH_WITHOUT_TYPES: [&str; 6] = [
    "client_closes_first",
    "client_is_killed",
    "client_closes_with_unread_data",
    "client_lingers_not",
    "nobody_listens",
    "older_connection_is_reset",
];

/// Ways between client and server that are left out when there is little time. Every scenario goes the one that is left,
/// `veth_ipv6`, which has most between the ends.
const OTHER_ROUTES: [&str; 5] =
    ["loopback_ipv4", "loopback_ipv6", "loopback_mapped", "veth_ipv4", "veth_mapped"];

/// The test program whose tests are run one at a time: the kernel skips a program on a function where another task is in
/// the middle of it, and a time to live is null then. On one emulated processor two tests bring that about.
const ALONE: &str = "ttl";

/// A program, and its scenario that goes by the loopback alone, over one of the routes for that.
const OVER_LOOPBACK: (&str, &str) = ("close", "client_connects_to_itself::loopback_ipv6");

/// Tests that are left out as well when there is little time: what they test is not the kernel's.
const LESS: [&str; 12] = [
    "a_closed_pipe_is_no_error",
    "a_command_that_cannot_be_started",
    "closed_stdout_ends_it",
    "count_ends_it",
    "doctor_prints_a_page",
    "duration_ends_it",
    "filters_keep_others_out",
    "filters_leave_out_what_does_not_match",
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

/// How much is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Every scenario once.
    Brief,
    /// Every scenario over every route.
    Full,
}

/// The tests of a machine.
pub(crate) struct Plan<'a> {
    /// What all of it is built for.
    pub(crate) platform: &'static Platform,
    pub(crate) suite: &'a Suite,
    pub(crate) tcpclose: &'a Path,
    pub(crate) extent: Extent,
    /// What names of tests have to contain, one of these; nothing for all.
    pub(crate) filters: &'a [String],
    /// More arguments for each test program.
    pub(crate) more: &'a [String],
    /// For all machines together; no end of it if there is none.
    pub(crate) time: Option<Duration>,
}

impl Plan<'_> {
    /// The list that `tests/src/bin/init.rs` works off. All but the last program begin in another place in each of
    /// several machines, so that where there is no time for all, each has been run in one of them.
    pub(crate) fn list(&self, place: usize, places: usize) -> String {
        let lines = self.lines();
        let (last, others): (Vec<_>, Vec<_>) = lines.lines().partition(|line| line.starts_with(LAST));
        let (later, first) = others.split_at(others.len() * place / places);
        [first, later, &last].concat().iter().flat_map(|line| [*line, "\n"]).collect()
    }

    fn lines(&self) -> String {
        let mut list = String::new();
        let mut add = |name: &str, variables: &str, program: &Path, arguments: &[&str]| {
            let more: Vec<_> = self.more.iter().map(String::as_str).collect();
            let arguments = [arguments, &more].concat().join(" ");
            // A string always takes what is written to it.
            let _ = writeln!(list, "{name} {variables}{} {arguments}", image::place(program).display());
        };
        let filters: Vec<_> = self.filters.iter().map(String::as_str).collect();
        let routes = match self.extent {
            Extent::Brief => [skip(&OTHER_ROUTES), skip(&LESS)].concat(),
            Extent::Full => Vec::new(),
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
            // Namespaces are not known then, so that one test at a time has the machine to itself.
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

fn skip(names: &[&'static str]) -> Vec<&'static str> {
    names.iter().flat_map(|name| ["--skip", name]).collect()
}
