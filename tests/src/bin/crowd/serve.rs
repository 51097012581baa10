//! The accepting side.

use std::{
    io::{Read, Write, pipe},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{fd::AsRawFd, unix::net::UnixStream},
};

use anyhow::Result;
use nix::poll::PollFlags;
use tcpclose_tests::{bed::Side, crowd::Kind, descriptors};

use crate::{GREETING, await_end, await_events, claim, forked, linger_not};

/// Accepts connections until the listener is shut down.
pub(crate) fn serve(listener: &TcpListener) -> Result<()> {
    let (mut channel, far) = UnixStream::pair()?;
    let receiver = forked(|| {
        // The other end must be closed when the worker exits, which a copy here would prevent.
        nix::unistd::close(channel.as_raw_fd())?;
        receive_all(&far)
    })?;
    drop(far);
    // An error means that the listener has been shut down.
    while let Ok((socket, from)) = listener.accept() {
        let kind = Kind::of(from.port());
        let to = socket.local_addr()?;
        match kind {
            Kind::ReceiverCloses | Kind::ReceiverIsReset => {
                descriptors::send(&channel, &socket)?;
                drop(socket);
                // From here on no other process holds the connection.
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

/// Sends the greeting, waits for the client if the client acts first, and closes.
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

/// Makes a child close last.
fn close_in_child(socket: TcpStream, to: SocketAddr, from: SocketAddr) -> Result<()> {
    let (mut alone, kept) = pipe()?;
    let theirs = kept.as_raw_fd();
    // The worker no longer holds what the child has captured when this returns.
    let child = forked(move || {
        nix::unistd::close(theirs)?;
        // The read ends when the worker has closed its copies of everything.
        alone.read_to_end(&mut Vec::new())?;
        claim(Side::Server, Kind::ChildCloses, to, from)?;
        hold(Kind::ChildCloses, socket)
    })?;
    drop(kept);
    await_end(child)
}

/// Receives connections that other processes have accepted, until the channel is closed.
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
