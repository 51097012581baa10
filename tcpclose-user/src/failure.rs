//! Errors for the person who reads them: what failed, what was found, what was needed, and what to try.

use std::{fmt, io};

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

impl Failure {
    /// The failure to start a thread, or another process.
    pub fn no_thread(error: &io::Error) -> Self {
        Self {
            failed: "cannot start a thread".to_owned(),
            found: error.to_string(),
            needed:
                "room for a few more threads: the limit of the user (RLIMIT_NPROC), of the control group \
                     (pids.max) or of the host (kernel.threads-max) is reached"
                    .to_owned(),
            fix: "ulimit -u unlimited, systemctl set-property UNIT TasksMax=100, or in a container \
                  --pids-limit"
                .to_owned(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { failed, found, needed, fix } = self;
        write!(f, "{failed}\n  found:  {found}\n  needed: {needed}\n  try:    {fix}")
    }
}

impl std::error::Error for Failure {}
