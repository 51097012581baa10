//! Whether a request was pending when the teardown of a connection began.
//!
//! The lines show which end sent the last data, and when. If it was the client, and the server had sent
//! nothing before, that data was a request. If the server had sent something, it may be anything else: HTTP/2
//! clients acknowledge settings and send a `WINDOW_UPDATE`, consumers of a message broker acknowledge
//! messages, publishers need no answer, and with AMQP both ends send heartbeats, each at times of its own.
//! One connection does not show the difference, nor do the times on many. Such data therefore counts as a
//! request only with other evidence, which each finding looks for itself.

use crate::{
    diagnose::end::{End, WAIT_MS, nanoseconds},
    event::{Cause, Ended, LastData, Role},
};

/// Whether a request was pending.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Pending {
    /// The server had sent the last data, or nobody had sent any.
    No,
    /// The client had sent the last data, this long ago, but the server had sent something before. Or the
    /// last data of both came within one tick of the kernel's clock.
    Perhaps(f64),
    /// The client had sent data, the last of it this long ago, and the server had not.
    Yes(f64),
}

impl Pending {
    /// What both ends of a connection show together.
    pub(crate) fn or(self, other: Self) -> Self {
        let rank = |pending: &Self| match pending {
            Self::No => 0,
            Self::Perhaps(_) => 1,
            Self::Yes(_) => 2,
        };
        if rank(&other) > rank(&self) { other } else { self }
    }
}

impl End {
    /// Whether a request was pending at this end.
    pub(crate) fn pending(&self) -> Pending {
        match self.waited_ms() {
            Some(waited) if self.had_answers() => Pending::Perhaps(waited),
            Some(waited) => Pending::Yes(waited),
            None if self.last_data.is_none() => self.idle_ms.map_or(Pending::No, Pending::Perhaps),
            None => Pending::No,
        }
    }

    /// How long ago the client had sent the last data; `None` if it was the server, or nobody. Data in both
    /// directions within one tick of the kernel's clock counts as an answer.
    pub(crate) fn waited_ms(&self) -> Option<f64> {
        let (request, since) = match self.role? {
            Role::Client => (LastData::Sent, self.since_sent_ms),
            Role::Server => (LastData::Received, self.since_received_ms),
        };
        if self.last_data != Some(request) {
            return None;
        }
        since.or(self.idle_ms)
    }

    /// How long a request had been pending when its client gave up. If the server had sent something before,
    /// only an answer that came too late shows that there was a request.
    pub(crate) fn given_up_after_ms(&self) -> Option<f64> {
        let wait = self.waited_ms().filter(|wait| *wait >= WAIT_MS)?;
        (!self.had_answers() || self.was_answered_late()).then_some(wait)
    }

    /// Whether the server had sent something when the teardown began.
    fn had_answers(&self) -> bool {
        let (server, client) = match self.role {
            Some(Role::Server) => (self.since_sent_ms, self.since_received_ms),
            _ => (self.since_received_ms, self.since_sent_ms),
        };
        // Without both, the lines do not distinguish the directions.
        server.is_some() || client.is_none() && self.sent_by_server() > 0
    }

    /// Whether the server sent data after the client had closed, which was answered with a RST, and so late
    /// that it was no reply to a closing message of the client.
    fn was_answered_late(&self) -> bool {
        let met_a_reset = match self.role {
            Some(Role::Server) => self.ended == Some(Ended::ResetReceived),
            _ => self.cause == Some(Cause::DataAfterClose),
        };
        met_a_reset && self.time.saturating_sub(self.moved) >= nanoseconds(WAIT_MS)
    }
}
