//! Finds faults that only many lines together show.
//!
//! A diagnosis is a pure function from lines ([`observation`]) to findings ([`crate::event::Finding`]). Each
//! line is added to tables of bounded size ([`Diagnosis::add`]), from which findings are derived on request
//! ([`Diagnosis::findings`]). The two ends of a connection are joined first ([`pairs`]). They are then
//! grouped by program and service ([`services`]), by process that ended ([`deaths`]), by destination
//! ([`time_wait`]), by process that leaks sockets ([`leaks`]), and by cause and effect ([`chains`],
//! [`relays`]). The module [`findings`] has the thresholds and the sentences.
//!
//! The tables together never exceed 150 MiB; a few MiB is usual.

mod chains;
mod deaths;
mod end;
mod findings;
mod from_event;
pub mod input;
mod leaks;
mod marks;
mod names;
pub mod observation;
pub mod page;
mod pairs;
mod pending;
pub mod pictures;
mod relays;
pub mod report;
mod services;
mod statistics;
mod time_wait;
mod unanswered;

#[cfg(test)]
mod tests;

use crate::{
    diagnose::{
        end::{End, Place},
        observation::{Line, Observation, to_nanoseconds},
        pairs::PairKey,
    },
    event::{Cause, Direction, Event, Finding, LingeringKind, Role, State, Time},
};

/// The age after which an end is judged without its peer, in nanoseconds of the lines' own time.
const WAITED: i64 = 60 * marks::SECOND;

/// The number of services, and of ends that wait for their peers, that a trace keeps.
const TRACED_SERVICES: usize = 1_024;
const TRACED_PAIRS: usize = 8_192;

/// Collects lines and derives findings from them.
#[derive(Debug, Default)]
pub struct Diagnosis {
    names: names::Names,
    pairs: pairs::Pairs,
    services: services::Services,
    deaths: deaths::Deaths,
    leaks: leaks::Leaks,
    time_wait: time_wait::TimeWaitPorts,
    chains: chains::Chains,
    relays: relays::Relays,
    /// The names of the files, by their numbers.
    sources: Vec<String>,
    latest: i64,
    totals: Totals,
}

/// Statistics of the input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Lines of events.
    pub lines: u64,
    /// Those of them that are ends of connections.
    pub ends: u64,
    /// Connections of which both ends were read.
    pub joined: u64,
    /// Events that the trace lost.
    pub lost: u64,
    /// Services that were dropped because there was no room for them.
    pub left_out: u64,
}

impl Diagnosis {
    /// Begins without lines. `sources` are the names of the files.
    pub fn new(sources: Vec<String>) -> Self {
        Self { sources, ..Self::default() }
    }

    /// Begins without lines, for the events of this process. Its tables are smaller than those for files, so
    /// that a trace stays small on a host with many services; they never exceed 30 MiB.
    pub fn of_trace() -> Self {
        let mut diagnosis = Self::default();
        diagnosis.services.most = TRACED_SERVICES;
        diagnosis.pairs.most = TRACED_PAIRS;
        diagnosis
    }

    /// Adds a line of a file, given by its index in `sources`.
    pub fn add(&mut self, observation: &Observation<'_>, source: u16) {
        let Some(line) = observation.event else { return };
        self.latest = self.latest.max(observation.time);
        self.totals.lines += 1;
        match line {
            Line::Close => self.close(observation, source),
            Line::Reset => self.reset(observation, source),
            Line::Lingering => self.lingering(observation, source),
            Line::Lost => self.totals.lost += observation.count.unwrap_or_default(),
        }
    }

    /// Adds an event of this process, which will be the line `seq`.
    pub fn add_event(&mut self, event: &Event, seq: u64) {
        match event {
            Event::Close(close) => {
                self.totals.lines += 1;
                self.totals.ends += 1;
                if let Some(end) = End::of_event(close, seq, &mut self.names) {
                    self.end(&end);
                }
            }
            Event::Reset(reset) if is_evidence(Some(reset.direction), reset.cause) => {
                self.add(&Observation { seq, ..Observation::from(&**reset) }, 0);
            }
            Event::Reset(reset) => {
                self.totals.lines += 1;
                self.advance_to(reset.time);
            }
            Event::Lingering(lingering) => {
                self.add(&Observation { seq, ..Observation::from(&**lingering) }, 0);
            }
            Event::Lost(lost) => self.totals.lost += lost.count,
            Event::Finding(_) => {}
        }
    }

