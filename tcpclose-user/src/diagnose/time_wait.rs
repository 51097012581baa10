//! The number of ports towards one service that are in `TIME_WAIT` at the same time.
//!
//! Linux keeps a connection in `TIME_WAIT` for 60 s (`TCP_TIMEWAIT_LEN`), which no sysctl changes, so the
//! number at a given time is the number of connections that entered the state in the last 60 s.

use std::{collections::HashMap, net::IpAddr};

use foldhash::fast::RandomState;

use crate::{
    diagnose::{
        end::End,
        marks::{Marks, SECOND},
        names::Who,
        services::Single,
    },
    event::Role,
};

/// The number of destinations that are kept. When there is no room, those with the lowest peaks are dropped.
const MOST: usize = 4_096;

/// `TCP_TIMEWAIT_LEN`, in seconds.
pub(crate) const LASTS: usize = 60;

/// The same number, for calculations with times.
pub(crate) const LASTS_SECONDS: i64 = 60;

/// The ports of `net.ipv4.ip_local_port_range` as Linux sets it, 32768 to 60999.
pub(crate) const PORTS: u64 = 28_232;

/// The share of the ports above which there is a finding.
const SHARE: f64 = 0.5;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Destination {
    source: u16,
    netns: u32,
    local: IpAddr,
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
}

#[derive(Clone, Debug)]
pub(crate) struct Ports {
    /// The connections of each of the last seconds, by the second modulo [`LASTS`].
    seconds: [u32; LASTS],
    first: i64,
    latest: i64,
    now: u64,
    pub(crate) peak: u64,
    /// The number of seconds in which the connections of the peak were closed.
    peak_seconds: i64,
    pub(crate) marks: Marks,
    pub(crate) who: Single<Who>,
    pub(crate) pid: Single<u32>,
}

#[derive(Debug, Default)]
pub(crate) struct TimeWaitPorts {
    all: HashMap<Destination, Ports, RandomState>,
}

fn slot(second: i64) -> usize {
    usize::try_from(second.rem_euclid(LASTS_SECONDS)).unwrap_or_default()
}

impl Ports {
    fn new(second: i64) -> Self {
        Self {
            seconds: [0; LASTS],
            first: second,
            latest: second,
            now: 0,
            peak: 0,
            peak_seconds: 1,
            marks: Marks::default(),
            who: Single::None,
            pid: Single::None,
        }
    }

    fn add(&mut self, second: i64) {
        // Lines are in order except for some milliseconds; a late one counts for the current second.
        let second = second.max(self.latest);
        for gone in (self.latest + 1..=second).take(LASTS) {
            self.now -= u64::from(std::mem::take(&mut self.seconds[slot(gone)]));
        }
        self.latest = second;
        self.seconds[slot(second)] += 1;
        self.now += 1;
        if self.now > self.peak {
            self.peak = self.now;
            self.peak_seconds = (second - self.first + 1).min(LASTS_SECONDS);
        }
    }
}

impl TimeWaitPorts {
    pub(crate) fn settle(&mut self, end: &End) {
        if end.role != Some(Role::Client) || !end.leaves_time_wait() {
            return;
        }
        let second = end.time.div_euclid(SECOND);
        let key = Destination {
            source: end.place.source,
            netns: end.netns,
            local: end.local.ip(),
            address: end.remote.ip(),
            port: end.remote.port(),
        };
        if self.all.len() >= MOST && !self.all.contains_key(&key) {
            let mut peaks: Vec<u64> = self.all.values().map(|ports| ports.peak).collect();
            let (_, middle, _) = peaks.select_nth_unstable(MOST / 2);
            let bar = *middle;
            self.all.retain(|_, ports| ports.peak > bar);
        }
        let ports = self.all.entry(key).or_insert_with(|| Ports::new(second));
        ports.add(second);
        ports.marks.add(end.place, end.time);
        if let Some(who) = end.who {
            ports.who.add(who);
            ports.pid.add(end.pid);
        }
    }

    /// The destinations that occupy enough of the ports.
    pub(crate) fn pressed(&self) -> Vec<(&Destination, &Ports)> {
        let mut pressed: Vec<_> = self.all.iter().filter(|(_, ports)| ports.share() >= SHARE).collect();
        pressed.sort_unstable_by_key(|(destination, _)| **destination);
        pressed
    }
}

#[expect(clippy::cast_precision_loss, reason = "as many as there are ports, or not many more")]
impl Ports {
    /// The number of connections per second up to the peak.
    pub(crate) fn rate(&self) -> f64 {
        self.peak as f64 / self.peak_seconds as f64
    }

    /// The number of seconds after which all ports are in use at this rate; `None` if ports become free
    /// before that.
    pub(crate) fn seconds_to_all(&self) -> Option<f64> {
        let seconds = PORTS as f64 / self.rate();
        (seconds < LASTS as f64).then_some(seconds)
    }

    pub(crate) fn share(&self) -> f64 {
        self.peak as f64 / PORTS as f64
    }
}
