//! One end of a closed connection, in a fixed number of bytes.

use std::net::{IpAddr, SocketAddr};

use crate::{
    diagnose::{
        names::{Names, Who},
        observation::{Observation, StatesSeen, to_nanoseconds},
    },
    event::{Cause, Close, ClosedBy, Ended, Endpoint, LastData, Role, SignalFrom, Trigger},
};

/// The shortest idle time that counts; shorter ones are pauses within an exchange or its end.
pub(crate) const IDLE_MS: f64 = 500.0;

/// The shortest wait for an answer that counts; shorter ones are races between an answer and an orderly end.
pub(crate) const WAIT_MS: f64 = 50.0;

/// The longest time from one retransmission to the next, in milliseconds (`TCP_RTO_MAX` in Linux); one that is
/// nearly as long may have been cut to it.
const LONGEST_RTO_MS: f64 = 120_000.0 * 0.99;

/// The longest time from the first time that data is sent to the last, in milliseconds: with the default of
/// `net.ipv4.tcp_retries2`, the kernel sends nothing again 924.6 s after it has sent it a second time.
const LONGEST_RETRANSMISSION_MS: f64 = 926_000.0;

/// The position of a line: the number of its file, and its own number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) source: u16,
    pub(crate) seq: u64,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Death {
    /// It was asked to terminate, or ended by itself.
    Stopped,
    /// The kernel's OOM killer.
    OutOfMemory,
    /// `SIGKILL` from another or an unknown sender.
    Killed,
    /// It crashed with this signal.
    Crashed(&'static str),
}

impl Death {
    const CRASHES: [&'static str; 7] =
        ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGSYS", "SIGTRAP"];

    fn of(trigger: Option<Trigger>, signal: Option<&str>, oom: bool) -> Option<Self> {
        match trigger? {
            Trigger::Exit => Some(Self::Stopped),
            Trigger::Signal => {
                let name = signal.unwrap_or_default();
                let crash = Self::CRASHES.into_iter().find(|crash| *crash == name);
                Some(match crash {
                    Some(crash) => Self::Crashed(crash),
                    None if oom => Self::OutOfMemory,
                    None if name == "SIGKILL" => Self::Killed,
                    None => Self::Stopped,
                })
            }
            _ => None,
        }
    }

    /// The verb for a sentence about the process.
    pub(crate) fn verb(self) -> String {
        match self {
            Self::Stopped => "was stopped".to_owned(),
            Self::OutOfMemory => "was killed by the kernel's OOM killer".to_owned(),
            Self::Killed => "was killed (SIGKILL)".to_owned(),
            Self::Crashed(signal) => format!("crashed ({signal})"),
        }
    }
}

/// An end whose addresses are known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct End {
    pub(crate) place: Place,
    /// When it ended.
    pub(crate) time: i64,
    /// When the teardown began.
    pub(crate) moved: i64,
    pub(crate) who: Option<Who>,
    pub(crate) pid: u32,
    pub(crate) tid: u32,
    pub(crate) netns: u32,
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
    pub(crate) role: Option<Role>,
    pub(crate) closed_by: Option<ClosedBy>,
    pub(crate) ended: Option<Ended>,
    /// The first act of this side.
    pub(crate) trigger: Option<Trigger>,
    pub(crate) death: Option<Death>,
    /// The program that sent the signal of which the process died.
    pub(crate) killer: Option<Who>,
    pub(crate) cause: Option<Cause>,
    pub(crate) idle_ms: Option<f64>,
    pub(crate) since_sent_ms: Option<f64>,
    pub(crate) since_received_ms: Option<f64>,
    pub(crate) last_data: Option<LastData>,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) retransmits: Option<u32>,
    pub(crate) unread: Option<u64>,
    pub(crate) unacked: Option<u64>,
    pub(crate) close_wait_ms: Option<f64>,
    pub(crate) path: StatesSeen,
}

/// The connections of a program to a service, or those of the service itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ServiceKey {
    pub(crate) who: Option<Who>,
    pub(crate) is_server: bool,
    /// The server's address, as its clients see it; all clients of a server are one group.
    pub(crate) address: Option<IpAddr>,
    pub(crate) port: u16,
}

impl ServiceKey {
    pub(crate) fn of(end: &End) -> Option<Self> {
        let (is_server, address, port) = match end.role? {
            Role::Client => (false, Some(end.remote.ip()), end.remote.port()),
            Role::Server => (true, None, end.local.port()),
        };
        Some(Self { who: end.who, is_server, address, port })
    }
}

