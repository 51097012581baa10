//! One socket as the kernel lists it, and what follows from that alone: what it waits for, and since when.

use tcpclose_common::tcp::is_teardown;

use crate::{
    event::{Endpoint, LingeringKind, State},
    judge,
};

/// One socket as the kernel lists it.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its state; for what is left of a closed socket ([`is_remnant`](Self::is_remnant)) the state of that.
    pub state: State,
    /// This end.
    pub local: Endpoint,
    /// The other end.
    pub remote: Endpoint,
    /// Inode of its descriptors; 0 while it is in an accept queue, and when no descriptor is left.
    pub inode: u64,
    /// Bytes from what was read to what was received, a FIN counting as one (`Recv-Q` of `ss`).
    pub recv_queue: u32,
    /// Only the small structure is left that the kernel keeps for `TIME_WAIT`, and for a closed socket in `FIN_WAIT2`.
    pub is_remnant: bool,
    /// The kernel's socket cookie.
    pub cookie: Option<u64>,
    /// From `struct tcp_info`, if that was to be had.
    pub info: Option<Info>,
}

/// What is used of `struct tcp_info`. Times are milliseconds before now, made of whole jiffies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Since data was last sent, or sent again; since it was established if there never was any.
    pub last_data_sent: u32,
    /// Since data last came, likewise.
    pub last_data_received: u32,
    /// Since an ACK last came; every segment of a connection carries one.
    pub last_ack_received: u32,
    /// Payload sent, each byte once.
    pub bytes_sent: u64,
    /// Payload received, each byte once; and the FIN.
    pub bytes_received: u64,
    /// Segments sent again.
    pub retransmits: u32,
    /// Smoothed round trip time, microseconds; 0 when never measured.
    pub rtt_us: u32,
}

/// Between which times it is in its state, milliseconds. `None` where the kernel gives no such bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Age {
    /// At least.
    pub at_least: Option<u32>,
    /// At most.
    pub at_most: Option<u32>,
}

/// The longest that a jiffy is (`CONFIG_HZ=100`), milliseconds. Between two moments that are `n` ticks apart, up to one
/// tick more or less has passed.
const JIFFY: u32 = 10;

impl Entry {
    /// Whether it is in a state of the teardown in which sockets get stuck.
    pub fn is_lingering(&self) -> bool {
        is_lingering(self.state)
    }

    /// Whether the peer's FIN has come.
    fn has_fin(&self) -> bool {
        matches!(self.state, State::CloseWait | State::Closing | State::LastAck)
    }

    /// Payload that nobody has read.
    pub fn unread_bytes(&self) -> Option<u32> {
        // A remnant has no queue, and nobody who could read it.
        (!self.is_remnant).then(|| self.recv_queue.saturating_sub(u32::from(self.has_fin())))
    }

    /// Payload received, each byte once.
    pub fn bytes_received(&self) -> Option<u64> {
        self.info.map(|info| info.bytes_received.saturating_sub(u64::from(self.has_fin())))
    }

    /// What it waits for.
    pub fn kind(&self) -> LingeringKind {
        judge::waits_for(self.state, self.inode != 0, Some(self.recv_queue))
    }

    /// How long it has been in its state. The kernel keeps no such time, but times of other things that can only have
    /// been before or after (`tcp_get_info()`, `net/ipv4/tcp.c`). A socket that carries segments out of order may be off
    /// by the time between these.
    pub fn age(&self) -> Age {
        const UNKNOWN: Age = Age { at_least: None, at_most: None };
        // A remnant has a timer and no times.
        let Some(info) = self.info else { return UNKNOWN };
        let at_least = |millis: u32| Some(millis.saturating_sub(JIFFY));
        let at_most = |millis: u32| Some(millis.saturating_add(JIFFY));
        match self.state {
            // The peer's FIN made the state. It had an ACK in it, and more may have come since. Data may have come with
            // it, none after it.
            State::CloseWait | State::Closing => {
                Age { at_least: at_least(info.last_ack_received), at_most: at_most(info.last_data_received) }
            }
            // The ACK of our FIN made the state. What we sent, and sent again, was before: that ACK was for all of it.
            State::FinWait2 => {
                Age { at_least: at_least(info.last_ack_received), at_most: at_most(info.last_data_sent) }
            }
            // We closed, which leaves no trace, but after the peer had: no data has come since.
            State::LastAck => Age { at_least: None, at_most: at_most(info.last_data_received) },
            // We closed or shut down. Data and ACKs may have come, and data may have been sent again, before or since.
            _ => UNKNOWN,
        }
    }
}

/// Whether sockets get stuck in this state of the teardown. `TIME_WAIT` ends by itself.
pub fn is_lingering(state: State) -> bool {
    is_teardown(state as u8)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn entry(state: State, inode: u64, recv_queue: u32) -> Entry {
        let end = |port| Endpoint { address: [10, 0, 0, 1].into(), port };
        Entry {
            state,
            local: end(40_000),
            remote: end(443),
            inode,
            recv_queue,
            is_remnant: false,
            cookie: None,
            info: Some(Info {
                last_data_sent: 5_000,
                last_data_received: 4_000,
                last_ack_received: 3_000,
                bytes_sent: 10,
                bytes_received: 21,
                retransmits: 0,
                rtt_us: 100,
            }),
        }
    }

    #[test]
    fn kinds_and_what_was_not_read() {
        for (entry, kind, unread) in [
            (entry(State::CloseWait, 7, 0), LingeringKind::Leaked, 0),
            (entry(State::CloseWait, 7, 1), LingeringKind::Unread, 0),
            (entry(State::CloseWait, 7, 6), LingeringKind::Unread, 5),
            (entry(State::CloseWait, 0, 6), LingeringKind::Unaccepted, 5),
            (entry(State::FinWait1, 7, 3), LingeringKind::Unacked, 3),
            (entry(State::LastAck, 0, 0), LingeringKind::Unacked, 0),
            (entry(State::Closing, 0, 1), LingeringKind::Unacked, 0),
            (entry(State::FinWait2, 7, 3), LingeringKind::HalfClosed, 3),
        ] {
            assert_eq!((entry.kind(), entry.unread_bytes()), (kind, Some(unread)), "{entry:?}");
        }
        assert_eq!(entry(State::CloseWait, 7, 0).bytes_received(), Some(20));
        assert_eq!(entry(State::FinWait2, 7, 0).bytes_received(), Some(21));
    }

    #[test]
    fn only_bounds_that_hold() {
        let age = |state| entry(state, 7, 0).age();
        let between = |at_least, at_most| Age { at_least, at_most };
        assert_eq!(age(State::CloseWait), between(Some(2_990), Some(4_010)));
        assert_eq!(age(State::Closing), between(Some(2_990), Some(4_010)));
        assert_eq!(age(State::FinWait2), between(Some(2_990), Some(5_010)));
        assert_eq!(age(State::LastAck), between(None, Some(4_010)));
        assert_eq!(age(State::FinWait1), between(None, None));
        let remnant = Entry { info: None, is_remnant: true, ..entry(State::FinWait2, 0, 0) };
        assert_eq!(remnant.age(), between(None, None));
        assert_eq!(remnant.unread_bytes(), None);
    }
}
