//! What a socket that stays in a teardown state waits for.

use crate::{event::LingeringKind, ingest::life::SendQueue, tcp::State};

/// What a socket in `state` waits for. `recv_queue` is its Recv-Q as in `ss`, and `send_queue` what is
/// waiting to be sent, if they are known.
pub fn waits_for(
    state: State,
    has_descriptor: bool,
    recv_queue: Option<u32>,
    send_queue: Option<SendQueue>,
) -> LingeringKind {
    match (state, recv_queue) {
        (State::FinWait1 | State::Closing | State::LastAck, _) => match send_queue {
            Some(queue) if queue.is_shut_out() => LingeringKind::PeerNotReading,
            Some(_) => LingeringKind::Unacked,
            None => LingeringKind::Unknown,
        },
        (State::FinWait2, _) => LingeringKind::HalfClosed,
        // A socket that was closed is in LAST_ACK; one in CLOSE_WAIT without a descriptor was never accepted.
        (State::CloseWait, Some(_)) if !has_descriptor => LingeringKind::Unaccepted,
        // The FIN takes a sequence number, which the recv() that reaches it consumes: tcp_recvmsg_locked().
        (State::CloseWait, Some(0)) => LingeringKind::Leaked,
        (State::CloseWait, Some(_)) => LingeringKind::Unread,
        _ => LingeringKind::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shut_window_and_a_lost_peer() {
        let kind = |unsent, in_flight, probes| {
            waits_for(State::FinWait1, true, Some(0), Some(SendQueue { unsent, in_flight, probes }))
        };
        assert_eq!(kind(1001, 0, 0), LingeringKind::PeerNotReading);
        assert_eq!(kind(1001, 0, 1), LingeringKind::PeerNotReading, "a probe is on its way");
        assert_eq!(kind(1, 0, 0), LingeringKind::PeerNotReading, "the FIN alone has no room either");
        assert_eq!(kind(1001, 0, 5), LingeringKind::Unacked, "probes go unanswered");
        assert_eq!(kind(1001, 10, 0), LingeringKind::Unacked, "what was sent is not acknowledged");
        assert_eq!(kind(0, 1, 0), LingeringKind::Unacked);
        assert_eq!(waits_for(State::LastAck, true, None, None), LingeringKind::Unknown);
    }
}
