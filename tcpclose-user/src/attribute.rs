//! Endings → owners: whose socket it was, and how that is known.
//!
//! The order of trust: the task that acted on the socket in its own context; the task that connected or
//! accepted it, if it still has it; the task that closed the descriptor after the end, or has it open; the
//! process that listens where the connection was never accepted; and, for a socket older than the trace, the
//! process that had its descriptor then. A task that merely happened to run on the CPU is never an owner.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use crate::{
    event::{Attribution, Process, Shared},
    host::{Host, ProgramInfo},
    ingest::life::{Claimant, Life, Task},
    processes::{LocalPid, holder::ProcfsHolder},
    tcp::Role,
};

/// The relation of a process to a socket, if the process was not seen to act on it.
#[derive(Clone, Copy, Debug)]
pub enum Claim<'a> {
    /// It closed the descriptor of a socket that had already ended.
    Closed(&'a Task),
    /// It has the socket open, as the iterator over all descriptors has shown.
    Holds(&'a Task),
    /// It has the socket open, as `/proc` has shown.
    Procfs(&'a ProcfsHolder),
}

impl Claim<'_> {
    fn pid(self) -> u32 {
        match self {
            Self::Closed(task) | Self::Holds(task) => task.pid,
            Self::Procfs(holder) => holder.pid,
        }
    }
}

/// How many tasks are remembered. When there are more, all are forgotten, and the host is asked again.
const MAX_TASKS: usize = 4096;

/// Finds the owner of a socket. It caches the description of a task, because most connections of a host
/// belong to few tasks.
#[derive(Default)]
pub struct Attributor {
    tasks: HashMap<TaskKey, Known, RandomState>,
    /// [`Host::programs_version`] when `tasks` were described.
    version: u64,
}

/// A task, and its relation to the socket.
#[derive(PartialEq, Eq, Hash)]
struct TaskKey {
    mm: u64,
    pid: u32,
    tid: Option<u32>,
    did: Did,
    attribution: Attribution,
}

/// Whether a task acted on the socket, or only has it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Did {
    Act,
    Have,
}

/// The description of a task, and the values that it was made from and that may change.
struct Known {
    uid: u32,
    comm: [u8; 16],
    process: Shared<Process>,
}

impl Attributor {
    /// The owner of a socket. `claim` is that of a process that was found after the end. With `unheld`, a
    /// search of all descriptors has shown that no process has the socket open any more.
    pub fn owner(
        &mut self,
        life: &Life,
        claim: Option<Claim<'_>>,
        unheld: bool,
        host: &mut impl Host,
    ) -> Option<Shared<Process>> {
        if let Some(actor) = life.own_actor() {
            let attribution = if life.is_unaccepted() { Attribution::Listener } else { Attribution::Syscall };
            return Some(self.acted(actor, attribution, host));
        }
        // The task that opened it, unless it was found that another process or none has the descriptor by
        // now.
        if let Some(opener) = &life.opener
            && !unheld
            && claim.is_none_or(|claim| claim.pid() == opener.pid)
        {
            return Some(self.acted(opener, obtained(life), host));
        }
        Some(match (claim, &life.holder) {
            (Some(Claim::Closed(task)), _) => self.acted(task, Attribution::Syscall, host),
            (Some(Claim::Holds(task)), _) => self.has(task, Attribution::Descriptors, host),
            (Some(Claim::Procfs(holder)), _) => {
                listed(holder, Attribution::Procfs, host.program(holder.pid, 0)).into()
            }
            (None, Some(Claimant::Listener(task))) => self.has(task, Attribution::Listener, host),
            (None, Some(Claimant::Descriptor(task))) if !unheld => {
                self.has(task, Attribution::Descriptors, host)
            }
            (None, _) => {
                let holder = host.holder(life.inode?)?;
                listed(&holder, Attribution::Procfs, host.program(holder.pid, 0)).into()
            }
        })
    }

    /// The process that opened the connection.
    pub fn opener(&mut self, life: &Life, host: &mut impl Host) -> Option<Shared<Process>> {
        life.opener.as_ref().map(|opener| self.acted(opener, obtained(life), host))
    }

    /// The process of a task that acted on the socket.
    pub fn acted(&mut self, task: &Task, attribution: Attribution, host: &mut impl Host) -> Shared<Process> {
        self.process(task, Did::Act, attribution, host)
    }

    /// The process of a task that has or listens for the socket, without having acted on it.
    fn has(&mut self, task: &Task, attribution: Attribution, host: &mut impl Host) -> Shared<Process> {
        self.process(task, Did::Have, attribution, host)
    }

    fn process(
        &mut self,
        task: &Task,
        did: Did,
        attribution: Attribution,
        host: &mut impl Host,
    ) -> Shared<Process> {
        let version = host.programs_version();
        if version != self.version || self.tasks.len() >= MAX_TASKS {
            self.tasks.clear();
            self.version = version;
        }
        let key = TaskKey { mm: task.mm, pid: task.pid, tid: task.tid, did, attribution };
        if let Some(known) = self.tasks.get(&key)
            && (known.uid, known.comm) == (task.uid, task.comm)
        {
            return known.process.clone();
        }
        let process = Shared::from(describe(task, did, attribution, host.program(task.pid, task.mm)));
        self.tasks.insert(key, Known { uid: task.uid, comm: task.comm, process: process.clone() });
        process
    }
}

