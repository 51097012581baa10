//! What tcpclose says: the public model of its output, one struct a line, serialized as it stands here.
//!
//! Fields may be added, never renamed. What is not known is `None` and becomes `null`; it is never left out.

pub mod compose;
pub mod schema;

use std::fmt;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

/// One line of output.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// One end of a connection, or of an attempt at one, is over.
    Close(Box<Close>),
    /// A RST was sent or received.
    Reset(Box<Reset>),
    /// A socket stays in a teardown state.
    Lingering(Box<Lingering>),
    /// Something could not be said.
    Lost(Lost),
}

impl Event {
    /// Gives the line its number.
    pub fn set_seq(&mut self, number: u64) {
        let seq = match self {
            Self::Close(close) => &mut close.seq,
            Self::Reset(reset) => &mut reset.seq,
            Self::Lingering(lingering) => &mut lingering.seq,
            Self::Lost(lost) => &mut lost.seq,
        };
        *seq = number;
    }

    /// Whose socket it tells of.
    pub fn process(&self) -> Option<&Process> {
        match self {
            Self::Close(close) => close.process.as_ref(),
            Self::Reset(reset) => reset.process.as_ref(),
            Self::Lingering(lingering) => lingering.process.as_ref(),
            Self::Lost(_) => None,
        }
    }
}

/// One end of a connection that is over.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Close {
    /// When it was over.
    pub time: Time,
    /// Counts up by one a line.
    pub seq: u64,
    /// Which connection.
    pub connection: Connection,
    /// Whose socket it was.
    pub process: Option<Process>,
    /// Who ended it.
    pub closed_by: Option<ClosedBy>,
    /// In what manner.
    pub ended: Option<Ended>,
    /// What this host's side did; null if it never acted.
    pub trigger: Option<Trigger>,
    /// The signal that the process died of, with trigger `signal`.
    pub signal: Option<String>,
    /// Why; null for an orderly close.
    pub cause: Option<Cause>,
    /// Milliseconds since data last went either way when the first move of the teardown came; null if none
    /// ever did.
    pub idle_ms: Option<f64>,
    /// Which way that data went.
    pub last_data: Option<LastData>,
    /// Milliseconds spent in `CLOSE_WAIT`; null if it was never there.
    pub close_wait_ms: Option<f64>,
    /// The path of states that was seen.
    pub states: Vec<Step>,
    /// Where this host's side acted; null if it did not, or if stacks were not asked for.
    pub stack: Option<Stack>,
    /// The connect or accept that made the connection; null if that was before tracing.
    pub opener: Option<Opener>,
}

/// A RST that was sent or received.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Reset {
    /// When.
    pub time: Time,
    /// Counts up by one a line.
    pub seq: u64,
    /// Which connection.
    pub connection: Connection,
    /// Whose socket it was.
    pub process: Option<Process>,
    /// Which way it went.
    pub direction: Direction,
    /// The kernel's own name for the reason, such as `TCP_ABORT_ON_CLOSE`; null on kernels that give none.
    pub reason: Option<String>,
    /// Why.
    pub cause: Option<Cause>,
    /// State of the socket when it happened; null without a socket.
    pub state: Option<State>,
    /// Milliseconds since data last went either way; null if none ever did.
    pub idle_ms: Option<f64>,
    /// Which way that data went.
    pub last_data: Option<LastData>,
    /// Time to live of the RST, received ones only.
    pub ttl: Option<u8>,
    /// Time to live of the connection's first packets.
    pub handshake_ttl: Option<u8>,
    /// Where this host's side acted.
    pub stack: Option<Stack>,
    /// The connect or accept that made the connection.
    pub opener: Option<Opener>,
}

/// A socket that stays in a teardown state.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Lingering {
    /// When this was noticed.
    pub time: Time,
    /// Counts up by one a line.
    pub seq: u64,
    /// Which connection.
    pub connection: Connection,
    /// Whose socket it is.
    pub process: Option<Process>,
    /// The state that it stays in.
    pub state: State,
    /// When it came into that state; null if before tracing began.
    pub since: Option<Time>,
    /// Milliseconds that it has been there, at least.
    pub for_ms: Option<f64>,
    /// Milliseconds that it has been there, at most; the same where `since` is known, null where the kernel gives no
    /// upper bound.
    pub for_ms_at_most: Option<f64>,
    /// Bytes received that nobody has read.
    pub unread_bytes: Option<u64>,
    /// Every process that has it open; null where that cannot be looked up.
    pub holders: Option<Vec<Holder>>,
    /// The connect or accept that made the connection; null if that was before tracing.
    pub opener: Option<Opener>,
    /// What it waits for.
    pub kind: LingeringKind,
}

/// A process that has a socket open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Holder {
    /// Process id in the initial pid namespace.
    pub pid: u32,
    /// Its name.
    pub comm: String,
    /// The descriptor.
    pub fd: u32,
}

