//! Requests the TCP sockets of this thread's network namespace from the kernel: `sock_diag(7)`.

use std::{io, net::SocketAddr as Address};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP},
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, Timer, nlas::Nla},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

use super::entry::{Info, ListedSocket, is_in_teardown};
use crate::{
    event::{Endpoint, State},
    ingest::life::SendQueue,
};

/// The kernel sends at most 32 KiB at a time (`netlink_dump()`, `net/netlink/af_netlink.c`), unless the
/// reader has offered a larger buffer before. The message about one socket takes about 500 bytes.
const BUFFER: usize = 32 * 1024;

/// Calls `each` for every TCP socket: first for listeners, last for those in a teardown state. Only these
/// come with `struct tcp_info`, because the kernel locks each socket to fill it in.
///
/// # Errors
/// The kernel has no `sock_diag` (`CONFIG_INET_DIAG`), or its answer cannot be parsed.
pub fn dump(each: impl FnMut(ListedSocket)) -> io::Result<()> {
    let listening = |state| state == State::Listen;
    let others = |state| !listening(state) && !is_in_teardown(state);
    dump_each(
        &[
            (mask(listening), ExtensionFlags::empty()),
            (mask(others), ExtensionFlags::empty()),
            (mask(is_in_teardown), ExtensionFlags::INFO),
        ],
        each,
    )
}

/// Calls `each` for every TCP socket in a teardown state.
///
/// # Errors
/// Those of [`dump`].
pub fn dump_teardown(each: impl FnMut(ListedSocket)) -> io::Result<()> {
    dump_each(&[(mask(is_in_teardown), ExtensionFlags::INFO)], each)
}

fn dump_each(
    requests: &[(StateFlags, ExtensionFlags)],
    mut each: impl FnMut(ListedSocket),
) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    for (states, extensions) in requests {
        for (family, socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            let request = InetRequest {
                family,
                protocol: IPPROTO_TCP,
                extensions: extensions.clone(),
                states: states.clone(),
                socket_id,
            };
            match request_dump(&socket, request, &mut each) {
                // A kernel without IPv6.
                Err(error) if family == AF_INET6 && error.raw_os_error() == Some(libc::ENOENT) => {}
                result => result?,
            }
        }
    }
    Ok(())
}

/// The mask of the states for which `satisfies` is true. The crate's own flags lack `NEW_SYN_RECV`.
fn mask(satisfies: impl Fn(State) -> bool) -> StateFlags {
    let numbers = (1..=12_u8).filter(|number| State::from_kernel(*number).is_some_and(&satisfies));
    StateFlags::from_bits_retain(numbers.fold(0, |mask, number| mask | 1 << number))
}

