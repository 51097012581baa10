//! The public model of the output: one struct for each kind of line, serialized with the fields in this
//! order.
//!
//! Fields may be added, never renamed. A fact that is not known is `None` and becomes `null`; it is never
//! left out.

#[cfg(test)]
pub(crate) mod examples;
mod finding;
pub mod schema;
mod shared;
mod stack;
mod time;
mod values;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::tcp::{Direction, Endpoint, Family, Role, State};
pub use finding::{Confidence, Evidence, Finding, FindingKind, Program, Remote};
pub use shared::{FINISHED, Shared};
pub use stack::{Frame, Frames, Stack, Truncated};
pub use time::{Time, millis};
pub use values::{Attribution, Cause, ClosedBy, Ended, LastData, LingeringKind, LostPlace, Trigger};

/// One line of output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// One end of a connection, or of an attempt at one, is over.
    Close(Box<Close>),
    /// A RST was sent or received.
    Reset(Box<Reset>),
    /// A socket stays in a teardown state.
    Lingering(Box<Lingering>),
    /// Something could not be reported.
    Lost(Lost),
    /// What many lines together show.
    Finding(Box<Finding>),
}

impl Event {
    /// Gives the line its number.
    pub fn set_seq(&mut self, number: u64) {
        let seq = match self {
            Self::Close(close) => &mut close.seq,
            Self::Reset(reset) => &mut reset.seq,
            Self::Lingering(lingering) => &mut lingering.seq,
            Self::Lost(lost) => &mut lost.seq,
            Self::Finding(finding) => &mut finding.seq,
        };
        *seq = number;
    }

    /// The owner of the socket.
    pub fn process(&self) -> Option<&Process> {
        match self {
            Self::Close(close) => close.process.as_deref(),
            Self::Reset(reset) => reset.process.as_deref(),
            Self::Lingering(lingering) => lingering.process.as_deref(),
            Self::Lost(_) | Self::Finding(_) => None,
        }
    }
}

/// One end of a connection that is over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Close {
    /// When it was over.
    pub time: Time,
    /// The number of the line, counted from 1.
    pub seq: u64,
    /// Which connection.
    pub connection: Connection,
    /// Whose socket it was.
    pub process: Option<Shared<Process>>,
    /// Who ended it.
    pub closed_by: Option<ClosedBy>,
    /// How it ended.
    pub ended: Option<Ended>,
    /// What this host's side did; null if it never acted.
    pub trigger: Option<Trigger>,
    /// The signal that the process died of, with trigger `signal`.
    pub signal: Option<String>,
    /// Who sent that signal; null if that was not seen, or if no process sent it, as for a fault.
    pub signal_from: Option<SignalFrom>,
    /// With `closed_by: admin`, the process that destroyed the socket from outside.
    pub destroyed_by: Option<Shared<Process>>,
    /// Why; null for an orderly close.
    pub cause: Option<Cause>,
    /// Milliseconds from the last data in either direction to the first step of the teardown; null if there
    /// was no data.
    pub idle_ms: Option<f64>,
    /// The direction of that data.
    pub last_data: Option<LastData>,
    /// Milliseconds from the last payload sent to the first move of the teardown; null if none was ever sent.
    /// A retransmission counts as sent.
    pub since_sent_ms: Option<f64>,
    /// Milliseconds from the last payload received to the first move of the teardown; null if none was ever
    /// received.
    pub since_received_ms: Option<f64>,
    /// Payload that was received and never read.
    pub unread_bytes: Option<u64>,
    /// Payload that was written and never acknowledged.
    pub unacked_bytes: Option<u64>,
    /// Milliseconds spent in `CLOSE_WAIT`; null if it was never there.
    pub close_wait_ms: Option<f64>,
    /// The states that were seen, in order.
    pub states: Vec<Step>,
    /// Every act of this side, in order: a `shutdown` and the `close` that followed it are two. Acts after
    /// the end are not included.
    pub acts: Vec<Act>,
    /// Where in the code this host's side acted; null if it did not, or if stacks were not requested.
    pub stack: Option<Stack>,
    /// The connect or accept that made the connection; null if that was before tracing.
    pub opener: Option<Opener>,
}

