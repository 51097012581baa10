//! Endings → owners: whose socket it was, and how that is known.
//!
//! The order of trust: the task that acted on the socket in its own context; the task that connected or accepted it, if
//! it still has it; the task that closed the descriptor after the end, or has it open; the process that listens where the
//! connection was never accepted; and, for a socket older than the trace, the process that had its descriptor then. A
//! task that merely ran on the CPU is never an owner.

pub mod container;
pub mod holder;
pub mod mappings;
pub mod process;
pub mod watch;

use self::holder::Holder;
use crate::{
    event::{Attribution, Process},
    host::{Host, Program},
    ingest::life::{Holder as Candidate, Life, Task},
    tcp::Role,
};

/// What a process has to do with a socket that it was not seen to act on.
#[derive(Clone, Copy, Debug)]
pub enum Claim<'a> {
    /// It closed the descriptor of a socket that had already ended.
    Closed(&'a Task),
    /// It has the socket open, as the iterator over all descriptors has shown.
    Holds(&'a Task),
    /// It has the socket open, as `/proc` has shown.
    Procfs(&'a Holder),
}

impl Claim<'_> {
    fn pid(self) -> u32 {
        match self {
            Self::Closed(task) | Self::Holds(task) => task.pid,
            Self::Procfs(holder) => holder.pid,
        }
    }
}

/// The owner of a socket. `claim` is that of a process which was found after the fact; with `unheld`, a search of all
/// descriptors has shown that nobody has the socket open any more.
pub fn owner(life: &Life, claim: Option<Claim<'_>>, unheld: bool, host: &mut impl Host) -> Option<Process> {
    if let Some(actor) = life.own_actor() {
        let attribution = if life.is_unaccepted() { Attribution::Listener } else { Attribution::Syscall };
        return Some(acted(actor, attribution, host));
    }
    // The task that opened it, unless the descriptor turned out to be another process's by now, or nobody's.
    if let Some(opener) = &life.opener
        && !unheld
        && claim.is_none_or(|claim| claim.pid() == opener.pid)
    {
        return Some(acted(opener, obtained(life), host));
    }
    Some(match (claim, &life.holder) {
        (Some(Claim::Closed(task)), _) => acted(task, Attribution::Syscall, host),
        (Some(Claim::Holds(task)), _) => acted(task, Attribution::Descriptors, host),
        (Some(Claim::Procfs(holder)), _) => listed(holder, Attribution::Procfs, host.program(holder.pid, 0)),
        (None, Some(Candidate::Listener(task))) => acted(task, Attribution::Listener, host),
        (None, Some(Candidate::Descriptor(task))) if !unheld => acted(task, Attribution::Descriptors, host),
        (None, _) => {
            let holder = host.holder(life.inode?)?;
            listed(&holder, Attribution::Procfs, host.program(holder.pid, 0))
        }
    })
}

/// The process that opened the connection.
pub fn opener(life: &Life, host: &mut impl Host) -> Option<Process> {
    life.opener.as_ref().map(|opener| acted(opener, obtained(life), host))
}

/// A process that is known from a task.
fn acted(task: &Task, attribution: Attribution, host: &mut impl Host) -> Process {
    let Program { exe, container } = host.program(task.pid, task.mm);
    Process {
        pid: task.pid,
        tid: task.tid,
        comm: task.comm(),
        exe,
        uid: Some(task.uid),
        container,
        attribution,
    }
}

/// A process that was found through `/proc`.
pub fn listed(holder: &Holder, attribution: Attribution, program: Program) -> Process {
    let Program { exe, container } = program;
    let comm = holder.comm.clone();
    Process { pid: holder.pid, tid: None, comm, exe, uid: holder.uid, container, attribution }
}

/// How the opener of a connection obtained it.
fn obtained(life: &Life) -> Attribution {
    if life.role == Some(Role::Server) { Attribution::Accept } else { Attribution::Connect }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        host::Recorded,
        ingest::life::{
            Act, End, SocketId,
            examples::{END, task, unknown},
        },
    };

    fn owner(life: &Life, claim: Option<Claim<'_>>, unheld: bool) -> Option<(u32, Attribution)> {
        let process = super::owner(life, claim, unheld, &mut Recorded::default())?;
        Some((process.pid, process.attribution))
    }

    #[test]
    fn the_order_of_trust() {
        let [acted, opened, held, listens] = [1, 2, 3, 4].map(|pid| task(pid, Act::Unknown));
        let nobody = Life { id: SocketId { address: 1, born: 1 }, end: Some(END), ..unknown() };
        assert_eq!(owner(&nobody, None, false), None);

        let listener = Life { holder: Some(Candidate::Listener(listens)), ..nobody.clone() };
        assert_eq!(owner(&listener, None, false), Some((listens.pid, Attribution::Listener)));
        let descriptor = Life { holder: Some(Candidate::Descriptor(held)), ..nobody.clone() };
        assert_eq!(owner(&descriptor, None, false), Some((held.pid, Attribution::Descriptors)));
        assert_eq!(owner(&descriptor, None, true), None, "it has passed the descriptor on");

        let claims = Life { opener: Some(opened), ..listener.clone() };
        assert_eq!(owner(&claims, None, false), Some((opened.pid, Attribution::Connect)));
        let accepted = Life { role: Some(Role::Server), ..claims.clone() };
        assert_eq!(owner(&accepted, None, false), Some((opened.pid, Attribution::Accept)));
        let by_opener = Claim::Holds(&opened);
        assert_eq!(owner(&claims, Some(by_opener), false), Some((opened.pid, Attribution::Connect)));
        let by_heir = Claim::Holds(&held);
        assert_eq!(owner(&claims, Some(by_heir), false), Some((held.pid, Attribution::Descriptors)));
        let closed_by_heir = Claim::Closed(&held);
        assert_eq!(owner(&claims, Some(closed_by_heir), false), Some((held.pid, Attribution::Syscall)));

        let actor = Life { actor: Some(acted), ..claims };
        assert_eq!(owner(&actor, Some(by_heir), true), Some((acted.pid, Attribution::Listener)));
        let had_descriptor = Life { inode: Some(9), ..actor.clone() };
        assert_eq!(owner(&had_descriptor, Some(by_heir), true), Some((acted.pid, Attribution::Syscall)));
        let end = End { error: Some(libc::ECONNABORTED), ..END };
        let destroyed = Life { end: Some(end), ..had_descriptor };
        assert_eq!(owner(&destroyed, None, false), Some((opened.pid, Attribution::Connect)));
    }
}
