//! Reads a `struct sock` through the offsets of the running kernel.

use aya_ebpf::programs::TracePointContext;
use tcpclose_common::{
    offsets::{ABSENT, RecordOffsets},
    record::{Address, RawEndpoints, RawSample, UNKNOWN_U32, UNKNOWN_U64, mapped},
    tcp::{AF_INET, AF_INET6, IPPROTO_TCP, sock_flag, state},
};

use crate::{
    kernel::{Object, member},
    maps::global,
};

/// The record of a classic tracepoint, which contains a socket's addresses on kernels without BTF.
#[derive(Clone, Copy)]
pub struct TracepointRecord<'a> {
    pub ctx: &'a TracePointContext,
    /// The places of its members.
    pub layout: RecordOffsets,
}

impl TracepointRecord<'_> {
    /// Reads a member; `None` if this kernel's record does not have it.
    #[inline(always)]
    pub fn get<T: Copy>(&self, offset: u16) -> Option<T> {
        use aya_ebpf::EbpfContext as _;
        member(self.ctx.as_ptr() as u64, offset)
    }
}

/// `S_IFMT` and `S_IFSOCK` of `include/uapi/linux/stat.h`.
const S_IFMT: u16 = 0o170_000;
const S_IFSOCK: u16 = 0o140_000;

/// The sock behind a file, if it is a TCP socket's.
#[inline(always)]
pub fn of_file(file: u64) -> Option<u64> {
    let inode: u64 = member(file, global!(STRUCTS.file_inode))?;
    let mode: u16 = member(inode, global!(STRUCTS.inode_mode))?;
    if mode & S_IFMT != S_IFSOCK {
        return None;
    }
    let socket: u64 = member(file, global!(STRUCTS.file_private))?;
    let sk: u64 = member(socket, global!(STRUCTS.socket_sk))?;
    let family: u16 = member(sk, global!(STRUCTS.sk_family))?;
    let is_tcp = (family == AF_INET || family == AF_INET6) && protocol(sk) == Some(IPPROTO_TCP);
    if is_tcp { Some(sk) } else { None }
}

/// A socket that a program runs for.
#[derive(Clone, Copy)]
pub struct Sock<O> {
    /// Its address, which is its key in the maps.
    pub address: u64,
    /// The pointer through which its members are read.
    pub object: O,
}

/// Fills in the ends of `sk`, from the sock itself if its layout is known, otherwise from the tracepoint's
/// record. Existing values stay if nothing better is found: a failed connect has lost its ports by the time
/// it ends.
#[inline(always)]
pub fn endpoints(sk: impl Object, record: Option<&TracepointRecord<'_>>, to: &mut RawEndpoints) {
    if to.local_port != 0 && to.remote_port != 0 {
        // They have been known since it was established, or since the SYN of a bound socket, and do not
        // change any more.
        return;
    }
    let Some(family) = member::<u16>(sk, global!(STRUCTS.sk_family)) else {
        if let Some(record) = record {
            endpoints_of_record(record, to);
        }
        return;
    };
    let mut local_port: u16 = member(sk, global!(STRUCTS.sk_num)).unwrap_or(0);
    if local_port == 0 && self::state(sk) != Some(state::TIME_WAIT) {
        // tcp_set_state() releases the port before it reports CLOSE: inet_put_port() clears one of its two
        // copies.
        local_port = member::<u16>(sk, global!(STRUCTS.sk_sport)).map_or(0, u16::from_be);
    }
    let remote_port = member::<u16>(sk, global!(STRUCTS.sk_dport)).map_or(0, u16::from_be);
    to.family = family;
    if local_port != 0 {
        to.local_port = local_port;
    }
    if let Some(net) = sk.follow(global!(STRUCTS.sk_net)) {
        to.netns = member(net, global!(STRUCTS.net_inum)).unwrap_or(UNKNOWN_U32);
    }
    if remote_port == 0 {
        // tcp_disconnect() and inet_hash_connect()'s failure clear the remote end.
        return;
    }
    to.remote_port = remote_port;
    if family == AF_INET6 {
        if let Some(local) = member::<Address>(sk, global!(STRUCTS.sk_v6_rcv_saddr))
            && let Some(remote) = member::<Address>(sk, global!(STRUCTS.sk_v6_daddr))
        {
            to.local = local;
            to.remote = remote;
        }
    } else if family == AF_INET {
        if let Some(local) = member(sk, global!(STRUCTS.sk_rcv_saddr)) {
            to.local = mapped(local);
        }
        if let Some(remote) = member(sk, global!(STRUCTS.sk_daddr)) {
            to.remote = mapped(remote);
        }
    }
}

