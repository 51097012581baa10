//! Endings → events: puts what is known about an ending into the words of the contract.

use std::net::Ipv6Addr;

use tcpclose_common::{
    record::{
        Address, Connection, Endpoints, Owner, Sample, Task, UNKNOWN_U32, UNKNOWN_U64, direction, role,
    },
    tcp::state,
};

use crate::{
    attribute::{self, Attributor, comm},
    correlate::{Ending, LateOwner},
    event::{
        self, Close, Direction, Event, Family, Holder, LastData, Lingering, Opener, Process, Reset, Role,
        State, Step, millis,
    },
    judge::{self, ResetReasons},
    kernel::clock::Clock,
    stacks::{Stacks, TaskStacks},
    stuck::{Lingerer, Orphaned},
};

/// Everything that words are made of.
pub struct Composer {
    /// Owners.
    pub attributor: Attributor,
    /// Stacks that records refer to.
    pub stacks: Stacks,
    /// Times.
    pub clock: Clock,
    /// Names of reset reasons.
    pub reasons: ResetReasons,
}

impl Composer {
    /// Made of these.
    pub fn new(attributor: Attributor, stacks: Stacks, reasons: ResetReasons) -> Self {
        Self { attributor, stacks, clock: Clock::new(), reasons }
    }

    /// The lines that tell of `ending`: its RSTs, then its close.
    pub fn events(&mut self, ending: &Ending) -> Vec<Event> {
        let process = self.attributor.owner(ending);
        let opener = ending.connection().and_then(|connection| self.opener(connection));
        let mut events = Vec::with_capacity(ending.resets.len() + 1);
        for reset in &ending.resets {
            events.push(self.reset(reset, process.clone(), opener.clone()));
        }
        if let Some(close) = &ending.close {
            events.push(self.close(close, process, opener));
            self.stacks.release(close.opener.user_stack);
            self.stacks.release(close.actor.user_stack);
        }
        events
    }

    /// Lets go of files that are kept open for programs that have ended.
    pub fn sweep(&mut self) {
        self.attributor.sweep();
        self.stacks.sweep();
    }

    fn close(&mut self, close: &Connection, process: Option<Process>, opener: Option<Opener>) -> Event {
        let verdict = judge::of(close, &self.reasons);
        let (idle_ms, last_data) = self.idle(close, &close.at_move, close.moved);
        Event::Close(Box::new(Close {
            time: self.clock.time(close.ended),
            seq: 0,
            connection: self.connection(close, close.ended),
            process,
            closed_by: verdict.closed_by,
            ended: verdict.ended,
            trigger: verdict.trigger,
            signal: verdict.signal,
            cause: verdict.cause,
            idle_ms,
            last_data,
            close_wait_ms: close_wait(close).map(millis),
            states: steps(close),
            stack: self.stack(judge::actor(close)),
            opener,
        }))
    }

    fn reset(&mut self, record: &Connection, process: Option<Process>, opener: Option<Opener>) -> Event {
        let reset = &record.reset;
        let (idle_ms, last_data) = self.idle(record, &record.at_end, reset.at);
        let sent = reset.direction == direction::SENT;
        Event::Reset(Box::new(Reset {
            time: self.clock.time(reset.at),
            seq: 0,
            connection: self.connection(record, reset.at),
            process,
            direction: if sent { Direction::Sent } else { Direction::Received },
            reason: judge::reason(reset.reason, &self.reasons).map(str::to_owned),
            cause: Some(judge::reset_cause(record, &self.reasons)),
            state: State::from_kernel(reset.state),
            idle_ms,
            last_data,
            ttl: (!sent && reset.ttl != 0).then_some(reset.ttl),
            handshake_ttl: (!sent && reset.handshake_ttl != 0).then_some(reset.handshake_ttl),
            // Nobody here acted when a RST came, or when the kernel answered a packet with one.
            stack: if sent && reset.answer == 0 { self.stack(judge::actor(record)) } else { None },
            opener,
        }))
    }

