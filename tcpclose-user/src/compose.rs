//! Endings and stuck sockets → events: turns facts and names into the values of the output contract. It is
//! pure: everything that has to be looked up was looked up before.

use std::collections::BTreeMap;

use crate::{
    correlate::Ending,
    event::{
        Act, Close, Connection, Event, Holder, LastData, Lingering, Opener, Process, Reset, Shared,
        SignalFrom, Stack, Step, millis,
    },
    ingest::life::{self, LaterAct, Life, Path, Sample, Task},
    judge,
    kernel::{ResetReasons, clock::Clock},
    stuck::Stuck,
    tcp::{Direction, State},
};

/// What was looked up about an ending.
#[derive(Clone, Debug, Default)]
pub struct LookedUp {
    /// The owner of the socket.
    pub process: Option<Shared<Process>>,
    /// The task that opened the connection, and where.
    pub opener: Option<Opener>,
    /// Where this side acted.
    pub stack: Option<Stack>,
    /// Who sent the signal that ended the process.
    pub signal_from: Option<SignalFrom>,
    /// What was done after the first act of this side, by which process, and where.
    pub later_acts: Vec<(LaterAct, Option<u32>, Option<Stack>)>,
    /// The processes that have the socket open.
    pub holders: Vec<Holder>,
    /// Who destroyed the socket from outside.
    pub destroyed_by: Option<Shared<Process>>,
}

/// How long a connection has transferred no data.
#[derive(Default)]
struct Silence {
    idle_ms: Option<f64>,
    last_data: Option<LastData>,
    since_sent_ms: Option<f64>,
    since_received_ms: Option<f64>,
}

/// Composes events.
pub struct Composer {
    /// Relates the kernel's clocks to the wall clock.
    pub clock: Clock,
    reasons: ResetReasons,
    /// The same names, as events have them.
    shared_reasons: BTreeMap<i64, Shared<String>>,
}

impl Composer {
    /// Makes a composer that knows the running kernel's names of reset reasons.
    pub fn new(reasons: ResetReasons) -> Self {
        let names = reasons.0.iter().map(|(number, name)| (*number, name.clone().into()));
        Self { clock: Clock::new(), shared_reasons: names.collect(), reasons }
    }

    /// The events of an ending: its RSTs, then its close.
    pub fn ending(&mut self, ending: &Ending, looked_up: LookedUp) -> impl Iterator<Item = Event> {
        if let Some((jiffies, at)) = ending.life.jiffies {
            self.clock.learn_hz(jiffies, at);
        }
        let composer = &*self;
        let life = &*ending.life;
        let of_close = looked_up.clone();
        let resets = ending.resets.iter().map(move |reset| {
            let mut looked_up = looked_up.clone();
            // The last act of this side is the one that sent a RST. If system calls cannot be read, later
            // acts are not seen, so the first act, which left the socket in a teardown state, need not be the
            // last.
            if let Some((_, _, stack)) = looked_up.later_acts.pop() {
                looked_up.stack = stack;
            } else if life.own_actor().is_some_and(|task| task.act == life::Activity::Unknown)
                && reset.state.is_some_and(has_sent_fin)
            {
                looked_up.stack = None;
            }
            composer.reset(life, reset, looked_up)
        });
        let end = life.end.filter(|_| ending.is_end);
        resets.chain(end.map(move |end| composer.close(life, end.at, of_close)))
    }

    fn close(&self, life: &Life, ended: u64, looked_up: LookedUp) -> Event {
        let verdict = judge::of(life, &self.reasons);
        let silence = life.first_move.map_or(Silence::default(), |first| self.silence(&first.sample));
        // The owner, if this side acted.
        let actor = looked_up.process.as_ref().and_then(|process| process.pid);
        Event::Close(Box::new(Close {
            time: self.clock.time(ended),
            seq: 0,
            connection: self.connection(life, ended),
            process: looked_up.process,
            closed_by: verdict.closed_by,
            ended: verdict.ended,
            trigger: verdict.trigger,
            signal: verdict.signal,
            signal_from: looked_up.signal_from,
            destroyed_by: looked_up.destroyed_by,
            cause: verdict.cause,
            idle_ms: silence.idle_ms,
            last_data: silence.last_data,
            since_sent_ms: silence.since_sent_ms,
            since_received_ms: silence.since_received_ms,
            unread_bytes: life.sample.unread.map(u64::from),
            unacked_bytes: life.unacknowledged_payload().map(u64::from),
            close_wait_ms: life.path.time_in(State::CloseWait).map(millis),
            states: steps(&life.path),
            acts: acts(life, actor, looked_up.stack.as_ref(), looked_up.later_acts),
            stack: looked_up.stack,
            opener: looked_up.opener,
        }))
    }

