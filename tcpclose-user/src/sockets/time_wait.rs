//! Sockets in `TIME_WAIT`, counted by destination: they have no owner, and only their number matters.

use std::{collections::HashMap, net::IpAddr};

use super::entry::ListedSocket;
use crate::event::Endpoint;

/// The number of destinations, and of local ports, that are counted separately in a namespace. The rest is
/// counted together.
const MAX_KEYS: usize = 32_768;

/// The sockets in `TIME_WAIT` of one network namespace.
#[derive(Clone, Debug, Default)]
pub struct TimeWait {
    /// The number of all of them.
    pub total: u64,
    /// Outgoing connections, by local address and destination. Each occupies a port that cannot be used for
    /// another connection from that address to that destination.
    outgoing: HashMap<(IpAddr, Endpoint), u32>,
    /// Incoming connections, by local port. They occupy no port that could be used for something else.
    incoming: HashMap<u16, u32>,
    /// Those that are in neither map, because it was full.
    pub others: u64,
}

/// The sockets in `TIME_WAIT` from one address to one destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The local address.
    pub from: IpAddr,
    /// The destination.
    pub to: Endpoint,
    /// Their number, which is also the number of ports that they occupy.
    pub sockets: u32,
}

impl TimeWait {
    /// Counts a socket; `incoming` if this host had accepted the connection.
    pub fn add(&mut self, entry: &ListedSocket, incoming: bool) {
        self.total += 1;
        let counted = if incoming {
            count(&mut self.incoming, entry.local.port)
        } else {
            count(&mut self.outgoing, (entry.local.address, entry.remote))
        };
        self.others += u64::from(!counted);
    }

    /// The outgoing connections by destination, most first.
    pub fn outgoing(&self) -> Vec<Outgoing> {
        let all = self.outgoing.iter();
        let mut all: Vec<_> = all.map(|(&(from, to), &sockets)| Outgoing { from, to, sockets }).collect();
        all.sort_by_key(|one| (std::cmp::Reverse(one.sockets), one.to.address, one.to.port, one.from));
        all
    }

    /// The incoming connections by local port, most first.
    pub fn incoming(&self) -> Vec<(u16, u32)> {
        let mut all: Vec<_> = self.incoming.iter().map(|(&port, &sockets)| (port, sockets)).collect();
        all.sort_by_key(|&(port, sockets)| (std::cmp::Reverse(sockets), port));
        all
    }
}

/// Increments a count. Returns false if the map is full.
fn count<K: Eq + std::hash::Hash>(counts: &mut HashMap<K, u32>, key: K) -> bool {
    let has_room = counts.len() < MAX_KEYS;
    match counts.get_mut(&key) {
        Some(count) => *count += 1,
        None if has_room => {
            counts.insert(key, 1);
        }
        None => return false,
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{event::State, sockets::entry::tests::entry};

    #[test]
    fn counted_by_destination() {
        let mut all = TimeWait::default();
        let socket = |local, remote| {
            let mut socket = entry(State::TimeWait, 0, 0);
            (socket.local.port, socket.remote.port) = (local, remote);
            socket
        };
        for local in 40_000..40_003 {
            all.add(&socket(local, 443), false);
        }
        all.add(&socket(40_000, 80), false);
        all.add(&socket(8080, 50_000), true);
        all.add(&socket(8080, 50_001), true);
        let outgoing: Vec<_> = all.outgoing().iter().map(|one| (one.to.port, one.sockets)).collect();
        assert_eq!(outgoing, [(443, 3), (80, 1)]);
        assert_eq!(all.incoming(), [(8080, 2)]);
        assert_eq!((all.total, all.others), (6, 0));
    }

    #[test]
    fn bounded() {
        let mut all = TimeWait::default();
        let mut socket = entry(State::TimeWait, 0, 0);
        for number in 0..u32::try_from(MAX_KEYS).unwrap() + 5 {
            socket.remote.address = IpAddr::V4(number.into());
            all.add(&socket, false);
        }
        assert_eq!((all.outgoing().len(), all.others), (MAX_KEYS, 5));
    }
}
