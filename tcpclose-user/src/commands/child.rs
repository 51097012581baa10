//! `-- COMMAND`: starts the command, and passes its exit status on.

use std::{
    error::Error,
    ffi::OsString,
    fmt,
    io::{self, ErrorKind},
    os::{fd::AsFd as _, unix::process::ExitStatusExt as _},
    process::ExitStatus,
};

use nix::errno::Errno;
use tokio::process::{Child, Command};

use crate::sink::Format;

/// The command could not be started.
#[derive(Debug)]
pub struct NotStarted(io::Error);

impl fmt::Display for NotStarted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for NotStarted {}

/// Exit statuses in place of the command's, the same as those of `env` and `timeout`.
const NOT_FOUND: u8 = 127;
const CANNOT_BE_RUN: u8 = 126;
const OWN_FAILURE: u8 = 125;

/// Starts the command. The kernel half already follows tcpclose itself, so it follows the command from its
/// first instruction on.
///
/// With lines for programs on the standard output, the command's output goes to the standard error.
///
/// # Errors
/// The command is not found or cannot be run, or there is no room for another process.
pub fn start(command: &[OsString], format: Format) -> Result<Child, NotStarted> {
    let Some((program, args)) = command.split_first() else {
        return Err(NotStarted(ErrorKind::InvalidInput.into()));
    };
    let mut child = Command::new(program);
    child.args(args);
    if format != Format::Text {
        child.stdout(io::stderr().as_fd().try_clone_to_owned().map_err(NotStarted)?);
    }
    child.spawn().map_err(NotStarted)
}

/// The exit status to end with in the command's place. If a signal killed it, that is 128 plus the signal's
/// number, as in shells.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code & 0xff).unwrap_or(1)
}

/// The exit status when tracing a command failed with this error: 127 if the command was not found, 126 if it
/// is there and cannot be run, 125 for every failure of tcpclose itself.
pub fn exit_code_of_failure(error: &anyhow::Error) -> u8 {
    let Some(NotStarted(error)) = error.downcast_ref() else { return OWN_FAILURE };
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => NOT_FOUND,
        // The errors of fork(), pipe() and dup() when a resource has run out.
        None | Some(Errno::EAGAIN | Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE) => OWN_FAILURE,
        Some(_) => CANNOT_BE_RUN,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use anyhow::Context as _;

    use super::*;

    /// The status after trying to start `program`, which must fail.
    fn status_of(program: &str) -> u8 {
        let result = start(&[program.into()], Format::Text).with_context(|| format!("cannot run {program}"));
        exit_code_of_failure(&result.map(drop).expect_err("it cannot be started"))
    }

    #[test]
    fn statuses_are_those_of_env() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        for program in
            ["tcpclose-no-such-program", "/no/such/program", "/etc", "/etc/passwd", "/etc/passwd/x"]
        {
            let env = std::process::Command::new("env").arg(program).output().unwrap().status;
            assert_eq!(Some(i32::from(status_of(program))), env.code(), "{program}");
        }
    }

    #[test]
    fn own_failures_are_told_from_the_commands() {
        assert_eq!(exit_code_of_failure(&anyhow!("cannot load")), OWN_FAILURE);
        let no_process = NotStarted(Errno::EAGAIN.into());
        assert_eq!(
            exit_code_of_failure(&anyhow::Error::from(no_process).context("cannot run x")),
            OWN_FAILURE
        );
    }
}