/// When the teardown began.
fn moved(ended: i64, path: &StatesSeen) -> i64 {
    let teardown = path.until_teardown_ms.map_or(0.0, |until| path.length_ms - until);
    ended.saturating_sub(nanoseconds(teardown))
}

/// Milliseconds in nanoseconds.
#[expect(clippy::cast_possible_truncation, reason = "a cast of a float saturates")]
pub(crate) fn nanoseconds(milliseconds: f64) -> i64 {
    (milliseconds * 1e6) as i64
}

impl End {
    /// Of a line. `None` if an address is not known.
    pub(crate) fn of_line(observation: &Observation<'_>, source: u16, names: &mut Names) -> Option<Self> {
        let connection = &observation.connection;
        let (local, remote) = connection.local.zip(connection.remote)?;
        let process = observation.process.as_ref();
        let signal = observation.signal.as_ref().map(|name| name.0.as_ref());
        let from = observation.signal_from.as_ref();
        let oom = from.is_some_and(|from| from.oom == Some(true));
        Some(Self {
            place: Place { source, seq: observation.seq },
            time: observation.time,
            moved: moved(observation.time, &observation.states),
            who: process.map(|process| names.of(process)),
            pid: process.map_or(0, |process| process.pid),
            tid: process.and_then(|process| process.tid).unwrap_or_default(),
            netns: connection.netns.unwrap_or_default(),
            local,
            remote,
            role: connection.role,
            closed_by: observation.closed_by,
            ended: observation.ended,
            trigger: observation.trigger,
            death: Death::of(observation.trigger, signal, oom),
            killer: from.and_then(|from| from.comm.as_ref()).map(|comm| names.of_comm(&comm.0)),
            cause: observation.cause,
            idle_ms: observation.idle_ms,
            since_sent_ms: observation.since_sent_ms,
            since_received_ms: observation.since_received_ms,
            last_data: observation.last_data,
            sent: connection.bytes_sent.unwrap_or_default(),
            received: connection.bytes_received.unwrap_or_default(),
            retransmits: connection.retransmits,
            unread: observation.unread_bytes,
            unacked: observation.unacked_bytes,
            close_wait_ms: observation.close_wait_ms,
            path: observation.states,
        })
    }

    /// Of an event of this process, which will be the line `seq`. `None` if an address is not known.
    pub(crate) fn of_event(close: &Close, seq: u64, names: &mut Names) -> Option<Self> {
        let connection = &close.connection;
        let (local, remote) = connection.local.zip(connection.remote)?;
        let address = |end: Endpoint| SocketAddr::new(end.address, end.port);
        let process = close.process.as_ref();
        let (oom, killer) = match &close.signal_from {
            Some(SignalFrom::Process { comm, .. }) => (false, Some(names.of_comm(comm))),
            Some(SignalFrom::Kernel { oom }) => (*oom, None),
            None => (false, None),
        };
        let time = to_nanoseconds(close.time.0);
        let mut path = StatesSeen::default();
        for step in &close.states {
            path.add(step.state, step.at_ms);
        }
        Some(Self {
            place: Place { source: 0, seq },
            time,
            moved: moved(time, &path),
            who: process.map(|process| names.of_shared(process)),
            pid: process.and_then(|process| process.pid).unwrap_or_default(),
            tid: process.and_then(|process| process.tid).unwrap_or_default(),
            netns: connection.netns.unwrap_or_default(),
            local: address(local),
            remote: address(remote),
            role: connection.role,
            closed_by: close.closed_by,
            ended: close.ended,
            trigger: close.trigger,
            death: Death::of(close.trigger, close.signal.as_deref(), oom),
            killer,
            cause: close.cause,
            idle_ms: close.idle_ms,
            since_sent_ms: close.since_sent_ms,
            since_received_ms: close.since_received_ms,
            last_data: close.last_data,
            sent: connection.bytes_sent.unwrap_or_default(),
            received: connection.bytes_received.unwrap_or_default(),
            retransmits: connection.retransmits,
            unread: close.unread_bytes,
            unacked: close.unacked_bytes,
            close_wait_ms: close.close_wait_ms,
            path,
        })
    }

