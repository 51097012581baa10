//! The process at one end of a test's connection. `peer NAME` sets its `comm` to that name and reads orders
//! from standard input. It answers each with one line: `ok KEY=VALUE…` with the facts, or
//! `error ERRNO KEY=VALUE…`.
//!
//! It holds at most one listener and one connection. It may have children, which execute the orders that
//! begin with `in`. `peer once ADDRESS PORT CODE` reads no orders: it connects, closes and exits.

use std::{
    env,
    ffi::CString,
    io::{self, BufRead, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd},
        unix::{net::UnixDatagram, process::CommandExt},
    },
    process::{self, Command, ExitCode},
    str::{FromStr, SplitWhitespace},
};

use anyhow::{Context, Error, Result, anyhow, bail};
use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        resource::{Resource, setrlimit},
        socket::{self, Backlog, MsgFlags, Shutdown, SockaddrStorage, sockopt},
    },
    unistd::gettid,
};

mod burst;
mod calls;
mod death;
mod kin;
mod options;
mod uring;

/// The default protocol of a stream socket: TCP.
const DEFAULT_PROTOCOL: libc::c_int = 0;

fn main() -> ExitCode {
    // Tests kill peers with signals, and core files would be of no use.
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let mut arguments = env::args().skip(1);
    let name = arguments.next().unwrap_or_else(|| "peer".to_owned());
    let result = match name.as_str() {
        "once" => once(&arguments.collect::<Vec<_>>().join(" ")),
        _ => play(&name),
    };
    result.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::FAILURE
    })
}

/// Connects, closes, and returns the exit code.
fn once(order: &str) -> Result<ExitCode> {
    let mut words = Words::of(order);
    let socket = connection(&mut words, DEFAULT_PROTOCOL)?.1?;
    calls::peer_closes_socket_outer(socket.into())?;
    Ok(ExitCode::from(words.next::<u8>()?))
}

fn play(name: &str) -> Result<ExitCode> {
    prctl::set_name(&CString::new(name)?)?;
    let mut peer = Peer {
        name: name.to_owned(),
        protocol: DEFAULT_PROTOCOL,
        listener: None,
        socket: None,
        children: Vec::new(),
        channel: None,
    };
    answer(&mut io::stdout(), &Ok(peer.introduction()?))?;
    obey_all(&mut peer, io::stdin().lock(), io::stdout())?;
    Ok(ExitCode::SUCCESS)
}

/// Executes orders until standard input ends.
fn obey_all(peer: &mut Peer, orders: impl BufRead, mut answers: impl Write) -> Result<()> {
    for line in orders.lines() {
        let done = peer.obey(&line?);
        answer(&mut answers, &done)?;
    }
    Ok(())
}

/// Writes the result of an order.
fn answer(answers: &mut impl Write, done: &Result<String>) -> Result<()> {
    match done {
        Ok(facts) => writeln!(answers, "ok {facts}")?,
        Err(error) => writeln!(answers, "error {}", format!("{error:#}").replace('\n', " "))?,
    }
    Ok(answers.flush()?)
}

/// The words of an order, each parsed as the type that the order needs.
struct Words<'a>(SplitWhitespace<'a>);

impl<'a> Words<'a> {
    fn of(order: &'a str) -> Self {
        Self(order.split_whitespace())
    }

    fn next<T: FromStr<Err: Into<Error>>>(&mut self) -> Result<T> {
        self.0.next().context("the order is too short")?.parse().map_err(Into::into)
    }

    fn rest(self) -> String {
        self.0.collect::<Vec<_>>().join(" ")
    }

    fn address(&mut self) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.next::<IpAddr>()?, self.next()?))
    }
}

struct Peer {
    name: String,
    /// The protocol of new sockets.
    protocol: libc::c_int,
    listener: Option<TcpListener>,
    socket: Option<TcpStream>,
    children: Vec<kin::Child>,
    /// The channel on which the parent passes descriptors.
    channel: Option<UnixDatagram>,
}

impl Peer {
    fn introduction(&self) -> Result<String> {
        Ok(format!(
            "pid={} tid={} name={} exe={}",
            process::id(),
            gettid(),
            self.name,
            env::current_exe()?.display()
        ))
    }

