//! Sockets that stay in a state of the teardown: finds out which are due to be told of, and gathers what the kernel half
//! says of them and of those who have them open.
//!
//! The kernel half keeps the addresses of sockets in such a state in `TEARDOWNS`; most are there for less than a
//! millisecond. This walks that table, a few times within the limit, and has those looked at (`hooks/look.rs` there)
//! that have been in it for longer. What it costs grows with the sockets that linger, not with those that live.

use std::{collections::HashMap, time::Duration};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap as KernelMap, MapData},
};
use tcpclose_common::record::{Connection, Owner};

use crate::cli::Linger;

/// How many sockets are looked at between two reads of the ring: with their holders, a quarter of it.
pub const AT_ONCE: usize = 4_096;

/// How many of one socket's holders are told.
const MAX_HOLDERS: usize = 64;

/// How often the table is walked.
const EVERY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How long a socket has been in its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Age {
    /// When it came into it, nanoseconds of `CLOCK_BOOTTIME`; `None` if that was before the trace.
    pub since: Option<u64>,
    /// Nanoseconds.
    pub at_least: u64,
    /// Nanoseconds; `None` if there is no telling.
    pub at_most: Option<u64>,
}

/// A socket that lingers.
#[derive(Clone, Debug)]
pub struct Lingerer {
    /// As it is.
    pub connection: Box<Connection>,
    /// When it was looked at, nanoseconds of `CLOCK_BOOTTIME`.
    pub seen: u64,
    /// How long it has been in its state.
    pub age: Age,
    /// Who has it open, up to [`MAX_HOLDERS`]; a process with several descriptors of it is there several times.
    pub holders: Vec<Owner>,
}

/// A socket of the table.
#[derive(Clone, Copy, Debug)]
struct Due {
    /// As the table has it: tells a socket from the next one at its address.
    since: u64,
    /// When to look at it, nanoseconds of `CLOCK_BOOTTIME`.
    next: u64,
}

/// See the module.
pub struct Lingerers {
    /// Nanoseconds; `None` if nobody wants to know.
    limit: Option<u64>,
    teardowns: KernelMap<MapData, u64, u64>,
    asked: Array<MapData, u32>,
    /// Never more than the table had room for.
    due: HashMap<u64, Due>,
    /// Of the look at descriptors that is to tell of holders; 0 is none.
    pass: u16,
    /// Looked at, not told yet.
    found: HashMap<(u64, u64), Lingerer>,
}