    /// Whether this end is evidence of nothing, as most ends are: the connection ended in order, within a
    /// fraction of a second after its last data, and no answer was pending. Such ends are only counted, which
    /// keeps a diagnosis cheap. Both ends of a connection show these facts, so that either both are ordinary
    /// or neither is, except where a time is close to its bound.
    pub(crate) fn is_ordinary(&self) -> bool {
        let client_closed = match self.role {
            Some(Role::Client) => self.closed_here(),
            Some(Role::Server) => self.closed_there(),
            None => return false,
        };
        let is_short = |silence: Option<f64>| silence.is_none_or(|silence| silence < IDLE_MS);
        self.cause.is_none()
            && self.ended == Some(Ended::Fin)
            && self.death.is_none()
            && self.path.established
            && is_short(self.idle_ms)
            && is_short(self.since_sent_ms)
            && is_short(self.since_received_ms)
            && self.waited_ms().is_none_or(|wait| client_closed && wait < WAIT_MS)
    }

    /// Whether the teardown began with an act of this host's side.
    pub(crate) fn closed_here(&self) -> bool {
        self.closed_by == Some(ClosedBy::Local)
    }

    pub(crate) fn closed_there(&self) -> bool {
        self.closed_by == Some(ClosedBy::Peer)
    }

    /// Whether a process has both ends of the connection.
    pub(crate) fn is_of_same_process(&self, peer: &Self) -> bool {
        self.pid != 0 && (self.place.source, self.pid) == (peer.place.source, peer.pid)
    }

    /// The number of bytes that the server sent.
    pub(crate) fn sent_by_server(&self) -> u64 {
        if self.role == Some(Role::Server) { self.sent } else { self.received }
    }

    /// When the connection's first state was seen.
    pub(crate) fn began(&self) -> i64 {
        self.time.saturating_sub(nanoseconds(self.path.length_ms))
    }

    /// How long the connection had been idle, after an answer or without any data, when the teardown began.
    /// `None` if the server had been sending for longer than that while the client was silent, such as
    /// heartbeats: then the connection was not idle.
    pub(crate) fn idle_after_answer_ms(&self) -> Option<f64> {
        match (self.waited_ms(), self.sent.min(self.received)) {
            (None, 1..) => {
                self.idle_ms.filter(|idle| self.client_silent_ms().is_none_or(|it| it <= 2.0 * idle))
            }
            _ => None,
        }
    }

    /// How long the client had sent nothing when the teardown began.
    fn client_silent_ms(&self) -> Option<f64> {
        if self.role == Some(Role::Server) { self.since_received_ms } else { self.since_sent_ms }
    }

    /// The silence before the last data that this end sent: the time since data was last received. `None` if
    /// the lines do not distinguish the directions.
    pub(crate) fn silence_before_last_sent_ms(&self) -> Option<f64> {
        let (sent, received) = self.since_sent_ms.zip(self.since_received_ms)?;
        (self.last_data == Some(LastData::Sent)).then_some(received - sent)
    }

    /// The silence before data that was answered with a RST, or never, and so ended the connection: at least
    /// this long. `None` if it is not known, because a retransmission counts as the last data sent.
    pub(crate) fn silence_before_failure_ms(&self) -> Option<f64> {
        let silence = self.silence_before_last_sent_ms()?;
        match (self.ended?, self.cause) {
            // What acknowledges data knows the connection.
            (Ended::ResetReceived, _) => {
                (self.retransmits == Some(0) && self.unacked != Some(0)).then_some(silence)
            }
            // The time from one retransmission to the next doubles, so that all of them together took no
            // longer than the kernel then waited.
            (Ended::Timeout, Some(Cause::RetransmitTimeout)) => {
                let waited = self.since_sent_ms?;
                let is_cut = waited >= LONGEST_RTO_MS;
                Some(silence - if is_cut { LONGEST_RETRANSMISSION_MS } else { waited })
            }
            _ => None,
        }
    }

    /// How long a server took to answer after its client had shut down sending; `None` if it had sent
    /// something before, because the time of its later data is then not known.
    pub(crate) fn half_closed_ms(&self) -> Option<f64> {
        let answered_later = self.closed_there() && self.sent > 0 && self.since_sent_ms.is_none();
        self.close_wait_ms.filter(|_| self.role == Some(Role::Server) && answered_later)
    }

    /// Whether this end stays in `TIME_WAIT`, which keeps the ports of the connection in use.
    pub(crate) fn leaves_time_wait(&self) -> bool {
        matches!(self.closed_by, Some(ClosedBy::Local | ClosedBy::Both))
            && self.ended == Some(Ended::Fin)
            && self.cause.is_none()
            && self.path.fin_acknowledged
    }
}
