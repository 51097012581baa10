//! What a socket waits for that stays in a teardown state.

use crate::{event::LingeringKind, tcp::State};

/// What a socket in `state` waits for. `recv_queue` is its Recv-Q as `ss` shows it, if that is known.
pub fn waits_for(state: State, has_descriptor: bool, recv_queue: Option<u32>) -> LingeringKind {
    match (state, recv_queue) {
        (State::FinWait1 | State::Closing | State::LastAck, _) => LingeringKind::Unacked,
        (State::FinWait2, _) => LingeringKind::HalfClosed,
        // A socket that was closed is in LAST_ACK; one in CLOSE_WAIT without a descriptor was never accepted.
        (State::CloseWait, Some(_)) if !has_descriptor => LingeringKind::Unaccepted,
        // The FIN takes a sequence number, which the recv() that reaches it consumes: tcp_recvmsg_locked().
        (State::CloseWait, Some(0)) => LingeringKind::Leaked,
        (State::CloseWait, Some(_)) => LingeringKind::Unread,
        _ => LingeringKind::Unknown,
    }
}
