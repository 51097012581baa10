//! The data of the page's diagrams: numbers over time and closing stacks, in tables of bounded size.

use std::collections::{BTreeMap, HashMap};

use crate::{
    diagnose::{
        end::nanoseconds,
        leaks::StackFields,
        marks::SECOND,
        observation::{Line, Observation},
        time_wait::LASTS_SECONDS,
    },
    event::{ClosedBy, Ended, State},
};

/// The number of points in time. When the trace is longer than they cover, each pair of points is merged.
const POINTS: usize = 240;

/// The same number, for calculations with times.
const POINTS_OF_TIME: i64 = 240;

/// The number of different stacks, and of frames of each; further stacks are counted as `(others)`.
const STACKS: usize = 4_096;
const FRAMES: usize = 64;

/// Ends by cause, sockets by state, and closing stacks.
#[derive(Debug, Default)]
pub struct Pictures {
    pub(crate) ends: Timeline,
    /// The change in the number of sockets in the state since the previous point.
    pub(crate) close_wait: Timeline,
    pub(crate) time_wait: Timeline,
    /// Stacks, outermost frame first.
    pub(crate) stacks: HashMap<Vec<String>, u64>,
    /// Sockets that linger in `CLOSE_WAIT`: local and remote address, and the time at which the state began.
    stuck: HashMap<(std::net::SocketAddr, std::net::SocketAddr), i64>,
}

/// Counts of several series over time.
#[derive(Debug)]
pub(crate) struct Timeline {
    pub(crate) start: i64,
    /// The time from one point to the next, in nanoseconds.
    pub(crate) step: i64,
    pub(crate) series: BTreeMap<String, Vec<i64>>,
    begun: bool,
}

impl Default for Timeline {
    fn default() -> Self {
        Self { start: 0, step: SECOND / 10, series: BTreeMap::new(), begun: false }
    }
}

impl Timeline {
    /// Sets the first point in time. Only the first call has an effect.
    fn begin(&mut self, time: i64) {
        if !self.begun {
            self.begun = true;
            self.start = time;
        }
    }

    /// Adds `by` to a series at the point of this time. Times before the first point count as the first
    /// point.
    pub(crate) fn add(&mut self, time: i64, series: &str, by: i64) {
        self.begin(time);
        let offset = time.saturating_sub(self.start).max(0);
        while offset / self.step >= POINTS_OF_TIME {
            self.step *= 2;
            for points in self.series.values_mut() {
                for index in 0..POINTS / 2 {
                    points[index] = points[2 * index] + points[2 * index + 1];
                }
                points[POINTS / 2..].fill(0);
            }
        }
        if !self.series.contains_key(series) {
            self.series.insert(series.to_owned(), vec![0; POINTS]);
        }
        if let Some(points) = self.series.get_mut(series)
            && let Some(point) =
                usize::try_from(offset / self.step).ok().and_then(|index| points.get_mut(index))
        {
            *point += by;
        }
    }

    /// The number of points up to the last one with a value, plus one.
    pub(crate) fn length(&self) -> usize {
        let last = |points: &Vec<i64>| points.iter().rposition(|count| *count != 0).unwrap_or_default();
        self.series.values().map(last).max().unwrap_or_default().saturating_add(2).min(POINTS)
    }
}

const SOCKETS: &str = "sockets";

/// The largest number of lingering sockets that are kept.
const STUCK: usize = 65_536;

impl Pictures {
    /// Adds a line.
    pub fn add(&mut self, observation: &Observation<'_>) {
        if observation.event.is_some() {
            // All diagrams have the same time axis.
            for timeline in [&mut self.ends, &mut self.close_wait, &mut self.time_wait] {
                timeline.begin(observation.time);
            }
        }
        match observation.event {
            Some(Line::Close) => self.close(observation),
            Some(Line::Lingering) if observation.state == Some(State::CloseWait) => {
                let Some(ends) = observation.connection.local.zip(observation.connection.remote) else {
                    return;
                };
                if self.stuck.len() < STUCK && !self.stuck.contains_key(&ends) {
                    let lasted = nanoseconds(observation.for_ms.unwrap_or_default());
                    let since = observation.since.unwrap_or(observation.time.saturating_sub(lasted));
                    self.stuck.insert(ends, since);
                    self.close_wait.add(since, SOCKETS, 1);
                }
            }
            _ => {}
        }
    }

    fn close(&mut self, observation: &Observation<'_>) {
        let time = observation.time;
        self.ends.add(time, &name(observation), 1);
        let path = observation.states;
        let ends = observation.connection.local.zip(observation.connection.remote);
        if let Some(lasted) = observation.close_wait_ms {
            let was_told = ends.is_some_and(|ends| self.stuck.remove(&ends).is_some());
            if !was_told {
                self.close_wait.add(time.saturating_sub(nanoseconds(lasted)), SOCKETS, 1);
            }
            self.close_wait.add(time, SOCKETS, -1);
        }
        let ours = matches!(observation.closed_by, Some(ClosedBy::Local | ClosedBy::Both));
        if ours
            && observation.ended == Some(Ended::Fin)
            && observation.cause.is_none()
            && path.fin_acknowledged
        {
            self.time_wait.add(time, SOCKETS, 1);
            // A change after the end of the trace is not drawn.
            self.time_wait.add(time.saturating_add(LASTS_SECONDS * SECOND), SOCKETS, -1);
        }
        if let Some(stack) = observation
            .stack
            .as_ref()
            .and_then(|text| serde_json::from_str::<StackFields<'_>>(text.get()).ok())
        {
            self.stack(observation, &stack);
        }
    }

    fn stack(&mut self, observation: &Observation<'_>, stack: &StackFields<'_>) {
        let frames = stack.kernel.iter().flatten().chain(stack.user.iter().flatten());
        let mut names: Vec<String> =
            frames.take(FRAMES).map(|frame| frame.name().unwrap_or_else(|| "?".to_owned())).collect();
        if names.is_empty() {
            return;
        }
        names.push(observation.process.as_ref().map_or("?", |process| process.comm.0.as_ref()).to_owned());
        names.reverse();
        if self.stacks.len() >= STACKS && !self.stacks.contains_key(&names) {
            names = vec!["(others)".to_owned()];
        }
        *self.stacks.entry(names).or_default() += 1;
    }
}

/// The cause, or who closed if there is no cause.
fn name(observation: &Observation<'_>) -> String {
    match (observation.cause, observation.closed_by) {
        (Some(cause), _) => cause.to_string(),
        (None, Some(by)) => format!("closed by {by}"),
        (None, None) => "not known".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_of_any_length_has_as_many_points() {
        let mut timeline = Timeline::default();
        for second in 0..100_000 {
            timeline.add(second * SECOND, "a", 1);
        }
        timeline.add(0, "b", 5);
        assert_eq!(timeline.series["a"].len(), POINTS);
        assert_eq!(timeline.series["a"].iter().sum::<i64>(), 100_000);
        assert_eq!(timeline.series["b"][0], 5);
        assert!(timeline.length() <= POINTS && timeline.length() > POINTS / 2);
    }
}
