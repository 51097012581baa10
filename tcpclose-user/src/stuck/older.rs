//! Sockets that were stuck before the trace began. The kernel does not record when a state began, but
//! `sock_diag` gives bounds for it (`sockets/entry.rs`).

use std::{
    collections::HashMap,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
};

use super::{age::Age, nanoseconds, now};
use crate::{
    ingest::life::{Endpoints, Life},
    sockets::{self, Socket},
    tcp::{Endpoint, State},
};

/// A socket, by network namespace and endpoints.
type SocketAddresses = (u32, Endpoint, Endpoint);

/// Sockets that were stuck before the trace and have descriptors, by which the inventory finds them.
#[derive(Default)]
pub struct Older {
    /// When the kernel was asked, and when it had answered, nanoseconds of `CLOCK_BOOTTIME`. The ages are
    /// those of some moment in between.
    asked: u64,
    answered: u64,
    sockets: HashMap<SocketAddresses, (State, sockets::AgeRange)>,
}

/// Sockets that were stuck before the trace and have no descriptor. The kernel half has no entries for them
/// while they do not change, so the kernel is asked for its sockets again whenever one of them is due, but
/// never if there are none.
#[derive(Default)]
pub struct Orphans {
    waiting: HashMap<SocketAddresses, WaitingOrphan>,
    /// When to ask, nanoseconds of `CLOCK_BOOTTIME`.
    next: Option<u64>,
    /// `None` as long as there are none.
    asker: Option<Asker>,
}

/// A thread that asks the kernel for the sockets in a teardown state. It is started before the tool gives up
/// its privileges (`sandbox.rs`), which it needs to enter network namespaces. It reads nothing that a traced
/// process has written.
struct Asker {
    questions: Sender<()>,
    answers: Receiver<Vec<Socket>>,
}

/// A socket without a descriptor that is due for a report, and the least that its age can be, nanoseconds.
pub type Orphan = (Socket, u64);

/// The state of an orphan when it was first seen, and when to report it. Times are nanoseconds of
/// `CLOCK_BOOTTIME`.
#[derive(Clone, Copy)]
struct WaitingOrphan {
    state: State,
    seen: u64,
    next: u64,
}

/// Asks the kernel which sockets are stuck now. `limit` is the age from which they are reported, nanoseconds.
pub fn find(limit: u64) -> (Older, Orphans) {
    let asked = now();
    let (orphans, held): (Vec<_>, Vec<_>) =
        sockets::in_teardown().into_iter().partition(|socket| socket.entry.inode == 0);
    let answered = now();
    let age = |socket: &Socket| (identity(socket), (socket.entry.state, socket.entry.age()));
    let older = Older { asked, answered, sockets: held.iter().map(age).collect() };
    (older, Orphans::new(&orphans, answered, limit))
}

impl Older {
    /// Narrows the age of a socket that was inspected `now` and has not moved since before the trace.
    pub fn narrow(&self, life: &Life, now: u64, age: &mut Age) {
        if age.since.is_some() || life.path.steps().len() != 1 {
            return;
        }
        if let Some(identity) = identity_of(&life.endpoints)
            && let Some((state, bounds)) = self.sockets.get(&identity)
            && life.state == Some(*state)
        {
            let later =
                |millis: u32, since: u64| nanoseconds(millis).saturating_add(now.saturating_sub(since));
            let at_least = bounds.at_least.map_or(0, |millis| later(millis, self.answered));
            age.at_least = age.at_least.max(at_least);
            age.at_most = bounds.at_most.map(|millis| later(millis, self.asked));
        }
    }
}

impl Asker {
    /// `None` if the thread cannot be started.
    fn start() -> Option<Self> {
        let (questions, asked) = channel();
        let (answer, answers) = channel();
        let work = move || while asked.recv().is_ok() && answer.send(sockets::in_teardown()).is_ok() {};
        thread::Builder::new().name("orphans".to_owned()).spawn(work).ok()?;
        Some(Self { questions, answers })
    }

    /// The sockets in a teardown state; none if the thread has panicked.
    fn ask(&self) -> Vec<Socket> {
        // If this fails, there is no answer either.
        let _ = self.questions.send(());
        self.answers.recv().unwrap_or_default()
    }
}