/// Sends a request and reads the answer to its end.
fn request_dump(
    socket: &Socket,
    request: InetRequest,
    each: &mut impl FnMut(ListedSocket),
) -> io::Result<()> {
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
        // With this flag the result is the length of the message, even if it did not fit.
        let length = socket.recv(&mut buffer, libc::MSG_TRUNC)?;
        if length > buffer.len() {
            return Err(io::Error::other("a message of sock_diag is longer than 32 KiB"));
        }
        if read(&buffer, each)? == Dump::Complete {
            return Ok(());
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Dump {
    Continues,
    Complete,
}

/// Reads the messages in one buffer.
fn read(mut bytes: &[u8], each: &mut impl FnMut(ListedSocket)) -> io::Result<Dump> {
    while !bytes.is_empty() {
        let message = NetlinkMessage::<SockDiagMessage>::deserialize(bytes).map_err(io::Error::other)?;
        match message.payload {
            NetlinkPayload::Done(done) if done.code < 0 => {
                return Err(io::Error::from_raw_os_error(-done.code));
            }
            NetlinkPayload::Done(_) => return Ok(Dump::Complete),
            NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
            NetlinkPayload::Overrun(_) => return Err(io::Error::other("a message of sock_diag was lost")),
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                // An unknown state is not a teardown state, so the socket can be ignored.
                if let Some(entry) = entry(&response) {
                    each(entry);
                }
            }
            _ => {}
        }
        // Messages are aligned to four bytes.
        let length = (message.header.length as usize).next_multiple_of(4).max(4);
        bytes = bytes.get(length..).unwrap_or_default();
    }
    Ok(Dump::Continues)
}

fn entry(response: &InetResponse) -> Option<ListedSocket> {
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
    Some(ListedSocket {
        state: State::from_kernel(header.state)?,
        local: endpoint(Address::new(id.source_address, id.source_port)),
        remote: endpoint(Address::new(id.destination_address, id.destination_port)),
        inode: header.inode.into(),
        recv_queue: header.recv_queue,
        send_queue: nlas.iter().find_map(|attribute| match attribute {
            Nla::TcpInfo(info) => Some(SendQueue {
                unsent: info.notsent_bytes,
                in_flight: header.send_queue.saturating_sub(info.notsent_bytes),
                probes: info.probes.into(),
            }),
            _ => None,
        }),
        is_remnant: header.timer == Some(Timer::TimeWait),
        cookie: cookie(id.cookie),
        info,
    })
}

/// Converts an address; IPv4-mapped addresses become IPv4 addresses.
pub fn endpoint(address: Address) -> Endpoint {
    Endpoint { address: address.ip().to_canonical(), port: address.port() }
}

/// Two 32-bit halves, the lower one first (`sock_diag_save_cookie()`, `net/core/sock_diag.c`). All ones mean
/// none.
fn cookie(bytes: [u8; 8]) -> Option<u64> {
    let half = |at: usize| u32::from_ne_bytes(std::array::from_fn(|index| bytes[at + index]));
    let (low, high) = (half(0), half(4));
    Some(u64::from(low) | u64::from(high) << 32).filter(|cookie| !matches!(*cookie, 0 | u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::sockets::table;

    #[test]
    fn malformed_messages_are_errors() {
        for bytes in [&[0xff_u8; 64][..], &[0; 16], &[1, 2, 3], &[20, 0, 0, 0, 3, 0, 0, 0, 0, 0]] {
            assert!(read(bytes, &mut |entry| panic!("{entry:?}")).is_err(), "{bytes:?}");
        }
        assert_eq!(read(&[], &mut |_| ()).unwrap(), Dump::Continues);
    }

    #[test]
    fn cookies() {
        assert_eq!(cookie([0xff; 8]), None);
        assert_eq!(cookie([0; 8]), None);
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&7_u32.to_ne_bytes());
        bytes[4..].copy_from_slice(&1_u32.to_ne_bytes());
        assert_eq!(cookie(bytes), Some(0x1_0000_0007));
    }

    /// Both sources list the same sockets, apart from the facts that only one of them has.
    #[test]
    fn the_kernel_and_proc_agree() {
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
        let (mut dumped, mut read) = (Vec::new(), Vec::new());
        let ours = |entry: &ListedSocket| entry.local.port == port || entry.remote.port == port;
        // The ACK of the FIN may be delayed.
        while !dumped.iter().any(|entry: &ListedSocket| entry.state == State::FinWait2) {
            dumped.clear();
            dump(|entry| dumped.extend(Some(entry).filter(ours))).unwrap();
        }
        table::read(std::process::id(), |entry| read.extend(Some(entry).filter(ours))).unwrap();
        assert_eq!(dumped.len(), 3, "{dumped:?}");
        assert!(dumped.iter().all(|entry| entry.cookie.is_some()));
        assert!(dumped.iter().all(|entry| entry.is_in_teardown() == entry.info.is_some()));
        assert!(dumped.iter().all(|entry| entry.info.is_some() == entry.send_queue.is_some()));
        for entry in dumped.iter_mut().chain(&mut read) {
            (entry.cookie, entry.info, entry.send_queue) = (None, None, None);
        }
        dumped.sort_by_key(|entry| entry.state);
        read.sort_by_key(|entry| entry.state);
        assert_eq!(dumped, read);
    }
}
