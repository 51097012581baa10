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
    fn nonsense_is_an_error_and_no_panic() {
        for bytes in [&[0xff_u8; 64][..], &[0; 16], &[1, 2, 3], &[20, 0, 0, 0, 3, 0, 0, 0, 0, 0]] {
            assert!(read(bytes, &mut |entry| panic!("{entry:?}")).is_err(), "{bytes:?}");
        }
        assert_eq!(read(&[], &mut |_| ()).unwrap(), Dump::Goes);
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

    /// The two ways to ask see the same, but for what only one of them tells.
    #[test]
    fn the_kernel_and_proc_agree() {
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
        let (mut asked, mut read) = (Vec::new(), Vec::new());
        let ours = |entry: &Entry| entry.local.port == port || entry.remote.port == port;
        // The ACK of the FIN may be delayed.
        while !asked.iter().any(|entry: &Entry| entry.state == State::FinWait2) {
            asked.clear();
            dump(|entry| asked.extend(Some(entry).filter(ours))).unwrap();
        }
        table::read(std::process::id(), |entry| read.extend(Some(entry).filter(ours))).unwrap();
        assert_eq!(asked.len(), 3, "{asked:?}");
        assert!(asked.iter().all(|entry| entry.cookie.is_some()));
        assert!(asked.iter().all(|entry| entry.is_lingering() == entry.info.is_some()));
        for entry in asked.iter_mut().chain(&mut read) {
            (entry.cookie, entry.info) = (None, None);
        }
        asked.sort_by_key(|entry| entry.state);
        read.sort_by_key(|entry| entry.state);
        assert_eq!(asked, read);
    }
}