    fn obey(&mut self, order: &str) -> Result<String> {
        let mut words = Words::of(order);
        let verb: String = words.next()?;
        match verb.as_str() {
            "listen" => {
                let address = words.address()?;
                let socket = new_socket(address, self.protocol)?;
                socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
                let listener = TcpListener::from(OwnedFd::from(socket));
                socket::listen(&listener, Backlog::new(words.next().unwrap_or(4096))?)?;
                let facts = format!("local={}", listener.local_addr()?);
                self.listener = Some(listener);
                return Ok(facts);
            }
            "mptcp" => {
                // This only checks whether the kernel supports it.
                new_socket((Ipv4Addr::LOCALHOST, 0).into(), libc::IPPROTO_MPTCP)?;
                self.protocol = libc::IPPROTO_MPTCP;
            }
            // `listen()` on a listening socket changes its backlog.
            "backlog" => socket::listen(self.listener()?, Backlog::new(words.next::<i32>()?)?)?,
            "await-client" => wait_for(self.listener()?, PollFlags::POLLIN)?,
            "accept" => {
                let socket = calls::peer_accepts_socket_outer(self.listener()?)?;
                return self.keep(socket);
            }
            "close-listener" => calls::peer_closes_socket_outer(taken(&mut self.listener)?.into())?,
            "connect" => {
                let (local, socket) = connection(&mut words, self.protocol)?;
                return match socket {
                    Ok(socket) => self.keep(socket),
                    Err(errno) => Err(anyhow!("{errno:?} local={local}")),
                };
            }
            "begin-connect" => {
                let address = words.address()?;
                let socket = new_socket(address, self.protocol)?;
                socket.set_nonblocking(true)?;
                if calls::peer_connects_socket_outer(&socket, address) != Err(Errno::EINPROGRESS) {
                    bail!("connected at once");
                }
                let facts = format!("local={}", socket.local_addr()?);
                self.socket = Some(socket);
                return Ok(facts);
            }
            "connect-to-itself" => {
                let socket = connection_to_itself(words.address()?, self.protocol)?;
                return self.keep(socket);
            }
            "connect-fast" => {
                let socket = fast_connection(words.address()?, self.protocol, words.next()?)?;
                return self.keep(socket);
            }
            "descriptor" => return Ok(format!("fd={}", self.socket()?.as_raw_fd())),
            "send" => self.socket()?.write_all(&vec![b'x'; words.next()?])?,
            "fill" => return fill(self.socket()?),
            "receive" => self.socket()?.read_exact(&mut vec![0; words.next()?])?,
            "await-data" => {
                let mut buffer = vec![0; words.next()?];
                let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_WAITALL;
                let length = socket::recv(self.socket()?.as_raw_fd(), &mut buffer, flags)?;
                if length < buffer.len() {
                    bail!("only {length} bytes came");
                }
            }
            "receive-end" => {
                let length = self.socket()?.read_to_end(&mut Vec::new()).map_err(errno)?;
                return Ok(format!("bytes={length}"));
            }
            "await-error" => {
                wait_for(self.socket()?, PollFlags::empty())?;
                let error = socket::getsockopt(self.socket()?, sockopt::SocketError)?;
                return Ok(format!("errno={:?}", Errno::from_raw(error)));
            }
            "close" => calls::peer_closes_socket_outer(self.taken_socket()?)?,
            "shutdown-write" => calls::peer_shuts_socket_outer(self.socket()?, Shutdown::Write)?,
            "shutdown-both" => calls::peer_shuts_socket_outer(self.socket()?, Shutdown::Both)?,
            "disconnect" => calls::peer_disconnects_socket_outer(self.socket()?)?,
            "dup2-over" => calls::peer_replaces_socket_outer(self.taken_socket()?)?,
            "close-range" => calls::peer_closes_range_outer(self.taken_socket()?)?,
            "thread-close" => return death::close_on_thread(self.taken_socket()?),
            "close-under-receive" => return death::close_under_receive(self.taken_socket()?),
            "fork-close" => return death::close_in_child(self.taken_socket()?),
            "exec" => return Err(Command::new(env::current_exe()?).arg(&self.name).exec().into()),
            "exit" => process::exit(words.next()?),
            "raise" => death::raise(words.next()?)?,
            "send-on" => death::send_on(words.next()?)?,
            "die-in-thread" => death::die_in_thread(words.next()?)?,
            "burst" => return burst::connect_all(words.address()?, words.next()?),
            "close-many" => return burst::close_all(words.address()?, words.next()?),
            "serve" => return burst::serve(self.listener()?, words.next()?),
            "ring-close" => {
                uring::submit(self.socket()?.as_raw_fd(), uring::Operation::Close, words.next()?)?;
                // The number may belong to another descriptor by now.
                let _ = self.taken_socket()?.into_raw_fd();
            }
            "ring-shutdown" => {
                uring::submit(self.socket()?.as_raw_fd(), uring::Operation::Shutdown, words.next()?)?;
            }
            _ => return self.obey_about_options(&verb, words),
        }
        Ok(String::new())
    }