/// The process of a task. `thread` is reported only for one that acted.
fn describe(task: &Task, did: Did, attribution: Attribution, program: ProgramInfo) -> Process {
    let ProgramInfo { comm, exe, container, container_name, pod, pid } = program;
    let tid = match pid {
        LocalPid::Same => task.tid,
        // Only the id of the main thread is known here, because it equals that of the process.
        LocalPid::Other(_) | LocalPid::None => pid.of(task.pid).filter(|_| task.tid == Some(task.pid)),
    };
    Process {
        pid: pid.of(task.pid),
        host_pid: Some(task.pid),
        tid,
        // The name in the record is that of the main thread itself, and newer than the one that was read: the
        // thread may have been renamed since.
        comm: comm.filter(|_| task.tid != Some(task.pid)).unwrap_or_else(|| task.comm()),
        thread: Some(task.comm()).filter(|name| did == Did::Act && !name.is_empty()),
        exe,
        uid: Some(task.uid),
        container,
        container_name,
        pod,
        attribution,
    }
}

/// A process that was found through `/proc`.
pub fn listed(holder: &ProcfsHolder, attribution: Attribution, program: ProgramInfo) -> Process {
    let ProgramInfo { comm, exe, container, container_name, pod, pid: _ } = program;
    Process {
        pid: Some(holder.pid),
        host_pid: holder.host_pid(),
        tid: None,
        comm: comm.unwrap_or_else(|| holder.comm.clone()),
        thread: None,
        exe,
        uid: holder.uid,
        container,
        container_name,
        pod,
        attribution,
    }
}

/// How the opener of a connection obtained it.
fn obtained(life: &Life) -> Attribution {
    if life.role == Some(Role::Server) { Attribution::Accept } else { Attribution::Connect }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        host::{Answer, Question, Recorded},
        ingest::life::{
            Activity, SocketEnd, SocketId,
            examples::{END, task, unknown},
        },
    };

    fn owner(life: &Life, claim: Option<Claim<'_>>, unheld: bool) -> Option<(u32, Attribution)> {
        let process = Attributor::default().owner(life, claim, unheld, &mut Recorded::default())?;
        Some((process.host_pid?, process.attribution))
    }

    #[test]
    fn what_is_remembered_of_a_task_is_what_it_is_now() {
        let life = |comm: &[u8; 4], tid| {
            let mut task = Task { tid: Some(tid), ..task(1, Activity::Unknown) };
            task.comm[..4].copy_from_slice(comm);
            Life { end: Some(END), actor: Some(task), inode: Some(9), ..unknown() }
        };
        let mut host = Recorded::default();
        let mut attributor = Attributor::default();
        let mut owner = |host: &mut Recorded, comm, tid| {
            let owner = attributor.owner(&life(comm, tid), None, false, host).unwrap();
            assert!(attributor.tasks.len() <= MAX_TASKS);
            owner
        };
        let first = owner(&mut host, b"comm", 1);
        assert!(owner(&mut host, b"comm", 1).is_same(&first), "described once");
        assert_eq!(owner(&mut host, b"name", 1).comm, "name", "the thread was renamed");
        assert_eq!(owner(&mut host, b"name", 2).tid, Some(2));
        let program = ProgramInfo { exe: Some("/bin/true".to_owned()), ..ProgramInfo::default() };
        host.learn(Question::Program { pid: 1, mm: 0 }, Answer::Program(program));
        assert_eq!(owner(&mut host, b"name", 2).exe.as_deref(), Some("/bin/true"), "known by now");
        for tid in 0..2 * u32::try_from(MAX_TASKS).unwrap() {
            owner(&mut host, b"many", tid);
        }
    }

    #[test]
    fn the_order_of_trust() {
        let [acted, opened, held, listens] = [1, 2, 3, 4].map(|pid| task(pid, Activity::Unknown));
        let nobody = Life { id: SocketId { address: 1, born: 1 }, end: Some(END), ..unknown() };
        assert_eq!(owner(&nobody, None, false), None);

        let listener = Life { holder: Some(Claimant::Listener(listens)), ..nobody.clone() };
        assert_eq!(owner(&listener, None, false), Some((listens.pid, Attribution::Listener)));
        let descriptor = Life { holder: Some(Claimant::Descriptor(held)), ..nobody.clone() };
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
        let end = SocketEnd { error: Some(libc::ECONNABORTED), ..END };
        let destroyed = Life { end: Some(end), actor: None, ..had_descriptor.clone() };
        assert_eq!(owner(&destroyed, None, false), Some((opened.pid, Attribution::Connect)));
        let shut_down = Life { end: Some(end), ..had_descriptor };
        assert_eq!(owner(&shut_down, None, false), Some((acted.pid, Attribution::Syscall)));
    }
}
