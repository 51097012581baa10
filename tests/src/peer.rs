//! The processes at the ends of a test's connections. They are controlled line by line; `src/bin/peer` lists
//! the commands.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    os::unix::process::ExitStatusExt,
    process::{Command, ExitStatus},
    str::FromStr,
};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use nix::sys::signal::Signal;

use crate::{netns::Namespace, program::Program};

/// A running peer; killed on drop.
#[derive(Debug)]
pub struct Peer {
    program: Program,
    introduction: Facts,
    netns: u64,
}

/// The facts in a peer's answer.
#[derive(Clone, Debug)]
pub struct Facts {
    line: String,
    facts: BTreeMap<String, String>,
}

/// Path of the peer's program, which cargo passes to every integration test.
pub fn program() -> Result<OsString> {
    env::var_os("CARGO_BIN_EXE_peer").context("CARGO_BIN_EXE_peer is not set: run `cargo xtask test`")
}

impl Peer {
    /// Starts a peer in a namespace, under a name that becomes its `comm`.
    pub fn start(namespace: &Namespace, name: &str) -> Result<Self> {
        let mut command = Command::new(program()?);
        command.arg(name);
        let program = Program::start(namespace, command)?;
        let introduction = Facts { line: String::new(), facts: BTreeMap::new() };
        let mut peer = Self { program, introduction, netns: namespace.inode() };
        peer.introduction =
            peer.answer()?.map_err(|refused| anyhow!("a peer cannot start: {}", refused.line))?;
        Ok(peer)
    }

    /// The process ID.
    pub fn pid(&self) -> u32 {
        self.program.pid()
    }

    /// The `comm` of the process.
    pub fn name(&self) -> Result<String> {
        self.introduction.get("name")
    }

    /// The path of its program.
    pub fn exe(&self) -> Result<String> {
        self.introduction.get("exe")
    }

    /// The network namespace of the process.
    pub fn netns(&self) -> u64 {
        self.netns
    }

    /// Sends an order that must succeed.
    pub fn ask(&mut self, order: &str) -> Result<Facts> {
        self.tell(order)?;
        self.finish(order)
    }

    /// Makes the peer fork a child, and returns the child's pid. Orders for the child go through the parent.
    pub fn fork(&mut self) -> Result<u32> {
        self.ask("fork")?.get("child")
    }

    /// Sends an order that must succeed to a child of the peer.
    pub fn ask_child(&mut self, child: u32, order: &str) -> Result<Facts> {
        self.ask(&format!("in {child} {order}"))
    }

    /// Sends an order that must fail with this error.
    pub fn ask_and_fail(&mut self, order: &str, errno: &str) -> Result<Facts> {
        self.tell(order)?;
        match self.answer().with_context(|| format!("`{order}`"))? {
            Err(refused) if refused.line.split_whitespace().nth(1) == Some(errno) => Ok(refused),
            Ok(other) | Err(other) => {
                bail!("`{order}` was to fail with {errno}, but the peer answered: {}", other.line)
            }
        }
    }

    /// Sends an order whose answer [`Peer::finish`] receives later.
    pub fn tell(&mut self, order: &str) -> Result<()> {
        self.program.tell(order)
    }

    /// Receives the answer to an order that must succeed.
    pub fn finish(&mut self, order: &str) -> Result<Facts> {
        let answer = self.answer().with_context(|| format!("`{order}`"))?;
        answer.map_err(|refused| anyhow!("`{order}`: the peer answered: {}", refused.line))
    }

    /// Sends an order that makes the peer exit, and returns its exit status.
    pub fn end_by(&mut self, order: &str) -> Result<ExitStatus> {
        self.tell(order)?;
        self.ended()
    }

    /// Kills the peer with a signal.
    pub fn kill(&mut self, signal: Signal) -> Result<()> {
        self.program.signal(signal)?;
        let status = self.ended()?;
        ensure!(status.signal() == Some(signal as i32), "killed by {signal}, it ended with {status}");
        Ok(())
    }

    /// Waits for the peer to end.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        self.program.ended()
    }

    /// Waits for the next answer. An order may take as long as the kernel's timers do.
    fn answer(&self) -> Result<Result<Facts, Facts>> {
        let line = self.program.line()?;
        let facts = line.split_whitespace().filter_map(|word| word.split_once('='));
        let facts = facts.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let answer = Facts { line, facts };
        Ok(if answer.line.starts_with("ok") { Ok(answer) } else { Err(answer) })
    }
}

impl Facts {
    /// Parses one fact.
    pub fn get<T: FromStr<Err: Into<Error>>>(&self, key: &str) -> Result<T> {
        let value = self
            .facts
            .get(key)
            .with_context(|| format!("the peer did not report its {key}: {}", self.line))?;
        value.parse().map_err(Into::into).with_context(|| format!("{key}={value}"))
    }
}
