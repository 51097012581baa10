//! Clients that gave up while a proxy asked its own server for their answer, where the client's connection
//! does not show it: the request came in the same tick of the kernel's clock as the answer before it, or the
//! client said farewell (TLS `close_notify`), which makes the last data recent.
//!
//! The proxy shows it. It gives up its own request, which is certainly pending, as soon as its client has
//! closed, and it had sent the client nothing for at least as long.

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

/// An end of a proxy.
#[derive(Clone, Copy, Debug)]
struct ProxyEnd {
    place: Place,
    key: ServiceKey,
    pid: u32,
    tid: u32,
    moved: i64,
    /// How long a request had been pending, or how long the client had been sent nothing.
    waited_ms: f64,
}

/// A client that gave up.
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
        let waited = end.waited_ms().filter(|wait| *wait >= WAIT_MS);
        let side = |waited_ms| ProxyEnd {
            place: end.place,
            key,
            pid: end.pid,
            tid: end.tid,
            moved: end.moved,
            waited_ms,
        };
        match (end.role, waited) {
            (Some(Role::Client), Some(wait)) if end.closed_here() => push(&mut self.dropped, side(wait)),
            (Some(Role::Server), None) if end.closed_there() => {
                if let Some(silence) = end.since_sent_ms.or(end.idle_ms).filter(|silence| *silence >= WAIT_MS)
                {
                    push(&mut self.left, side(silence));
                }
            }
            _ => {}
        }
    }

    /// Joins what both sides show, each end once.
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
            };
            // The one of the same thread, and of those the nearest in time.
            let distance = |side: &ProxyEnd| (side.tid != dropped.tid, (dropped.moved - side.moved).abs());
            let candidates = sides.iter().enumerate().filter(|(_, side)| fits(side));
            let Some((index, side)) = candidates.min_by_key(|(_, side)| distance(side)) else { return true };
            found.push(GaveUp {
                key: side.key,
                place: side.place,
                moved: side.moved,
                waited_ms: dropped.waited_ms,
            });
            sides.swap_remove(index);
            false
        });
        // Those that are left over may still find the other side.
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
