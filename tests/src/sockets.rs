//! The kernel's own list of the TCP sockets in a network namespace, which is independent of the tool.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context, Result};

use crate::{
    bed::{Bed, Connection, Side},
    netns::Namespace,
    until,
};

/// The TCP states by the kernel's numbers. The kernel shows an entry in `TIME_WAIT` whose peer has not sent
/// its FIN yet as `FIN_WAIT2`.
pub const ESTABLISHED: u8 = 1;
/// See [`ESTABLISHED`].
pub const FIN_WAIT1: u8 = 4;
/// See [`ESTABLISHED`].
pub const FIN_WAIT2: u8 = 5;
/// See [`ESTABLISHED`].
pub const TIME_WAIT: u8 = 6;
/// See [`ESTABLISHED`].
pub const CLOSE_WAIT: u8 = 8;
/// See [`ESTABLISHED`].
pub const LAST_ACK: u8 = 9;
/// See [`ESTABLISHED`].
pub const LISTEN: u8 = 10;

/// The number of the `TIME_WAIT` timer in `/proc/net/tcp`.
pub const TIMER_OF_REMNANT: u8 = 3;
/// The number of the zero-window probe timer in `/proc/net/tcp`.
pub const TIMER_OF_PROBES: u8 = 4;

/// One socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// The local address.
    pub local: SocketAddr,
    /// The remote address.
    pub remote: SocketAddr,
    /// The TCP state; see [`ESTABLISHED`].
    pub state: u8,
    /// The pending timer; see [`TIMER_OF_REMNANT`].
    pub timer: u8,
    /// Unread bytes in the receive queue. A received FIN counts as one.
    pub untaken: u32,
    /// The inode of the socket, which descriptors refer to; 0 if it has none.
    pub inode: u64,
}

/// Lists all sockets of a namespace.
pub fn list(namespace: &Namespace) -> Result<Vec<Socket>> {
    let read = |file| fs::read_to_string(format!("/proc/thread-self/net/{file}"));
    let (ipv4, ipv6) = namespace.inside(|| Ok((read("tcp")?, read("tcp6")?)))?;
    ipv4.lines().skip(1).chain(ipv6.lines().skip(1)).map(parse).collect()
}

/// Waits until the sockets of a namespace satisfy the condition.
pub fn wait_until(namespace: &Namespace, what: &str, satisfied: impl Fn(&[Socket]) -> bool) -> Result<()> {
    until(what, || Ok(satisfied(&list(namespace)?).then_some(())))
}

/// Waits until the socket of a side is in this state.
pub fn wait_until_in(bed: &Bed, connection: &Connection, side: Side, state: u8) -> Result<()> {
    wait_for(bed, connection, side, &format!("the {side} is in state {state}"), |sockets| {
        sockets.iter().any(|socket| socket.state == state)
    })
}

/// Waits until the sockets that a side's host has for a connection satisfy the condition.
pub fn wait_for(
    bed: &Bed,
    connection: &Connection,
    side: Side,
    what: &str,
    satisfied: impl Fn(&[Socket]) -> bool,
) -> Result<()> {
    let (local, remote) = (connection.address(side), connection.address(side.other()));
    wait_until(bed.namespace(side), what, |sockets| {
        let of_connection = |socket: &&Socket| (socket.local, socket.remote) == (local, remote);
        satisfied(&sockets.iter().filter(of_connection).copied().collect::<Vec<_>>())
    })
}

/// The descriptors of a process that refer to a socket.
pub fn descriptors(pid: u32, socket: &Socket) -> Result<Vec<i32>> {
    let link = format!("socket:[{}]", socket.inode);
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        // The descriptor has been closed in the meantime.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        if target.as_os_str() == link.as_str() {
            found.push(entry.file_name().to_string_lossy().parse()?);
        }
    }
    Ok(found)
}

/// Parses a line:
/// `number: address:port address:port state sending:untaken timer:when retransmits user timeout inode …`,
/// where the first five fields are hexadecimal.
fn parse(line: &str) -> Result<Socket> {
    let mut words = line.split_whitespace().skip(1);
    let mut next = || words.next().with_context(|| format!("too short: {line}"));
    let (local, remote) = (parse_address(next()?)?, parse_address(next()?)?);
    let state = u8::from_str_radix(next()?, 16)?;
    let (_, untaken) = next()?.split_once(':').with_context(|| format!("no queues: {line}"))?;
    let untaken = u32::from_str_radix(untaken, 16)?;
    let (timer, _) = next()?.split_once(':').with_context(|| format!("no timer: {line}"))?;
    let timer = timer.parse()?;
    let inode = words.nth(3).with_context(|| format!("no inode: {line}"))?.parse()?;
    Ok(Socket { local, remote, state, timer, untaken, inode })
}

/// Parses an address, written as 32-bit words in the byte order of the host.
fn parse_address(text: &str) -> Result<SocketAddr> {
    let (address, port) = text.split_once(':').with_context(|| format!("not an address: {text}"))?;
    let mut bytes = Vec::new();
    for group in address.as_bytes().chunks(8) {
        bytes.extend(u32::from_str_radix(str::from_utf8(group)?, 16)?.to_ne_bytes());
    }
    let address = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(octets) => IpAddr::from(Ipv4Addr::from(octets)),
        Err(_) => Ipv6Addr::from(<[u8; 16]>::try_from(bytes.as_slice())?).into(),
    };
    Ok(SocketAddr::new(address.to_canonical(), u16::from_str_radix(port, 16)?))
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::{LISTEN, parse, parse_address};

    #[test]
    fn lines_become_sockets() {
        let line = "   0: 0100007F:0016 0200007F:D431 0A 00000000:0000001F \
                    00:00000000 00000000     0        0 4711 1";
        let ipv4 = parse(line).unwrap();
        assert_eq!(ipv4.local, "127.0.0.1:22".parse().unwrap());
        assert_eq!(ipv4.remote, "127.0.0.2:54321".parse().unwrap());
        assert_eq!((ipv4.state, ipv4.untaken, ipv4.inode), (LISTEN, 31, 4711));
        assert!(parse("1: 0100007F:0016 0200007F:D431").is_err());
        let address = parse_address("770000FD000000000000000001000000:0016").unwrap();
        assert_eq!(address, "[fd00:77::1]:22".parse().unwrap());
        let mapped = parse_address("0000000000000000FFFF00000100007F:0016").unwrap();
        assert_eq!(mapped, "127.0.0.1:22".parse().unwrap());
    }
}
