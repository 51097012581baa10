//! Counters of both halves → `lost` lines. Nothing is lost silently.

use std::collections::BTreeMap;

use aya::util::nr_cpus;
use tcpclose_common::counters::Counters;

use crate::{
    event::{Lost, LostPlace},
    kernel::{clock::Clock, handle::KernelHalf},
};

/// What could not be reported so far.
pub struct Losses {
    /// How many sockets the table of connections has room for.
    capacity: u64,
    /// What `lost` lines have said so far.
    reported: BTreeMap<LostPlace, u64>,
    /// Entries that the table of connections has evicted.
    evicted: u64,
}

/// What the user half has lost so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct UserLosses {
    /// Records that could not be decoded.
    pub undecodable: u64,
    /// Stacks that were evicted before they were read.
    pub stacks: u64,
    /// Events that could not be written.
    pub output: u64,
}

impl Losses {
    /// Nothing was lost yet; `capacity` is the size of the table of connections.
    pub fn new(capacity: u32) -> Self {
        Self { capacity: u64::from(capacity), reported: BTreeMap::new(), evicted: 0 }
    }

    /// A line for each place where more was lost than was reported.
    pub fn news(&mut self, kernel: &KernelHalf, user: UserLosses) -> Vec<Lost> {
        let totals = self.totals(kernel, user);
        let mut news = Vec::new();
        for (place, total) in totals {
            let reported = self.reported.entry(place).or_default();
            if total > *reported {
                let count = total - *reported;
                news.push(Lost { time: Clock::now(), seq: 0, place, count });
                *reported = total;
            }
        }
        news
    }

    /// How much was lost in all, by place.
    pub fn totals(&mut self, kernel: &KernelHalf, user: UserLosses) -> [(LostPlace, u64); 4] {
        let counters = kernel.counters();
        self.evicted = self.evicted.max(self.evictions(kernel, &counters));
        let unwritten = counters.records_lost + counters.processes_lost + kernel.skipped_runs();
        [
            (LostPlace::RingBuffer, unwritten + user.undecodable),
            (
                LostPlace::Connections,
                counters.connections_failed + counters.teardowns_failed + counters.ends_missed + self.evicted,
            ),
            (LostPlace::Stacks, counters.stacks_failed + user.stacks),
            (LostPlace::Output, user.output),
        ]
    }

    /// What was added, not removed, and is no longer there. The table is counted only when it may have been full: an LRU
    /// map begins to evict while each CPU still has up to 128 free entries (`LOCAL_FREE_TARGET`,
    /// `kernel/bpf/bpf_lru_list.c`).
    fn evictions(&self, kernel: &KernelHalf, before: &Counters) -> u64 {
        let free = 128 * u64::try_from(nr_cpus().unwrap_or(1)).unwrap_or(1);
        let living = before.connections_added.saturating_sub(before.connections_removed);
        if living <= self.evicted + self.capacity.saturating_sub(free) {
            return 0;
        }
        let present = kernel.connections();
        let removed = kernel.counters().connections_removed;
        before.connections_added.saturating_sub(removed + present)
    }
}
