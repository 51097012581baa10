//! Descriptors shared between processes: children that inherit them and execute orders of their own, and
//! descriptors that are passed from one process to another.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    os::{fd::OwnedFd, unix::net::UnixDatagram},
    process, thread,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{prctl, signal::Signal},
    unistd::{ForkResult, fork, getppid, pipe},
};
use tcpclose_tests::descriptors;

use crate::{Peer, Words, calls, obey_all, taken};

/// A child process and its channels.
pub(crate) struct Child {
    pid: i32,
    orders: File,
    answers: BufReader<File>,
    /// Carries descriptors.
    channel: UnixDatagram,
}

impl Child {
    /// Sends an order to the child and returns its answer.
    fn ask(&mut self, order: &str) -> Result<String> {
        writeln!(self.orders, "{order}")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        let (verdict, facts) = answer.trim_end_matches('\n').split_once(' ').context("a child has died")?;
        if verdict == "ok" { Ok(facts.to_owned()) } else { Err(anyhow!("{facts}")) }
    }
}

impl Peer {
    /// Executes an order about children.
    pub(crate) fn obey_about_kin(&mut self, verb: &str, mut words: Words) -> Result<String> {
        match verb {
            // Later children are in a new pid namespace.
            "new-pids" => unshare(CloneFlags::CLONE_NEWPID)?,
            "fork" => return bear(self),
            "in" => return child_of(&mut self.children, words.next()?)?.ask(&words.rest()),
            "hand-over" => return hand_over(),
            "pass" => {
                let socket = self.taken_socket()?;
                pass(child_of(&mut self.children, words.next()?)?, socket)?;
            }
            "take" => {
                let socket = take(self.channel.as_ref().context("there is no channel")?)?;
                return self.keep(socket);
            }
            "lose-in-cycle" => lose_in_cycle(self.taken_socket()?)?,
            "close-channel" => calls::peer_closes_socket_outer(taken(&mut self.channel)?.into())?,
            _ => bail!("there is no order {verb}"),
        }
        Ok(String::new())
    }
}

/// The child with this pid.
fn child_of(children: &mut [Child], pid: i32) -> Result<&mut Child> {
    children.iter_mut().find(|child| child.pid == pid).with_context(|| format!("{pid} is no child"))
}

/// Forks a child that inherits all descriptors of this process and executes the orders that this process
/// forwards.
fn bear(peer: &mut Peer) -> Result<String> {
    let (order_reader, orders) = pipe()?;
    let (answers, answer_writer) = pipe()?;
    let (channel, far) = UnixDatagram::pair()?;
    // SAFETY: this process has one thread, so the child is not restricted to async-signal-safe functions.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop((orders, answers, channel));
            // A copy of the pipes to its siblings in this child would keep their input from ending.
            peer.children.clear();
            peer.channel = Some(far);
            let _ = prctl::set_pdeathsig(Signal::SIGKILL);
            let ended = obey_all(peer, BufReader::new(File::from(order_reader)), File::from(answer_writer));
            process::exit(i32::from(ended.is_err()))
        }
        ForkResult::Parent { child } => {
            let (pid, answers) = (child.as_raw(), BufReader::new(answers.into()));
            peer.children.push(Child { pid, orders: orders.into(), answers, channel });
            Ok(format!("child={pid}"))
        }
    }
}

/// Exits, and leaves everything to a child that continues to execute orders in its place.
fn hand_over() -> Result<String> {
    let this = process::id();
    // SAFETY: this process has one thread, so the child is not restricted to async-signal-safe functions.
    match unsafe { fork() }? {
        ForkResult::Child => {
            while getppid().as_raw().cast_unsigned() == this {
                thread::yield_now();
            }
            Ok(format!("child={}", process::id()))
        }
        ForkResult::Parent { .. } => process::exit(0),
    }
}

/// Passes a socket to a child and closes it here.
fn pass(child: &Child, socket: OwnedFd) -> Result<()> {
    descriptors::send(&child.channel, &socket)?;
    Ok(calls::peer_closes_socket_outer(socket)?)
}

/// Receives a socket that was passed.
fn take(channel: &UnixDatagram) -> Result<TcpStream> {
    Ok(descriptors::receive(channel)?.context("no descriptor came")?.into())
}

/// Leaves a socket to the kernel's garbage collector: in flight to a unix socket that is in flight to itself
/// and that no process holds any more.
fn lose_in_cycle(socket: OwnedFd) -> Result<()> {
    let (sender, receiver) = UnixDatagram::pair()?;
    descriptors::send(&sender, &socket)?;
    descriptors::send(&sender, &receiver)?;
    drop((socket, receiver));
    // Closing a unix socket triggers the garbage collector.
    Ok(calls::peer_closes_socket_outer(sender.into())?)
}