    fn reset(&self, life: &Life, reset: &life::Rst, looked_up: LookedUp) -> Event {
        let silence = self.silence(&life.sample);
        // This side did not act when a RST was received, or when the kernel answered a packet with one.
        let acted = reset.direction == Direction::Sent && !reset.answer;
        Event::Reset(Box::new(Reset {
            time: self.clock.time(reset.at),
            seq: 0,
            connection: self.connection(life, reset.at),
            process: looked_up.process,
            direction: reset.direction,
            reason: reset.reason.and_then(|number| self.shared_reasons.get(&number.into()).cloned()),
            cause: Some(judge::reset_cause(life, reset, &self.reasons)),
            state: reset.state,
            idle_ms: silence.idle_ms,
            last_data: silence.last_data,
            since_sent_ms: silence.since_sent_ms,
            since_received_ms: silence.since_received_ms,
            unread_bytes: life.sample.unread.map(u64::from),
            unacked_bytes: life.unacknowledged_payload().map(u64::from),
            ttl: reset.ttl,
            handshake_ttl: reset.handshake_ttl,
            stack: looked_up.stack.filter(|_| acted),
            opener: looked_up.opener,
        }))
    }

    /// The event of a socket that is stuck in a teardown state. `None` if its state is not known.
    pub fn stuck(&self, stuck: &Stuck, looked_up: LookedUp) -> Option<Event> {
        let Stuck { life, inspected, age, descriptors: _ } = stuck;
        let state = life.state?;
        let (trigger, signal) = judge::trigger(life.own_actor());
        Some(Event::Lingering(Box::new(Lingering {
            time: self.clock.time(*inspected),
            seq: 0,
            connection: self.connection(life, *inspected),
            process: looked_up.process,
            state,
            since: age.since.map(|since| self.clock.time(since)),
            for_ms: Some(millis(age.at_least)),
            for_ms_at_most: age.at_most.map(millis),
            unread_bytes: life.sample.unread.map(u64::from),
            unsent_bytes: life.send_queue.map(|queue| queue.unsent_payload(state).into()),
            trigger,
            signal,
            signal_from: looked_up.signal_from,
            stack: looked_up.stack,
            holders: Some(looked_up.holders),
            opener: looked_up.opener,
            kind: judge::waits_for(state, life.inode.is_some(), life.sample.recv_queue, life.send_queue),
        })))
    }

    fn connection(&self, life: &Life, at: u64) -> Connection {
        // The sample was taken at the end or, for a RST that ended nothing, at the time of the RST.
        let sample = &life.sample;
        Connection {
            family: life.endpoints.family,
            local: life.endpoints.local,
            remote: life.endpoints.remote,
            netns: life.endpoints.netns,
            cookie: life.cookie,
            role: life.role,
            opened: life.established.map(|established| self.clock.time(established)),
            age_ms: life.established.map(|established| millis(at.saturating_sub(established))),
            bytes_sent: sample.bytes_sent,
            bytes_received: sample.bytes_received,
            retransmits: sample.retransmits,
            rtt_us: sample.rtt_us,
        }
    }

    fn silence(&self, sample: &Sample) -> Silence {
        let millis = |jiffies: Option<u32>| jiffies.and_then(|jiffies| self.clock.jiffies_to_millis(jiffies));
        let last = judge::last_data(sample);
        Silence {
            idle_ms: millis(last.map(|(jiffies, _)| jiffies)),
            last_data: last.and_then(|(_, way)| way),
            since_sent_ms: millis(sample.sent_ago),
            since_received_ms: millis(sample.received_ago),
        }
    }
}

/// Whether a socket in this state has sent a FIN.
fn has_sent_fin(state: State) -> bool {
    matches!(state, State::FinWait1 | State::FinWait2 | State::Closing | State::LastAck)
}

/// The acts of this side, with times relative to the first state.
fn acts(
    life: &Life,
    pid: Option<u32>,
    stack: Option<&Stack>,
    later: Vec<(LaterAct, Option<u32>, Option<Stack>)>,
) -> Vec<Act> {
    let beginning = life.path.steps().first().map_or(0, |(_, at)| *at);
    let act = |task: &Task, pid: Option<u32>, at: Option<u64>, stack: Option<Stack>| Act {
        trigger: judge::trigger(Some(task)).0,
        at_ms: at.map(|at| millis(at.saturating_sub(beginning))),
        pid,
        stack,
    };
    let first = life.own_actor().map(|task| act(task, pid, life.acted_at(), stack.cloned()));
    let later = later.into_iter().map(|(later, pid, stack)| act(&later.task, pid, Some(later.at), stack));
    first.into_iter().chain(later).collect()
}

/// The path of states, with times relative to the first.
fn steps(path: &Path) -> Vec<Step> {
    let first = path.steps().first().map_or(0, |(_, at)| *at);
    let step = |&(state, at): &(State, u64)| Step { state, at_ms: millis(at.saturating_sub(first)) };
    path.steps().iter().map(step).collect()
}
