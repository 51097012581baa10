//! TCP segments that no socket sends.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
};

use anyhow::Result;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, sendto, setsockopt,
    socket, sockopt,
};

use crate::netns::Namespace;

/// The ACK flag, which all segments of a connection but the first have.
pub const ACK: u8 = 0x10;
/// The RST flag.
pub const RST: u8 = 0x04;

/// Length of a header without options.
const HEADER: u8 = 20;
const PROTOCOL: u8 = 6;
/// Offset of the checksum in the header.
const CHECKSUM: usize = 16;

/// A segment without data.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Its source address, which may be forged.
    pub from: SocketAddr,
    /// Its destination address.
    pub to: SocketAddr,
    /// Its flags.
    pub flags: u8,
    /// Its sequence number.
    pub sequence: u32,
    /// Its TTL; `None` for the default of the namespace.
    pub ttl: Option<u8>,
}

/// Sends a segment from a namespace that has its source address. A reply finds no socket there.
pub fn send(namespace: &Namespace, segment: Segment) -> Result<()> {
    let Segment { from, to, flags, sequence, ttl } = segment;
    let (acknowledged, window) = (2000_u32, 1000_u16);
    let mut segment = Vec::new();
    segment.extend(from.port().to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend(sequence.to_be_bytes());
    segment.extend(acknowledged.to_be_bytes());
    segment.extend([(HEADER / 4) << 4, flags]);
    segment.extend(window.to_be_bytes());
    // Checksum and urgent pointer.
    segment.extend([0; 4]);
    let checksum =
        checksum(&[octets(from.ip()), octets(to.ip()), vec![0, PROTOCOL, 0, HEADER], segment.clone()]);
    segment[CHECKSUM..CHECKSUM + 2].copy_from_slice(&checksum.to_be_bytes());

    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    namespace.inside(|| {
        let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp)?;
        // Raw sockets take addresses without a port; the segment contains the ports.
        let plain = |address: SocketAddr| SockaddrStorage::from(SocketAddr::new(address.ip(), 0));
        bind(socket.as_raw_fd(), &plain(from))?;
        match (ttl.map(i32::from), family) {
            (Some(ttl), AddressFamily::Inet) => setsockopt(&socket, sockopt::Ipv4Ttl, &ttl)?,
            (Some(ttl), _) => setsockopt(&socket, sockopt::Ipv6Ttl, &ttl)?,
            (None, _) => {}
        }
        sendto(socket.as_raw_fd(), &segment, &plain(to), MsgFlags::empty())?;
        Ok(())
    })
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The Internet checksum of several parts, each of an even length.
fn checksum(parts: &[Vec<u8>]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum: u32 = words.map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::checksum;

    #[test]
    fn checksum_of_a_header_with_its_checksum_is_zero() {
        let header =
            [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7];
        assert_eq!(checksum(&[header.to_vec()]), 0xb861);
    }
}
