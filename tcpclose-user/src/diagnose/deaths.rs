//! Processes that ended while they had connections of clients.

use std::collections::{HashMap, VecDeque};

use crate::{
    diagnose::{
        end::{Death, End},
        marks::Marks,
        names::Who,
        services::Single,
        statistics::TICKS_MS,
    },
    event::{Role, Trigger},
};

/// The number of ended processes that are kept.
const MOST: usize = 4_096;

/// A process that ended.
#[derive(Clone, Debug)]
pub(crate) struct EndedProcess {
    pub(crate) who: Option<Who>,
    pub(crate) pid: u32,
    pub(crate) death: Death,
    pub(crate) killer: Single<Who>,
    pub(crate) port: Single<u16>,
    /// The programs at the other ends.
    pub(crate) peer: Single<Who>,
    /// Its connections, by the time at which they were closed.
    pub(crate) ends: Marks,
    /// The connections with a pending request.
    pub(crate) requests_lost: Marks,
}

type DeathKey = (u16, u32, Death);

#[derive(Debug, Default)]
pub(crate) struct Deaths {
    all: HashMap<DeathKey, EndedProcess>,
    order: VecDeque<DeathKey>,
}

impl Deaths {
    pub(crate) fn settle(&mut self, end: &End, peer: Option<&End>) {
        let Some(death) = end.death else { return };
        if end.role != Some(Role::Server) || end.closed_there() || end.pid == 0 {
            return;
        }
        let key = (end.place.source, end.pid, death);
        if !self.all.contains_key(&key) {
            self.order.push_back(key);
            if self.order.len() > MOST
                && let Some(oldest) = self.order.pop_front()
            {
                self.all.remove(&oldest);
            }
        }
        let process = self.all.entry(key).or_insert_with(|| EndedProcess {
            who: end.who,
            pid: end.pid,
            death,
            killer: Single::None,
            port: Single::None,
            peer: Single::None,
            ends: Marks::default(),
            requests_lost: Marks::default(),
        });
        if let Some(killer) = end.killer {
            process.killer.add(killer);
        }
        process.port.add(end.local.port());
        if let Some(who) = peer.and_then(|peer| peer.who) {
            process.peer.add(who);
        }
        process.ends.add(end.place, end.moved);
        // One that exits by itself as soon as it has received data does what its client asked for, with
        // PostgreSQL's Terminate or SMTP's QUIT, and its client closes without seeing that.
        let least = if end.trigger == Some(Trigger::Exit) { TICKS_MS } else { 0.0 };
        let was_waiting = |end: &End| end.waited_ms().is_some_and(|waited| waited >= least);
        if was_waiting(end) || peer.is_some_and(was_waiting) {
            process.requests_lost.add(end.place, end.moved);
        }
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &EndedProcess> {
        self.order.iter().filter_map(|key| self.all.get(key))
    }
}
