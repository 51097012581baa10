//! Endings → owners: whose socket it was, and how that is known.
//!
//! The order of trust: the task that acted on the socket in its own context; the task that connected or accepted it, if
//! it still has it; the task that closed the descriptor after the end, or has it open; the process that listens where the
//! connection was never accepted; and, for a socket older than the trace, the process that had its descriptor then. A
//! task that merely ran on the CPU is never an owner.

pub mod container;
pub mod holder;
pub mod mappings;
pub mod pace;
pub mod process;
pub mod watch;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use self::{
    holder::{Holder, Holders},
    process::Processes,
};
use crate::{
    event::{Attribution, Process},
    ingest::life::{Holder as Candidate, Life, Task},
    kernel::privilege,
    tcp::Role,
};

/// Finds the owners of sockets.
pub struct Attributor {
    processes: Arc<Mutex<Processes>>,
    holders: Holders,
}

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

impl Default for Attributor {
    fn default() -> Self {
        Self { processes: Arc::new(Mutex::new(Processes::of_kernel_half())), holders: Holders::default() }
    }
}

impl Attributor {
    /// The known processes, for the thread that watches for new ones.
    pub fn processes(&self) -> Arc<Mutex<Processes>> {
        Arc::clone(&self.processes)
    }

    /// Closes files that are held open for processes that have ended. Call it every few seconds.
    pub fn sweep(&mut self) {
        lock(&self.processes).sweep(Instant::now());
    }

    /// Looks the holders of these sockets up in `/proc`, by inode number. Says for each whether one is known.
    pub fn find_owners(&mut self, inodes: &[u64]) -> Vec<bool> {
        // In another pid namespace the ids in `/proc` are not those that the kernel half reports.
        if !privilege::in_initial_pid_namespace() {
            return vec![false; inodes.len()];
        }
        self.holders.find(inodes)
    }

    /// The owner of a socket. `claim` is that of a process which was found after the fact; with `unheld`, a search of all
    /// descriptors has shown that nobody has the socket open any more.
    pub fn owner(&mut self, life: &Life, claim: Option<Claim<'_>>, unheld: bool) -> Option<Process> {
        if let Some(actor) = life.own_actor() {
            let attribution = if life.is_unaccepted() { Attribution::Listener } else { Attribution::Syscall };
            return Some(self.process(actor, attribution));
        }
        // The task that opened it, unless the descriptor turned out to be another process's by now, or nobody's.
        if let Some(opener) = &life.opener
            && !unheld
            && claim.is_none_or(|claim| claim.pid() == opener.pid)
        {
            return Some(self.process(opener, obtained(life)));
        }
        match (claim, &life.holder) {
            (Some(Claim::Closed(task)), _) => Some(self.process(task, Attribution::Syscall)),
            (Some(Claim::Holds(task)), _) => Some(self.process(task, Attribution::Descriptors)),
            (Some(Claim::Procfs(holder)), _) => Some(self.listed(holder)),
            (None, Some(Candidate::Listener(task))) => Some(self.process(task, Attribution::Listener)),
            (None, Some(Candidate::Descriptor(task))) if !unheld => {
                Some(self.process(task, Attribution::Descriptors))
            }
            (None, _) => {
                let holder = self.holders.of(life.inode?)?.clone();
                Some(self.listed(&holder))
            }
        }
    }

    /// The process that opened the connection.
    pub fn opener(&mut self, life: &Life) -> Option<Process> {
        life.opener.as_ref().map(|opener| self.process(opener, obtained(life)))
    }

    fn process(&mut self, task: &Task, attribution: Attribution) -> Process {
        let image = lock(&self.processes).image(task.pid, task.mm);
        Process {
            pid: task.pid,
            tid: task.tid,
            comm: task.comm(),
            exe: image.as_ref().and_then(|image| image.exe.clone()),
            uid: Some(task.uid),
            container: image.and_then(|image| image.container.clone()),
            attribution,
        }
    }

    fn listed(&mut self, holder: &Holder) -> Process {
        describe(holder, &mut lock(&self.processes), Attribution::Procfs)
    }
}

/// A process that was found through `/proc`, as the output describes it.
pub fn describe(holder: &Holder, processes: &mut Processes, attribution: Attribution) -> Process {
    let image = processes.image(holder.pid, 0);
    Process {
        pid: holder.pid,
        tid: None,
        comm: holder.comm.clone(),
        exe: image.as_ref().and_then(|image| image.exe.clone()),
        uid: holder.uid,
        container: image.and_then(|image| image.container.clone()),
        attribution,
    }
}

/// How the opener of a connection obtained it.
fn obtained(life: &Life) -> Attribution {
    if life.role == Some(Role::Server) { Attribution::Accept } else { Attribution::Connect }
}

/// A thread that panicked while it held the lock has left at worst an image that was read halfway.
pub(crate) fn lock(processes: &Mutex<Processes>) -> MutexGuard<'_, Processes> {
    processes.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::life::{
        Act, End, SocketId,
        examples::{END, task, unknown},
    };

    fn owner(life: &Life, claim: Option<Claim<'_>>, unheld: bool) -> Option<(u32, Attribution)> {
        let process = Attributor::default().owner(life, claim, unheld)?;
        Some((process.pid, process.attribution))
    }

    #[test]
    fn the_order_of_trust() {
        // Process ids that cannot exist, so that nothing is found in /proc.
        let [acted, opened, held, listens] = [1, 2, 3, 4].map(|n| task(u32::MAX - n, Act::Unknown));
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
