//! Connections of clients that the server ended while a request seemed to be pending.
//!
//! The last data of a client is not always a request ([`Pending`]). Besides, some protocols end with a
//! message of the client, a farewell (`quit` in memcached), and some clients never get an answer (they send
//! logs). On one connection this looks like a lost answer. The other connections to the service show the
//! difference.

use crate::{
    diagnose::{
        end::{End, IDLE_MS, WAIT_MS},
        marks::Series,
        pending::Pending,
        statistics::ENOUGH,
    },
    event::Ended,
};

/// The ends that seem to have lost an answer, by the way in which the server ended them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Unanswered {
    /// Those that the server ended with a RST, and without a FIN before it.
    pub(crate) resets: Part,
    /// Those that the server ended with a FIN.
    pub(crate) closes: Part,
    /// The number of connections that the server ended as soon as the client had sent data, which was
    /// therefore a farewell.
    farewells: u64,
}

/// The ends that the server ended in the same way.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part {
    /// The waits for the answer.
    pub(crate) waits: Series,
    /// The number of ends that the server's own code is known to have closed.
    pub(crate) closed_by_code: u64,
    /// The number of ends on which the server had not sent anything.
    first: u64,
}

/// The other ends of the service, with which those that seem to have lost an answer are compared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    /// The number of all ends, and of those on which the server sent something.
    pub(crate) ends: u64,
    pub(crate) answered: u64,
}

impl Unanswered {
    /// Adds a client's end that its server ended this long after a request.
    pub(crate) fn add(&mut self, end: &End, peer: Option<&End>, wait: f64) {
        if is_farewell(end, wait) {
            return self.add_farewell();
        }
        let part = if was_reset_at_once(end) { &mut self.resets } else { &mut self.closes };
        part.waits.add(end.place, end.moved, wait);
        part.closed_by_code +=
            u64::from(peer.is_some_and(|peer| peer.closed_here() && peer.trigger.is_some()));
        part.first += u64::from(is_first(end));
    }

    /// Counts a client's end that its server ended in answer to a farewell.
    pub(crate) fn add_farewell(&mut self) {
        self.farewells += 1;
    }

    /// The number of ends.
    pub(crate) fn count(&self) -> u64 {
        self.resets.count() + self.closes.count()
    }

    /// Whether most of them were reset after their first request, as the kernel does if the accept queue is
    /// full and `net.ipv4.tcp_abort_on_overflow` is set.
    pub(crate) fn were_turned_away(&self) -> bool {
        self.resets.first * 2 > self.count()
    }

    /// The parts that show a fault of the server.
    pub(crate) fn faults(&self, context: Context) -> Vec<&Part> {
        // A service that never sends anything (logs, metrics) cannot owe an answer.
        if context.answered == 0 {
            return Vec::new();
        }
        let mut faults = Vec::new();
        if self.resets.are_requests() && !self.resets.is_idle_timeout() {
            faults.push(&self.resets);
        }
        // If most connections end like this, it is a part of the protocol. Some servers take a while to close
        // after a farewell.
        let closes = self.closes.count();
        let is_rule = (closes + self.farewells) * 2 > context.ends || self.farewells > closes;
        if self.closes.are_requests() && !is_rule && !self.closes.is_idle_timeout() {
            faults.push(&self.closes);
        }
        faults
    }

    /// Whether the lost answers may have been needed. The caller knows that the client failed after each
    /// loss, so that, unlike in [`Self::faults`], all connections may have ended like this.
    pub(crate) fn may_be_a_cause(&self, context: Context) -> bool {
        let is_fault = |part: &Part| part.count() > 0 && !part.is_idle_timeout();
        context.answered > 0
            && self.farewells <= self.closes.count()
            && (is_fault(&self.resets) || is_fault(&self.closes))
    }
}

impl Part {
    pub(crate) fn count(&self) -> u64 {
        self.waits.marks.count
    }

    /// Whether enough of them had a pending request, and not a heartbeat as the last data. If a server ends,
    /// or a device on the way, connections with heartbeats end as well, but all of them at once.
    fn are_requests(&self) -> bool {
        self.first >= ENOUGH || self.waits.marks.are_spread()
    }

    /// Whether the server closes after a fixed time of silence, as it also does after a message that needs no
    /// answer. If the server had not sent anything before, that message was a request.
    fn is_idle_timeout(&self) -> bool {
        let regular = self.waits.sample.regular();
        self.first * 2 < self.count() && regular.is_some_and(|spread| spread.median >= IDLE_MS)
    }
}

/// Whether the server ended the connection as soon as the client had sent data, which was therefore a
/// farewell. If the server had not sent anything before, and resets the connection, it rejects the client.
pub(crate) fn is_farewell(end: &End, wait: f64) -> bool {
    let turned_away = was_reset_at_once(end) && is_first(end);
    wait < WAIT_MS && !turned_away
}

/// Whether the server had not sent anything before.
fn is_first(end: &End) -> bool {
    matches!(end.pending(), Pending::Yes(_))
}

/// Whether no FIN came before the RST. After a FIN, the RST is the reply to data that this end has sent then,
/// such as a TLS `close_notify`.
fn was_reset_at_once(end: &End) -> bool {
    end.ended == Some(Ended::ResetReceived) && !end.path.close_wait
}