/// What a lingering socket waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LingeringKind {
    /// The application was told of the end of file and did not close.
    Leaked,
    /// The application has not read as far as the end of file.
    Unread,
    /// It is still in the accept queue.
    Unaccepted,
    /// The peer never answered our FIN.
    Unacked,
    /// We shut down our half, the peer goes on.
    HalfClosed,
    /// None of these could be shown.
    Unknown,
}

/// What could not be said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Lost {
    /// When it was noticed.
    pub time: Time,
    /// Counts up by one a line.
    pub seq: u64,
    /// Where it was lost.
    #[serde(rename = "where")]
    pub place: LostPlace,
    /// How many since the last such line.
    pub count: u64,
}

/// Where something was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LostPlace {
    /// Records that found the ring buffer full, could not be read, or were never written because the kernel skipped
    /// a program that was running already.
    RingBuffer,
    /// Sockets whose gathered facts had to give way to newer ones, or found no room; and ends that the kernel ran no
    /// program for, which are told later with what is known.
    Connections,
    /// Stacks that found no room.
    Stacks,
    /// Lines that could not be written.
    Output,
}

/// A point in time, written as RFC 3339 in UTC with nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub Timestamp);

/// The name of a value in text is the one that serde gives it in JSON: there is one list of names.
macro_rules! display_as_serialized {
    ($($name:ty),+ $(,)?) => {
        $(impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.serialize(formatter)
            }
        })+
    };
}

display_as_serialized!(
    Attribution,
    Cause,
    ClosedBy,
    Direction,
    Ended,
    Family,
    LastData,
    LingeringKind,
    LostPlace,
    Role,
    State,
    Trigger,
);

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:.9}", self.0))
    }
}

impl JsonSchema for Time {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Time".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "format": "date-time",
            "description": "RFC 3339, UTC, nanoseconds"
        })
    }
}

/// A connection, seen from the host that traces.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
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

/// Address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// IPv4, mapped or not.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// One end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
pub struct Endpoint {
    /// IPv4 or IPv6 address.
    pub address: IpAddr,
    /// TCP port.
    pub port: u16,
}

/// Who opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It called `connect()`.
    Client,
    /// It was accepted.
    Server,
}

/// The owner of a socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Process {
    /// Process id in the initial pid namespace.
    pub pid: u32,
    /// Thread id.
    pub tid: Option<u32>,
    /// The thread's name.
    pub comm: String,
    /// Path of the program.
    pub exe: Option<String>,
    /// Real user id.
    pub uid: Option<u32>,
    /// Container id.
    pub container: Option<String>,
    /// How it is known.
    pub attribution: Attribution,
}

/// How the owner of a socket is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Attribution {
    /// This task acted on the socket, in its own context.
    Syscall,
    /// This task accepted it.
    Accept,
    /// This task connected it.
    Connect,
    /// Not accepted yet: the owner of the listening socket.
    Listener,
    /// Found through `/proc`.
    Procfs,
}

/// Who ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClosedBy {
    /// This host's application.
    Local,
    /// The other end.
    Peer,
    /// The FINs crossed.
    Both,
    /// A timer or a limit of this host.
    Kernel,
    /// Somebody destroyed the socket from outside (`ss -K`).
    Admin,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// In order.
    Fin,
    /// This host sent a RST.
    ResetSent,
    /// This host received a RST.
    ResetReceived,
    /// A timer ran out, or an ICMP error came.
    Timeout,
    /// Destroyed without a RST.
    Destroyed,
}

/// What this host's side did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// `close()`.
    Close,
    /// `shutdown()`.
    Shutdown,
    /// The process ended.
    Exit,
    /// The process was killed.
    Signal,
    /// `execve()` closed a close-on-exec descriptor.
    Exec,
    /// `dup2()` or `dup3()` replaced the descriptor.
    Dup,
    /// `close_range()`.
    CloseRange,
    /// An `io_uring` request.
    IoUring,
}

/// Why a connection ended otherwise than in order.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[clap(rename_all = "snake_case")]
pub enum Cause {
    /// A packet reached a port that nothing listens on, or no socket at all.
    NoListener,
    /// RST received in answer to a connect.
    Refused,
    /// Closed with received data that was never read.
    UnreadData,
    /// `SO_LINGER` 0.
    LingerZero,
    /// Data arrived after the local side had closed.
    DataAfterClose,
    /// `connect(AF_UNSPEC)` on a live connection.
    Disconnect,
    /// Keepalive probes went unanswered.
    KeepaliveTimeout,
    /// Retransmissions went unanswered.
    RetransmitTimeout,
    /// The SYN went unanswered.
    ConnectTimeout,
    /// `TCP_USER_TIMEOUT` ran out.
    UserTimeout,
    /// The peer never answered the FIN.
    FinTimeout,
    /// Closed by the application before the handshake was done.
    ConnectAbandoned,
    /// Accept queue full, with `tcp_abort_on_overflow`.
    AcceptOverflow,
    /// Still in the accept queue when its listener closed.
    ListenerClosed,
    /// An unacceptable segment for a connection in `TIME_WAIT`.
    Timewait,
    /// Sequence, ACK, timestamp or flags not acceptable.
    InvalidSegment,
    /// `ss -K`.
    Destroyed,
    /// Too many orphans, or socket memory exhausted.
    OutOfMemory,
    /// RST received with no sign of anything but the peer.
    PeerReset,
    /// RST received whose TTL does not fit the handshake's.
    SuspectedInjection,
    /// ICMP error or route loss.
    HostUnreachable,
    /// None of the above could be shown.
    Unknown,
}