impl Orphans {
    /// Makes the collection of those that existed when the trace began; `seen` is a moment after that.
    fn new(found: &[Socket], seen: u64, limit: u64) -> Self {
        let waiting = |socket: &Socket| {
            let next = seen.saturating_add(limit.saturating_sub(least_age(socket)));
            (identity(socket), WaitingOrphan { state: socket.entry.state, seen, next })
        };
        let waiting: HashMap<_, _> = found.iter().map(waiting).collect();
        let next: Option<u64> = waiting.values().map(|orphan| orphan.next).min();
        Self { waiting, next, asker: next.and_then(|_| Asker::start()) }
    }

    /// Removes a socket, because the kernel half has seen an event of it.
    pub fn forget(&mut self, endpoints: &Endpoints) {
        if let Some(identity) = identity_of(endpoints) {
            self.waiting.remove(&identity);
        }
    }

    /// The orphans that are due for a report.
    pub fn due(&mut self, limit: u64) -> Vec<Orphan> {
        let asked = now();
        if self.next.is_none_or(|next| next > asked) {
            return Vec::new();
        }
        let found = self.asker.as_ref().map_or_else(sockets::in_teardown, Asker::ask);
        self.take_in(found, asked, now(), limit)
    }

    /// Handles the sockets that exist, as requested at `asked` and received by `seen`. Returns those that are
    /// due for a report.
    fn take_in(&mut self, found: Vec<Socket>, asked: u64, seen: u64, limit: u64) -> Vec<Orphan> {
        let mut waiting = HashMap::with_capacity(self.waiting.len());
        let mut due = Vec::new();
        for socket in found {
            let (identity, state) = (identity(&socket), socket.entry.state);
            let Some(mut orphan) = self.waiting.get(&identity).copied() else { continue };
            if orphan.state != state {
                orphan = WaitingOrphan { state, seen, next: seen };
            }
            let at_least = least_age(&socket).max(asked.saturating_sub(orphan.seen));
            if orphan.next <= asked && at_least >= limit {
                orphan.next = asked.saturating_add(at_least);
                due.push((socket, at_least));
            } else if orphan.next <= seen {
                orphan.next = asked.saturating_add(limit.saturating_sub(at_least));
            }
            waiting.insert(identity, orphan);
        }
        // One request serves all: those that are due soon can wait for the others.
        let soonest = waiting.values().map(|orphan| orphan.next).min();
        self.next = soonest.map(|soonest| soonest.max(asked.saturating_add(limit)));
        self.waiting = waiting;
        due
    }
}

/// The least that a socket's age can be, as far as the kernel knows, nanoseconds.
fn least_age(socket: &Socket) -> u64 {
    socket.entry.age().at_least.map_or(0, nanoseconds)
}

fn identity(socket: &Socket) -> SocketAddresses {
    (socket.netns, socket.entry.local, socket.entry.remote)
}

fn identity_of(endpoints: &Endpoints) -> Option<SocketAddresses> {
    Some((endpoints.netns?, endpoints.local?, endpoints.remote?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stuck::age::tests::found;

    #[test]
    fn bounds_are_those_of_a_moment_between_question_and_answer() {
        let end = |port| Endpoint { address: [10, 0, 0, 1].into(), port };
        let endpoints = Endpoints {
            netns: Some(1),
            local: Some(end(40_000)),
            remote: Some(end(443)),
            ..Endpoints::default()
        };
        let bounds = sockets::AgeRange { at_least: Some(3), at_most: Some(5) };
        let known = (State::CloseWait, bounds);
        let sockets = HashMap::from([(identity_of(&endpoints).unwrap(), known)]);
        let older = Older { asked: 10, answered: 40, sockets };
        let waits = Life { endpoints, ..found(&[(State::CloseWait, 30)]) };
        let mut age = Age::of(&waits, 100);
        older.narrow(&waits, 100, &mut age);
        assert_eq!(age, Age { since: None, at_least: 3_000_060, at_most: Some(5_000_090) });
    }
}
