//! Connections with a property in common: their number, their times, and some of their lines.

use crate::diagnose::{
    end::Place,
    statistics::{ENOUGH, Reservoir},
};

/// The number of lines that a finding names.
const LINES: usize = 10;

/// Connections with a property in common.
#[derive(Clone, Debug, Default)]
pub(crate) struct Marks {
    pub(crate) count: u64,
    pub(crate) first: i64,
    pub(crate) last: i64,
    /// The number of different seconds in which they occurred, if they were added in order.
    pub(crate) seconds: u64,
    pub(crate) lines: Vec<Place>,
}

impl Marks {
    pub(crate) fn add(&mut self, place: Place, time: i64) {
        if self.count == 0 || time / SECOND != self.last / SECOND {
            self.seconds += 1;
        }
        self.first = if self.count == 0 { time } else { self.first.min(time) };
        self.last = if self.count == 0 { time } else { self.last.max(time) };
        self.count += 1;
        self.name(place);
    }

    /// Names a line, once, if there is room.
    pub(crate) fn name(&mut self, place: Place) {
        if self.lines.len() < LINES && !self.lines.contains(&place) {
            self.lines.push(place);
        }
    }

    /// Whether they are many and occurred at many moments: what happens to all at once has one cause.
    pub(crate) fn are_spread(&self) -> bool {
        self.seconds >= ENOUGH && self.last - self.first > SECOND
    }

    /// Names lines of `other` first, each line once: at most half as many as a finding names.
    pub(crate) fn put_first(&mut self, other: &Self) {
        let first: Vec<Place> = other.lines.iter().copied().take(LINES / 2).collect();
        self.lines.retain(|place| !first.contains(place));
        self.lines.splice(0..0, first);
        self.lines.truncate(LINES);
    }

    /// Adds those of `other`; lines of both are named.
    pub(crate) fn merge(&mut self, other: &Self) {
        if other.count == 0 {
            return;
        }
        self.first = if self.count == 0 { other.first } else { self.first.min(other.first) };
        self.last = if self.count == 0 { other.last } else { self.last.max(other.last) };
        self.count += other.count;
        self.seconds += other.seconds;
        let room = LINES.saturating_sub(self.lines.len());
        self.lines.extend(other.lines.iter().take(room));
    }
}

/// Nanoseconds.
pub(crate) const SECOND: i64 = 1_000_000_000;

/// Connections with a time each.
#[derive(Clone, Debug, Default)]
pub(crate) struct Series {
    pub(crate) marks: Marks,
    pub(crate) sample: Reservoir,
}

impl Series {
    pub(crate) fn add(&mut self, place: Place, time: i64, value: f64) {
        self.marks.add(place, time);
        self.sample.add(value);
    }
}
