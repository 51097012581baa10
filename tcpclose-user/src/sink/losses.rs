//! Counters of the kernel half → `lost` lines. Nothing is lost silently.

use std::{collections::BTreeMap, os::fd::RawFd};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{HashMap, MapData, PerCpuArray},
    util::nr_cpus,
};
use tcpclose_common::{
    counters::Counters,
    record::{Connection, Task},
};

use crate::{
    event::{Event, Lost, LostPlace},
    kernel::clock::Clock,
};

/// Watches the counters.
pub struct Losses {
    counters: PerCpuArray<MapData, Counters>,
    connections: HashMap<MapData, u64, Connection>,
    capacity: u64,
    /// See [`crate::kernel::loader::Loaded::guarded`].
    guarded: Vec<RawFd>,
    /// What was told so far.
    told: BTreeMap<LostPlace, u64>,
    /// Records that could not be read.
    pub undecodable: u64,
    /// Notices of processes that could not be read.
    pub processes: u64,
    /// Stacks that were gone when they were wanted.
    pub stacks: u64,
    evicted: u64,
}

impl Losses {
    /// Takes the maps that it needs out of the loaded object. `capacity` is the size of `CONNECTIONS`, `guarded` are
    /// descriptors of programs, which must stay open.
    ///
    /// # Errors
    /// The object has no such maps.
    pub fn take(ebpf: &mut Ebpf, capacity: u32, guarded: Vec<RawFd>) -> Result<Self> {
        let mut map = |name| ebpf.take_map(name).with_context(|| format!("the object has no map {name}"));
        Ok(Self {
            counters: map("COUNTERS")?.try_into().context("COUNTERS is not what it should be")?,
            connections: map("CONNECTIONS")?.try_into().context("CONNECTIONS is not what it should be")?,
            capacity: u64::from(capacity),
            guarded,
            told: BTreeMap::new(),
            undecodable: 0,
            processes: 0,
            stacks: 0,
            evicted: 0,
        })
    }

    /// The counters of all CPUs together.
    pub fn counters(&self) -> Counters {
        let Ok(cpus) = self.counters.get(&0, 0) else { return Counters::default() };
        cpus.iter().fold(Counters::default(), |sum, cpu| sum.plus(cpu))
    }

    /// Whether a connection lives that one of the processes in question opened or closed.
    pub fn any_alive(&self, is_ours: impl Fn(u32) -> bool) -> bool {
        let ours = |task: &Task| task.pid != 0 && is_ours(task.pid);
        self.connections.iter().flatten().any(|(_, connection)| {
            connection.ended == 0 && (ours(&connection.opener) || ours(&connection.actor))
        })
    }

    /// A line for each place where more was lost than was told.
    pub fn news(&mut self) -> Vec<Event> {
        let totals = self.totals();
        let mut news = Vec::new();
        for (place, total) in totals {
            let told = self.told.entry(place).or_default();
            if total > *told {
                news.push(Event::Lost(Lost { time: Clock::now(), seq: 0, place, count: total - *told }));
                *told = total;
            }
        }
        news
    }

    /// How much was lost in all, by place.
    pub fn totals(&mut self) -> [(LostPlace, u64); 3] {
        let counters = self.counters();
        self.evicted = self.evicted.max(self.evictions(&counters));
        let skipped: u64 = self.guarded.iter().map(|fd| skipped(*fd)).sum();
        let unwritten = counters.records_lost + counters.processes_lost + skipped;
        [
            (LostPlace::RingBuffer, unwritten + self.undecodable + self.processes),
            (
                LostPlace::Connections,
                counters.connections_failed + counters.teardowns_failed + counters.ends_missed + self.evicted,
            ),
            (LostPlace::Stacks, counters.stacks_failed + self.stacks),
        ]
    }

    /// What was added, not removed and is not there any more. The table is counted only when it may have been full: an
    /// LRU map begins to evict while each CPU still holds up to 128 free places (`LOCAL_FREE_TARGET`,
    /// `kernel/bpf/bpf_lru_list.c`).
    fn evictions(&self, before: &Counters) -> u64 {
        let free = 128 * u64::try_from(nr_cpus().unwrap_or(1)).unwrap_or(1);
        let living = before.connections_added.saturating_sub(before.connections_removed);
        if living <= self.evicted + self.capacity.saturating_sub(free) {
            return 0;
        }
        let present = self.connections.keys().flatten().count() as u64;
        let removed = self.counters().connections_removed;
        before.connections_added.saturating_sub(removed + present)
    }
}

/// How often the kernel did not run a program because it was running on that CPU. Counted from 5.12 on; 0 before, where
/// nothing keeps it from running.
fn skipped(program: RawFd) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{program}")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("recursion_misses:"));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn what_is_no_program_skips_nothing() {
        let file = std::fs::File::open("/proc/self/stat").unwrap();
        assert_eq!(skipped(file.as_raw_fd()), 0);
        assert_eq!(skipped(-1), 0);
    }
}
