//! Sockets that stay in a state of the teardown: finds out which are due to be told of, and gathers what the kernel half
//! says of them and of those who have them open.
//!
//! The kernel half keeps the addresses of sockets in such a state in `TEARDOWNS`; most are there for less than a
//! millisecond. This walks that table, a few times within the limit, and has those looked at (`hooks/look.rs` there)
//! that have been in it for longer. What it costs grows with the sockets that linger, not with those that live.

use std::{collections::HashMap, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap as KernelMap, MapData},
};
use tcpclose_common::record::{Connection, Header, Owner, Task, VERSION, holds, tag};

use crate::{
    attribute::holder::{self, Holder},
    cli::Linger,
    event::compose::ends,
    event::{Endpoint, State},
    kernel::clock::Clock,
    sockets::{self, Socket},
};

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
    /// What lingered before the trace, once that was asked for.
    before: Option<Before>,
    /// Of that, what has no descriptor.
    orphans: Orphans,
}

/// A socket, by network namespace and ends.
type Identity = (u32, Endpoint, Endpoint);

/// What lingered before the trace and has descriptors, by which the inventory finds it.
#[derive(Default)]
struct Before {
    /// When the kernel was asked, nanoseconds of `CLOCK_BOOTTIME`. Ages are of a moment after that,
    asked: u64,
    /// and before this one.
    answered: u64,
    sockets: HashMap<Identity, (State, sockets::Age)>,
}

/// What lingered before the trace without a descriptor. The kernel half knows nothing of it while it stays as it is, so
/// the kernel is asked for its sockets again whenever one of these is due, and never when there are none.
#[derive(Default)]
struct Orphans {
    /// How it was when it was first seen, and when to tell of it; both times in nanoseconds of `CLOCK_BOOTTIME`.
    waiting: HashMap<Identity, Orphan>,
    /// When to ask.
    next: Option<u64>,
}

/// See [`Orphans`].
#[derive(Clone, Copy)]
struct Orphan {
    state: State,
    seen: u64,
    next: u64,
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
            before: None,
            orphans: Orphans::default(),
        })
    }

    /// Looks at what lingers when the trace begins, so that its age is known as far as the kernel knows it.
    pub fn take_stock(&mut self) {
        let Some(limit) = self.limit else { return };
        let asked = Clock::boot_now();
        let (orphans, held): (Vec<_>, Vec<_>) =
            sockets::lingering().into_iter().partition(|socket| socket.entry.inode == 0);
        let answered = Clock::boot_now();
        let age = |socket: &Socket| (identity(socket), (socket.entry.state, socket.entry.age()));
        self.before = Some(Before { asked, answered, sockets: held.iter().map(age).collect() });
        self.orphans = Orphans::new(&orphans, answered, limit);
    }

    /// What had no descriptor then, and is due.
    pub fn orphaned(&mut self) -> Vec<Orphaned> {
        let now = Clock::boot_now();
        match (self.limit, self.orphans.next) {
            (Some(limit), Some(next)) if next <= now => {
                self.orphans.look(sockets::lingering(), now, Clock::boot_now(), limit)
            }
            _ => Vec::new(),
        }
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
        let mut age = age(&connection, now);
        if let (_, Some(local), Some(remote)) = ends(&connection.endpoints) {
            let identity = (connection.endpoints.netns, local, remote);
            // Programs were attached before the trace began to look around.
            self.orphans.waiting.remove(&identity);
            if let Some(before) = &self.before {
                before.narrow(&identity, &connection, now, &mut age);
            }
        }
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

    /// Looks the holders up in `/proc`, where the inventory cannot.
    pub fn look_up_holders(&mut self) {
        let mut wanted: HashMap<_, _> =
            self.found.values_mut().map(|lingerer| (lingerer.connection.inode, lingerer)).collect();
        holder::walk(|process, fd, inode| {
            if let Some(lingerer) = wanted.get_mut(&inode)
                && inode != 0
                && lingerer.holders.len() < MAX_HOLDERS
                && let Some(holder) = process.holder()
            {
                let owner = owner(&lingerer.connection, holder, fd);
                lingerer.holders.push(owner);
            }
        });
    }

    /// What was seen since [`Self::ask`], oldest first.
    pub fn found(&mut self) -> Vec<Lingerer> {
        let mut found: Vec<_> = self.found.drain().map(|(_, lingerer)| lingerer).collect();
        found.sort_by_key(|lingerer| std::cmp::Reverse(lingerer.age.at_least));
        found
    }
}

/// A socket without a descriptor that lingers, and the least time that it has, nanoseconds.
pub type Orphaned = (Socket, u64);

