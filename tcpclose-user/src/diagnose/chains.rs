//! Chains of causes: a process lost its connection to a server during a request, and then closed the
//! connection to its own client without an answer.
//!
//! Two ends are linked if they belong to the same process, one was lost while a request was pending, and the
//! process closed the other within [`REACTION`] while a request was pending there. Processes are linked by
//! the connection between them, if both of its ends are known.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::{
    diagnose::{
        end::{Death, End, Place},
        marks::Marks,
        names::Who,
        pairs::PairKey,
        pending::Pending,
        unanswered::is_farewell,
    },
    event::{ClosedBy, Ended, Role, Trigger},
};

/// The number of candidate ends that are kept; 3 MiB.
const ROOM: usize = 16_384;

/// The longest time between the loss of the server and the close of the client's connection, in nanoseconds.
const REACTION: i64 = 100_000_000;

/// The largest number of processes in a chain.
const LONGEST: usize = 8;

/// An end that may be part of a chain.
#[derive(Clone, Copy, Debug)]
struct Link {
    place: Place,
    moved: i64,
    pid: u32,
    tid: u32,
    who: Option<Who>,
    own: PairKey,
    peer: PairKey,
    port: u16,
    peer_who: Option<Who>,
    peer_death: Option<Death>,
    was_reset: bool,
    is_request: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Chains {
    /// Connections to servers that were lost during a request.
    lost: VecDeque<Link>,
    /// Connections of clients that were closed without an answer.
    left: VecDeque<Link>,
}

/// A sequence of processes, each with the port that it serves, beginning with the one whose end caused the
/// others.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Route {
    /// The program at the beginning, if its end is known, and how it died.
    pub(crate) root: (Option<Who>, Option<Death>, u16),
    /// The programs in between, each with the port on which it closed its client's connection.
    pub(crate) through: Vec<(Option<Who>, u16)>,
    /// The last client, if its end is known.
    pub(crate) victim: Option<Who>,
}

#[derive(Debug, Default)]
pub(crate) struct Chain {
    pub(crate) marks: Marks,
    /// How many of the last clients received a RST.
    pub(crate) resets: u64,
    /// How many of them are known to have waited for an answer.
    pub(crate) unanswered: u64,
    /// The longest time from the first end to the last.
    pub(crate) took_ns: i64,
}

impl Chains {
    pub(crate) fn settle(&mut self, end: &End, peer: Option<&End>) {
        // A process that connects to itself, to wake up its event loop, does not wait for an answer.
        let is_own = peer.is_some_and(|peer| end.is_of_same_process(peer));
        if end.pid == 0 || !end.path.established || is_own {
            return;
        }
        let link = || Link {
            place: end.place,
            moved: end.moved,
            pid: end.pid,
            tid: end.tid,
            who: end.who,
            own: PairKey::of(end),
            peer: PairKey::of_peer(end),
            port: if end.role == Some(Role::Server) { end.local.port() } else { end.remote.port() },
            peer_who: peer.and_then(|peer| peer.who),
            peer_death: peer.and_then(|peer| peer.death),
            was_reset: matches!(end.ended, Some(Ended::ResetSent | Ended::ResetReceived)),
            is_request: matches!(end.pending(), Pending::Yes(_)),
        };
        let waited = end.waited_ms();
        // The message that a proxy forwards to its server may be a closing message, after which both
        // connections end in order.
        let is_dead = peer.is_some_and(|peer| peer.death.is_some() && peer.trigger != Some(Trigger::Exit));
        let was_needed = waited.is_some_and(|waited| is_dead || !is_farewell(end, waited));
        match end.role {
            Some(Role::Client)
                if was_needed && matches!(end.closed_by, Some(ClosedBy::Peer | ClosedBy::Kernel)) =>
            {
                push(&mut self.lost, link());
            }
            Some(Role::Server) if waited.is_some() && end.closed_here() && end.death.is_none() => {
                push(&mut self.left, link());
            }
            _ => {}
        }
    }

    /// Traces every end that a process closed without an answer back to its origin.
    pub(crate) fn all(&self) -> BTreeMap<Route, Chain> {
        let mut lost: HashMap<(u16, u32), Vec<&Link>> = HashMap::new();
        for link in &self.lost {
            lost.entry((link.place.source, link.pid)).or_default().push(link);
        }
        for links in lost.values_mut() {
            links.sort_unstable_by_key(|link| link.moved);
        }
        // For each connection that a process closed without an answer, the lost connection that was the
        // cause.
        let reasons: HashMap<PairKey, (&Link, &Link)> = self
            .left
            .iter()
            .filter_map(|left| {
                let links = lost.get(&(left.place.source, left.pid))?;
                let after = links.partition_point(|link| link.moved <= left.moved);
                let recent =
                    || links[..after].iter().rev().take_while(|link| left.moved - link.moved <= REACTION);
                let reason = recent().find(|link| link.tid == left.tid).or_else(|| recent().next())?;
                Some((left.own, (left, *reason)))
            })
            .collect();
        let passed_on: std::collections::HashSet<PairKey> =
            reasons.values().map(|(_, reason)| reason.peer).collect();
        let mut chains: BTreeMap<Route, Chain> = BTreeMap::new();
        let mut victims: Vec<_> =
            reasons.values().filter(|(left, _)| !passed_on.contains(&left.own)).collect();
        victims.sort_unstable_by_key(|(left, _)| (left.moved, left.place.seq));
        for (last, reason) in victims {
            let mut places = vec![last.place, reason.place];
            let mut through = vec![(last.who, last.port)];
            let mut root = *reason;
            while through.len() < LONGEST
                && let Some((left, reason)) = reasons.get(&root.peer)
            {
                through.push((left.who, left.port));
                places.extend([left.place, reason.place]);
                root = reason;
            }
            through.reverse();
            let route =
                Route { root: (root.peer_who, root.peer_death, root.port), through, victim: last.peer_who };
            let chain = chains.entry(route).or_default();
            chain.marks.add(root.place, root.moved);
            places.into_iter().rev().for_each(|place| chain.marks.name(place));
            chain.resets += u64::from(last.was_reset);
            chain.unanswered += u64::from(last.is_request);
            chain.took_ns = chain.took_ns.max(last.moved - root.moved);
        }
        chains
    }
}

fn push(links: &mut VecDeque<Link>, link: Link) {
    if links.len() >= ROOM {
        links.pop_front();
    }
    links.push_back(link);
}
