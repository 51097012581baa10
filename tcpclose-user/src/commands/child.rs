//! `-- COMMAND`: runs it, and knows which processes are its own.

use std::{ffi::OsString, os::unix::process::ExitStatusExt as _, process::ExitStatus};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData};
use tokio::process::{Child, Command};

use crate::{kernel::handle::KernelHalf, sink::Format};

/// The processes whose connections are wanted, as the kernel half keeps them.
pub struct Followed(HashMap<MapData, u32, u8>);

impl Followed {
    /// Takes the map out of the kernel half.
    ///
    /// # Errors
    /// The object has no such map.
    pub fn new(kernel: &mut KernelHalf) -> Result<Self> {
        kernel.take_map("FOLLOWED").map(Self)
    }

    /// Adds a process.
    ///
    /// # Errors
    /// The map is full.
    pub fn add(&mut self, pid: u32) -> Result<()> {
        self.0.insert(pid, 1, 0).with_context(|| format!("cannot follow process {pid}: too many of them"))
    }

    /// Whether this process is one of them.
    pub fn contains(&self, pid: u32) -> bool {
        self.0.get(&pid, 0).is_ok()
    }
}

/// Starts the command. The kernel half already follows this very process, so the command is followed from its birth.
///
/// With JSON on the standard output the command's own output goes to the standard error, so that every line of the one
/// is JSON.
///
/// # Errors
/// It cannot be run.
pub fn start(command: &[OsString], format: Format) -> std::io::Result<Child> {
    let Some((program, args)) = command.split_first() else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    let mut child = Command::new(program);
    child.args(args);
    if format == Format::Json {
        use std::os::fd::AsFd as _;
        child.stdout(std::io::stderr().as_fd().try_clone_to_owned()?);
    }
    child.spawn()
}

/// The exit status to end with in the command's place; 128 and the number for one that a signal killed, as shells have
/// it.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code & 0xff).unwrap_or(1)
}
