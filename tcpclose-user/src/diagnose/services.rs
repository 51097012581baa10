//! Ends of connections, grouped by program, side and service.
//!
//! [`Services::settle`] adds an end to the series it belongs to; [`findings`](crate::diagnose::findings) are
//! derived from them.

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, SocketAddr},
};

use foldhash::fast::RandomState;

use crate::{
    diagnose::{
        end::{End, IDLE_MS, Place, ServiceKey},
        marks::{Marks, Series},
        names::Who,
        pairs::PairKey,
        relays::GaveUp,
        unanswered::{Context, Unanswered},
    },
    event::{Cause, Ended, LastData, Role},
};

/// The number of services that are distinguished. When there is no room, those with the fewest marks are
/// dropped.
const MOST: usize = 8_192;

/// The number of idle ends closed by a server that are kept, to match requests that arrive too late.
const RECENT: usize = 8_192;

/// The shortest abandoned attempt; a shorter one may have lost a race against another address of the same
/// name.
const ATTEMPT_MS: f64 = 500.0;

/// The longest time, round trip included, before the peer's FIN arrives, at which data may have been sent
/// that crossed with the FIN.
const CROSSING_MS: f64 = 50.0;

/// The length of a `close_notify`, in bytes: of TLS 1.2 with `ChaCha20` and with AES-GCM, and of TLS 1.3 (RFC
/// 8446, section 5.2).
const FAREWELLS: [u64; 3] = [23, 31, 24];

/// The shortest silence after which a device may have forgotten a connection.
const CUT_MS: f64 = 1_000.0;

/// The facts about the connections of a program to a service, or about those of the service itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Service {
    /// The number of ends that were established, and of those on which the server sent data.
    pub(crate) ends: u64,
    pub(crate) answered: u64,
    pub(crate) pid: Single<u32>,
    pub(crate) remote: Single<IpAddr>,
    /// The program at the other end.
    pub(crate) peer: Single<Who>,
    /// Of a client: idle times after which the server closed.
    pub(crate) idle_by_peer: Series,
    /// Idle times after which this end closed.
    pub(crate) idle_own: Series,
    /// Connections on which a request crossed with the FIN of the other end.
    pub(crate) raced: Marks,
    /// Waits after which the client closed before it had an answer.
    pub(crate) gave_up: Series,
    /// Of a client: connections that the server ended before it answered.
    pub(crate) unanswered: Unanswered,
    /// Of a server: closes with unread data after an answer was sent, and the number of unread bytes.
    pub(crate) unread: Marks,
    pub(crate) unread_bytes: u64,
    pub(crate) overflow: Marks,
    /// Sockets that wait in the accept queue.
    pub(crate) unaccepted: Marks,
    pub(crate) refused: Marks,
    pub(crate) no_answer: Series,
    pub(crate) unreachable: u64,
    pub(crate) forged: Marks,
    /// Silences after which a connection was used again, and the data was answered with a RST or not at all.
    pub(crate) cut: Series,
    /// Silences after which a connection still worked.
    pub(crate) lived: Lived,
    /// Of a server: the same for connections whose client had shut down sending.
    pub(crate) half_closed_cut: Series,
    pub(crate) half_closed_lived: Lived,
}

/// Silences after which connections still worked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lived {
    pub(crate) count: u64,
    pub(crate) longest_ms: f64,
}

impl Lived {
    fn add(&mut self, silence_ms: f64) {
        self.count += 1;
        self.longest_ms = self.longest_ms.max(silence_ms);
    }
}

/// A value that is kept as long as it is the same every time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Single<T> {
    #[default]
    None,
    One(T),
    Several,
}

impl<T: Copy + PartialEq> Single<T> {
    pub(crate) fn add(&mut self, value: T) {
        *self = match *self {
            Self::None => Self::One(value),
            Self::One(one) if one == value => *self,
            _ => Self::Several,
        };
    }

    pub(crate) fn get(self) -> Option<T> {
        match self {
            Self::One(value) => Some(value),
            _ => None,
        }
    }
}

impl Service {
    fn shown(&self) -> u64 {
        let series = [&self.idle_by_peer, &self.gave_up, &self.no_answer, &self.cut, &self.half_closed_cut];
        let marks =
            [&self.unread, &self.overflow, &self.unaccepted, &self.refused, &self.forged, &self.raced];
        series.iter().map(|series| series.marks.count).sum::<u64>()
            + marks.iter().map(|marks| marks.count).sum::<u64>()
            + self.unanswered.count()
    }

    /// What the connections that seem to have lost an answer are compared with.
    pub(crate) fn context(&self) -> Context {
        Context { ends: self.ends, answered: self.answered }
    }
}

#[derive(Debug)]
pub(crate) struct Services {
    /// The number of services that are kept.
    pub(crate) most: usize,
    pub(crate) all: HashMap<ServiceKey, Service, RandomState>,
    /// The number of services that were evicted.
    pub(crate) left_out: u64,
    idle_closed: HashMap<PairKey, ServiceKey>,
    idle_closed_order: VecDeque<PairKey>,
}

