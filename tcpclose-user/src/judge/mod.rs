//! Who ended a connection, how and why, from the facts in its record. Pure: no look-ups, no state.

use std::{cmp::Ordering, collections::BTreeMap};

use tcpclose_common::{
    record::{Connection, Reset, Task, UNKNOWN_U32, UNKNOWN_U64, direction, first_move},
    tcp::{shutdown, sock_flag, state, task_flag},
};

use crate::event::{Cause, ClosedBy, Ended, LastData, LingeringKind, State, Trigger};

/// What is said of an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Who.
    pub closed_by: Option<ClosedBy>,
    /// How.
    pub ended: Option<Ended>,
    /// What this side did.
    pub trigger: Option<Trigger>,
    /// What it died of.
    pub signal: Option<String>,
    /// Why.
    pub cause: Option<Cause>,
}

/// Names of the running kernel's `enum sk_rst_reason`.
pub type ResetReasons = BTreeMap<i64, String>;

/// The task of this side that acted: not the one that came from outside and destroyed what it does not own.
pub fn actor(connection: &Connection) -> &Task {
    if is_destroyed(connection) { &Task::NONE } else { &connection.actor }
}

/// Whether the socket was destroyed from outside, as `ss -K` does. What a listener has not accepted ends without an error
/// when that befalls the listener: `tcp_abort()` stops it as `close()` does. But it does so while a message is sent to the
/// kernel, and nobody closes a listener by sending something, unless it dies of it.
fn is_destroyed(connection: &Connection) -> bool {
    let sends = [libc::SYS_sendmsg, libc::SYS_sendmmsg, libc::SYS_sendto, libc::SYS_write, libc::SYS_writev];
    let Task { syscall, flags, .. } = connection.actor;
    connection.error == libc::ECONNABORTED
        || is_unaccepted(connection) && sends.contains(&i64::from(syscall)) && flags & task_flag::EXITING == 0
}

/// Says who ended `connection`, how and why. Its `reset` is the RST that ended it, if one did.
pub fn of(connection: &Connection, reasons: &ResetReasons) -> Verdict {
    let ended = ended(connection);
    let (trigger, signal) = trigger(actor(connection));
    Verdict {
        closed_by: closed_by(connection),
        ended,
        trigger,
        signal,
        cause: if ended == Some(Ended::Fin) { None } else { Some(cause(connection, reasons)) },
    }
}

fn ended(connection: &Connection) -> Option<Ended> {
    if is_destroyed(connection) {
        return Some(Ended::Destroyed);
    }
    match connection.reset.direction {
        direction::SENT => return Some(Ended::ResetSent),
        direction::RECEIVED => return Some(Ended::ResetReceived),
        _ => {}
    }
    match connection.error {
        0 | i32::MIN => match connection.last_state {
            state::FIN_WAIT2 | state::LAST_ACK | state::CLOSING | state::TIME_WAIT => Some(Ended::Fin),
            _ => None,
        },
        libc::ETIMEDOUT => Some(Ended::Timeout),
        // Only a RST sets these where the hook on it is missing. ECONNREFUSED may also come of an ICMP message.
        libc::ECONNRESET | libc::EPIPE => Some(Ended::ResetReceived),
        // The timer that gives up reports the ICMP error that came last in place of ETIMEDOUT: tcp_write_err().
        _ if !matches!(connection.at_end.retransmits, 0 | UNKNOWN_U32) => Some(Ended::Timeout),
        _ => None,
    }
}

/// Who made the first move.
fn closed_by(connection: &Connection) -> Option<ClosedBy> {
    if is_destroyed(connection) {
        return Some(ClosedBy::Admin);
    }
    let states = &connection.states[..usize::from(connection.steps).min(connection.states.len())];
    if states.contains(&state::CLOSING) {
        return Some(ClosedBy::Both);
    }
    match connection.first_move {
        first_move::LOCAL => return Some(ClosedBy::Local),
        first_move::PEER => return Some(ClosedBy::Peer),
        _ => {}
    }
    if connection.reset.direction == direction::RECEIVED {
        return Some(ClosedBy::Peer);
    }
    match connection.error {
        0 if connection.actor.pid != 0 => Some(ClosedBy::Local),
        0 if connection.reset.direction == direction::SENT => Some(ClosedBy::Kernel),
        0 | i32::MIN => None,
        libc::ECONNRESET | libc::EPIPE => Some(ClosedBy::Peer),
        _ => Some(ClosedBy::Kernel),
    }
}

