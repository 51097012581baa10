//! One end of a closed connection, in a fixed number of bytes.

use std::net::SocketAddr;

use crate::{
    diagnose::{
        names::{Names, Who},
        observation::{Observation, Path},
    },
    event::{Cause, ClosedBy, Ended, LastData, Role, Trigger},
};

/// The position of a line: the number of its file, and its own number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) source: u16,
    pub(crate) seq: u64,
}

/// How a process died of a signal.
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

    fn of(observation: &Observation<'_>) -> Option<Self> {
        match observation.trigger? {
            Trigger::Exit => Some(Self::Stopped),
            Trigger::Signal => {
                let name = observation.signal.as_ref().map_or("", |name| name.0.as_ref());
                let oom = observation.signal_from.is_some_and(|from| from.oom == Some(true));
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
#[derive(Clone, Copy, Debug)]
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
    pub(crate) acted: bool,
    pub(crate) death: Option<Death>,
    pub(crate) cause: Option<Cause>,
    pub(crate) idle_ms: Option<f64>,
    pub(crate) since_sent_ms: Option<f64>,
    pub(crate) since_received_ms: Option<f64>,
    pub(crate) last_data: Option<LastData>,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) unread: Option<u64>,
    pub(crate) close_wait_ms: Option<f64>,
    pub(crate) path: Path,
}

/// Milliseconds in nanoseconds.
#[expect(clippy::cast_possible_truncation, reason = "a cast of a float saturates")]
pub(crate) fn nanoseconds(milliseconds: f64) -> i64 {
    (milliseconds * 1e6) as i64
}

impl End {
    /// `None` if an address is not known.
    pub(crate) fn of(observation: &Observation<'_>, source: u16, names: &mut Names) -> Option<Self> {
        let connection = &observation.connection;
        let (local, remote) = connection.local.zip(connection.remote)?;
        let path = observation.states;
        let teardown = path.until_teardown_ms.map_or(0.0, |until| path.length_ms - until);
        let process = observation.process.as_ref();
        Some(Self {
            place: Place { source, seq: observation.seq },
            time: observation.time,
            moved: observation.time.saturating_sub(nanoseconds(teardown)),
            who: process.map(|process| names.of(process)),
            pid: process.map_or(0, |process| process.pid),
            tid: process.and_then(|process| process.tid).unwrap_or_default(),
            netns: connection.netns.unwrap_or_default(),
            local,
            remote,
            role: connection.role,
            closed_by: observation.closed_by,
            ended: observation.ended,
            acted: observation.trigger.is_some(),
            death: Death::of(observation),
            cause: observation.cause,
            idle_ms: observation.idle_ms,
            since_sent_ms: observation.since_sent_ms,
            since_received_ms: observation.since_received_ms,
            last_data: observation.last_data,
            sent: connection.bytes_sent.unwrap_or_default(),
            received: connection.bytes_received.unwrap_or_default(),
            unread: observation.unread_bytes,
            close_wait_ms: observation.close_wait_ms,
            path,
        })
    }

    /// Whether the teardown began with an act of this host's side.
    pub(crate) fn closed_here(&self) -> bool {
        self.closed_by == Some(ClosedBy::Local)
    }

    pub(crate) fn closed_there(&self) -> bool {
        self.closed_by == Some(ClosedBy::Peer)
    }

    /// How long a request had been pending at this end when the teardown began; `None` if none was, which is inferred
    /// from the direction of the last data. Data in both directions within one tick of the kernel's clock counts as an
    /// answer.
    pub(crate) fn waited_ms(&self) -> Option<f64> {
        let (request, since) = match self.role? {
            Role::Client => (LastData::Sent, self.since_sent_ms),
            Role::Server => (LastData::Received, self.since_received_ms),
        };
        if self.last_data != Some(request) {
            return None;
        }
        since.or(self.idle_ms)
    }

    /// How long the connection had been idle, after an answer or without any data, when the teardown began.
    pub(crate) fn idle_after_answer_ms(&self) -> Option<f64> {
        match (self.waited_ms(), self.sent.min(self.received)) {
            (None, 1..) => self.idle_ms,
            _ => None,
        }
    }

    /// The silence before the last data that this end sent: the time since data was last received. `None` if the lines
    /// do not distinguish the directions.
    pub(crate) fn silence_before_last_sent_ms(&self) -> Option<f64> {
        let (sent, received) = self.since_sent_ms.zip(self.since_received_ms)?;
        (self.last_data == Some(LastData::Sent)).then_some(received - sent)
    }

    /// A socket that stays in `TIME_WAIT`, which holds the connection's ports.
    pub(crate) fn leaves_time_wait(&self) -> bool {
        matches!(self.closed_by, Some(ClosedBy::Local | ClosedBy::Both))
            && self.ended == Some(Ended::Fin)
            && self.cause.is_none()
            && self.path.fin_acknowledged
    }
}
