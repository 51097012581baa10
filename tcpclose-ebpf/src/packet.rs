//! Reads packets: their times to live, and the endpoints of a packet that a RST answers, because on some
//! kernels the tracepoint has no remote end for a RST of a listener or without a socket.

use tcpclose_common::{
    record::{Address, RawEndpoints, UNKNOWN_U32, mapped},
    tcp::{AF_INET, AF_INET6},
};

use crate::{
    kernel::{member, read},
    maps::global,
};

/// Fills in both ends as seen by the packet's receiver (its destination is the local end), and the network
/// namespace of the device that received it. It changes nothing if the packet cannot be read.
#[inline(always)]
pub fn endpoints(skb: u64, to: &mut RawEndpoints) {
    // Each result is tested before the next read. If all are read first, LLVM's code also reads what a failed
    // read left uninitialized, and kernels before 6.3 refuse that.
    let Some(head) = member::<u64>(skb, global!(STRUCTS.skb_head)) else { return };
    let Some(network) = member::<u16>(skb, global!(STRUCTS.skb_network_header)) else { return };
    let Some(transport) = member::<u16>(skb, global!(STRUCTS.skb_transport_header)) else { return };
    let ip = head + u64::from(network);
    let tcp = head + u64::from(transport);
    let Some(first) = read::<u8>(ip) else { return };
    // RFC 791, 3.1 and RFC 8200, 3: the places of version and addresses in the headers.
    match first >> 4 {
        4 => {
            let Some(source) = read::<u32>(ip + 12) else { return };
            let Some(destination) = read::<u32>(ip + 16) else { return };
            to.family = AF_INET;
            to.remote = mapped(source);
            to.local = mapped(destination);
        }
        6 => {
            let Some(source) = read::<Address>(ip + 8) else { return };
            let Some(destination) = read::<Address>(ip + 24) else { return };
            to.family = AF_INET6;
            to.remote = source;
            to.local = destination;
        }
        _ => return,
    }
    // RFC 9293, 3.1: source port, destination port.
    to.remote_port = read::<u16>(tcp).map_or(0, u16::from_be);
    to.local_port = read::<u16>(tcp + 2).map_or(0, u16::from_be);
    if to.netns == UNKNOWN_U32 {
        to.netns = netns(skb).unwrap_or(UNKNOWN_U32);
    }
}

/// The time to live of a packet, or its hop limit; 0 if it cannot be read.
#[inline(always)]
pub fn ttl(skb: u64) -> u8 {
    let Some(head) = member::<u64>(skb, global!(STRUCTS.skb_head)) else { return 0 };
    let Some(network) = member::<u16>(skb, global!(STRUCTS.skb_network_header)) else { return 0 };
    let ip = head + u64::from(network);
    let Some(first) = read::<u8>(ip) else { return 0 };
    // RFC 791, 3.1 and RFC 8200, 3.
    let at = match first >> 4 {
        4 => 8,
        6 => 7,
        _ => return 0,
    };
    read(ip + at).unwrap_or(0)
}

/// Inode number of the network namespace of the device that received a packet.
#[inline(always)]
pub fn netns(skb: u64) -> Option<u32> {
    let dev: u64 = member(skb, global!(STRUCTS.skb_dev))?;
    let net: u64 = member(dev, global!(STRUCTS.dev_net))?;
    member(net, global!(STRUCTS.net_inum))
}
