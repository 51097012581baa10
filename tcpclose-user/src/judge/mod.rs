//! Concludes who ended a connection, how and why, from the facts of its life. It is pure: it looks nothing
//! up, and has no state.

pub mod cause;
mod data;
mod stuck;
mod trigger;

use crate::{
    event::{Cause, ClosedBy, Ended, Trigger},
    ingest::life::{Life, Side},
    kernel::ResetReasons,
    tcp::{Direction, State},
};

pub use cause::reset_cause;
pub use data::last_data;
pub use stuck::waits_for;
pub use trigger::trigger;

/// What is reported about an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Who moved first.
    pub closed_by: Option<ClosedBy>,
    /// How it ended.
    pub ended: Option<Ended>,
    /// What this side did.
    pub trigger: Option<Trigger>,
    /// The signal that killed the process, with [`Trigger::Signal`].
    pub signal: Option<String>,
    /// Why; `None` for an orderly end.
    pub cause: Option<Cause>,
}

/// Concludes who ended `life`, how and why.
pub fn of(life: &Life, reasons: &ResetReasons) -> Verdict {
    let ended = ended(life);
    let (trigger, signal) = trigger(life.own_actor());
    Verdict {
        closed_by: closed_by(life),
        ended,
        trigger,
        signal,
        cause: if ended == Some(Ended::Fin) { None } else { Some(cause::of(life, reasons)) },
    }
}

fn ended(life: &Life) -> Option<Ended> {
    if life.is_destroyed() {
        return Some(Ended::Destroyed);
    }
    if let Some(reset) = &life.reset {
        return Some(match reset.direction {
            Direction::Sent => Ended::ResetSent,
            Direction::Received => Ended::ResetReceived,
        });
    }
    match life.error() {
        None | Some(0) => match life.state {
            Some(State::FinWait2 | State::LastAck | State::Closing | State::TimeWait) => Some(Ended::Fin),
            // The peer has acknowledged the FIN, so it was in FIN_WAIT2, a change that the kernel ran no program
            // for.
            Some(State::FinWait1) if life.sample.unacknowledged == Some(0) => Some(Ended::Fin),
            _ => None,
        },
        Some(libc::ETIMEDOUT) => Some(Ended::Timeout),
        // If the hook on received RSTs is missing, these errors show that one was received. ECONNREFUSED may
        // also come from an ICMP message.
        Some(libc::ECONNRESET | libc::EPIPE) => Some(Ended::ResetReceived),
        // The timer that gives up reports the last ICMP error instead of ETIMEDOUT: tcp_write_err().
        Some(_) if life.sample.retransmits.is_some_and(|count| count > 0) => Some(Ended::Timeout),
        Some(_) => None,
    }
}

/// Who made the first move.
fn closed_by(life: &Life) -> Option<ClosedBy> {
    if life.is_destroyed() {
        return Some(ClosedBy::Admin);
    }
    if life.path.contains(State::Closing) {
        return Some(ClosedBy::Both);
    }
    match life.moved_first() {
        Some(Side::Local) => return Some(ClosedBy::Local),
        Some(Side::Peer) => return Some(ClosedBy::Peer),
        None => {}
    }
    let direction = life.reset.map(|reset| reset.direction);
    if direction == Some(Direction::Received) {
        return Some(ClosedBy::Peer);
    }
    match life.error()? {
        0 if life.actor.is_some() => Some(ClosedBy::Local),
        0 if direction == Some(Direction::Sent) => Some(ClosedBy::Kernel),
        0 => None,
        libc::ECONNRESET | libc::EPIPE => Some(ClosedBy::Peer),
        _ => Some(ClosedBy::Kernel),
    }
}

#[cfg(test)]
#[expect(
    clippy::needless_pass_by_value,
    clippy::large_stack_arrays,
    reason = "lives are built by functions that change one and hand it on"
)]
mod tests {
    use super::*;
    use crate::ingest::life::{
        Activity, FirstMove, Rst, Sample, SocketEnd,
        examples::{END, RESET, task, unknown},
    };

    /// A client's end of an established connection that ended although neither side had done anything.
    fn established() -> Life {
        Life {
            role: Some(crate::tcp::Role::Client),
            established: Some(5),
            state: Some(State::Established),
            inode: Some(99),
            opener: Some(task(7, Activity::Syscall(libc::SYS_connect))),
            sample: Sample { unread: Some(0), unacknowledged: Some(0), ..Sample::default() },
            end: Some(END),
            ..unknown()
        }
    }

    /// An end that a process caused in this system call.
    fn acted(syscall: i64, life: Life) -> Life {
        let end =
            SocketEnd { locked: true, shut_down: syscall != libc::SYS_connect, ..life.end.unwrap_or(END) };
        Life { actor: Some(task(7, Activity::Syscall(syscall))), end: Some(end), ..life }
    }

    fn closed(life: Life) -> Life {
        acted(libc::SYS_close, life)
    }

    fn failed(error: i32, life: Life) -> Life {
        Life { end: life.end.map(|end| SocketEnd { error: Some(error), ..end }), ..life }
    }

