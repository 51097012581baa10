//! The accepting half.

use std::{
    io::{Read, Write, pipe},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{fd::AsRawFd, unix::net::UnixStream},
};

use anyhow::Result;
use nix::poll::PollFlags;
use tcpclose_tests::{bed::Side, crowd::Kind, descriptors};

use crate::{GREETING, await_end, await_events, claim, forked, linger_not};

/// Accepts until nobody comes any more.
pub(crate) fn serve(listener: &TcpListener) -> Result<()> {
    let (mut channel, far) = UnixStream::pair()?;
    let receiver = forked(|| {
        // The other end goes with the worker; with a copy of it here, it never would.
        nix::unistd::close(channel.as_raw_fd())?;
        receive_all(&far)
    })?;
    drop(far);
    // An error: the listener is no listener any more.
    while let Ok((socket, from)) = listener.accept() {
        let kind = Kind::of(from.port());
        let to = socket.local_addr()?;
        match kind {
            Kind::ReceiverCloses | Kind::ReceiverIsReset => {
                descriptors::send(&channel, &socket)?;
                drop(socket);
                // Now nobody else has it.
                channel.write_all(&[GREETING])?;
            }
            Kind::ChildCloses => close_in_child(socket, to, from)?,
            _ => {
                claim(Side::Server, kind, to, from)?;
                hold(kind, socket)?;
            }
        }
    }
    drop(channel);
    await_end(receiver)
}

/// Greets, waits for what the client does if it is the client that acts, and closes.
fn hold(kind: Kind, mut socket: TcpStream) -> Result<()> {
    socket.write_all(&[GREETING])?;
    match kind {
        Kind::ServerCloses | Kind::ReceiverCloses | Kind::ChildCloses => {}
        Kind::ClientResets | Kind::ClientReadsNot | Kind::ReceiverIsReset => {
            await_events(&socket, PollFlags::empty())?;
        }
        Kind::HeirIsReset => {
            socket.read_exact(&mut [0])?;
            linger_not(&socket)?;
        }
        _ => {
            socket.read_to_end(&mut Vec::new())?;
        }
    }
    Ok(())
}

/// Has a child close last.
fn close_in_child(socket: TcpStream, to: SocketAddr, from: SocketAddr) -> Result<()> {
    let (mut alone, kept) = pipe()?;
    let theirs = kept.as_raw_fd();
    // What the child takes along is the worker's no more when this returns.
    let child = forked(move || {
        nix::unistd::close(theirs)?;
        // It ends when the worker has closed its own of everything.
        alone.read_to_end(&mut Vec::new())?;
        claim(Side::Server, Kind::ChildCloses, to, from)?;
        hold(Kind::ChildCloses, socket)
    })?;
    drop(kept);
    await_end(child)
}

/// Takes connections that others have accepted, until no more can come.
fn receive_all(mut channel: &UnixStream) -> Result<()> {
    while let Some(socket) = descriptors::receive(channel)? {
        channel.read_exact(&mut [0])?;
        let socket = TcpStream::from(socket);
        let from = socket.peer_addr()?;
        let kind = Kind::of(from.port());
        claim(Side::Server, kind, socket.local_addr()?, from)?;
        hold(kind, socket)?;
    }
    Ok(())
}