/// Both shapes of record (see [`RecordOffsets`]).
#[inline(always)]
fn endpoints_of_record(record: &TracepointRecord<'_>, to: &mut RawEndpoints) {
    let layout = record.layout;
    if let Some(family) = record.get::<u16>(layout.family) {
        to.family = family;
    }
    if let Some(local) = record.get::<Address>(layout.saddr_v6)
        && let Some(remote) = record.get::<Address>(layout.daddr_v6)
    {
        let remote_port = record.get(layout.dport).unwrap_or(0);
        if remote_port != 0 {
            to.local = local;
            to.remote = remote;
            to.remote_port = remote_port;
        }
        let local_port = record.get(layout.sport).unwrap_or(0);
        if local_port != 0 {
            to.local_port = local_port;
        }
    } else {
        sockaddr(record, layout.local_sockaddr, &mut to.family, &mut to.local, &mut to.local_port);
        sockaddr(record, layout.remote_sockaddr, &mut to.family, &mut to.remote, &mut to.remote_port);
    }
}

/// `struct sockaddr_in` and `struct sockaddr_in6`: family, port in network order, then the address at 4 or
/// at 8.
#[inline(always)]
fn sockaddr(record: &TracepointRecord<'_>, at: u16, family: &mut u16, address: &mut Address, port: &mut u16) {
    if at == ABSENT {
        return;
    }
    *family = record.get(at).unwrap_or(0);
    *port = record.get::<u16>(at + 2).map_or(0, u16::from_be);
    if *family == AF_INET6 {
        if let Some(found) = record.get(at + 8) {
            *address = found;
        }
    } else if *family == AF_INET
        && let Some(found) = record.get(at + 4)
    {
        *address = mapped(found);
    }
}

/// Whether a process holds the socket's lock, so that the current task is the one that acts, or that
/// processes the backlog while it holds the lock. `None` if that cannot be read.
#[inline(always)]
pub fn owned(sk: impl Object) -> Option<bool> {
    member::<i32>(sk, global!(STRUCTS.sk_lock_owned)).map(|owned| owned != 0)
}

/// `sk_flags`, `enum sock_flags`.
#[inline(always)]
pub fn flags(sk: impl Object) -> Option<u64> {
    member(sk, global!(STRUCTS.sk_flags))
}

/// Address of the `struct socket`; 0 for a socket that has none, because it is not accepted yet or is
/// orphaned.
#[inline(always)]
pub fn socket(sk: impl Object) -> Option<u64> {
    member(sk, global!(STRUCTS.sk_socket))
}

/// Inode number of the socket's descriptor, as `/proc/PID/fd` shows it; 0 if it has none.
#[inline(always)]
pub fn inode(sk: impl Object) -> u64 {
    match socket(sk) {
        Some(socket) if socket != 0 => member(socket, global!(STRUCTS.socket_inode)).unwrap_or(0),
        _ => 0,
    }
}

/// The socket's cookie, if it was requested from the kernel before; otherwise 0.
#[inline(always)]
pub fn cookie(sk: impl Object) -> u64 {
    member(sk, global!(STRUCTS.sk_cookie)).unwrap_or(0)
}

/// Whether `sk` still has these ends; `None` if that cannot be read.
#[inline(always)]
pub fn has_ends(sk: impl Object, ends: &RawEndpoints) -> Option<bool> {
    let local: u16 = member(sk, global!(STRUCTS.sk_num))?;
    let remote: u16 = member(sk, global!(STRUCTS.sk_dport))?;
    Some(local == ends.local_port && u16::from_be(remote) == ends.remote_port)
}