    fn listener(&self) -> Result<&TcpListener> {
        self.listener.as_ref().context("there is no listener")
    }

    fn socket(&self) -> Result<&TcpStream> {
        self.socket.as_ref().context("there is no connection")
    }

    fn taken_socket(&mut self) -> Result<OwnedFd> {
        Ok(taken(&mut self.socket)?.into())
    }

    /// Keeps a connection, and returns its addresses.
    fn keep(&mut self, socket: TcpStream) -> Result<String> {
        let facts = format!("local={} remote={}", socket.local_addr()?, socket.peer_addr()?);
        self.socket = Some(socket);
        Ok(facts)
    }
}

fn taken<T>(holder: &mut Option<T>) -> Result<T> {
    holder.take().context("there is nothing to close")
}

fn new_socket(address: SocketAddr, protocol: libc::c_int) -> nix::Result<TcpStream> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: the call takes only numbers.
    let socket = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, protocol) };
    // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
    Errno::result(socket).map(|socket| unsafe { TcpStream::from_raw_fd(socket) })
}

/// Connects to the address in the order. The local address is known even if the attempt fails.
fn connection(words: &mut Words, protocol: libc::c_int) -> Result<(SocketAddr, nix::Result<TcpStream>)> {
    let address = words.address()?;
    let socket = new_socket(address, protocol)?;
    let result = calls::peer_connects_socket_outer(&socket, address);
    Ok((socket.local_addr()?, result.map(|()| socket)))
}

/// A socket that is connected to itself.
fn connection_to_itself(address: SocketAddr, protocol: libc::c_int) -> Result<TcpStream> {
    let socket = new_socket(address, protocol)?;
    socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    calls::peer_connects_socket_outer(&socket, socket.local_addr()?)?;
    Ok(socket)
}

/// A connection whose first bytes are sent with the SYN (TCP Fast Open).
fn fast_connection(address: SocketAddr, protocol: libc::c_int, bytes: usize) -> Result<TcpStream> {
    let socket = new_socket(address, protocol)?;
    if calls::peer_connects_fast_outer(&socket, address, &vec![b'x'; bytes])? < bytes {
        bail!("not all was sent");
    }
    Ok(socket)
}

/// Sends until the send buffer is full.
fn fill(mut socket: &TcpStream) -> Result<String> {
    socket.set_nonblocking(true)?;
    let mut written = 0;
    let full = loop {
        match socket.write(&[b'x'; 16_384]) {
            Ok(bytes) => written += bytes,
            Err(error) => break error,
        }
    };
    socket.set_nonblocking(false)?;
    if full.kind() == io::ErrorKind::WouldBlock { Ok(format!("bytes={written}")) } else { Err(errno(full)) }
}

/// Waits until the descriptor has one of these events or an error, which `poll` always reports.
fn wait_for(descriptor: &impl AsFd, events: PollFlags) -> Result<()> {
    poll(&mut [PollFd::new(descriptor.as_fd(), events)], PollTimeout::NONE)?;
    Ok(())
}

/// The kernel's name for an I/O error, which is what tests compare.
fn errno(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(number) => anyhow!("{:?}", Errno::from_raw(number)),
        None => error.into(),
    }
}
