//! Programs that tests run: started in a namespace, controlled line by line, and killed at the end.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{PATIENCE, netns::Namespace, until};

/// A running program; killed on drop.
#[derive(Debug)]
pub struct Program {
    child: Child,
    orders: ChildStdin,
    lines: Receiver<String>,
    command: String,
}

impl Program {
    /// Starts a program in a namespace.
    pub fn start(namespace: &Namespace, mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        namespace.enter(&mut command)?;
        let name = command.get_program().display().to_string();
        let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        let orders = child.stdin.take().context("a program without standard input")?;
        let output = child.stdout.take().context("a program without standard output")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Ok(Self { child, orders, lines, command: name })
    }

    /// The process ID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes a line to its standard input, all at once: a program that does not wait for the end of the line may
    /// be gone before a second write.
    pub fn tell(&mut self, order: &str) -> Result<()> {
        let line = format!("{order}\n");
        self.orders.write_all(line.as_bytes()).with_context(|| format!("telling {} {order}", self.command))
    }

    /// Waits for the next line of its standard output.
    pub fn line(&self) -> Result<String> {
        self.lines.recv_timeout(PATIENCE).with_context(|| format!("{} wrote no line", self.command))
    }

    /// Writes a line, and returns the line that the program answers with.
    pub fn ask(&mut self, order: &str) -> Result<String> {
        self.tell(order)?;
        self.line().with_context(|| format!("`{order}`"))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.pid().try_into()?), signal)?)
    }

    /// Waits for the program to end.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        until(&format!("{} has ended", self.command), || Ok(self.child.try_wait()?))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
