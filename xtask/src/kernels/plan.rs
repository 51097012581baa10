//! Which tests a virtual machine runs, and how.

use std::{fmt::Write, path::Path};

use crate::{platform::Platform, suite::Suite};

/// Test programs that are of no use there: the tests of the tests' own code, and a crowd, which does so much at once
/// that an emulated processor comes to the end of everybody's patience.
const LEFT_OUT: [&str; 3] = ["tcpclose_tests", "harness", "crowd"];

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

/// Tests that are left out as well when there is little time: what they test is not the kernel's.
const LESS: [&str; 4] = ["filters_keep_others_out", "other_commands_answer", "schema_is_json", "wrong_usage"];

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
}

impl Plan<'_> {
    /// The list that `tests/src/bin/init.rs` works off.
    pub(crate) fn list(&self) -> String {
        let mut list = String::new();
        let mut add = |name: &str, variables: &str, program: &Path, arguments: &[&str]| {
            let more: Vec<_> = self.more.iter().map(String::as_str).collect();
            let arguments = [arguments, &more].concat().join(" ");
            // A string always takes what is written to it.
            let _ = writeln!(list, "{name} {variables}{} {arguments}", program.display());
        };
        let filters: Vec<_> = self.filters.iter().map(String::as_str).collect();
        let routes = match self.extent {
            Extent::Brief => [skip(&OTHER_ROUTES), skip(&LESS)].concat(),
            Extent::Full => Vec::new(),
        };
        let tests: Vec<_> = self.suite.tests().filter(|(name, _)| !LEFT_OUT.contains(name)).collect();
        for (name, program) in tests.iter().filter(|(name, _)| *name != LAST) {
            add(name, "", program, &[filters.as_slice(), &routes].concat());
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
