//! Asks the kernel for the TCP sockets of this thread's network namespace: `sock_diag(7)`.

use std::{io, net::SocketAddr as Address};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP},
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, Timer, nlas::Nla},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

use super::entry::{Entry, Info, is_lingering};
use crate::event::{Endpoint, State};

/// The kernel fills at most 32 KiB at a time (`netlink_dump()`, `net/netlink/af_netlink.c`), and more only if the reader
/// has once offered more. One answer takes some 500 bytes.
const BUFFER: usize = 32 * 1024;

/// Calls `each` for every TCP socket there is: listeners first, then those without teardown, then the lingering ones.
/// `struct tcp_info` comes with the last alone: the kernel locks each socket to fill it in.
///
/// # Errors
/// The kernel has no `sock_diag` (`CONFIG_INET_DIAG`), or says something that is not understood.
pub fn dump(mut each: impl FnMut(Entry)) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let listening = |state| state == State::Listen;
    let plain = |state| !listening(state) && !is_lingering(state);
    for (states, extensions) in [
        (mask(listening), ExtensionFlags::empty()),
        (mask(plain), ExtensionFlags::empty()),
        (mask(is_lingering), ExtensionFlags::INFO),
    ] {
        for (family, socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            let request = InetRequest {
                family,
                protocol: IPPROTO_TCP,
                extensions: extensions.clone(),
                states: states.clone(),
                socket_id,
            };
            match ask(&socket, request, &mut each) {
                // A kernel without IPv6 has none of its sockets either.
                Err(error) if family == AF_INET6 && error.raw_os_error() == Some(libc::ENOENT) => {}
                result => result?,
            }
        }
    }
    Ok(())
}

/// The states that satisfy. The crate's flags lack `NEW_SYN_RECV`, in which requests to connect are.
fn mask(satisfies: impl Fn(State) -> bool) -> StateFlags {
    let numbers = (1..=12_u8).filter(|number| State::from_kernel(*number).is_some_and(&satisfies));
    StateFlags::from_bits_retain(numbers.fold(0, |mask, number| mask | 1 << number))
}

fn ask(socket: &Socket, request: InetRequest, each: &mut impl FnMut(Entry)) -> io::Result<()> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut buffer = Vec::with_capacity(BUFFER);
    loop {
        buffer.clear();
        // With this flag the answer is the length of what came, and not of what there was room for.
        let length = socket.recv(&mut buffer, libc::MSG_TRUNC)?;
        if length > buffer.len() {
            return Err(io::Error::other("an answer of sock_diag is longer than 32 KiB"));
        }
        if read(&buffer, each)? == Dump::Over {
            return Ok(());
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Dump {
    Goes,
    Over,
}

/// Takes the messages out of one answer.
fn read(mut bytes: &[u8], each: &mut impl FnMut(Entry)) -> io::Result<Dump> {
    while !bytes.is_empty() {
        let message = NetlinkMessage::<SockDiagMessage>::deserialize(bytes).map_err(io::Error::other)?;
        match message.payload {
            NetlinkPayload::Done(done) if done.code < 0 => {
                return Err(io::Error::from_raw_os_error(-done.code));
            }
            NetlinkPayload::Done(_) => return Ok(Dump::Over),
            NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
            NetlinkPayload::Overrun(_) => return Err(io::Error::other("an answer of sock_diag was lost")),
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                // A state that this tool does not know yet is none that lingers.
                if let Some(entry) = entry(&response) {
                    each(entry);
                }
            }
            _ => {}
        }
        // Messages begin at multiples of four.
        let length = (message.header.length as usize).next_multiple_of(4).max(4);
        bytes = bytes.get(length..).unwrap_or_default();
    }
    Ok(Dump::Goes)
}

fn entry(response: &InetResponse) -> Option<Entry> {
    let InetResponse { header, nlas } = response;
    let id = &header.socket_id;
    let info = nlas.iter().find_map(|attribute| match attribute {
        Nla::TcpInfo(info) => Some(Info {
            last_data_sent: info.last_data_sent,
            last_data_received: info.last_data_recv,
            last_ack_received: info.last_ack_recv,
            bytes_sent: info.bytes_sent.saturating_sub(info.bytes_retrans),
            bytes_received: info.bytes_received,
            retransmits: info.total_retrans,
            rtt_us: info.rtt,
        }),
        _ => None,
    });
    Some(Entry {
        state: State::from_kernel(header.state)?,
        local: endpoint(Address::new(id.source_address, id.source_port)),
        remote: endpoint(Address::new(id.destination_address, id.destination_port)),
        inode: header.inode.into(),
        recv_queue: header.recv_queue,
        is_remnant: header.timer == Some(Timer::TimeWait),
        cookie: cookie(id.cookie),
        info,
    })
}

/// IPv4-mapped addresses are IPv4 ones.
pub fn endpoint(address: Address) -> Endpoint {
    Endpoint { address: address.ip().to_canonical(), port: address.port() }
}

/// Two numbers, the lower half first (`sock_diag_save_cookie()`, `net/core/sock_diag.c`). All ones stand for none.
fn cookie(bytes: [u8; 8]) -> Option<u64> {
    let [a, b, c, d, e, f, g, h] = bytes;
    let (low, high) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
    Some(u64::from(low) | u64::from(high) << 32).filter(|cookie| !matches!(*cookie, 0 | u64::MAX))
}