/// The kernel's current counters of this socket.
#[inline(always)]
pub fn sample(sk: impl Object, jiffies: u64, to: &mut RawSample) {
    // SOCK_DONE says that the FIN was received. It takes a sequence number, which bytes_received and rcv_nxt
    // count.
    let fin = (flags(sk).unwrap_or(0) / sock_flag::DONE) as u32 & 1;
    if let Some(sent) = member::<u64>(sk, global!(STRUCTS.tcp_bytes_sent))
        && let Some(again) = member::<u64>(sk, global!(STRUCTS.tcp_bytes_retrans))
    {
        to.bytes_sent = sent.wrapping_sub(again);
    }
    if let Some(received) = member::<u64>(sk, global!(STRUCTS.tcp_bytes_received)) {
        to.bytes_received = received.saturating_sub(u64::from(fin));
    }
    to.retransmits = member(sk, global!(STRUCTS.tcp_total_retrans)).unwrap_or(UNKNOWN_U32);
    to.rtt_us = member::<u32>(sk, global!(STRUCTS.tcp_srtt_us)).map_or(UNKNOWN_U32, |srtt| srtt >> 3);
    if let Some(next) = member::<u32>(sk, global!(STRUCTS.tcp_rcv_nxt))
        && let Some(copied) = member::<u32>(sk, global!(STRUCTS.tcp_copied_seq))
    {
        to.untaken = next.wrapping_sub(copied);
        to.unread = to.untaken.saturating_sub(fin);
    }
    if let Some(written) = member::<u32>(sk, global!(STRUCTS.tcp_write_seq))
        && let Some(acknowledged) = member::<u32>(sk, global!(STRUCTS.tcp_snd_una))
    {
        to.unacknowledged = written.wrapping_sub(acknowledged);
    }
    to.user_timeout = member(sk, global!(STRUCTS.icsk_user_timeout)).unwrap_or(UNKNOWN_U32);
    let now = jiffies as u32;
    to.sent_ago =
        member::<u32>(sk, global!(STRUCTS.tcp_lsndtime)).map_or(UNKNOWN_U32, |at| now.wrapping_sub(at));
    to.received_ago =
        member::<u32>(sk, global!(STRUCTS.icsk_lrcvtime)).map_or(UNKNOWN_U32, |at| now.wrapping_sub(at));
}

/// What is waiting to be sent: sequence numbers that were not sent yet, and probes of the peer's window that
/// the peer has not answered.
#[inline(always)]
pub fn waiting(sk: u64) -> (u32, u32) {
    let unsent = match (
        member::<u32>(sk, global!(STRUCTS.tcp_write_seq)),
        member::<u32>(sk, global!(STRUCTS.tcp_snd_nxt)),
    ) {
        (Some(written), Some(next)) => written.wrapping_sub(next),
        _ => UNKNOWN_U32,
    };
    (unsent, member::<u8>(sk, global!(STRUCTS.icsk_probes_out)).map_or(UNKNOWN_U32, u32::from))
}

/// Facts about the end of a socket: `(sk_err, sk_shutdown, linger time in jiffies)`.
#[inline(always)]
pub fn end(sk: impl Object) -> (i32, u8, u64) {
    (
        member(sk, global!(STRUCTS.sk_err)).unwrap_or(i32::MIN),
        member(sk, global!(STRUCTS.sk_shutdown)).unwrap_or(0),
        member(sk, global!(STRUCTS.sk_lingertime)).unwrap_or(UNKNOWN_U64),
    )
}

/// Whether the socket must not wait in FIN_WAIT2 once it is closed: `TCP_LINGER2` is negative.
#[inline(always)]
pub fn has_no_fin_wait2(sk: impl Object) -> bool {
    member::<i32>(sk, global!(STRUCTS.tcp_linger2)).is_some_and(|jiffies| jiffies < 0)
}

/// `sk_protocol`; `None` if it cannot be read.
#[inline(always)]
pub fn protocol(sk: impl Object) -> Option<u16> {
    member(sk, global!(STRUCTS.sk_protocol))
}

/// The current `sk_state`.
#[inline(always)]
pub fn state(sk: impl Object) -> Option<u8> {
    member(sk, global!(STRUCTS.sk_state))
}
