//! Errors for the person who reads them: what failed, what was found, what was needed, and the command that mends it.

use std::fmt;

use crate::kernel::tracefs;

/// Why tcpclose cannot go on; ends it with exit status 1.
#[derive(Debug)]
pub struct Failure {
    /// What was attempted.
    pub failed: String,
    /// How things are.
    pub found: String,
    /// How they would have to be.
    pub needed: String,
    /// A command, or what else to do.
    pub fix: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { failed, found, needed, fix } = self;
        write!(f, "{failed}\n  found:  {found}\n  needed: {needed}\n  try:    {fix}")
    }
}

impl std::error::Error for Failure {}

impl From<tracefs::Error> for Failure {
    fn from(error: tracefs::Error) -> Self {
        let tracefs::Error { failed, found, needed, fix } = error;
        Self { failed, found, needed, fix }
    }
}
