//! Large numbers of connections, opened and closed as fast as possible.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener},
};

use anyhow::Result;

use crate::{DEFAULT_PROTOCOL, calls, new_socket, options::linger};

/// The data sent over each connection.
const GREETING: &[u8] = b"0123456789";

/// Opens and closes this many connections in sequence; every second one is closed with a RST. Returns their
/// local ports in order.
pub(crate) fn connect_all(address: SocketAddr, count: u32) -> Result<String> {
    let mut ports = Vec::new();
    for number in 0..count {
        let mut socket = new_socket(address, DEFAULT_PROTOCOL)?;
        calls::peer_connects_socket_outer(&socket, address)?;
        ports.push(socket.local_addr()?.port().to_string());
        socket.write_all(GREETING)?;
        if number % 2 == 1 {
            linger(&socket, 0)?;
        }
        calls::peer_closes_socket_outer(socket.into())?;
    }
    Ok(format!("bytes={} ports={}", GREETING.len(), ports.join(",")))
}

/// Opens and closes this many connections in sequence, each of which leaves a port in `TIME_WAIT` behind.
pub(crate) fn close_all(address: SocketAddr, count: u32) -> Result<String> {
    for _ in 0..count {
        let mut socket = new_socket(address, DEFAULT_PROTOCOL)?;
        calls::peer_connects_socket_outer(&socket, address)?;
        socket.shutdown(Shutdown::Write)?;
        // Waits until the server has closed as well and can accept the next one.
        socket.read_to_end(&mut Vec::new())?;
    }
    Ok(String::new())
}

/// Accepts this many connections, reads each to its end, and closes it. Returns how many ended with a FIN.
pub(crate) fn serve(listener: &TcpListener, count: u32) -> Result<String> {
    let mut orderly = 0;
    for _ in 0..count {
        let mut socket = calls::peer_accepts_socket_outer(listener)?;
        orderly += u32::from(socket.read_to_end(&mut Vec::new()).is_ok());
        calls::peer_closes_socket_outer(socket.into())?;
    }
    Ok(format!("orderly={orderly}"))
}
