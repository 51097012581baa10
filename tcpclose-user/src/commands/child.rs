//! `-- COMMAND`: starts the command, and passes its exit status on.

use std::{
    error::Error,
    ffi::{OsStr, OsString},
    fmt, future, io,
    os::{fd::AsFd as _, unix::process::ExitStatusExt as _},
    process::ExitStatus,
};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use tokio::process::{Child, Command};

use crate::sink::Format;

/// The command could not be started.
#[derive(Debug)]
struct NotStarted(io::Error);

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

/// The command after `--`, until it has ended; `None` afterwards, and if there is no command.
pub struct TracedCommand(Option<Child>);

impl TracedCommand {
    /// Starts the command, if there is one. The kernel half already follows tcpclose itself, so it follows
    /// the command from its first instruction on.
    ///
    /// If the standard output of tcpclose has lines for programs, the output of the command goes to the
    /// standard error.
    ///
    /// # Errors
    /// The command is not found or cannot be run, or there is no room for another process.
    pub fn start(command: &[OsString], format: Format) -> Result<Self> {
        let Some((program, arguments)) = command.split_first() else { return Ok(Self(None)) };
        let child = spawn(program, arguments, format).map_err(NotStarted);
        child.map(|child| Self(Some(child))).with_context(|| format!("cannot run {}", program.display()))
    }

    /// Waits until the command has ended, and returns the exit status to end with in its place. Without a
    /// command that runs it waits for ever. Safe to cancel.
    ///
    /// # Errors
    /// The command cannot be waited for.
    pub async fn ended(&mut self) -> io::Result<u8> {
        let Some(child) = &mut self.0 else { return future::pending().await };
        let status = child.wait().await?;
        self.0 = None;
        Ok(exit_code(status))
    }
}

fn spawn(program: &OsStr, arguments: &[OsString], format: Format) -> io::Result<Child> {
    let mut command = Command::new(program);
    command.args(arguments);
    if format != Format::Text {
        command.stdout(io::stderr().as_fd().try_clone_to_owned()?);
    }
    command.spawn()
}

/// The exit status of the command. If a signal killed it, that is 128 plus the signal's number, as in shells.
fn exit_code(status: ExitStatus) -> u8 {
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

    use super::*;

    /// The status after trying to start `program`, which must fail.
    fn status_of(program: &str) -> u8 {
        let result = TracedCommand::start(&[program.into()], Format::Text);
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
