//! Times to live where fentry is not available: they are read from packets, and kept until a hook on the
//! socket needs them.

use tcpclose_common::record::{Address, RawEndpoints, UNKNOWN_U32, mapped};

use crate::{
    kernel::{member, read},
    maps::{TTLS, Ttls, Tuple, global},
    packet,
};

/// Bits of the TCP header's fourteenth byte (RFC 9293, 3.1).
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const IPPROTO_TCP: u8 = 6;

/// Records the time to live of a received packet if it is a TCP segment with SYN or RST.
#[inline(always)]
pub fn seen(skb: u64) {
    let Some(head) = member::<u64>(skb, global!(STRUCTS.skb_head)) else { return };
    let Some(network) = member::<u16>(skb, global!(STRUCTS.skb_network_header)) else { return };
    let ip = head + u64::from(network);
    let Some(first) = read::<u8>(ip) else { return };
    // RFC 791, 3.1 and RFC 8200, 3. IPv6 extension headers are not followed: TCP seldom has any.
    let (protocol, ttl, tcp) = match first >> 4 {
        4 => (9, 8, ip + u64::from(first & 0xf) * 4),
        6 => (6, 7, ip + 40),
        _ => return,
    };
    if read::<u8>(ip + protocol) != Some(IPPROTO_TCP) {
        return;
    }
    let flags = read::<u8>(tcp + 13).unwrap_or(0);
    if flags & (SYN | RST) == 0 {
        return;
    }
    let Some(ttl) = read::<u8>(ip + ttl) else { return };
    let mut tuple = Tuple { local: [0; 4], remote: [0; 4], local_port: 0, remote_port: 0, netns: 0 };
    if first >> 4 == 4 {
        tuple.remote = mapped(read(ip + 12).unwrap_or(0));
        tuple.local = mapped(read(ip + 16).unwrap_or(0));
    } else {
        tuple.remote = read::<Address>(ip + 8).unwrap_or([0; 4]);
        tuple.local = read::<Address>(ip + 24).unwrap_or([0; 4]);
    }
    tuple.remote_port = read::<u16>(tcp).map_or(0, u16::from_be);
    tuple.local_port = read::<u16>(tcp + 2).map_or(0, u16::from_be);
    tuple.netns = packet::netns(skb).unwrap_or(UNKNOWN_U32);
    let mut ttls = match TTLS.get_ptr(tuple) {
        // SAFETY: a valid map value.
        Some(known) => unsafe { *known },
        None => Ttls { handshake: 0, reset: 0, reserved: [0; 6] },
    };
    if flags & RST != 0 {
        ttls.reset = ttl;
    } else {
        ttls.handshake = ttl;
    }
    // Without room, the time to live is null.
    let _ = TTLS.insert(tuple, ttls, 0);
}

/// The times to live of a connection; zeros if none are known. With `forget` they are then removed.
#[inline(always)]
pub fn of(ends: &RawEndpoints, forget: bool) -> Ttls {
    let none = Ttls { handshake: 0, reset: 0, reserved: [0; 6] };
    if global!(PARAMS.ttl) == 0 {
        return none;
    }
    let tuple = Tuple {
        local: ends.local,
        remote: ends.remote,
        local_port: ends.local_port,
        remote_port: ends.remote_port,
        netns: ends.netns,
    };
    let Some(known) = TTLS.get_ptr(tuple) else {
        return none;
    };
    // SAFETY: a valid map value.
    let known = unsafe { *known };
    if forget {
        let _ = TTLS.remove(tuple);
    }
    known
}