impl Lingerers {
    /// Takes the maps that it needs out of the loaded object.
    ///
    /// # Errors
    /// The object has no such maps.
    pub fn take(ebpf: &mut Ebpf, linger: Linger) -> Result<Self> {
        let mut map = |name| ebpf.take_map(name).with_context(|| format!("the object has no map {name}"));
        let limit = match linger {
            Linger::Off => None,
            Linger::After(limit) => Some(u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX)),
        };
        Ok(Self {
            limit,
            teardowns: map("TEARDOWNS")?.try_into().context("TEARDOWNS is not what it should be")?,
            asked: map("ASKED")?.try_into().context("ASKED is not what it should be")?,
            due: HashMap::new(),
            pass: 0,
            found: HashMap::new(),
        })
    }

    /// How often to call [`Self::due`]; `None` for never.
    pub fn period(&self) -> Option<Duration> {
        let (least, most) = EVERY;
        self.limit.map(|limit| Duration::from_nanos(limit / 10).clamp(least, most))
    }

    /// The addresses of sockets to look at now.
    pub fn due(&mut self, now: u64) -> Vec<u64> {
        let Some(limit) = self.limit else { return Vec::new() };
        let mut present = HashMap::with_capacity(self.due.len());
        let mut due = Vec::new();
        for (sk, since) in self.teardowns.iter().flatten() {
            let known = self.due.get(&sk).filter(|known| known.since == since);
            let next =
                known.map_or(since.saturating_add(if since == 0 { 0 } else { limit }), |known| known.next);
            // A walk begins anew where the place that it had come to is gone, and then sees sockets twice.
            if present.insert(sk, Due { since, next }).is_none() && next <= now {
                due.push(sk);
            }
        }
        self.due = present;
        due
    }

    /// The addresses of all sockets of the table, for a last look at the end of the trace.
    pub fn all(&mut self) -> Vec<u64> {
        // As after `due()`: no address twice, and no more than the table has room for.
        self.due(u64::MAX)
    }

    /// Begins a look at sockets: says which inventory pass is to tell of their holders.
    ///
    /// # Errors
    /// The kernel refuses to change the map.
    pub fn ask(&mut self) -> Result<u16> {
        self.found.clear();
        self.pass = self.pass.wrapping_add(1).max(1);
        self.asked.set(0, u32::from(self.pass), 0).context("cannot ask the kernel half for holders")?;
        Ok(self.pass)
    }

    /// A socket that was looked at, as it is `now`.
    pub fn seen(&mut self, connection: Box<Connection>, now: u64) {
        let Some(limit) = self.limit else { return };
        let age = age(&connection, now);
        if let Some(due) = self.due.get_mut(&connection.sock) {
            // Told again when it is twice as old; or it has come into another state lately.
            due.next =
                now.saturating_add(if age.at_least < limit { limit - age.at_least } else { age.at_least });
        }
        if age.at_least >= limit {
            let identity = (connection.sock, connection.born);
            self.found.insert(identity, Lingerer { connection, seen: now, age, holders: Vec::new() });
        }
    }

    /// Somebody who has such a socket open.
    pub fn held(&mut self, owner: &Owner) {
        if let Some(lingerer) = self.found.get_mut(&(owner.sock, owner.born))
            && lingerer.holders.len() < MAX_HOLDERS
        {
            lingerer.holders.push(*owner);
        }
    }

    /// Whether one of those that were seen has a descriptor, and so a holder.
    pub fn lack_holders(&self) -> bool {
        self.found.values().any(|lingerer| lingerer.connection.inode != 0)
    }

    /// What was seen since [`Self::ask`], oldest first.
    pub fn found(&mut self) -> Vec<Lingerer> {
        let mut found: Vec<_> = self.found.drain().map(|(_, lingerer)| lingerer).collect();
        found.sort_by_key(|lingerer| std::cmp::Reverse(lingerer.age.at_least));
        found
    }
}

/// How long it has been in the state that it is in.
fn age(connection: &Connection, now: u64) -> Age {
    let steps = usize::from(connection.steps).min(connection.states.len());
    let last = steps.checked_sub(1).map(|last| (connection.states[last], connection.times[last]));
    let found_there = connection.found != 0 && steps == 1;
    match last {
        Some((state, entered)) if state == connection.last_state => {
            let at_least = now.saturating_sub(entered);
            let known = !found_there;
            Age { since: known.then_some(entered), at_least, at_most: known.then_some(at_least) }
        }
        // It has gone on unseen.
        Some((_, entered)) => Age { since: None, at_least: 0, at_most: Some(now.saturating_sub(entered)) },
        None => Age { since: None, at_least: 0, at_most: None },
    }
}

#[cfg(test)]
mod tests {
    use tcpclose_common::tcp::state;

    use super::*;

    fn connection(path: &[(u8, u64)]) -> Connection {
        let mut connection = Connection { steps: u8::try_from(path.len()).unwrap(), ..Connection::NEW };
        for (index, (state, time)) in path.iter().enumerate() {
            (connection.states[index], connection.times[index]) = (*state, *time);
            connection.last_state = *state;
        }
        connection
    }

    #[test]
    fn age_in_the_last_state() {
        let closed = connection(&[(state::ESTABLISHED, 10), (state::CLOSE_WAIT, 30)]);
        assert_eq!(age(&closed, 100), Age { since: Some(30), at_least: 70, at_most: Some(70) });
    }

    #[test]
    fn age_of_what_was_there_before() {
        let found = Connection { found: 1, ..connection(&[(state::CLOSE_WAIT, 30)]) };
        assert_eq!(age(&found, 100), Age { since: None, at_least: 70, at_most: None });
        let moved_on =
            Connection { found: 1, ..connection(&[(state::ESTABLISHED, 30), (state::CLOSE_WAIT, 40)]) };
        assert_eq!(age(&moved_on, 100).since, Some(40));
    }

    #[test]
    fn age_in_a_state_that_nobody_saw_it_enter() {
        let skipped = Connection { last_state: state::FIN_WAIT2, ..connection(&[(state::FIN_WAIT1, 40)]) };
        assert_eq!(age(&skipped, 100), Age { since: None, at_least: 0, at_most: Some(60) });
    }
}
