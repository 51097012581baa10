//! Errors for the person who reads them: what failed, what was found, what was needed, and what to try.

use std::fmt;

/// Why tcpclose cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What failed, such as `cannot load the kernel programs: not permitted`.
    pub failed: String,
    /// What was found.
    pub found: String,
    /// What was needed.
    pub needed: String,
    /// A command to run, or what else to do.
    pub fix: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { failed, found, needed, fix } = self;
        write!(f, "{failed}\n  found:  {found}\n  needed: {needed}\n  try:    {fix}")
    }
}

impl std::error::Error for Failure {}
