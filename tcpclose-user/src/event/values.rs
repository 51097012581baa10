//! The closed lists of values in the output. Their names in JSON, in text and on the command line are the
//! same.

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
    /// It owns the listening socket of a connection that was never accepted.
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
    /// Another process destroyed the socket (`ss -K`).
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
    /// A timer expired, or an ICMP error arrived.
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

/// Why a connection did not end in order.
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
    /// `TCP_USER_TIMEOUT` expired.
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
    /// RST received, and nothing suggests that a device sent it.
    PeerReset,
    /// RST received with a TTL unlike that of the handshake.
    SuspectedInjection,
    /// ICMP error or route loss.
    HostUnreachable,
    /// The facts do not show any of the above.
    Unknown,
}

/// The direction of the last data.
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
    /// The peer has not acknowledged the FIN.
    Unacked,
    /// The FIN waits behind data for which the peer's receive window has no room; the peer answers.
    PeerNotReading,
    /// This side shut down its half, and the peer has not closed.
    HalfClosed,
    /// The facts do not show any of these.
    Unknown,
}

/// Where something was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LostPlace {
    /// Records for which the ring buffer had no room, that could not be decoded, or that were never written
    /// because the kernel skipped a program that was already running.
    RingBuffer,
    /// Sockets whose entry was evicted, or for which there was no room; and ends for which the kernel ran no
    /// program, which are reported later with what is known.
    Connections,
    /// Stacks for which there was no room.
    Stacks,
    /// Lines that could not be written.
    Output,
    /// Lines that the collector of `--otlp` has refused, or did not take in time.
    Export,
}