/// Why a connection ended otherwise than in order.
fn cause(connection: &Connection, reasons: &ResetReasons) -> Cause {
    if is_destroyed(connection) {
        return Cause::Destroyed;
    }
    if connection.reset.direction != direction::NONE {
        return reset_cause(connection, reasons);
    }
    let connecting = connection.last_state == state::SYN_SENT;
    match connection.error {
        0 if connecting && connection.shutdown == shutdown::BOTH => Cause::ConnectAbandoned,
        0 if connection.actor.pid != 0 && !connecting => abort_cause(connection),
        0 | i32::MIN => Cause::Unknown,
        libc::ETIMEDOUT if connecting => Cause::ConnectTimeout,
        libc::ETIMEDOUT if connection.first_move == first_move::LOCAL => Cause::FinTimeout,
        // With it set, it alone decides when to give up: retransmits_timed_out().
        libc::ETIMEDOUT if !matches!(connection.at_end.user_timeout, 0 | UNKNOWN_U32) => Cause::UserTimeout,
        libc::ETIMEDOUT if matches!(connection.at_end.unacknowledged, 0 | UNKNOWN_U32) => {
            Cause::KeepaliveTimeout
        }
        libc::ETIMEDOUT => Cause::RetransmitTimeout,
        libc::ECONNRESET | libc::EPIPE => Cause::PeerReset,
        _ => Cause::HostUnreachable,
    }
}

/// Why the RST in `connection.reset` went.
///
/// The evidence of the socket comes first, since it is the same on every kernel; the kernel's own reason, which only
/// newer ones give, and which says `TCP_STATE` for four different things, comes second.
pub fn reset_cause(connection: &Connection, reasons: &ResetReasons) -> Cause {
    let reset = &connection.reset;
    if reset.direction == direction::RECEIVED {
        return match reset.state {
            state::SYN_SENT => Cause::Refused,
            _ if is_from_elsewhere(reset) => Cause::SuspectedInjection,
            _ => Cause::PeerReset,
        };
    }
    if reset.ambiguous != 0 {
        // The correlator saw tcp_reset() run and a RST go out at once.
        return Cause::DataAfterClose;
    }
    if is_destroyed(connection) {
        return Cause::Destroyed;
    }
    let reason = reason(reset.reason, reasons);
    if let Some(cause) = orphan_cause(connection) {
        return cause;
    }
    if reset.answer == 0 {
        return match reason {
            Some("TCP_ABORT_ON_LINGER") => Cause::FinTimeout,
            Some("TCP_ABORT_ON_MEMORY") => Cause::OutOfMemory,
            Some("TCP_KEEPALIVE_TIMEOUT") => Cause::KeepaliveTimeout,
            _ if connection.ended != 0 && connection.error == libc::ETIMEDOUT => Cause::KeepaliveTimeout,
            _ if connection.actor.pid != 0 => abort_cause(connection),
            _ => Cause::Unknown,
        };
    }
    match (reset.state, reason) {
        (_, Some("TCP_ABORT_ON_DATA")) => Cause::DataAfterClose,
        (state::TIME_WAIT, _) => Cause::Timewait,
        (state::LISTEN, Some("INVALID_SYN")) => Cause::AcceptOverflow,
        // Either of the two, and nothing tells which.
        (state::LISTEN, None) => Cause::Unknown,
        // There is a socket, but what is known of it does not tell.
        (0, None) if connection.sock != 0 => Cause::Unknown,
        (0, _) => Cause::NoListener,
        _ => Cause::InvalidSegment,
    }
}

