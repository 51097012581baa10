//! The processes at the ends of a test's connections, driven line by line; `src/bin/peer` says what they
//! obey.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    io::{BufRead, BufReader, Write},
    os::unix::process::ExitStatusExt,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    str::FromStr,
    sync::mpsc::{self, Receiver},
    thread,
};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{PATIENCE, netns::Namespace, until};

/// A running peer; killed on drop.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
    introduction: Facts,
    netns: u64,
}

/// What a peer said it did.
#[derive(Clone, Debug)]
pub struct Facts {
    line: String,
    facts: BTreeMap<String, String>,
}

/// Path of the peer's program, as cargo tells every integration test.
pub fn program() -> Result<OsString> {
    env::var_os("CARGO_BIN_EXE_peer").context("CARGO_BIN_EXE_peer is not set: run `cargo xtask test`")
}

impl Peer {
    /// Starts one in a namespace, under a name that the kernel takes as its `comm`.
    pub fn start(namespace: &Namespace, name: &str) -> Result<Self> {
        let mut command = Command::new(program()?);
        command.arg(name).stdin(Stdio::piped()).stdout(Stdio::piped());
        namespace.enter(&mut command)?;
        let mut child = command.spawn().context("starting a peer")?;
        let orders = child.stdin.take().context("a peer without standard input")?;
        let output = child.stdout.take().context("a peer without standard output")?;
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let introduction = Facts { line: String::new(), facts: BTreeMap::new() };
        let mut peer = Self { child, orders, answers, introduction, netns: namespace.inode() };
        peer.introduction =
            peer.answer()?.map_err(|refused| anyhow!("a peer cannot start: {}", refused.line))?;
        Ok(peer)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it called itself.
    pub fn name(&self) -> Result<String> {
        self.introduction.get("name")
    }

    /// The program it runs.
    pub fn exe(&self) -> Result<String> {
        self.introduction.get("exe")
    }

    /// The namespace it runs in.
    pub fn netns(&self) -> u64 {
        self.netns
    }

    /// Has it do something that has to succeed.
    pub fn ask(&mut self, order: &str) -> Result<Facts> {
        self.tell(order)?;
        self.finish(order)
    }

    /// Has it fork a child, and returns the child's pid. What the child is told goes through its parent.
    pub fn fork(&mut self) -> Result<u32> {
        self.ask("fork")?.get("child")
    }

    /// Has a child of it do something that has to succeed.
    pub fn ask_child(&mut self, child: u32, order: &str) -> Result<Facts> {
        self.ask(&format!("in {child} {order}"))
    }

    /// Has it do something that has to fail with this error.
    pub fn ask_in_vain(&mut self, order: &str, errno: &str) -> Result<Facts> {
        self.tell(order)?;
        match self.answer().with_context(|| format!("`{order}`"))? {
            Err(refused) if refused.line.split_whitespace().nth(1) == Some(errno) => Ok(refused),
            Ok(other) | Err(other) => {
                bail!("`{order}` was to fail with {errno}, but the peer said: {}", other.line)
            }
        }
    }

    /// Gives an order whose answer is fetched later, with [`Peer::finish`].
    pub fn tell(&mut self, order: &str) -> Result<()> {
        writeln!(self.orders, "{order}").with_context(|| format!("telling a peer to {order}"))
    }

    /// The answer to an order that has to succeed.
    pub fn finish(&mut self, order: &str) -> Result<Facts> {
        let answer = self.answer().with_context(|| format!("`{order}`"))?;
        answer.map_err(|refused| anyhow!("`{order}`: the peer said: {}", refused.line))
    }

    /// Has it end by an order, and returns how it did.
    pub fn end_by(&mut self, order: &str) -> Result<ExitStatus> {
        self.tell(order)?;
        self.ended()
    }

    /// Kills it.
    pub fn kill(&mut self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid().try_into()?), signal)?;
        let status = self.ended()?;
        ensure!(status.signal() == Some(signal as i32), "killed by {signal}, it ended with {status}");
        Ok(())
    }

    /// Waits for its end.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        until("a peer has ended", || Ok(self.child.try_wait()?))
    }

    /// The next line it says, if it says one in time. An order may take as long as the kernel's timers do.
    fn answer(&self) -> Result<Result<Facts, Facts>> {
        let line = self.answers.recv_timeout(PATIENCE).context("a peer does not answer")?;
        let facts = line.split_whitespace().filter_map(|word| word.split_once('='));
        let facts = facts.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let said = Facts { line, facts };
        Ok(if said.line.starts_with("ok") { Ok(said) } else { Err(said) })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may be dead already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Facts {
    /// One fact.
    pub fn get<T: FromStr<Err: Into<Error>>>(&self, key: &str) -> Result<T> {
        let value =
            self.facts.get(key).with_context(|| format!("the peer did not say its {key}: {}", self.line))?;
        value.parse().map_err(Into::into).with_context(|| format!("{key}={value}"))
    }
}