    fn moved(by: Side, from: State, life: Life) -> Life {
        let first = FirstMove { by: Some(by), at: Some(8), sample: life.sample };
        Life { first_move: Some(first), state: Some(from), ..life }
    }

    /// A RST that the kernel sent unprompted.
    fn sent(reason: u32, state: State, life: Life) -> Life {
        let reset = Rst { reason: Some(reason), state: Some(state), answer: false, ..RESET };
        Life { reset: Some(reset), ..life }
    }

    fn received(state: State, life: Life) -> Life {
        let reset = Rst { direction: Direction::Received, state: Some(state), answer: false, ..RESET };
        Life { reset: Some(reset), ..life }
    }

    fn with_sample(change: impl FnOnce(&mut Sample), mut life: Life) -> Life {
        change(&mut life.sample);
        life
    }

    fn reasons() -> ResetReasons {
        // The numbers of 6.12 to 7.1.
        ResetReasons(
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
            .into(),
        )
    }

    /// The verdict in one line: who, how, what this side did, why.
    fn line(life: &Life, reasons: &ResetReasons) -> String {
        let Verdict { closed_by, ended, trigger, signal, cause } = of(life, reasons);
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

    fn without_reason(life: &Life) -> Life {
        Life { reset: life.reset.map(|reset| Rst { reason: None, ..reset }), ..life.clone() }
    }

    /// Ends that leave the same evidence on every kernel: with the reasons of newer ones and without.
    #[test]
    fn verdicts_do_not_depend_on_reasons() {
        use Side::{Local, Peer};
        use State::{CloseWait, Established, FinWait1, FinWait2, LastAck, SynSent};
        let syn_sent = || Life { state: Some(SynSent), established: None, ..established() };
        let unread = |life| with_sample(|sample| sample.unread = Some(3), life);
        let unacknowledged = |life| with_sample(|sample| sample.unacknowledged = Some(100), life);
        let user_timeout = |life| with_sample(|sample| sample.user_timeout = Some(1000), life);
        let linger_zero =
            |life: Life| Life { end: life.end.map(|end| SocketEnd { linger_zero: true, ..end }), ..life };
        let never_accepted = |life: Life| Life {
            inode: None,
            end: life.end.map(|end| SocketEnd { locked: false, ..end }),
            ..life
        };
        for (life, expected) in [
            (closed(moved(Local, FinWait2, established())), "local fin close - -"),
            (closed(moved(Peer, LastAck, established())), "peer fin close - -"),
            // The change to FIN_WAIT2 was not seen.
            (closed(moved(Local, FinWait1, established())), "local fin close - -"),
            (closed(moved(Local, FinWait1, unacknowledged(established()))), "local - close - unknown"),
            (sent(11, Established, closed(unread(established()))), "local reset_sent close - unread_data"),
            // __tcp_close() looks at unread data before SO_LINGER.
            (
                sent(11, Established, linger_zero(closed(unread(established())))),
                "local reset_sent close - unread_data",
            ),
            (
                sent(14, Established, linger_zero(closed(established()))),
                "local reset_sent close - linger_zero",
            ),
            (
                sent(11, CloseWait, closed(moved(Peer, CloseWait, unread(established())))),
                "peer reset_sent close - unread_data",
            ),
            (
                sent(14, Established, acted(libc::SYS_connect, established())),
                "local reset_sent - - disconnect",
            ),
            (
                sent(14, Established, never_accepted(closed(established()))),
                "local reset_sent close - listener_closed",
            ),
            (received(SynSent, failed(libc::ECONNREFUSED, syn_sent())), "peer reset_received - - refused"),
            (failed(libc::ETIMEDOUT, syn_sent()), "kernel timeout - - connect_timeout"),
            (closed(syn_sent()), "local - close - connect_abandoned"),
            (failed(libc::EHOSTUNREACH, syn_sent()), "kernel - - - host_unreachable"),
            (
                received(Established, failed(libc::ECONNRESET, established())),
                "peer reset_received - - peer_reset",
            ),
            (
                received(CloseWait, failed(libc::EPIPE, moved(Peer, CloseWait, established()))),
                "peer reset_received - - peer_reset",
            ),
            (failed(libc::ETIMEDOUT, unacknowledged(established())), "kernel timeout - - retransmit_timeout"),
            (
                failed(libc::ETIMEDOUT, user_timeout(unacknowledged(established()))),
                "kernel timeout - - user_timeout",
            ),
            (
                failed(libc::ETIMEDOUT, closed(moved(Local, FinWait1, established()))),
                "local timeout close - fin_timeout",
            ),
            (
                sent(15, Established, failed(libc::ETIMEDOUT, established())),
                "kernel reset_sent - - keepalive_timeout",
            ),
            (
                sent(14, Established, failed(libc::ECONNABORTED, established())),
                "admin destroyed - - destroyed",
            ),
            (failed(libc::ECONNABORTED, syn_sent()), "admin destroyed - - destroyed"),
        ] {
            assert_eq!(line(&life, &reasons()), expected);
            assert_eq!(line(&without_reason(&life), &ResetReasons::default()), expected, "without reasons");
        }
    }

    /// What the kernel abandons after `close()`, judged by the socket alone.
    #[test]
    fn orphans() {
        use State::{Closing, FinWait1, FinWait2, LastAck};
        let orphan = |from, locked, no_fin_wait2| {
            let life = closed(moved(Side::Local, from, established()));
            let end = SocketEnd { orphan: Some(true), locked, no_fin_wait2, ..END };
            with_sample(|sample| sample.unacknowledged = Some(1), Life { end: Some(end), ..life })
        };
        let fin_timeout = "local reset_sent close - fin_timeout";
        let out_of_memory = "local reset_sent close - out_of_memory";
        for (from, locked, no_fin_wait2, reason, answer, expected) in [
            (FinWait2, true, true, 12, false, fin_timeout),
            (FinWait2, false, true, 8, true, fin_timeout),
            (FinWait2, false, false, 14, false, fin_timeout),
            (FinWait2, true, false, 13, false, out_of_memory),
            (FinWait1, true, false, 13, false, out_of_memory),
            (FinWait1, false, false, 13, false, out_of_memory),
            (LastAck, true, false, 13, false, out_of_memory),
            (Closing, true, false, 13, false, out_of_memory),
        ] {
            let reset = Rst { reason: Some(reason), state: Some(from), answer, ..RESET };
            let life = Life { reset: Some(reset), ..orphan(from, locked, no_fin_wait2) };
            assert_eq!(line(&life, &reasons()), expected, "from {from}");
            let without = without_reason(&life);
            assert_eq!(line(&without, &ResetReasons::default()), expected, "from {from}, without reasons");
        }
    }

    #[test]
    fn a_connection_in_the_queue_of_a_listener_that_is_destroyed() {
        let queued = |act| Life {
            inode: None,
            actor: Some(task(7, act)),
            end: Some(SocketEnd { shut_down: true, ..END }),
            ..established()
        };
        let end = |act| sent(14, State::Established, queued(act));
        let closed = end(Activity::Syscall(libc::SYS_close));
        assert_eq!(line(&closed, &reasons()), "local reset_sent close - listener_closed");
        let destroyed = end(Activity::Syscall(libc::SYS_sendmsg));
        assert_eq!(line(&destroyed, &reasons()), "admin destroyed - - destroyed");
        assert_eq!(destroyed.own_actor(), None, "the task that destroys it does not own it");
        let killed = end(Activity::Signal(libc::SIGKILL));
        assert_eq!(line(&killed, &reasons()), "local reset_sent signal SIGKILL listener_closed");
    }

    #[test]
    fn crossed_fins_are_both_sides() {
        let path = [(State::FinWait1, 1), (State::Closing, 2), (State::Close, 3)].into_iter().collect();
        let life = Life { path, ..closed(moved(Side::Local, State::Closing, established())) };
        assert_eq!(line(&life, &reasons()), "both fin close - -");
    }

    #[test]
    fn resets_without_a_connection() {
        let stray = |life: &Life, reset: Rst| reset_cause(life, &reset, &reasons());
        let nowhere = Life { id: crate::ingest::life::SocketId { address: 0, born: 1 }, ..unknown() };
        for (state, reason, expected) in [
            (None, 1, Cause::NoListener),
            (Some(State::Listen), 10, Cause::AcceptOverflow),
            (Some(State::Listen), 6, Cause::InvalidSegment),
            (Some(State::TimeWait), 9, Cause::Timewait),
            (Some(State::FinWait2), 8, Cause::DataAfterClose),
            // A reason that this build does not know.
            (Some(State::Established), 77, Cause::InvalidSegment),
        ] {
            let reset = Rst { reason: Some(reason), state, ..RESET };
            assert_eq!(stray(&nowhere, reset), expected, "{state:?} {reason}");
        }
        let listener = Rst { state: Some(State::Listen), ..RESET };
        assert_eq!(stray(&unknown(), listener), Cause::Unknown, "without a reason");
        assert_eq!(stray(&unknown(), RESET), Cause::Unknown, "there is a socket, but its state is not known");
        let memory = Rst { reason: Some(13), state: Some(State::FinWait1), answer: false, ..RESET };
        assert_eq!(stray(&nowhere, memory), Cause::OutOfMemory);
    }

    #[test]
    fn a_reset_from_elsewhere() {
        let life = failed(libc::ECONNRESET, established());
        for (ttl, handshake_ttl, expected) in [
            (Some(64), Some(64), Cause::PeerReset),
            (Some(62), Some(64), Cause::PeerReset),
            (Some(61), Some(64), Cause::SuspectedInjection),
            (Some(128), Some(57), Cause::SuspectedInjection),
            (None, Some(64), Cause::PeerReset),
            (Some(64), None, Cause::PeerReset),
        ] {
            let reset = Rst {
                direction: Direction::Received,
                state: Some(State::Established),
                ttl,
                handshake_ttl,
                ..RESET
            };
            assert_eq!(reset_cause(&life, &reset, &reasons()), expected, "{ttl:?} {handshake_ttl:?}");
        }
    }
}
