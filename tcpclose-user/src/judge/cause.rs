//! Why a connection did not end in order, and why a RST was sent.

use crate::{
    event::Cause,
    ingest::life::{Activity, Life, Rst, Side},
    kernel::ResetReasons,
    tcp::{Direction, State},
};

/// Why `life` did not end in order.
pub(super) fn of(life: &Life, reasons: &ResetReasons) -> Cause {
    if life.is_destroyed() {
        return Cause::Destroyed;
    }
    if let Some(reset) = &life.reset {
        return reset_cause(life, reset, reasons);
    }
    let connecting = life.state == Some(State::SynSent);
    let shut_down = life.end.is_some_and(|end| end.shut_down);
    match life.error() {
        Some(0) if connecting && shut_down => Cause::ConnectAbandoned,
        Some(0) if life.actor.is_some() && !connecting => abort_cause(life),
        None | Some(0) => Cause::Unknown,
        Some(libc::ETIMEDOUT) if connecting => Cause::ConnectTimeout,
        Some(libc::ETIMEDOUT) if life.moved_first() == Some(Side::Local) => Cause::FinTimeout,
        // If it is set, it alone decides when the kernel gives up: retransmits_timed_out().
        Some(libc::ETIMEDOUT) if life.sample.user_timeout.is_some() => Cause::UserTimeout,
        Some(libc::ETIMEDOUT) if matches!(life.sample.unacknowledged, None | Some(0)) => {
            Cause::KeepaliveTimeout
        }
        Some(libc::ETIMEDOUT) => Cause::RetransmitTimeout,
        Some(libc::ECONNRESET | libc::EPIPE) => Cause::PeerReset,
        Some(_) => Cause::HostUnreachable,
    }
}

/// Why `reset` was sent or received on `life`.
///
/// The evidence of the socket comes first, because it is the same on every kernel. The kernel's own reason,
/// which only newer kernels give and which is `TCP_STATE` for four different causes, comes second.
pub fn reset_cause(life: &Life, reset: &Rst, reasons: &ResetReasons) -> Cause {
    if reset.direction == Direction::Received {
        return match reset.state {
            Some(State::SynSent) => Cause::Refused,
            _ if is_from_elsewhere(reset) => Cause::SuspectedInjection,
            _ => Cause::PeerReset,
        };
    }
    if reset.ambiguous {
        // The correlator found that tcp_reset() ran and that a RST was sent at once.
        return Cause::DataAfterClose;
    }
    if life.is_destroyed() {
        return Cause::Destroyed;
    }
    if let Some(cause) = orphan_cause(life, reset) {
        return cause;
    }
    let reason = reasons.name(reset.reason);
    if !reset.answer {
        return match reason {
            Some("TCP_ABORT_ON_LINGER") => Cause::FinTimeout,
            Some("TCP_ABORT_ON_MEMORY") => Cause::OutOfMemory,
            Some("TCP_KEEPALIVE_TIMEOUT") => Cause::KeepaliveTimeout,
            _ if life.error() == Some(libc::ETIMEDOUT) => Cause::KeepaliveTimeout,
            _ if life.actor.is_some() => abort_cause(life),
            _ => Cause::Unknown,
        };
    }
    match (reset.state, reason) {
        (_, Some("TCP_ABORT_ON_DATA")) => Cause::DataAfterClose,
        (Some(State::TimeWait), _) => Cause::Timewait,
        (Some(State::Listen), Some("INVALID_SYN")) => Cause::AcceptOverflow,
        // Without a reason it may be either of the two.
        (Some(State::Listen), None) => Cause::Unknown,
        // There is a socket, but none of the known facts shows the cause.
        (None, None) if life.id.address != 0 => Cause::Unknown,
        (None, _) => Cause::NoListener,
        _ => Cause::InvalidSegment,
    }
}

/// Why the kernel reset a connection that no descriptor refers to any more. `None` if there is no evidence
/// that it did, or if it merely answered a segment.
///
/// In FIN_WAIT2 the socket only waits for the peer's FIN. A negative `TCP_LINGER2` ends that at once;
/// otherwise the timer does. In the earlier states it still has something to deliver, which the kernel
/// abandons only when memory is short: the timer that gives up because there was no answer sets an error and
/// sends no RST.
fn orphan_cause(life: &Life, reset: &Rst) -> Option<Cause> {
    let end = life.end.filter(|end| end.error == Some(0) && end.orphan == Some(true))?;
    let own_accord = !reset.answer;
    match life.state? {
        State::FinWait2 if end.no_fin_wait2 => Some(Cause::FinTimeout),
        State::FinWait2 if own_accord && !end.locked => Some(Cause::FinTimeout),
        State::FinWait1 | State::FinWait2 | State::Closing | State::LastAck if own_accord => {
            Some(Cause::OutOfMemory)
        }
        _ => None,
    }
}

/// How much the TTLs of packets from one host may differ: routes change by a hop or two.
const SAME_ROUTE: u8 = 2;

/// Whether a RST took another route than the connection's first packet, as a RST does that a middlebox has
/// forged.
fn is_from_elsewhere(reset: &Rst) -> bool {
    matches!((reset.ttl, reset.handshake_ttl), (Some(ttl), Some(first)) if ttl.abs_diff(first) > SAME_ROUTE)
}

/// Why an application's own action ended in an abort instead of a FIN, in the order in which `__tcp_close()`
/// decides.
fn abort_cause(life: &Life) -> Cause {
    if life.is_unaccepted() {
        return Cause::ListenerClosed;
    }
    let connects = life.actor.is_some_and(|actor| actor.act == Activity::Syscall(libc::SYS_connect));
    let end = life.end;
    if connects && !end.is_some_and(|end| end.shut_down) {
        return Cause::Disconnect;
    }
    if life.sample.unread.is_some_and(|bytes| bytes > 0) {
        return Cause::UnreadData;
    }
    if end.is_some_and(|end| end.linger_zero) {
        return Cause::LingerZero;
    }
    Cause::Unknown
}