/// Why the kernel reset a connection that nobody has a descriptor of any more. `None` if it does not look as if it had,
/// or if it merely answered a segment.
///
/// In FIN_WAIT2 nothing is left but to wait for the peer's FIN; what ends that is `TCP_LINGER2` below 0, at once, or the
/// timer. Before, it still has something to deliver, and gives that up for want of memory alone: the timer that gives up
/// for want of an answer sets an error and sends no RST.
fn orphan_cause(connection: &Connection) -> Option<Cause> {
    let flags = connection.sock_flags;
    if connection.ended == 0 || connection.error != 0 || flags == UNKNOWN_U64 || flags & sock_flag::DEAD == 0
    {
        return None;
    }
    let own_accord = connection.reset.answer == 0;
    match connection.last_state {
        state::FIN_WAIT2 if connection.no_fin_wait2 != 0 => Some(Cause::FinTimeout),
        state::FIN_WAIT2 if own_accord && connection.owned == 0 => Some(Cause::FinTimeout),
        state::FIN_WAIT1 | state::FIN_WAIT2 | state::CLOSING | state::LAST_ACK if own_accord => {
            Some(Cause::OutOfMemory)
        }
        _ => None,
    }
}

/// By how much the time to live of packets from one host may differ: routes change by a hop or two.
const SAME_ROUTE: u8 = 2;

/// Whether a RST came another way than the connection's first packet, as one does that a middlebox forged.
fn is_from_elsewhere(reset: &Reset) -> bool {
    reset.ttl != 0 && reset.handshake_ttl != 0 && reset.ttl.abs_diff(reset.handshake_ttl) > SAME_ROUTE
}

/// Why an application's own action ended in an abort in place of a FIN, in the order in which `__tcp_close()` decides.
fn abort_cause(connection: &Connection) -> Cause {
    if is_unaccepted(connection) {
        return Cause::ListenerClosed;
    }
    if connection.shutdown != shutdown::BOTH && i64::from(connection.actor.syscall) == libc::SYS_connect {
        return Cause::Disconnect;
    }
    if !matches!(connection.at_end.unread, 0 | UNKNOWN_U32) {
        return Cause::UnreadData;
    }
    if connection.sock_flags & sock_flag::LINGER != 0 && connection.linger == 0 {
        return Cause::LingerZero;
    }
    Cause::Unknown
}

/// Whether it ended in the accept queue of a listener that closed: alive, but without a descriptor.
pub fn is_unaccepted(connection: &Connection) -> bool {
    connection.ended != 0
        && connection.error == 0
        && connection.inode == 0
        && connection.owned == 0
        && connection.sock_flags & sock_flag::DEAD == 0
        && connection.actor.pid != 0
}

/// What a socket that is in a state of the teardown waits for.
pub fn lingering(connection: &Connection) -> LingeringKind {
    let untaken = connection.at_end.untaken;
    let untaken = (untaken != UNKNOWN_U32).then_some(untaken);
    State::from_kernel(connection.last_state)
        .map_or(LingeringKind::Unknown, |state| waits_for(state, connection.inode != 0, untaken))
}

/// What a socket in `state` waits for; `untaken` is its Recv-Q, if that is known.
pub fn waits_for(state: State, has_descriptor: bool, untaken: Option<u32>) -> LingeringKind {
    match (state, untaken) {
        (State::FinWait1 | State::Closing | State::LastAck, _) => LingeringKind::Unacked,
        (State::FinWait2, _) => LingeringKind::HalfClosed,
        // A socket that was closed is in LAST_ACK; one without a descriptor that is not has never been accepted.
        (State::CloseWait, Some(_)) if !has_descriptor => LingeringKind::Unaccepted,
        // The FIN takes a sequence number, which the recv() that reaches it takes: tcp_recvmsg_locked().
        (State::CloseWait, Some(0)) => LingeringKind::Leaked,
        (State::CloseWait, Some(_)) => LingeringKind::Unread,
        _ => LingeringKind::Unknown,
    }
}

/// The kernel's name for a reason, as it is; `None` on kernels that give none.
pub fn reason(number: u32, reasons: &ResetReasons) -> Option<&str> {
    if number == UNKNOWN_U32 { None } else { reasons.get(&i64::from(number)).map(String::as_str) }
}

