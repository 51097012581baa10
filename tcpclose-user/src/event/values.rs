//! The closed lists of values in the output. Their names in JSON, in text and on the command line are the same.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tcp::display_as_serialized;

display_as_serialized!(Attribution, Cause, ClosedBy, Ended, LastData, LingeringKind, LostPlace, Trigger);

/// How the owner of a socket is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
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
    /// It has the descriptor open, as the iterator over all descriptors has shown.
    Descriptors,
    /// It has the descriptor open, as `/proc` has shown.
    Procfs,
}

/// Who ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
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
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    JsonSchema,
    clap::ValueEnum,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LastData {
    /// From this host.
    Sent,
    /// To this host.
    Received,
}

/// What a lingering socket waits for.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[clap(rename_all = "snake_case")]
pub enum LingeringKind {
    /// The application has read the end of file and has not closed.
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

/// Where something was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LostPlace {
    /// Records that found the ring buffer full, could not be read, or were never written because the kernel skipped
    /// a program that was running already.
    RingBuffer,
    /// Sockets whose gathered facts had to give way to newer ones, or found no room; and ends that the kernel ran no
    /// program for, which are reported later with what is known.
    Connections,
    /// Stacks that found no room.
    Stacks,
    /// Lines that could not be written.
    Output,
}