impl Orphans {
    /// What there was when the trace began, `seen` being a moment after that.
    fn new(found: &[Socket], seen: u64, limit: u64) -> Self {
        let orphan = |socket: &Socket| {
            let next = seen.saturating_add(limit.saturating_sub(by_kernel(socket)));
            (identity(socket), Orphan { state: socket.entry.state, seen, next })
        };
        let waiting: HashMap<_, _> = found.iter().map(orphan).collect();
        let next = waiting.values().map(|orphan| orphan.next).min();
        Self { waiting, next }
    }

    /// Takes in what there is, having been asked for at `now` and come by `seen`; says which of it is to be told of.
    fn look(&mut self, found: Vec<Socket>, now: u64, seen: u64, limit: u64) -> Vec<Orphaned> {
        let mut waiting = HashMap::with_capacity(self.waiting.len());
        let mut due = Vec::new();
        for socket in found {
            let (identity, state) = (identity(&socket), socket.entry.state);
            let Some(mut orphan) = self.waiting.get(&identity).copied() else { continue };
            if orphan.state != state {
                orphan = Orphan { state, seen, next: seen };
            }
            let at_least = by_kernel(&socket).max(now.saturating_sub(orphan.seen));
            if orphan.next <= now && at_least >= limit {
                orphan.next = now.saturating_add(at_least);
                due.push((socket, at_least));
            } else if orphan.next <= seen {
                orphan.next = now.saturating_add(limit.saturating_sub(at_least));
            }
            waiting.insert(identity, orphan);
        }
        // Not for each alone: those that are due soon can wait for the others.
        let soonest = waiting.values().map(|orphan| orphan.next).min();
        self.next = soonest.map(|soonest| soonest.max(now.saturating_add(limit)));
        self.waiting = waiting;
        due
    }
}

/// The least time that a socket has been in its state, as far as the kernel tells, nanoseconds.
fn by_kernel(socket: &Socket) -> u64 {
    socket.entry.age().at_least.map_or(0, nanoseconds)
}

fn identity(socket: &Socket) -> Identity {
    (socket.netns, socket.entry.local, socket.entry.remote)
}

impl Before {
    /// Puts the bounds that were known before the trace to the age of a socket that has not moved since.
    fn narrow(&self, identity: &Identity, connection: &Connection, now: u64, age: &mut Age) {
        if age.since.is_some() || connection.steps != 1 {
            return;
        }
        if let Some((state, bounds)) = self.sockets.get(identity)
            && State::from_kernel(connection.last_state) == Some(*state)
        {
            let later =
                |millis: u32, since: u64| nanoseconds(millis).saturating_add(now.saturating_sub(since));
            let at_least = bounds.at_least.map_or(0, |millis| later(millis, self.answered));
            age.at_least = age.at_least.max(at_least);
            age.at_most = bounds.at_most.map(|millis| later(millis, self.asked));
        }
    }
}

fn nanoseconds(millis: u32) -> u64 {
    u64::from(millis) * 1_000_000
}

/// A holder in the form in which the inventory tells of one.
fn owner(connection: &Connection, holder: &Arc<Holder>, fd: u32) -> Owner {
    let mut comm = [0; 16];
    let length = holder.comm.len().min(comm.len() - 1);
    comm[..length].copy_from_slice(&holder.comm.as_bytes()[..length]);
    let task = Task { pid: holder.pid, uid: holder.uid.unwrap_or(0), comm, ..Task::NONE };
    let header = Header { tag: tag::OWNER, version: VERSION, length: 0 };
    Owner { header, sock: connection.sock, born: connection.born, task, holds: holds::ASKED, fd }
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
    fn bounds_are_of_some_moment_between_question_and_answer() {
        let end = |port| Endpoint { address: [10, 0, 0, 1].into(), port };
        let identity = (1, end(40_000), end(443));
        let bounds = sockets::Age { at_least: Some(3), at_most: Some(5) };
        let sockets = HashMap::from([(identity, (State::CloseWait, bounds))]);
        let before = Before { asked: 10, answered: 40, sockets };
        let found = Connection { found: 1, ..connection(&[(state::CLOSE_WAIT, 30)]) };
        let mut narrowed = age(&found, 100);
        before.narrow(&identity, &found, 100, &mut narrowed);
        let expected = Age { since: None, at_least: 3_000_060, at_most: Some(5_000_090) };
        assert_eq!(narrowed, expected);
    }

    #[test]
    fn age_in_a_state_that_nobody_saw_it_enter() {
        let skipped = Connection { last_state: state::FIN_WAIT2, ..connection(&[(state::FIN_WAIT1, 40)]) };
        assert_eq!(age(&skipped, 100), Age { since: None, at_least: 0, at_most: Some(60) });
    }
}