/// A RST that was sent or received.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Reset {
    /// When.
    pub time: Time,
    /// The number of the line, counted from 1.
    pub seq: u64,
    /// Which connection.
    pub connection: Connection,
    /// Whose socket it was.
    pub process: Option<Shared<Process>>,
    /// The direction.
    pub direction: Direction,
    /// The kernel's own name for the reason, such as `TCP_ABORT_ON_CLOSE`; null on kernels that give none.
    pub reason: Option<Shared<String>>,
    /// Why.
    pub cause: Option<Cause>,
    /// State of the socket when it happened; null without a socket.
    pub state: Option<State>,
    /// Milliseconds since the last data in either direction; null if there was none.
    pub idle_ms: Option<f64>,
    /// The direction of that data.
    pub last_data: Option<LastData>,
    /// Milliseconds since payload was last sent; null if none was ever sent. A retransmission counts as sent.
    pub since_sent_ms: Option<f64>,
    /// Milliseconds since payload was last received; null if none was ever received.
    pub since_received_ms: Option<f64>,
    /// Payload that was received and never read.
    pub unread_bytes: Option<u64>,
    /// Payload that was written and never acknowledged.
    pub unacked_bytes: Option<u64>,
    /// Time to live of the RST, if it was received.
    pub ttl: Option<u8>,
    /// Time to live of the connection's first packets.
    pub handshake_ttl: Option<u8>,
    /// Where in the code this host's side acted.
    pub stack: Option<Stack>,
    /// The connect or accept that made the connection.
    pub opener: Option<Opener>,
}

/// A socket that stays in a teardown state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Lingering {
    /// When this was noticed.
    pub time: Time,
    /// The number of the line, counted from 1.
    pub seq: u64,
    /// Which connection.
    pub connection: Connection,
    /// Whose socket it is.
    pub process: Option<Shared<Process>>,
    /// The state in which it stays.
    pub state: State,
    /// When it entered that state; null if before tracing began.
    pub since: Option<Time>,
    /// The least time that it has been there, milliseconds.
    pub for_ms: Option<f64>,
    /// The most time that it can have been there, milliseconds; the same where `since` is known, null where
    /// the kernel gives no upper bound.
    pub for_ms_at_most: Option<f64>,
    /// Bytes received that no process has read.
    pub unread_bytes: Option<u64>,
    /// Bytes written that have not been sent, because the peer's window has no room for them.
    pub unsent_bytes: Option<u64>,
    /// What this side did last; null if it has not acted, or before tracing began.
    pub trigger: Option<Trigger>,
    /// The signal that the process died of, with trigger `signal`.
    pub signal: Option<String>,
    /// Who sent that signal.
    pub signal_from: Option<SignalFrom>,
    /// Where in the code it did that.
    pub stack: Option<Stack>,
    /// Every process that has it open; null if that cannot be looked up.
    pub holders: Option<Vec<Holder>>,
    /// The connect or accept that made the connection; null if that was before tracing.
    pub opener: Option<Opener>,
    /// What it waits for.
    pub kind: LingeringKind,
}

/// A process that has a socket open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Holder {
    /// Process id, in the pid namespace of tcpclose; null if it has none there.
    pub pid: Option<u32>,
    /// Process id in the initial pid namespace; null if tcpclose runs in another one and the kernel did not
    /// say.
    pub host_pid: Option<u32>,
    /// Its name.
    pub comm: String,
    /// The descriptor.
    pub fd: u32,
}

/// What could not be reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Lost {
    /// When it was noticed.
    pub time: Time,
    /// The number of the line, counted from 1.
    pub seq: u64,
    /// Where it was lost.
    #[serde(rename = "where")]
    pub place: LostPlace,
    /// The number since the last such line.
    pub count: u64,
}