/// Which way data last went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LastData {
    /// From this host.
    Sent,
    /// To this host.
    Received,
}

/// Direction of a RST.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// This host sent it.
    Sent,
    /// This host received it.
    Received,
}

/// A TCP state, under the name that `ss -o` and `netstat` users know from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[expect(missing_docs, reason = "the names are TCP's own")]
#[repr(u8)]
pub enum State {
    // The kernel's number for it; those of the others follow.
    Established = 1,
    SynSent,
    SynRecv,
    #[serde(rename = "FIN_WAIT1")]
    FinWait1,
    #[serde(rename = "FIN_WAIT2")]
    FinWait2,
    TimeWait,
    Close,
    CloseWait,
    LastAck,
    Listen,
    Closing,
    NewSynRecv,
}

impl State {
    /// From the kernel's number; `None` for one that is not a TCP state.
    pub fn from_kernel(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Established,
            2 => Self::SynSent,
            3 => Self::SynRecv,
            4 => Self::FinWait1,
            5 => Self::FinWait2,
            6 => Self::TimeWait,
            7 => Self::Close,
            8 => Self::CloseWait,
            9 => Self::LastAck,
            10 => Self::Listen,
            11 => Self::Closing,
            12 => Self::NewSynRecv,
            _ => return None,
        })
    }
}

/// A state and when it was entered.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Step {
    /// The state.
    pub state: State,
    /// Milliseconds since the first one.
    pub at_ms: f64,
}

/// Where something was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Stack {
    /// Innermost first; null when not taken or not there to take.
    pub user: Option<Frames>,
    /// Likewise.
    pub kernel: Option<Frames>,
}

/// The frames of a stack. Programs have few places that open and close sockets, so the same stacks come again and again:
/// they are shared, and put into JSON once.
#[derive(Clone)]
pub struct Frames(Arc<NamedFrames>);

struct NamedFrames {
    frames: Vec<Frame>,
    json: OnceLock<Option<Box<RawValue>>>,
}

impl From<Vec<Frame>> for Frames {
    fn from(frames: Vec<Frame>) -> Self {
        Self(Arc::new(NamedFrames { frames, json: OnceLock::new() }))
    }
}

impl Deref for Frames {
    type Target = [Frame];

    fn deref(&self) -> &[Frame] {
        &self.0.frames
    }
}

impl PartialEq for Frames {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Frames {}

impl fmt::Debug for Frames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl Serialize for Frames {
    /// JSON that was made before is copied. (Only `serde_json` understands it, and nothing else is used here.)
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.json.get_or_init(|| serde_json::value::to_raw_value(&self.0.frames).ok()) {
            Some(json) => json.serialize(serializer),
            None => self.0.frames.serialize(serializer),
        }
    }
}

impl JsonSchema for Frames {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        Vec::<Frame>::schema_name()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        Vec::<Frame>::json_schema(generator)
    }

    fn inline_schema() -> bool {
        Vec::<Frame>::inline_schema()
    }
}

/// One frame of a stack.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
pub struct Frame {
    /// The address, as `0x…`.
    pub address: String,
    /// The function.
    pub symbol: Option<String>,
    /// The file it was loaded from.
    pub module: Option<String>,
    /// From the start of the symbol, or, without one, of the module; null without either.
    pub offset: Option<u64>,
    /// Source file.
    pub file: Option<String>,
    /// Line in it.
    pub line: Option<u32>,
    /// A function that the compiler merged into its caller, which is the next frame.
    pub inlined: bool,
}

/// Who made a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Opener {
    /// Who called connect or accept.
    pub process: Option<Process>,
    /// Where.
    pub stack: Option<Stack>,
}

/// Nanoseconds as milliseconds with microsecond resolution: what a reader of a log line can use.
pub fn millis(nanoseconds: u64) -> f64 {
    // Rounded in whole microseconds first, so that 1.3 is written 1.3 and not 1.2999999.
    #[expect(clippy::cast_precision_loss, reason = "2^53 µs are 285 years")]
    let micros = (nanoseconds.saturating_add(500) / 1000) as f64;
    micros / 1000.0
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
