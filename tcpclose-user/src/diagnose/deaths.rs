//! Processes that ended while clients were connected to them.

use std::collections::{HashMap, VecDeque};

use crate::{
    diagnose::{
        end::{Death, End},
        marks::Marks,
        names::Who,
        pending::Pending,
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
    /// Its connections, at the times at which they were closed.
    pub(crate) ends: Marks,
    pub(crate) lost: LostAnswers,
    /// The number of connections that the process closed by exiting just after the client's last data.
    pub(crate) farewells: u64,
}

/// The connections of an ended process whose clients waited for an answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct LostAnswers {
    pub(crate) marks: Marks,
    /// The further connections for which it is not known whether the client waited.
    pub(crate) undecided: Marks,
    /// Whether no client ever got an answer, so that the data of clients may not have been requests.
    pub(crate) is_one_way: bool,
}

impl LostAnswers {
    /// Adds the connections of another process.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.marks.merge(&other.marks);
        self.undecided.merge(&other.undecided);
        self.is_one_way |= other.is_one_way;
    }
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
        // Nobody is left of a connection of a process with itself, which wakes up its own event loop.
        let is_own = peer.is_some_and(|peer| end.is_of_same_process(peer));
        if end.role != Some(Role::Server) || end.closed_there() || end.pid == 0 || is_own {
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
            lost: LostAnswers::default(),
            farewells: 0,
        });
        if let Some(killer) = end.killer {
            process.killer.add(killer);
        }
        process.port.add(end.local.port());
        if let Some(who) = peer.and_then(|peer| peer.who) {
            process.peer.add(who);
        }
        process.ends.add(end.place, end.moved);
        // A process that exits by itself as soon as it has received data does what its client asked for, as
        // after PostgreSQL's Terminate or SMTP's QUIT. The client does not wait for it.
        let is_asked_to = end.trigger == Some(Trigger::Exit);
        match peer.map_or(end.pending(), |peer| end.pending().or(peer.pending())) {
            Pending::No => {}
            Pending::Perhaps(waited) | Pending::Yes(waited) if is_asked_to && waited < TICKS_MS => {
                process.farewells += 1;
            }
            Pending::Perhaps(_) => process.lost.undecided.add(end.place, end.moved),
            Pending::Yes(_) => process.lost.marks.add(end.place, end.moved),
        }
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &EndedProcess> {
        self.order.iter().filter_map(|key| self.all.get(key))
    }
}