/// What a task was doing when it acted on the socket, and the signal that it died of.
///
/// The context comes before the system call: an exiting task still shows the call that it slept in.
fn trigger(task: &Task) -> (Option<Trigger>, Option<String>) {
    if task.pid == 0 {
        return (None, None);
    }
    if task.flags & task_flag::EXITING != 0 {
        // wait(2): the low seven bits are the signal. PF_SIGNALED is set on the siblings of an exit_group() as well.
        return match task.exit_code & 0x7f {
            0 => (Some(Trigger::Exit), None),
            signal => (Some(Trigger::Signal), Some(signal_name(signal))),
        };
    }
    if task.flags & task_flag::IO_WORKER != 0 {
        return (Some(Trigger::IoUring), None);
    }
    let trigger = match i64::from(task.syscall) {
        -1 => None,
        libc::SYS_shutdown => Some(Trigger::Shutdown),
        libc::SYS_dup3 => Some(Trigger::Dup),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_dup2 => Some(Trigger::Dup),
        libc::SYS_close_range => Some(Trigger::CloseRange),
        libc::SYS_execve | libc::SYS_execveat => Some(Trigger::Exec),
        libc::SYS_io_uring_setup | libc::SYS_io_uring_enter => Some(Trigger::IoUring),
        // connect(AF_UNSPEC) is none of the ways to close a descriptor; the cause says what it was.
        libc::SYS_connect => None,
        // close() itself, or the call in which the last reference was dropped: a recv() whose descriptor another
        // thread closed meanwhile, the close of a unix socket that carried this one.
        _ => Some(Trigger::Close),
    };
    (trigger, None)
}

fn signal_name(number: i32) -> String {
    nix::sys::signal::Signal::try_from(number)
        .map_or_else(|_| format!("SIGRTMIN+{}", number - 32), |signal| signal.as_str().to_owned())
}

