//! A large number of processes that connect, accept, fork, pass descriptors and die. Before it acts, each
//! prints which end of which connection it holds and what will happen to that end (`tcpclose_tests::crowd`).
//!
//! The server sends a greeting when the right process, and no other, holds the connection. The client does
//! nothing before, so the owner of each end at its close does not depend on timing.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
    process, thread,
};

use anyhow::{Context, Result, ensure};
use nix::{
    libc::linger,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::{Signal, kill},
        socket::{self, AddressFamily, Shutdown, SockFlag, SockType, SockaddrIn, setsockopt, sockopt},
        wait::waitpid,
    },
    unistd::{ForkResult, Pid, alarm, fork, getpid, getppid, pause},
};
use tcpclose_tests::{
    bed::Side,
    crowd::{CLIENTS, CLOSED_PORT, Claim, Kind, WORKERS, client, ports, server},
};

mod serve;

const GREETING: u8 = b'.';

/// Seconds after which every process ends in any case: children die with their parents.
const LONGEST: u32 = 300;

fn main() -> Result<()> {
    alarm::set(LONGEST);
    let listeners = (1..=CLIENTS).map(|number| Ok(TcpListener::bind((server(number), 0))?));
    let listeners = listeners.collect::<Result<Vec<_>>>()?;
    let mut workers = Vec::new();
    for listener in &listeners {
        for _ in 0..WORKERS {
            workers.push(forked(|| serve::serve(listener))?);
        }
    }
    let mut clients = Vec::new();
    for (number, listener) in (1..=CLIENTS).zip(&listeners) {
        let to = listener.local_addr()?;
        clients.push(forked(|| connect_all(number, to))?);
    }
    for client in clients {
        await_end(client)?;
    }
    // No more clients will connect. This wakes all processes that wait on the shared listener.
    for listener in &listeners {
        socket::shutdown(listener.as_raw_fd(), Shutdown::Both)?;
    }
    for worker in workers {
        await_end(worker)?;
    }
    Ok(())
}

/// Runs `act` in a forked child that then exits.
fn forked(act: impl FnOnce() -> Result<()>) -> Result<Pid> {
    // SAFETY: no process here ever has a second thread, so the child is not restricted to async-signal-safe
    // functions.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let _ = prctl::set_pdeathsig(Signal::SIGKILL);
            let done = act();
            if let Err(error) = &done {
                eprintln!("{error:#}");
            }
            process::exit(i32::from(done.is_err()))
        }
    }
}

/// Waits for a child and checks that it succeeded.
fn await_end(child: Pid) -> Result<()> {
    let status = waitpid(child, None)?;
    ensure!(status == nix::sys::wait::WaitStatus::Exited(child, 0), "{status:?}");
    Ok(())
}

/// Prints who holds an end. It is a single write, so that lines of several processes do not mix.
fn claim(side: Side, kind: Kind, local: SocketAddr, remote: SocketAddr) -> Result<()> {
    let claim = Claim { pid: process::id(), side, kind, local, remote };
    let line = claim.written();
    let written = nix::unistd::write(std::io::stdout(), line.as_bytes())?;
    ensure!(written == line.len(), "half a line was written");
    Ok(())
}

fn connect_all(number: u8, to: SocketAddr) -> Result<()> {
    for port in ports() {
        let from = SocketAddr::from((client(number), port));
        connect(Kind::of(port), from, to).with_context(|| format!("{from}, {:?}", Kind::of(port)))?;
    }
    Ok(())
}

/// Opens one connection and ends it in the way of its kind.
fn connect(kind: Kind, from: SocketAddr, to: SocketAddr) -> Result<()> {
    match kind {
        Kind::ClientExits => await_end(forked(|| hold(kind, from, to))?),
        Kind::ClientIsKilled => be_killed(from, to),
        Kind::HeirIsReset => leave(from, to),
        Kind::Refused => {
            let to = SocketAddr::new(to.ip(), CLOSED_PORT);
            claim(Side::Client, kind, from, to)?;
            ensure!(connected(from, to).is_err(), "there is a listener at {to}");
            Ok(())
        }
        _ => {
            let mut socket = greeted(kind, from, to)?;
            act(kind, &mut socket)
        }
    }
}

