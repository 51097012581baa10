//! Sockets that stay in a teardown state: finds those that are due for a report, and collects facts from the
//! kernel half and `/proc` about them and about the processes that have them open.
//!
//! The kernel half's table shows which sockets are in such a state; most stay there for less than a
//! millisecond. This module walks that table a few times within the limit, and selects the sockets that have
//! been in such a state for longer, so that they are inspected. A walk reads the buckets, which are mapped
//! into memory, so its cost grows with the size of the table (`--connections`). The cost of inspections grows
//! with the number of sockets that are stuck.

pub mod age;
pub mod older;

use std::{
    collections::HashMap,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::maps::{Array, MapData};
use foldhash::fast::RandomState;
use tcpclose_common::table::BEFORE_TRACE;

use self::{
    age::Age,
    older::{Older, Orphan, Orphans},
};
use crate::{
    attribute::Claim,
    cli::Linger,
    ingest::life::{Life, SocketId, Task},
    kernel::{clock::Clock, handle::KernelHalf, table::ConnectionTable},
    processes::holder::{self, ProcfsHolder},
};

/// The number of sockets that are inspected between two reads of the ring. Their records and those of their
/// holders take a quarter of it.
pub const BATCH: usize = 4_096;

/// The number of holders of one socket that are reported.
const MAX_HOLDERS: usize = 64;

/// The shortest and the longest time between two walks of the table.
const PERIOD: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// A socket that has been in a teardown state for longer than the limit.
#[derive(Clone, Debug)]
pub struct Stuck {
    /// The socket in its current state.
    pub life: Box<Life>,
    /// When it was inspected, nanoseconds of `CLOCK_BOOTTIME`.
    pub inspected: u64,
    /// How long it has been in its state.
    pub age: Age,
    /// The descriptors that refer to it, up to [`MAX_HOLDERS`]. A process may have several of them.
    pub descriptors: Vec<Descriptor>,
}

/// A descriptor that refers to a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number in the process.
    pub fd: u32,
    /// The process.
    pub holder: FoundBy,
}

/// A process that has a socket open, by the way in which it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FoundBy {
    /// The iterator over all descriptors.
    Iterator(Task),
    /// `/proc/PID/fd`.
    Procfs(Arc<ProcfsHolder>),
}

impl FoundBy {
    /// Process id.
    pub fn pid(&self) -> u32 {
        match self {
            Self::Iterator(task) => task.pid,
            Self::Procfs(holder) => holder.pid,
        }
    }

    /// The process's name.
    pub fn comm(&self) -> String {
        match self {
            Self::Iterator(task) => task.comm(),
            Self::Procfs(holder) => holder.comm.clone(),
        }
    }

    /// The claim to the socket that it has.
    pub fn claim(&self) -> Claim<'_> {
        match self {
            Self::Iterator(task) => Claim::Holds(task),
            Self::Procfs(holder) => Claim::Procfs(holder),
        }
    }
}

impl Stuck {
    /// The process that most likely owns the socket: of several holders, the one that opened the connection,
    /// otherwise the first.
    pub fn holder(&self) -> Option<&FoundBy> {
        let opener = self.life.opener.map(|opener| opener.pid);
        let holders = || self.descriptors.iter().map(|descriptor| &descriptor.holder);
        holders().find(|holder| Some(holder.pid()) == opener).or(holders().next())
    }
}

/// A socket of the kernel half's table.
#[derive(Clone, Copy, Debug)]
struct WatchedSocket {
    /// The value in the table, which distinguishes a socket from the next one at its address: the time when
    /// it entered its first teardown state, nanoseconds of `CLOCK_BOOTTIME`, or [`BEFORE_TRACE`].
    since: u64,
    /// When to inspect it next, nanoseconds of `CLOCK_BOOTTIME`.
    next: u64,
}

