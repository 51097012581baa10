//! One socket as the kernel lists it, and the conclusions from that alone: what keeps it in its state, and
//! how long it has been there.

use tcpclose_common::tcp::is_teardown;

use crate::{
    event::{Endpoint, LingeringKind, State},
    ingest::life::SendQueue,
    judge,
};

/// One socket as the kernel lists it.
#[derive(Clone, Debug, PartialEq)]
pub struct ListedSocket {
    /// Its state. For a [remnant](Self::is_remnant), the state in which that is.
    pub state: State,
    /// The local end.
    pub local: Endpoint,
    /// The remote end.
    pub remote: Endpoint,
    /// Inode of its descriptors; 0 while it is in an accept queue, and once no descriptor is left.
    pub inode: u64,
    /// Bytes received and not read, where a FIN counts as one (`Recv-Q` of `ss`).
    pub recv_queue: u32,
    /// The send queue, if it is known.
    pub send_queue: Option<SendQueue>,
    /// Whether only the small structure is left that the kernel keeps for a socket in `TIME_WAIT`, and for a
    /// closed one in `FIN_WAIT2`.
    pub is_remnant: bool,
    /// The kernel's socket cookie.
    pub cookie: Option<u64>,
    /// Facts from `struct tcp_info`, if the kernel sent it.
    pub info: Option<Info>,
}

/// The part of `struct tcp_info` that is used. Times are milliseconds before now, with the resolution of a
/// jiffy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Time since data was last sent or retransmitted or, if none was, since the connection was established.
    pub last_data_sent: u32,
    /// Time since data was last received or, if none was, since the connection was established.
    pub last_data_received: u32,
    /// Time since an ACK was last received; every segment of a connection carries one.
    pub last_ack_received: u32,
    /// Payload sent, each byte counted once.
    pub bytes_sent: u64,
    /// Payload received, each byte counted once, plus one for a FIN.
    pub bytes_received: u64,
    /// Segments retransmitted.
    pub retransmits: u32,
    /// Smoothed round-trip time in microseconds; 0 if never measured.
    pub rtt_us: u32,
}

/// Bounds for the time that a socket has been in its state, in milliseconds. A bound that the kernel does not
/// provide is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AgeRange {
    /// The lower bound.
    pub at_least: Option<u32>,
    /// The upper bound.
    pub at_most: Option<u32>,
}

/// The longest duration of a jiffy in milliseconds (`CONFIG_HZ=100`). Times made of jiffies are off by up to
/// one jiffy.
const JIFFY: u32 = 10;

impl ListedSocket {
    /// Whether it is in a teardown state; see [`is_in_teardown`].
    pub fn is_in_teardown(&self) -> bool {
        is_in_teardown(self.state)
    }

    /// Whether the peer's FIN has been received.
    fn has_fin(&self) -> bool {
        matches!(self.state, State::CloseWait | State::Closing | State::LastAck)
    }

    /// Payload received and not read; `None` for a remnant, which has no queue.
    pub fn unread_bytes(&self) -> Option<u32> {
        (!self.is_remnant).then(|| self.recv_queue.saturating_sub(u32::from(self.has_fin())))
    }

    /// Payload received, each byte counted once.
    pub fn bytes_received(&self) -> Option<u64> {
        self.info.map(|info| info.bytes_received.saturating_sub(u64::from(self.has_fin())))
    }

    /// What keeps it in its state.
    pub fn kind(&self) -> LingeringKind {
        judge::waits_for(self.state, self.inode != 0, Some(self.recv_queue), self.send_queue)
    }

    /// How long it has been in its state. The kernel does not record that, but it records the times of other
    /// events that must have come before or after the change of state (`tcp_get_info()`, `net/ipv4/tcp.c`).
    /// If segments arrive out of order, the bounds may be off by the time between them.
    pub fn age(&self) -> AgeRange {
        const UNKNOWN: AgeRange = AgeRange { at_least: None, at_most: None };
        // A remnant has a timer but no times.
        let Some(info) = self.info else { return UNKNOWN };
        let at_least = |millis: u32| Some(millis.saturating_sub(JIFFY));
        let at_most = |millis: u32| Some(millis.saturating_add(JIFFY));
        match self.state {
            // The peer's FIN led to this state. The FIN carried an ACK, and more ACKs may have come since.
            // Data may have come with the FIN, but not after it.
            State::CloseWait | State::Closing => AgeRange {
                at_least: at_least(info.last_ack_received),
                at_most: at_most(info.last_data_received),
            },
            // The ACK of our FIN led to this state. It acknowledged everything we had sent, so we sent
            // nothing after it.
            State::FinWait2 => {
                AgeRange { at_least: at_least(info.last_ack_received), at_most: at_most(info.last_data_sent) }
            }
            // Our close, which the kernel does not record, led to this state. The peer had closed before, so
            // no data has come since.
            State::LastAck => AgeRange { at_least: None, at_most: at_most(info.last_data_received) },
            // Our close or shutdown led to this state. Data, ACKs and retransmissions may have come before or
            // after it.
            _ => UNKNOWN,
        }
    }
}

/// Whether this is a teardown state in which a socket can get stuck. `TIME_WAIT` is not, because it ends by
/// itself.
pub fn is_in_teardown(state: State) -> bool {
    is_teardown(state as u8)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn entry(state: State, inode: u64, recv_queue: u32) -> ListedSocket {
        let end = |port| Endpoint { address: [10, 0, 0, 1].into(), port };
        ListedSocket {
            state,
            local: end(40_000),
            remote: end(443),
            inode,
            recv_queue,
            send_queue: Some(SendQueue { unsent: 0, in_flight: 1, probes: 0 }),
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
    fn kinds_and_unread_bytes() {
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
    fn bounds_of_ages() {
        let age = |state| entry(state, 7, 0).age();
        let between = |at_least, at_most| AgeRange { at_least, at_most };
        assert_eq!(age(State::CloseWait), between(Some(2_990), Some(4_010)));
        assert_eq!(age(State::Closing), between(Some(2_990), Some(4_010)));
        assert_eq!(age(State::FinWait2), between(Some(2_990), Some(5_010)));
        assert_eq!(age(State::LastAck), between(None, Some(4_010)));
        assert_eq!(age(State::FinWait1), between(None, None));
        let remnant = ListedSocket { info: None, is_remnant: true, ..entry(State::FinWait2, 0, 0) };
        assert_eq!(remnant.age(), between(None, None));
        assert_eq!(remnant.unread_bytes(), None);
    }
}