/// A connection, seen from the host that traces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Connection {
    /// An IPv4-mapped IPv6 socket is `ipv4`.
    pub family: Option<Family>,
    /// This end.
    pub local: Option<Endpoint>,
    /// The other end.
    pub remote: Option<Endpoint>,
    /// Inode number of the network namespace.
    pub netns: Option<u32>,
    /// The kernel's socket cookie.
    pub cookie: Option<u64>,
    /// Who opened it.
    pub role: Option<Role>,
    /// When it was established; null if never, or before tracing began.
    pub opened: Option<Time>,
    /// Milliseconds since then.
    pub age_ms: Option<f64>,
    /// Payload sent, each byte once.
    pub bytes_sent: Option<u64>,
    /// Payload received, each byte once.
    pub bytes_received: Option<u64>,
    /// Segments sent again.
    pub retransmits: Option<u32>,
    /// Smoothed round trip time, microseconds; null when never measured.
    pub rtt_us: Option<u32>,
}

/// The owner of a socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Process {
    /// Process id, in the pid namespace of tcpclose; null if it has none there.
    pub pid: Option<u32>,
    /// Process id in the initial pid namespace; null if tcpclose runs in another one and the kernel did not
    /// say.
    pub host_pid: Option<u32>,
    /// Thread id, in the pid namespace of tcpclose.
    pub tid: Option<u32>,
    /// The program's name, which is that of its main thread; the same on all lines of a process.
    pub comm: String,
    /// Name of the thread that acted; null if none did.
    pub thread: Option<String>,
    /// Path of the program.
    pub exe: Option<String>,
    /// Real user id.
    pub uid: Option<u32>,
    /// Container id.
    pub container: Option<String>,
    /// The container's name; null where the files of its runtime do not have it, or cannot be seen.
    pub container_name: Option<String>,
    /// Its Kubernetes pod; null where the files of its runtime name none, or cannot be seen.
    pub pod: Option<Pod>,
    /// How it is known.
    pub attribution: Attribution,
}

/// A pod of Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its Kubernetes namespace.
    pub namespace: String,
}

impl Process {
    /// Its id as in the text output: `-` if it has none in the pid namespace of tcpclose.
    pub fn shown_pid(&self) -> String {
        shown_pid(self.pid)
    }
}

/// A process id as in the text output.
pub fn shown_pid(pid: Option<u32>) -> String {
    pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string())
}

/// A state and when it was entered.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Step {
    /// The state.
    pub state: State,
    /// Milliseconds since the first one.
    pub at_ms: f64,
}

/// Something that this side did to end a connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Act {
    /// The kind of act; null if the system call could not be read, or if it does not end connections.
    pub trigger: Option<Trigger>,
    /// Milliseconds since the first of `states`; null if it was before tracing began.
    pub at_ms: Option<f64>,
    /// Which process did it, in the pid namespace of tcpclose; null if it has no id there.
    pub pid: Option<u32>,
    /// Where.
    pub stack: Option<Stack>,
}

/// Who sent a signal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum SignalFrom {
    /// A process.
    Process {
        /// Process id, in the pid namespace of tcpclose; null if it has none there.
        pid: Option<u32>,
        /// Process id in the initial pid namespace.
        host_pid: Option<u32>,
        /// The program's name.
        comm: String,
        /// Real user id.
        uid: u32,
    },
    /// The kernel itself.
    Kernel {
        /// Its OOM killer.
        oom: bool,
    },
}

/// Who made a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Opener {
    /// Who called connect or accept.
    pub process: Option<Shared<Process>>,
    /// Where.
    pub stack: Option<Stack>,
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use crate::event::{Cause, Family, State, millis};

    #[test]
    fn one_name_for_json_text_and_command_line() {
        for cause in Cause::value_variants() {
            let json = serde_json::to_value(cause).expect("serializable");
            assert_eq!(json, cause.to_string());
            assert_eq!(json, cause.to_possible_value().expect("not skipped").get_name());
        }
        assert_eq!(Cause::Timewait.to_string(), "timewait");
        assert_eq!(Family::Ipv4.to_string(), "ipv4");
        assert_eq!(State::FinWait1.to_string(), "FIN_WAIT1");
        assert_eq!(format!("{:<8}|", State::Close), "CLOSE   |");
    }

    #[test]
    fn milliseconds_read_well() {
        assert_eq!(serde_json::to_string(&millis(1_300_000)).expect("a number"), "1.3");
        assert_eq!(serde_json::to_string(&millis(1_499)).expect("a number"), "0.001");
        assert!(millis(u64::MAX) > millis(u64::MAX - 1_000_000));
    }
}
