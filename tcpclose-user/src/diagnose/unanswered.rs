//! Connections of clients that the server ended while a request seemed to be pending.
//!
//! Not all that a client says last is a request ([`Pending`]). In addition, some protocols end with a message
//! of the client (`quit` in memcached), and some clients never get an answer (logs). What follows from that
//! looks like a lost answer on one connection, and is told apart by what the other connections to the service
//! show.

use crate::{
    diagnose::{
        end::{End, IDLE_MS, WAIT_MS},
        marks::Series,
        pending::Pending,
        statistics::ENOUGH,
    },
    event::Ended,
};

/// The ends that seem to have lost an answer, by how the server ended them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Unanswered {
    /// With a RST that nothing preceded.
    pub(crate) resets: Part,
    /// With a FIN.
    pub(crate) closes: Part,
    /// The number of connections that the server ended as soon as the client had said something: the answer
    /// to a farewell.
    farewells: u64,
}

/// Those that the server ended in the same way.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part {
    /// The waits for the answer.
    pub(crate) waits: Series,
    /// The number of those that the server's own code is known to have closed.
    pub(crate) closed_by_code: u64,
    /// The number of those on which the server had not sent anything.
    first: u64,
}

/// What to believe of the ends of a service.
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
        // If every connection ends like this, the protocol does, and some servers are slow to answer a
        // farewell.
        let closes = self.closes.count();
        let is_rule = (closes + self.farewells) * 2 > context.ends || self.farewells > closes;
        if self.closes.are_requests() && !is_rule && !self.closes.is_idle_timeout() {
            faults.push(&self.closes);
        }
        faults
    }

    /// Whether the server's answers were needed, if it is known that each loss made the client fail: then all
    /// of its connections may have ended like this.
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

    /// Whether enough of them had a pending request, rather than a heartbeat as the last message: a server that
    /// ends, or a device on the way, ends connections at any point of that, but all of them at once.
    fn are_requests(&self) -> bool {
        self.first >= ENOUGH || self.waits.marks.are_spread()
    }

    /// Whether the server closes after a fixed time of silence, which it also does after a message that needs
    /// no answer. If it had not sent anything before, the message was a request.
    fn is_idle_timeout(&self) -> bool {
        let regular = self.waits.sample.regular();
        self.first * 2 < self.count() && regular.is_some_and(|spread| spread.median >= IDLE_MS)
    }
}

/// Whether the server ended the connection as soon as the client had said something. If it had not sent
/// anything before and resets the connection, it turns the client away.
pub(crate) fn is_farewell(end: &End, wait: f64) -> bool {
    let turned_away = was_reset_at_once(end) && is_first(end);
    wait < WAIT_MS && !turned_away
}

/// Whether the server had not sent anything before.
fn is_first(end: &End) -> bool {
    matches!(end.pending(), Pending::Yes(_))
}

/// Whether the RST came first. After a FIN, only data that is sent then causes a RST, such as the farewell of
/// TLS.
fn was_reset_at_once(end: &End) -> bool {
    end.ended == Some(Ended::ResetReceived) && !end.path.close_wait
}