/// Jiffies since data last went, and which way; `None` if none ever did, or if it cannot be read. Within one jiffy the
/// two ways cannot be told apart, and then no way is given.
pub fn last_data(sample: &tcpclose_common::record::Sample) -> Option<(u32, Option<LastData>)> {
    let ever = |bytes: u64, ago: u32| !matches!(bytes, 0 | UNKNOWN_U64) && ago != UNKNOWN_U32;
    let sent = ever(sample.bytes_sent, sample.sent_ago).then_some(sample.sent_ago);
    let received = ever(sample.bytes_received, sample.received_ago).then_some(sample.received_ago);
    match (sent, received) {
        (Some(sent), Some(received)) => Some(match sent.cmp(&received) {
            Ordering::Less => (sent, Some(LastData::Sent)),
            Ordering::Equal => (sent, None),
            Ordering::Greater => (received, Some(LastData::Received)),
        }),
        (Some(sent), None) => Some((sent, Some(LastData::Sent))),
        (None, Some(received)) => Some((received, Some(LastData::Received))),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use tcpclose_common::record::{Sample, role};

    use super::*;

    /// A client's end of an established connection that nobody has touched.
    fn established() -> Connection {
        let mut connection = Connection::NEW;
        connection.role = role::CLIENT;
        connection.opener.pid = 7;
        connection.established = 5;
        connection.ended = 10;
        connection.last_state = state::ESTABLISHED;
        connection.error = 0;
        connection.sock_flags = 0;
        connection.inode = 99;
        connection.at_end = Sample { unread: 0, unacknowledged: 0, user_timeout: 0, ..Sample::UNKNOWN };
        connection
    }

    fn acted(mut connection: Connection, syscall: i64) -> Connection {
        connection.actor = Task { pid: 7, syscall: i32::try_from(syscall).unwrap(), ..Task::NONE };
        connection.owned = 1;
        connection.shutdown = if syscall == libc::SYS_connect { 0 } else { shutdown::BOTH };
        connection
    }

    fn failed(mut connection: Connection, error: i32) -> Connection {
        connection.error = error;
        connection
    }

    fn sent(mut connection: Connection, reason: u32, answer: u8, state: u8) -> Connection {
        connection.reset.direction = direction::SENT;
        (connection.reset.at, connection.reset.reason) = (9, reason);
        (connection.reset.answer, connection.reset.state) = (answer, state);
        connection
    }

    fn received(mut connection: Connection, state: u8) -> Connection {
        connection.reset.direction = direction::RECEIVED;
        (connection.reset.at, connection.reset.state) = (9, state);
        connection
    }

    fn reasons() -> ResetReasons {
        // As 6.12 to 7.1 number them.
        [
            (1, "NO_SOCKET"),
            (6, "TCP_FLAGS"),
            (8, "TCP_ABORT_ON_DATA"),
            (9, "TCP_TIMEWAIT_SOCKET"),
            (10, "INVALID_SYN"),
            (11, "TCP_ABORT_ON_CLOSE"),
            (12, "TCP_ABORT_ON_LINGER"),
            (13, "TCP_ABORT_ON_MEMORY"),
            (14, "TCP_STATE"),
            (15, "TCP_KEEPALIVE_TIMEOUT"),
        ]
        .map(|(number, name)| (number, name.to_owned()))
        .into()
    }

    /// What is said, in a line: who, how, what this side did, why.
    fn said(connection: &Connection, reasons: &ResetReasons) -> String {
        let Verdict { closed_by, ended, trigger, signal, cause } = of(connection, reasons);
        [
            closed_by.map(|word| word.to_string()),
            ended.map(|word| word.to_string()),
            trigger.map(|word| word.to_string()),
            signal,
            cause.map(|word| word.to_string()),
        ]
        .map(|word| word.unwrap_or_else(|| "-".to_owned()))
        .join(" ")
    }

    /// Ends that leave the same evidence on every kernel: with the reasons of newer ones and without.
    #[test]
    fn the_same_with_and_without_reasons() {
        const NONE: u32 = UNKNOWN_U32;
        let syn_sent = || Connection { last_state: state::SYN_SENT, established: 0, ..established() };
        let unacknowledged = |mut connection: Connection| {
            connection.at_end.unacknowledged = 100;
            connection
        };
        let unread = |mut connection: Connection| {
            connection.at_end.unread = 3;
            connection
        };
        let lingers_not =
            |connection: Connection| Connection { sock_flags: sock_flag::LINGER, linger: 0, ..connection };
        let moved = |by: u8, from: u8, connection: Connection| Connection {
            first_move: by,
            last_state: from,
            ..connection
        };
        let user_timeout = |mut connection: Connection| {
            connection.at_end.user_timeout = 1000;
            connection
        };
        let close = |connection| acted(connection, libc::SYS_close);
        let peer = first_move::PEER;
        let local = first_move::LOCAL;
        let cases = [
            (close(moved(local, state::FIN_WAIT2, established())), NONE, "local fin close - -"),
            (close(moved(peer, state::LAST_ACK, established())), NONE, "peer fin close - -"),
            (sent(close(unread(established())), 11, 0, 1), 11, "local reset_sent close - unread_data"),
            // Unread data comes before SO_LINGER in __tcp_close().
            (
                sent(lingers_not(close(unread(established()))), 11, 0, 1),
                11,
                "local reset_sent close - unread_data",
            ),
            (sent(lingers_not(close(established())), 14, 0, 1), 14, "local reset_sent close - linger_zero"),
            (
                sent(close(moved(peer, state::CLOSE_WAIT, unread(established()))), 11, 0, 8),
                11,
                "peer reset_sent close - unread_data",
            ),
            (sent(acted(established(), libc::SYS_connect), 14, 0, 1), 14, "local reset_sent - - disconnect"),
            (
                sent(Connection { inode: 0, owned: 0, ..close(established()) }, 14, 0, 1),
                14,
                "local reset_sent close - listener_closed",
            ),
            (received(failed(syn_sent(), libc::ECONNREFUSED), 2), NONE, "peer reset_received - - refused"),
            (failed(syn_sent(), libc::ETIMEDOUT), NONE, "kernel timeout - - connect_timeout"),
            (close(syn_sent()), NONE, "local - close - connect_abandoned"),
            (failed(syn_sent(), libc::EHOSTUNREACH), NONE, "kernel - - - host_unreachable"),
            (
                received(failed(established(), libc::ECONNRESET), 1),
                NONE,
                "peer reset_received - - peer_reset",
            ),
            (
                received(failed(moved(peer, state::CLOSE_WAIT, established()), libc::EPIPE), 8),
                NONE,
                "peer reset_received - - peer_reset",
            ),
            (
                failed(unacknowledged(established()), libc::ETIMEDOUT),
                NONE,
                "kernel timeout - - retransmit_timeout",
            ),
            (
                failed(user_timeout(unacknowledged(established())), libc::ETIMEDOUT),
                NONE,
                "kernel timeout - - user_timeout",
            ),
            (
                failed(close(moved(local, state::FIN_WAIT1, established())), libc::ETIMEDOUT),
                NONE,
                "local timeout close - fin_timeout",
            ),
            (
                sent(failed(established(), libc::ETIMEDOUT), 15, 0, 1),
                15,
                "kernel reset_sent - - keepalive_timeout",
            ),
            (sent(failed(established(), libc::ECONNABORTED), 14, 0, 1), 14, "admin destroyed - - destroyed"),
            (failed(syn_sent(), libc::ECONNABORTED), NONE, "admin destroyed - - destroyed"),
        ];
        for (mut connection, reason, expected) in cases {
            connection.reset.reason = reason;
            assert_eq!(said(&connection, &reasons()), expected);
            connection.reset.reason = UNKNOWN_U32;
            assert_eq!(said(&connection, &ResetReasons::new()), expected, "without reasons");
        }
    }

    /// What the kernel gives up after `close()`, told from the socket alone.
    #[test]
    fn orphans() {
        let orphan = |from: u8, owned: u8| {
            let mut connection = acted(established(), libc::SYS_close);
            (connection.first_move, connection.last_state) = (first_move::LOCAL, from);
            (connection.sock_flags, connection.owned) = (sock_flag::DEAD, owned);
            connection.at_end.unacknowledged = 1;
            connection
        };
        let does_not_wait = |connection: Connection| Connection { no_fin_wait2: 1, ..connection };
        let fin_timeout = "local reset_sent close - fin_timeout";
        let out_of_memory = "local reset_sent close - out_of_memory";
        for (connection, reason, answer, expected) in [
            (does_not_wait(orphan(state::FIN_WAIT2, 1)), 12, 0, fin_timeout),
            (does_not_wait(orphan(state::FIN_WAIT2, 0)), 8, 1, fin_timeout),
            (orphan(state::FIN_WAIT2, 0), 14, 0, fin_timeout),
            (orphan(state::FIN_WAIT2, 1), 13, 0, out_of_memory),
            (orphan(state::FIN_WAIT1, 1), 13, 0, out_of_memory),
            (orphan(state::FIN_WAIT1, 0), 13, 0, out_of_memory),
            (orphan(state::LAST_ACK, 1), 13, 0, out_of_memory),
            (orphan(state::CLOSING, 1), 13, 0, out_of_memory),
        ] {
            let from = connection.last_state;
            let connection = sent(connection, reason, answer, from);
            assert_eq!(said(&connection, &reasons()), expected, "from {from}");
            let connection = sent(connection, UNKNOWN_U32, answer, from);
            assert_eq!(said(&connection, &ResetReasons::new()), expected, "from {from}, without reasons");
        }
    }

    #[test]
    fn what_waits_in_the_queue_of_a_listener_that_is_destroyed() {
        let queued = |syscall| Connection { inode: 0, owned: 0, ..acted(established(), syscall) };
        let closed = sent(queued(libc::SYS_close), 14, 0, 1);
        assert_eq!(said(&closed, &reasons()), "local reset_sent close - listener_closed");
        let destroyed = sent(queued(libc::SYS_sendmsg), 14, 0, 1);
        assert_eq!(said(&destroyed, &reasons()), "admin destroyed - - destroyed");
        assert_eq!(actor(&destroyed).pid, 0, "whoever destroys it is not its owner");
        let mut killed = destroyed;
        (killed.actor.flags, killed.actor.exit_code) = (task_flag::EXITING, libc::SIGKILL);
        assert_eq!(said(&killed, &reasons()), "local reset_sent signal SIGKILL listener_closed");
    }

    #[test]
    fn crossed_fins_are_both_sides() {
        let mut connection = acted(established(), libc::SYS_close);
        connection.first_move = first_move::LOCAL;
        connection.last_state = state::CLOSING;
        connection.states[..3].copy_from_slice(&[state::FIN_WAIT1, state::CLOSING, state::CLOSE]);
        connection.steps = 3;
        assert_eq!(said(&connection, &reasons()), "both fin close - -");
    }

    #[test]
    fn resets_without_a_connection() {
        for (state, reason, expected) in [
            (0, 1, Cause::NoListener),
            (state::LISTEN, 10, Cause::AcceptOverflow),
            (state::LISTEN, 6, Cause::InvalidSegment),
            (state::TIME_WAIT, 9, Cause::Timewait),
            (state::FIN_WAIT2, 8, Cause::DataAfterClose),
            // A reason that this build has never heard of.
            (state::ESTABLISHED, 77, Cause::InvalidSegment),
        ] {
            let stray = sent(Connection::NEW, reason, 1, state);
            assert_eq!(reset_cause(&stray, &reasons()), expected, "{state} {reason}");
        }
        let without = sent(Connection::NEW, UNKNOWN_U32, 1, state::LISTEN);
        assert_eq!(reset_cause(&without, &ResetReasons::new()), Cause::Unknown);
        let memory = sent(Connection::NEW, 13, 0, state::FIN_WAIT1);
        assert_eq!(reset_cause(&memory, &reasons()), Cause::OutOfMemory);
    }

    #[test]
    fn a_reset_from_elsewhere() {
        let mut reset = received(failed(established(), libc::ECONNRESET), state::ESTABLISHED);
        for (ttl, handshake, expected) in [
            (64, 64, Cause::PeerReset),
            (62, 64, Cause::PeerReset),
            (61, 64, Cause::SuspectedInjection),
            (128, 57, Cause::SuspectedInjection),
            (0, 64, Cause::PeerReset),
            (64, 0, Cause::PeerReset),
        ] {
            (reset.reset.ttl, reset.reset.handshake_ttl) = (ttl, handshake);
            assert_eq!(reset_cause(&reset, &reasons()), expected, "{ttl} {handshake}");
        }
    }

    #[test]
    fn triggers() {
        let task = |flags, exit_code, syscall: i64| Task {
            pid: 7,
            flags,
            exit_code,
            syscall: i32::try_from(syscall).unwrap(),
            ..Task::NONE
        };
        let signal = |name: &str| (Some(Trigger::Signal), Some(name.to_owned()));
        // What an exiting task slept in says nothing, and neither does PF_SIGNALED (0x400), which exit_group() sets on
        // threads that it wakes.
        for (task, expected) in [
            (task(task_flag::EXITING, 0x300, libc::SYS_futex), (Some(Trigger::Exit), None)),
            (task(task_flag::EXITING | 0x400, 0x300, libc::SYS_futex), (Some(Trigger::Exit), None)),
            (task(task_flag::EXITING, 9, libc::SYS_close), signal("SIGKILL")),
            (task(task_flag::EXITING, 0x8b, -1), signal("SIGSEGV")),
            (task(task_flag::EXITING, 34, -1), signal("SIGRTMIN+2")),
            (task(task_flag::IO_WORKER, 0, libc::SYS_close), (Some(Trigger::IoUring), None)),
            (task(0, 0, libc::SYS_io_uring_enter), (Some(Trigger::IoUring), None)),
            (task(0, 0, libc::SYS_close), (Some(Trigger::Close), None)),
            (task(0, 0, libc::SYS_recvfrom), (Some(Trigger::Close), None)),
            (task(0, 0, libc::SYS_shutdown), (Some(Trigger::Shutdown), None)),
            (task(0, 0, libc::SYS_dup3), (Some(Trigger::Dup), None)),
            (task(0, 0, libc::SYS_close_range), (Some(Trigger::CloseRange), None)),
            (task(0, 0, libc::SYS_execve), (Some(Trigger::Exec), None)),
            (task(0, 0, libc::SYS_connect), (None, None)),
            (task(0, 0, -1), (None, None)),
            (Task::NONE, (None, None)),
        ] {
            assert_eq!(trigger(&task), expected, "{task:?}");
        }
    }

    #[test]
    fn which_way_data_went_last() {
        let sample = |bytes_sent, sent_ago, bytes_received, received_ago| Sample {
            bytes_sent,
            sent_ago,
            bytes_received,
            received_ago,
            ..Sample::UNKNOWN
        };
        for (sample, expected) in [
            (sample(10, 5, 20, 9), Some((5, Some(LastData::Sent)))),
            (sample(10, 9, 20, 5), Some((5, Some(LastData::Received)))),
            // Within one jiffy: not known, and not guessed.
            (sample(10, 5, 20, 5), Some((5, None))),
            (sample(10, 9, 0, 5), Some((9, Some(LastData::Sent)))),
            (sample(0, 5, 20, 9), Some((9, Some(LastData::Received)))),
            (sample(0, 5, 0, 5), None),
            (Sample::UNKNOWN, None),
        ] {
            assert_eq!(last_data(&sample), expected, "{sample:?}");
        }
    }
}