fn act(kind: Kind, socket: &mut TcpStream) -> Result<()> {
    match kind {
        Kind::ClientReadsNot => return Ok(()),
        Kind::ClientResets | Kind::ReceiverIsReset => {
            socket.read_exact(&mut [0])?;
            return Ok(linger_not(socket)?);
        }
        Kind::ServerCloses | Kind::ReceiverCloses | Kind::ChildCloses => {
            socket.read_to_end(&mut Vec::new())?;
        }
        Kind::ClientShutsDown => {
            socket.read_exact(&mut [0])?;
            socket.shutdown(std::net::Shutdown::Write)?;
            socket.read_to_end(&mut Vec::new())?;
        }
        _ => socket.read_exact(&mut [0])?,
    }
    Ok(())
}

/// Connects, and exits without closing.
fn hold(kind: Kind, from: SocketAddr, to: SocketAddr) -> Result<()> {
    let mut socket = greeted(kind, from, to)?;
    socket.read_exact(&mut [0])?;
    process::exit(0)
}

/// Forks a child that connects, and kills it.
fn be_killed(from: SocketAddr, to: SocketAddr) -> Result<()> {
    let (mut ready, mut signal) = std::io::pipe()?;
    let child = forked(move || {
        let mut socket = greeted(Kind::ClientIsKilled, from, to)?;
        socket.read_exact(&mut [0])?;
        signal.write_all(&[GREETING])?;
        loop {
            pause();
        }
    })?;
    ready.read_exact(&mut [0])?;
    kill(child, Signal::SIGKILL)?;
    waitpid(child, None)?;
    Ok(())
}

/// Forks a child that connects and exits, and waits for the end of the grandchild that inherits the
/// connection.
fn leave(from: SocketAddr, to: SocketAddr) -> Result<()> {
    let (mut over, heirs) = std::io::pipe()?;
    let child = forked(move || {
        let socket = connected(from, to)?;
        let (mut born, signal) = std::io::pipe()?;
        let parent = getpid();
        forked(move || {
            prctl::set_pdeathsig(None)?;
            drop(signal);
            inherit(parent, socket)?;
            drop(heirs);
            Ok(())
        })?;
        // The grandchild has no parent any more whose death would end it.
        born.read_to_end(&mut Vec::new())?;
        Ok(())
    })?;
    await_end(child)?;
    over.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Waits until no other process holds the connection, prints the claim, and then is idle until the connection
/// is reset.
fn inherit(parent: Pid, mut socket: TcpStream) -> Result<()> {
    while getppid() == parent {
        thread::yield_now();
    }
    socket.read_exact(&mut [0])?;
    claim(Side::Client, Kind::HeirIsReset, socket.local_addr()?, socket.peer_addr()?)?;
    socket.write_all(&[GREETING])?;
    await_events(&socket, PollFlags::empty())
}

/// Makes the next close reset the connection.
fn linger_not(socket: &TcpStream) -> nix::Result<()> {
    setsockopt(socket, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 })
}

/// Opens a connection whose server end is held by the right process; the greeting is still unread.
fn greeted(kind: Kind, from: SocketAddr, to: SocketAddr) -> Result<TcpStream> {
    let socket = connected(from, to)?;
    claim(Side::Client, kind, from, to)?;
    await_events(&socket, PollFlags::POLLIN)?;
    Ok(socket)
}

fn connected(from: SocketAddr, to: SocketAddr) -> Result<TcpStream> {
    let socket = socket::socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let address = |address: SocketAddr| match address {
        SocketAddr::V4(address) => Ok(SockaddrIn::from(address)),
        SocketAddr::V6(_) => Err(nix::errno::Errno::EAFNOSUPPORT),
    };
    socket::bind(socket.as_raw_fd(), &address(from)?)?;
    socket::connect(socket.as_raw_fd(), &address(to)?)?;
    Ok(socket.into())
}

/// Waits for one of these events or an error.
fn await_events(descriptor: &impl AsFd, events: PollFlags) -> Result<()> {
    poll(&mut [PollFd::new(descriptor.as_fd(), events)], PollTimeout::NONE)?;
    Ok(())
}