/// Watches the kernel half's table of sockets that are being torn down.
pub struct StuckSockets {
    /// The age from which sockets are reported, nanoseconds; `None` if they are not reported.
    limit: Option<u64>,
    requested_pass: Array<MapData, u32>,
    /// The sockets of the table at the last walk: never more than it has room for.
    entries: HashMap<u64, WatchedSocket, RandomState>,
    /// Number of the inventory pass that will report holders; 0 if none was requested yet.
    pass: u16,
    /// The thread that asks the kernel for the sockets that were stuck before the trace.
    asking: Option<JoinHandle<(Older, Orphans)>>,
    /// Sockets that were stuck before the trace and have a descriptor.
    older: Older,
    /// Sockets that were stuck before the trace and have none.
    orphans: Orphans,
}

impl StuckSockets {
    /// Takes the maps that it needs from the kernel half.
    ///
    /// # Errors
    /// The object has no such maps.
    pub fn new(kernel: &mut KernelHalf, linger: Linger) -> Result<Self> {
        let limit = match linger {
            Linger::After(limit) if kernel.can_inspect() => {
                Some(u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX))
            }
            _ => None,
        };
        Ok(Self {
            limit,
            requested_pass: kernel.take_map("ASKED")?,
            entries: HashMap::default(),
            pass: 0,
            asking: None,
            older: Older::default(),
            orphans: Orphans::default(),
        })
    }

    /// Asks the kernel which sockets are stuck when the trace begins, because it has bounds for their age.
    /// This runs in a thread: for each network namespace, the kernel walks the sockets of the whole host,
    /// which takes seconds on a host with many of both. Until the kernel has answered, no socket is due. If no
    /// thread can be started, this waits for the answer.
    pub fn find_older(&mut self) {
        let Some(limit) = self.limit else { return };
        let ask = move || older::find(limit);
        if let Ok(thread) = thread::Builder::new().name("older".to_owned()).spawn(ask) {
            self.asking = Some(thread);
        } else {
            (self.older, self.orphans) = ask();
        }
    }

    /// Handles the answer.
    fn take_older(&mut self) {
        // A thread that panicked has found nothing.
        if let Some(Ok(found)) = self.asking.take().map(JoinHandle::join) {
            (self.older, self.orphans) = found;
        }
    }

    /// The sockets that were stuck before the trace, have no descriptor, and are due for a report.
    pub fn due_orphans(&mut self) -> Vec<Orphan> {
        self.limit.map_or_else(Vec::new, |limit| self.orphans.due(limit))
    }

    /// How often to call [`Self::due`]; `None` for never.
    pub fn period(&self) -> Option<Duration> {
        let (shortest, longest) = PERIOD;
        self.limit.map(|limit| Duration::from_nanos(limit / 10).clamp(shortest, longest))
    }

    /// The addresses of the sockets to inspect now.
    pub fn due(&mut self, table: &ConnectionTable, now: u64) -> Vec<u64> {
        if self.asking.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return Vec::new();
        }
        self.take_older();
        self.older_than(table, now)
    }

    fn older_than(&mut self, table: &ConnectionTable, now: u64) -> Vec<u64> {
        let Some(limit) = self.limit else { return Vec::new() };
        let mut present = HashMap::with_capacity_and_hasher(self.entries.len(), RandomState::default());
        let mut due = Vec::new();
        for (address, since) in table.teardowns() {
            let known = self.entries.get(&address).filter(|known| known.since == since);
            let first = since.saturating_add(if since == BEFORE_TRACE { 0 } else { limit });
            let next = known.map_or(first, |known| known.next);
            // A walk restarts if the key that it had reached was removed, and then sees sockets twice.
            if present.insert(address, WatchedSocket { since, next }).is_none() && next <= now {
                due.push(address);
            }
        }
        self.entries = present;
        due
    }

    /// The addresses of all sockets of the table, for the last inspection when the trace ends.
    pub fn all(&mut self, table: &ConnectionTable) -> Vec<u64> {
        self.take_older();
        // As after `due()`, no address occurs twice, and there are no more than the table has room for.
        self.older_than(table, u64::MAX)
    }

    /// Begins to inspect sockets. Returns the number of the inventory pass that will report their holders.
    ///
    /// # Errors
    /// The kernel refuses to change the map.
    pub fn begin(&mut self) -> Result<u16> {
        self.pass = self.pass.wrapping_add(1).max(1);
        self.requested_pass
            .set(0, u32::from(self.pass), 0)
            .context("cannot request holders from the kernel half")?;
        Ok(self.pass)
    }

    /// The age of a socket that was inspected `now`, and when to inspect it next.
    pub fn inspected(&mut self, life: &Life, now: u64) -> Age {
        let mut age = Age::of(life, now);
        // An event of the socket shows that the kernel half has an entry for it.
        self.orphans.forget(&life.endpoints);
        self.older.narrow(life, now, &mut age);
        if let (Some(limit), Some(entry)) = (self.limit, self.entries.get_mut(&life.id.address)) {
            // It is reported again at twice the age, unless it has entered another state meanwhile.
            let wait = if age.at_least < limit { limit - age.at_least } else { age.at_least };
            entry.next = now.saturating_add(wait);
        }
        age
    }

    /// Whether a socket of this age is reported.
    pub fn is_old_enough(&self, age: &Age) -> bool {
        self.limit.is_some_and(|limit| age.at_least >= limit)
    }
}

