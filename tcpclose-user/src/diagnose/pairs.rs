//! The two ends of a connection, joined by their addresses.
//!
//! An end waits for its peer, which may come from the same file or from another, so that both can be judged
//! together. It stops waiting when [`ROOM`] further ends have been read, or when findings are requested and
//! it is a minute old. It is then judged alone: its peer was not traced, or NAT changes the addresses between
//! the two.

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, SocketAddr},
};

use foldhash::fast::RandomState;

use crate::diagnose::end::End;

/// The number of ends that may wait for their peers; 16 MiB.
const ROOM: usize = 32_768;

/// The local and remote address of an end. Loopback addresses are unique only within one network namespace of
/// one host, which is then part of the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PairKey {
    local: PairAddress,
    remote: PairAddress,
    place: Option<(u16, u32)>,
}

/// An IPv6 or IPv4-mapped address, as a number, and a port: without the scope and the flow label of a
/// [`SocketAddr`], which differ between the two ends.
type PairAddress = (u128, u16);

impl PairKey {
    fn new(local: SocketAddr, remote: SocketAddr, source: u16, netns: u32) -> Self {
        // Two ends with the same address are on the same host.
        let is_local = local.ip().is_loopback() || local.ip() == remote.ip();
        Self { local: plain(local), remote: plain(remote), place: is_local.then_some((source, netns)) }
    }

    pub(crate) fn of(end: &End) -> Self {
        Self::new(end.local, end.remote, end.place.source, end.netns)
    }

    pub(crate) fn of_peer(end: &End) -> Self {
        Self::new(end.remote, end.local, end.place.source, end.netns)
    }

    pub(crate) fn seen(local: SocketAddr, remote: SocketAddr, source: u16, netns: Option<u32>) -> Self {
        Self::new(local, remote, source, netns.unwrap_or_default())
    }
}

fn plain(address: SocketAddr) -> PairAddress {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    (ip.to_bits(), address.port())
}

/// Ends that wait for their peers.
#[derive(Debug)]
pub(crate) struct Pairs {
    /// The number of ends that may wait.
    pub(crate) most: usize,
    waiting: HashMap<PairKey, End, RandomState>,
    /// The ends in the order of arrival; some of them may have been joined since.
    order: VecDeque<(PairKey, i64)>,
    pub(crate) joined: u64,
    pub(crate) alone: u64,
}

impl Default for Pairs {
    fn default() -> Self {
        Self { most: ROOM, waiting: HashMap::default(), order: VecDeque::new(), joined: 0, alone: 0 }
    }
}

impl Pairs {
    /// Passes to `settle` what can be judged now: this end with its peer, or ends that have waited long
    /// enough.
    pub(crate) fn add(&mut self, end: &End, mut settle: impl FnMut(&End, Option<&End>)) {
        if let Some(peer) = self.waiting.remove(&PairKey::of_peer(end)) {
            self.joined += 1;
            settle(&peer, Some(end));
            settle(end, Some(&peer));
            return;
        }
        let key = PairKey::of(end);
        // If there is an earlier end with the same addresses, the port has been reused, and the peer of the
        // earlier end will not be read.
        if let Some(former) = self.waiting.insert(key, *end) {
            self.alone += 1;
            settle(&former, None);
        }
        self.order.push_back((key, end.time));
        while self.waiting.len() > self.most || self.order.len() > 2 * self.most {
            self.give_up_oldest(&mut settle);
        }
    }

    /// The end with this key, if it waits for its peer.
    pub(crate) fn waiting(&self, key: PairKey) -> Option<&End> {
        self.waiting.get(&key)
    }

    fn give_up_oldest(&mut self, settle: &mut impl FnMut(&End, Option<&End>)) {
        let Some((key, time)) = self.order.pop_front() else { return };
        if self.waiting.get(&key).is_some_and(|end| end.time == time)
            && let Some(end) = self.waiting.remove(&key)
        {
            self.alone += 1;
            settle(&end, None);
        }
    }

    /// Passes the ends from before `time` to `settle`, without their peers.
    pub(crate) fn give_up_before(&mut self, time: i64, mut settle: impl FnMut(&End, Option<&End>)) {
        while self.order.front().is_some_and(|(_, oldest)| *oldest < time) {
            self.give_up_oldest(&mut settle);
        }
    }
}