impl Default for Services {
    fn default() -> Self {
        Self {
            most: MOST,
            all: HashMap::default(),
            left_out: 0,
            idle_closed: HashMap::new(),
            idle_closed_order: VecDeque::new(),
        }
    }
}

impl Services {
    fn get(&mut self, key: ServiceKey) -> &mut Service {
        if self.all.len() >= self.most && !self.all.contains_key(&key) {
            let before = self.all.len();
            let mut shown: Vec<u64> = self.all.values().map(Service::shown).collect();
            let (_, middle, _) = shown.select_nth_unstable(before / 2);
            let bar = *middle;
            // At least half of the services are dropped, and all of them if they have equally many marks.
            self.all.retain(|_, service| service.shown() > bar);
            self.left_out += (before - self.all.len()) as u64;
        }
        self.all.entry(key).or_default()
    }

    /// Counts an end that is evidence of nothing ([`End::is_ordinary`]).
    pub(crate) fn ordinary(&mut self, end: &End) {
        let Some(key) = ServiceKey::of(end) else { return };
        let service = self.get(key);
        service.seen(end);
        service.established(end);
        service.half_closed(end);
        if !key.is_server
            && let Some(idle) = end.idle_after_answer_ms()
        {
            service.lived.add(idle);
        }
    }

    /// Adds an end. Its peer, if it is known, is only consulted.
    pub(crate) fn settle(&mut self, end: &End, peer: Option<&End>) {
        let Some(key) = ServiceKey::of(end) else { return };
        let place = end.place;
        let service = self.get(key);
        service.seen(end);
        if let Some(who) = peer.and_then(|peer| peer.who) {
            service.peer.add(who);
        }
        match end.cause {
            Some(Cause::Refused) => return service.refused.add(place, end.time),
            Some(Cause::AcceptOverflow) => return service.overflow.add(place, end.time),
            Some(Cause::SuspectedInjection) => return service.forged.add(place, end.time),
            Some(Cause::ConnectTimeout | Cause::ConnectAbandoned | Cause::HostUnreachable)
                if !end.path.established =>
            {
                service.unreachable += u64::from(end.cause == Some(Cause::HostUnreachable));
                if end.cause != Some(Cause::ConnectAbandoned) || end.path.length_ms >= ATTEMPT_MS {
                    service.no_answer.add(place, end.time, end.path.length_ms);
                }
                return;
            }
            _ => {}
        }
        if !end.path.established {
            return;
        }
        service.established(end);
        if key.is_server {
            service.settle_server(end, peer);
            if end.closed_here() && end.idle_after_answer_ms().is_some_and(|idle| idle >= IDLE_MS) {
                // If the peer is known, its line shows whether a request was lost.
                if peer.is_none() {
                    self.remember(end, key);
                }
            }
        } else {
            service.settle_client(end, peer);
        }
    }

    /// Adds an end whose client gave up, as the behaviour of a proxy shows.
    pub(crate) fn gave_up(&mut self, gave_up: &GaveUp) {
        self.get(gave_up.key).gave_up.add(gave_up.place, gave_up.moved, gave_up.waited_ms);
    }

    fn remember(&mut self, end: &End, key: ServiceKey) {
        let pair = PairKey::of(end);
        self.idle_closed.insert(pair, key);
        self.idle_closed_order.push_back(pair);
        if self.idle_closed_order.len() > RECENT
            && let Some(oldest) = self.idle_closed_order.pop_front()
        {
            self.idle_closed.remove(&oldest);
        }
    }

    /// Adds a RST with which this host answered data for a connection that it had closed. The `close` line of
    /// this end may still be `waiting` for that of its peer.
    pub(crate) fn too_late(&mut self, pair: PairKey, waiting: Option<&End>, place: Place, time: i64) {
        let waiting = waiting.filter(|end| {
            end.role == Some(Role::Server)
                && end.closed_here()
                && end.idle_after_answer_ms().is_some_and(|idle| idle >= IDLE_MS)
        });
        let key = waiting.and_then(ServiceKey::of).or_else(|| self.idle_closed.remove(&pair));
        if let Some(key) = key {
            self.get(key).raced.add(place, time);
        }
    }

    /// Adds a socket that waits to be accepted.
    pub(crate) fn unaccepted(&mut self, who: Option<Who>, local: SocketAddr, place: Place, time: i64) {
        let key = ServiceKey { who, is_server: true, address: None, port: local.port() };
        self.get(key).unaccepted.add(place, time);
    }
}

impl Service {
    fn seen(&mut self, end: &End) {
        self.remote.add(end.remote.ip());
        if end.who.is_some() {
            self.pid.add(end.pid);
        }
    }

    fn established(&mut self, end: &End) {
        self.ends += 1;
        self.answered += u64::from(end.sent_by_server() > 0);
    }

