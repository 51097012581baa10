//! Clients that gave up while a proxy waited for its own server, and whose connections do not show it. There
//! was an earlier answer on the connection, so that the last data may not have been a request
//! ([`End::given_up_after_ms`]). Or the client sent a TLS `close_notify`, so that the last data is recent.
//!
//! The proxy's connection to its server shows it instead: the proxy gave up its own request as soon as its
//! client had closed, and had sent nothing to the client for at least as long as that request was pending. A
//! proxy that only forwards bytes, such as a TCP proxy, does not know requests. Its connection to the server
//! shows no more than that to the client.

use std::collections::{HashMap, VecDeque};

use crate::{
    diagnose::{
        end::{End, Place, ServiceKey, WAIT_MS, nanoseconds},
        statistics::TICKS_MS,
    },
    event::Role,
};

/// The number of ends of each side that are kept; 2 MiB each.
const ROOM: usize = 16_384;

/// The longest time from the close of the client to that of the proxy's own connection, in nanoseconds.
const REACTION: i64 = 100_000_000;

/// An end of a connection of a process that may be a proxy.
#[derive(Clone, Copy, Debug)]
struct ProxyEnd {
    place: Place,
    key: ServiceKey,
    pid: u32,
    tid: u32,
    moved: i64,
    /// How long a request of the proxy had been pending, or how long it had sent nothing to its client.
    waited_ms: f64,
    began: i64,
    /// The number of bytes from the client to the server, and in the other direction.
    bytes: (u64, u64),
    /// Whether the end alone shows that a request was pending.
    is_certain: bool,
    /// Whether the last data is recent, as after a `close_notify`.
    is_recent: bool,
}

impl ProxyEnd {
    fn gave_up(&self, waited_ms: f64) -> GaveUp {
        GaveUp { key: self.key, place: self.place, moved: self.moved, waited_ms }
    }

    /// Whether the two connections may be those of a proxy that only forwards bytes: it opens both at the
    /// same time, and forwards every byte, or what is left of them if it terminates TLS.
    fn may_only_forward(&self, dropped: &Self) -> bool {
        let (own, other) = (self.bytes, dropped.bytes);
        (self.began - dropped.began).abs() <= REACTION
            && (self.is_recent || own.0 == other.0 || own.1 == other.1)
    }
}

/// A client that gave up, as one of the two ends shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GaveUp {
    pub(crate) key: ServiceKey,
    pub(crate) place: Place,
    pub(crate) moved: i64,
    pub(crate) waited_ms: f64,
}

#[derive(Debug, Default)]
pub(crate) struct Relays {
    /// Connections that clients have closed, and whose ends do not show a pending request.
    left: VecDeque<ProxyEnd>,
    /// Connections that the proxy itself has closed while a request was pending.
    dropped: VecDeque<ProxyEnd>,
}

impl Relays {
    pub(crate) fn settle(&mut self, end: &End) {
        if end.pid == 0 || end.death.is_some() || !end.path.established {
            return;
        }
        let Some(key) = ServiceKey::of(end) else { return };
        let waited = end.waited_ms();
        let is_certain = end.given_up_after_ms().is_some();
        let side = |waited_ms, bytes| ProxyEnd {
            place: end.place,
            key,
            pid: end.pid,
            tid: end.tid,
            moved: end.moved,
            waited_ms,
            began: end.began(),
            bytes,
            is_certain,
            is_recent: waited.is_some_and(|wait| wait < WAIT_MS),
        };
        match end.role {
            Some(Role::Client) if end.closed_here() => {
                if let Some(wait) = waited.filter(|wait| *wait >= WAIT_MS) {
                    push(&mut self.dropped, side(wait, (end.sent, end.received)));
                }
            }
            Some(Role::Server) if end.closed_there() && !is_certain => {
                if let Some(silence) = end.since_sent_ms.or(end.idle_ms).filter(|silence| *silence >= WAIT_MS)
                {
                    push(&mut self.left, side(silence, (end.received, end.sent)));
                }
            }
            _ => {}
        }
    }

    /// Joins the connections of clients with those of the proxy to its servers, each at most once. The result
    /// has the end of each client that gave up, and the end of the proxy if that alone does not show it.
    pub(crate) fn join(&mut self) -> Vec<GaveUp> {
        let mut left: HashMap<(u16, u32), Vec<ProxyEnd>> = HashMap::new();
        for side in self.left.drain(..) {
            left.entry((side.place.source, side.pid)).or_default().push(side);
        }
        let mut found = Vec::new();
        self.dropped.retain(|dropped| {
            let Some(sides) = left.get_mut(&(dropped.place.source, dropped.pid)) else { return true };
            let early = nanoseconds(TICKS_MS);
            let fits = |side: &ProxyEnd| {
                (-early..=REACTION).contains(&(dropped.moved - side.moved))
                    && side.waited_ms + TICKS_MS >= dropped.waited_ms
                    && (dropped.is_certain || !side.may_only_forward(dropped))
            };
            // A connection of the same thread is preferred, and among several the nearest in time.
            let distance = |side: &ProxyEnd| (side.tid != dropped.tid, (dropped.moved - side.moved).abs());
            let candidates = sides.iter().enumerate().filter(|(_, side)| fits(side));
            let Some((index, side)) = candidates.min_by_key(|(_, side)| distance(side)) else { return true };
            found.push(side.gave_up(dropped.waited_ms));
            if !dropped.is_certain {
                found.push(dropped.gave_up(dropped.waited_ms));
            }
            sides.swap_remove(index);
            false
        });
        // The others may be joined with ends that come later.
        let mut rest: Vec<ProxyEnd> = left.into_values().flatten().collect();
        rest.sort_unstable_by_key(|side| (side.moved, side.place.source, side.place.seq));
        self.left.extend(rest);
        found.sort_unstable_by_key(|gave_up| (gave_up.moved, gave_up.place.source, gave_up.place.seq));
        found
    }
}

fn push(sides: &mut VecDeque<ProxyEnd>, side: ProxyEnd) {
    if sides.len() >= ROOM {
        sides.pop_front();
    }
    sides.push_back(side);
}