    /// The line that tells of a socket that lingers.
    pub fn lingering(&mut self, lingerer: &Lingerer) -> Option<Event> {
        let Lingerer { connection, seen, age, holders } = lingerer;
        // Of several holders the one who opened it counts, else the first.
        let holds = |owner: &Owner| LateOwner { task: owner.task, holds: true };
        let opener = holders.iter().find(|owner| owner.task.pid == connection.opener.pid);
        let late_owner = opener.or(holders.first()).map(holds);
        let ending = Ending { resets: Vec::new(), close: Some(**connection), late_owner, unheld: false };
        let known = |bytes: u32| (bytes != UNKNOWN_U32).then_some(u64::from(bytes));
        Some(Event::Lingering(Box::new(Lingering {
            time: self.clock.time(*seen),
            seq: 0,
            connection: self.connection(connection, *seen),
            process: self.attributor.owner(&ending),
            state: State::from_kernel(connection.last_state)?,
            since: age.since.map(|since| self.clock.time(since)),
            for_ms: Some(millis(age.at_least)),
            for_ms_at_most: age.at_most.map(millis),
            unread_bytes: known(connection.at_end.unread),
            holders: Some(holders.iter().map(holder).collect()),
            opener: self.opener(connection),
            kind: judge::lingering(connection),
        })))
    }

    /// The line that tells of a socket without a descriptor that lingered before the trace.
    pub fn lingering_before(&self, (socket, at_least): &Orphaned) -> Event {
        let processes = self.attributor.processes();
        let line = socket.lingering(Clock::now(), &mut attribute::lock(&processes));
        Event::Lingering(Box::new(Lingering { for_ms: Some(millis(*at_least)), ..line }))
    }

    fn connection(&self, connection: &Connection, at: u64) -> event::Connection {
        let (family, local, remote) = ends(&connection.endpoints);
        let established = connection.established;
        // At its end, or, for a RST that ended nothing, then.
        let sample = &connection.at_end;
        event::Connection {
            family,
            local,
            remote,
            netns: known(connection.endpoints.netns),
            cookie: (connection.cookie != 0).then_some(connection.cookie),
            role: match connection.role {
                role::CLIENT => Some(Role::Client),
                role::SERVER => Some(Role::Server),
                _ => None,
            },
            opened: (established != 0).then(|| self.clock.time(established)),
            age_ms: (established != 0).then(|| millis(at.saturating_sub(established))),
            bytes_sent: (sample.bytes_sent != UNKNOWN_U64).then_some(sample.bytes_sent),
            bytes_received: (sample.bytes_received != UNKNOWN_U64).then_some(sample.bytes_received),
            retransmits: known(sample.retransmits),
            rtt_us: known(sample.rtt_us).filter(|rtt| *rtt != 0),
        }
    }

    fn idle(&mut self, connection: &Connection, sample: &Sample, at: u64) -> (Option<f64>, Option<LastData>) {
        let Some((jiffies, way)) = judge::last_data(sample) else {
            return (None, None);
        };
        (Some(self.clock.jiffies_to_millis(jiffies, (connection.jiffies, at))), way)
    }

    fn opener(&mut self, connection: &Connection) -> Option<Opener> {
        let process = self.attributor.opener(connection)?;
        let stack = self.stack(&connection.opener);
        Some(Opener { process: Some(process), stack })
    }

    fn stack(&mut self, task: &Task) -> Option<event::Stack> {
        let Task { pid, mm, user_stack: user, kernel_stack: kernel, .. } = *task;
        self.stacks.named(&TaskStacks { pid, mm, user, kernel })
    }
}

fn holder(owner: &Owner) -> Holder {
    Holder { pid: owner.task.pid, comm: comm(&owner.task.comm), fd: owner.fd }
}