    /// A client that has shut down sending only acknowledges the answer. If it does not even do that, and
    /// sends no RST, the data of the server has not reached it, or its packets do not reach the server.
    fn half_closed(&mut self, end: &End) {
        let Some(waited) = end.half_closed_ms() else { return };
        match end.ended {
            Some(Ended::Fin) => self.half_closed_lived.add(waited),
            Some(Ended::Timeout) if waited >= CUT_MS && end.unacked == Some(end.sent) => {
                self.half_closed_cut.add(end.place, end.time, waited);
            }
            _ => {}
        }
    }

    fn settle_server(&mut self, end: &End, peer: Option<&End>) {
        let place = end.place;
        self.half_closed(end);
        // A client whose last message is a request to close (MySQL's COM_QUIT) sends a TLS close_notify right
        // after it, which the server does not read.
        let is_farewell = end.unread.is_some_and(|bytes| FAREWELLS.contains(&bytes));
        if end.cause == Some(Cause::UnreadData)
            && end.closed_here()
            && end.sent > 0
            && end.death.is_none()
            && !is_farewell
        {
            self.unread.add(place, end.time);
            self.unread_bytes += end.unread.unwrap_or_default();
        }
        if end.closed_here()
            && end.death.is_none()
            && let Some(idle) = end.idle_after_answer_ms().filter(|idle| *idle >= IDLE_MS)
        {
            self.idle_own.add(place, end.time, idle);
            // The request arrived between the server's shutdown() and its close().
            if end.cause == Some(Cause::DataAfterClose) {
                self.raced.add(place, end.time);
            }
        }
        let client_died = peer.is_some_and(|peer| peer.death.is_some());
        if end.closed_there()
            && !client_died
            && let Some(wait) = end.given_up_after_ms()
        {
            self.gave_up.add(place, end.moved, wait);
        }
    }

    fn settle_client(&mut self, end: &End, peer: Option<&End>) {
        let place = end.place;
        let was_reset = end.ended == Some(Ended::ResetReceived);
        if end.closed_here() {
            if end.death.is_some() {
                return;
            }
            if let Some(wait) = end.given_up_after_ms() {
                self.gave_up.add(place, end.moved, wait);
            } else if let Some(idle) = end.idle_after_answer_ms() {
                // A peer that knew the connection would have acknowledged the FIN before resetting it.
                let unknown_to_peer = end.path.fin_wait && !end.path.fin_acknowledged;
                if unknown_to_peer && (was_reset || end.ended == Some(Ended::Timeout)) && idle >= CUT_MS {
                    self.cut_unless_ended(end, peer, idle);
                } else if end.ended == Some(Ended::Fin) {
                    self.lived.add(idle);
                    if idle >= IDLE_MS {
                        self.idle_own.add(place, end.time, idle);
                    }
                }
            }
            return;
        }
        // The end of the process explains the end of the connection, and so does a full accept queue.
        let explains = |peer: &End| peer.death.is_some() || peer.cause == Some(Cause::AcceptOverflow);
        if peer.is_some_and(explains) {
            return;
        }
        if !end.path.close_wait
            && let Some(silence) = end.silence_before_failure_ms().filter(|silence| *silence >= CUT_MS)
        {
            return self.cut_unless_ended(end, peer, silence);
        }
        if !end.closed_there() {
            return;
        }
        let crossing = end.since_sent_ms.is_some_and(|since| since <= CROSSING_MS);
        if let Some(silence) = end
            .silence_before_last_sent_ms()
            .filter(|silence| end.path.close_wait && crossing && *silence >= IDLE_MS)
        {
            // A request that crossed with the FIN is answered with a RST. If there was no RST, the server has
            // read the data, which may be the close_notify of a client that closes an idle TLS connection and
            // waits for that of the server.
            if was_reset {
                self.idle_by_peer.add(place, end.moved, silence);
                self.lost_request(end);
            } else {
                self.unanswered.add_farewell();
            }
        } else if let Some(idle) =
            // Some servers end idle connections with a RST, as MariaDB does.
            end.idle_after_answer_ms().filter(|_| end.path.close_wait || was_reset)
        {
            if end.ended == Some(Ended::Fin) {
                self.lived.add(idle);
            }
            if idle >= IDLE_MS {
                self.idle_by_peer.add(place, end.moved, idle);
                // In CLOSE_WAIT only data causes a RST.
                if was_reset && end.path.close_wait {
                    self.lost_request(end);
                }
            }
        } else if let Some(wait) = end.waited_ms().filter(|_| end.last_data == Some(LastData::Sent)) {
            self.unanswered.add(end, peer, wait);
        }
    }

    /// Counts the data that the RST answered as a request, unless it was a `close_notify`, which programs
    /// also send in reply to that of the other end.
    fn lost_request(&mut self, end: &End) {
        if !end.unacked.is_some_and(|bytes| FAREWELLS.contains(&bytes)) {
            self.raced.add(end.place, end.time);
        }
    }

    /// Adds a connection that failed after a silence, unless its peer is known to have ended it.
    fn cut_unless_ended(&mut self, end: &End, peer: Option<&End>, silence: f64) {
        let ended_there = peer.is_some_and(|peer| peer.trigger.is_some() && peer.moved < end.moved);
        if !ended_there {
            self.cut.add(end.place, end.time, silence);
        }
    }
}
