//! Counters of both halves → `lost` lines. Nothing is lost silently.

use std::collections::BTreeMap;

use aya::util::nr_cpus;
use tcpclose_common::{counters::Counters, table::overflow};

use crate::{
    event::{Lost, LostPlace},
    kernel::{clock::Clock, handle::KernelHalf},
    pace::Pace,
};

/// The losses so far.
pub struct Losses {
    /// The number of sockets that `OVERFLOW`, the map for sockets whose bucket is full, has room for.
    capacity: u64,
    /// What `lost` lines have reported so far.
    reported: BTreeMap<LostPlace, u64>,
    /// Entries that `OVERFLOW` has evicted.
    evicted: u64,
    /// Limits counting these entries to a tenth of a CPU: counting a million of them takes most of a second.
    pace: Pace,
}

/// The losses of the user half so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct UserLosses {
    /// Records that could not be decoded.
    pub undecodable: u64,
    /// Stacks that were evicted before they were read.
    pub stacks: u64,
    /// Events that could not be written.
    pub output: u64,
    /// Lines that no collector has taken; `None` without `--otlp`.
    pub export: Option<u64>,
}

impl Losses {
    /// Makes empty counts for a table that has room for `connections` sockets.
    pub fn new(connections: u32) -> Self {
        Self {
            capacity: u64::from(overflow(connections)),
            reported: BTreeMap::new(),
            evicted: 0,
            pace: Pace::default(),
        }
    }

    /// A line for each place where more was lost than was reported. Evictions may be reported with a later
    /// call.
    pub fn news(&mut self, kernel: &KernelHalf, user: UserLosses) -> Vec<Lost> {
        let counters = kernel.counters();
        let mut pace = self.pace;
        if self.may_have_evicted(&counters) {
            pace.run(|| self.count_evictions(kernel, &counters));
        }
        self.pace = pace;
        let totals = self.by_place(kernel, user, &counters);
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
    pub fn totals(&mut self, kernel: &KernelHalf, user: UserLosses) -> Vec<(LostPlace, u64)> {
        let counters = kernel.counters();
        if self.may_have_evicted(&counters) {
            self.count_evictions(kernel, &counters);
        }
        self.by_place(kernel, user, &counters)
    }

    fn by_place(&self, kernel: &KernelHalf, user: UserLosses, counters: &Counters) -> Vec<(LostPlace, u64)> {
        let unwritten = counters.records_lost + counters.processes_lost + kernel.skipped_runs();
        let places = [
            (LostPlace::RingBuffer, unwritten + user.undecodable),
            (
                LostPlace::Connections,
                counters.connections_failed + counters.teardowns_failed + counters.ends_missed + self.evicted,
            ),
            (LostPlace::Stacks, counters.stacks_failed + user.stacks),
            (LostPlace::Output, user.output),
        ];
        places.into_iter().chain(user.export.map(|lost| (LostPlace::Export, lost))).collect()
    }

    /// Whether `OVERFLOW` may have been full since evictions were last counted. An LRU map begins to evict
    /// while each CPU still has up to 128 free entries (`LOCAL_FREE_TARGET`, `kernel/bpf/bpf_lru_list.c`).
    fn may_have_evicted(&self, counters: &Counters) -> bool {
        let free = 128 * u64::try_from(nr_cpus().unwrap_or(1)).unwrap_or(1);
        let living = counters.overflow_added.saturating_sub(counters.overflow_removed);
        living > self.evicted + self.capacity.saturating_sub(free)
    }

    /// Counts `OVERFLOW`: what was added, not removed, and is no longer there was evicted. `before` are the
    /// counters as they were before this call.
    fn count_evictions(&mut self, kernel: &KernelHalf, before: &Counters) {
        let present = kernel.table().overflow();
        let removed = kernel.counters().overflow_removed;
        self.evicted = self.evicted.max(before.overflow_added.saturating_sub(removed + present));
    }
}
