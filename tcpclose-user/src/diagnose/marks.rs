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
    /// The number of different seconds in which they occurred, provided that they were added in order.
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

    /// Whether they are many and occurred at many moments. What happens to all of them at once has one cause.
    pub(crate) fn are_spread(&self) -> bool {
        self.seconds >= ENOUGH && self.last - self.first > SECOND
    }

    /// Puts lines of `other` before those of `self`, each line once. They fill at most half of the list.
    pub(crate) fn put_first(&mut self, other: &Self) {
        let first: Vec<Place> = other.lines.iter().copied().take(LINES / 2).collect();
        self.lines.retain(|place| !first.contains(place));
        self.lines.splice(0..0, first);
        self.lines.truncate(LINES);
    }

    /// Adds the connections of `other`, and as many of their lines as there is room for.
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

/// One second, in nanoseconds.
pub(crate) const SECOND: i64 = 1_000_000_000;

/// Connections, each with a duration.
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