fn known(value: u32) -> Option<u32> {
    (value != UNKNOWN_U32).then_some(value)
}

/// Both ends; an end of which neither address nor port is known is `None`.
pub fn ends(ends: &Endpoints) -> (Option<Family>, Option<event::Endpoint>, Option<event::Endpoint>) {
    let end = |address: Address, port: u16| {
        (address != [0; 4] || port != 0)
            .then(|| event::Endpoint { address: ip(address).to_canonical(), port })
    };
    let (local, remote) = (end(ends.local, ends.local_port), end(ends.remote, ends.remote_port));
    // An IPv6 socket on mapped addresses speaks IPv4.
    let family = match remote.or(local) {
        Some(end) if ends.family != 0 => {
            Some(if end.address.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 })
        }
        _ => None,
    };
    (family, local, remote)
}

fn ip(address: Address) -> Ipv6Addr {
    let mut octets = [0; 16];
    for (to, word) in octets.chunks_exact_mut(4).zip(address) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    octets.into()
}

/// The path of states, times relative to the first.
fn steps(connection: &Connection) -> Vec<Step> {
    let count = usize::from(connection.steps).min(connection.states.len());
    let first = connection.times[0];
    let path = connection.states.iter().zip(&connection.times).take(count);
    path.filter_map(|(number, at)| {
        Some(Step { state: State::from_kernel(*number)?, at_ms: millis(at.saturating_sub(first)) })
    })
    .collect()
}

/// Nanoseconds between entering CLOSE_WAIT and leaving it.
fn close_wait(connection: &Connection) -> Option<u64> {
    let count = usize::from(connection.steps).min(connection.states.len());
    let entered = connection.states[..count].iter().position(|number| *number == state::CLOSE_WAIT)?;
    let left = connection.times[..count].get(entered + 1)?;
    if entered == 0 && connection.found != 0 {
        // It was there before the trace.
        return None;
    }
    Some(left.saturating_sub(connection.times[entered]))
}

#[cfg(test)]
mod tests {
    use tcpclose_common::record;

    use super::*;

    fn words(text: &str) -> Address {
        let octets = text.parse::<Ipv6Addr>().unwrap().octets();
        std::array::from_fn(|word| u32::from_ne_bytes(octets[word * 4..][..4].try_into().unwrap()))
    }

    #[test]
    fn mapped_addresses_are_ipv4() {
        let mut endpoints = Connection::NEW.endpoints;
        assert_eq!(ends(&endpoints), (None, None, None));
        endpoints.family = 10;
        endpoints.local = record::mapped(u32::from(std::net::Ipv4Addr::new(10, 0, 0, 1)).to_be());
        endpoints.remote = words("::ffff:10.0.0.2");
        (endpoints.local_port, endpoints.remote_port) = (80, 4711);
        let (family, local, remote) = ends(&endpoints);
        assert_eq!(family, Some(Family::Ipv4));
        assert_eq!(local.unwrap().address.to_string(), "10.0.0.1");
        assert_eq!(remote.unwrap().address.to_string(), "10.0.0.2");
        endpoints.remote = words("fd00::2");
        assert_eq!(ends(&endpoints).0, Some(Family::Ipv6));
    }

    #[test]
    fn time_in_close_wait() {
        let mut connection = Connection::NEW;
        connection.states[..3].copy_from_slice(&[state::ESTABLISHED, state::CLOSE_WAIT, state::LAST_ACK]);
        connection.times[..3].copy_from_slice(&[5, 100, 350]);
        connection.steps = 2;
        assert_eq!(close_wait(&connection), None, "not left yet");
        connection.steps = 3;
        assert_eq!(close_wait(&connection), Some(250));
        connection.states[1] = state::FIN_WAIT1;
        assert_eq!(close_wait(&connection), None);
        connection.steps = u8::MAX;
        assert_eq!(steps(&connection).len(), 3, "a count that lies is cut, and 0 is no state");
    }
}