/// The sockets that were found to be stuck since the last report.
#[derive(Default)]
pub struct Found(HashMap<SocketId, Stuck>);

impl Found {
    /// Adds a socket as it was when it was inspected, `at`.
    pub fn socket(&mut self, life: Box<Life>, at: u64, age: Age) {
        self.0.insert(life.id, Stuck { life, inspected: at, age, descriptors: Vec::new() });
    }

    /// Adds a descriptor of an inspected socket. Returns whether the socket is stuck and there was room.
    pub fn descriptor(&mut self, id: SocketId, descriptor: Descriptor) {
        if let Some(stuck) = self.0.get_mut(&id)
            && stuck.descriptors.len() < MAX_HOLDERS
        {
            stuck.descriptors.push(descriptor);
        }
    }

    /// Whether one of the sockets has a descriptor, and so a holder.
    pub fn lacks_holders(&self) -> bool {
        self.0.values().any(|stuck| stuck.life.inode.is_some())
    }

    /// Looks up the holders in `/proc`, for kernels on which the iterator cannot be run. Returns those that
    /// were found.
    pub fn look_up_holders(&self) -> Vec<(SocketId, u32, Arc<ProcfsHolder>)> {
        let by_inode = self.0.values().filter_map(|stuck| Some((stuck.life.inode?, stuck.life.id)));
        let wanted: HashMap<u64, SocketId> = by_inode.collect();
        let mut found = Vec::new();
        let mut counts = HashMap::<SocketId, usize>::new();
        holder::walk(|process, fd, inode| {
            let Some(id) = wanted.get(&inode) else { return };
            let count = counts.entry(*id).or_default();
            if *count < MAX_HOLDERS
                && let Some(holder) = process.holder()
            {
                *count += 1;
                found.push((*id, fd, Arc::clone(holder)));
            }
        });
        found
    }

    /// Removes and returns the sockets, the oldest first.
    pub fn take(&mut self) -> Vec<Stuck> {
        let mut found: Vec<_> = self.0.drain().map(|(_, stuck)| stuck).collect();
        // They are sorted by identity too, so that a replay has the same order.
        found.sort_by_key(|stuck| (std::cmp::Reverse(stuck.age.at_least), stuck.life.id.address));
        found
    }
}

/// Milliseconds as nanoseconds.
fn nanoseconds(millis: u32) -> u64 {
    u64::from(millis) * 1_000_000
}

/// The time now, nanoseconds of `CLOCK_BOOTTIME`.
fn now() -> u64 {
    Clock::boot_now()
}