    fn close(&mut self, observation: &Observation<'_>, source: u16) {
        self.totals.ends += 1;
        if let Some(end) = End::of_line(observation, source, &mut self.names) {
            self.end(&end);
        }
    }

    fn end(&mut self, end: &End) {
        self.latest = self.latest.max(end.time);
        if end.close_wait_ms.is_some() && !self.leaks.is_empty() {
            self.leaks.closed(PairKey::of(end), end.death.is_some());
        }
        self.time_wait.settle(end);
        if end.is_ordinary() {
            return self.services.ordinary(end);
        }
        let Self { pairs, services, deaths, chains, relays, .. } = self;
        if end.role == Some(Role::Client) && !end.path.established {
            // There is no other end to wait for.
            return services.settle(end, None);
        }
        pairs.add(end, |end, peer| {
            services.settle(end, peer);
            deaths.settle(end, peer);
            chains.settle(end, peer);
            relays.settle(end);
        });
    }

    fn reset(&mut self, observation: &Observation<'_>, source: u16) {
        if !is_evidence(observation.direction, observation.cause) {
            return;
        }
        match observation.cause {
            Some(Cause::AcceptOverflow) => self.not_accepted(observation, source),
            _ => self.too_late(observation, source),
        }
    }

    /// Adds a RST with which the kernel refused a connection for which the accept queue had no room. This end
    /// has no other line, because the program never had it. Its peer had been connected.
    fn not_accepted(&mut self, observation: &Observation<'_>, source: u16) {
        if let Some(end) = End::of_line(observation, source, &mut self.names) {
            self.end(&End { role: Some(Role::Server), ..end });
        }
    }

    fn too_late(&mut self, observation: &Observation<'_>, source: u16) {
        if let Some((local, remote)) = observation.connection.local.zip(observation.connection.remote) {
            let pair = PairKey::seen(local, remote, source, observation.connection.netns);
            let place = Place { source, seq: observation.seq };
            self.services.too_late(pair, self.pairs.waiting(pair), place, observation.time);
        }
    }

    fn lingering(&mut self, observation: &Observation<'_>, source: u16) {
        let connection = &observation.connection;
        let Some((local, remote)) = connection.local.zip(connection.remote) else { return };
        let who = observation.process.as_ref().map(|process| self.names.of(process));
        match (observation.state, observation.kind) {
            (_, Some(LingeringKind::Unaccepted)) => {
                let place = Place { source, seq: observation.seq };
                self.services.unaccepted(who, local, place, observation.time);
            }
            (Some(State::CloseWait), _) => {
                let pair = PairKey::seen(local, remote, source, connection.netns);
                self.leaks.lingering(observation, source, pair, who);
            }
            _ => {}
        }
    }

    /// Sets the time, which also passes while there are no lines.
    pub fn advance_to(&mut self, time: Time) {
        self.latest = self.latest.max(to_nanoseconds(time.0));
    }

    /// The findings so far, the most costly first. An end whose peer has not been read counts only after a
    /// minute, unless these are the `last` findings.
    pub fn findings(&mut self, last: bool) -> Vec<Finding> {
        let until = if last { i64::MAX } else { self.latest.saturating_sub(WAITED) };
        let Self { pairs, services, deaths, chains, relays, .. } = self;
        pairs.give_up_before(until, |end, peer| {
            services.settle(end, peer);
            deaths.settle(end, peer);
            chains.settle(end, peer);
            relays.settle(end);
        });
        for gave_up in relays.join() {
            services.gave_up(&gave_up);
        }
        self.all_findings()
    }

    /// Statistics of the input.
    pub fn totals(&self) -> Totals {
        Totals { joined: self.pairs.joined, left_out: self.services.left_out, ..self.totals }
    }
}

/// Whether a RST of this direction and cause shows a fault by itself. Others are judged with the ends that they
/// belong to.
fn is_evidence(direction: Option<Direction>, cause: Option<Cause>) -> bool {
    direction == Some(Direction::Sent)
        && matches!(cause, Some(Cause::AcceptOverflow | Cause::Timewait | Cause::NoListener))
}
