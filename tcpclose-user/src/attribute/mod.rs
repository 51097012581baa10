//! Endings → owners. Whose socket it was, and how that is known.
//!
//! The order of trust: the task that acted on the socket in its own context; the task that connected or accepted it, if
//! it has it still; the task that closed the descriptor of a socket that was over already, or has it open; the process
//! that listens where it was never accepted; and, for what is older than the trace, whoever held its descriptor then.
//! Nobody else: a task that was merely running is no owner.

pub mod container;
pub mod holder;
pub mod inventory;
pub mod maps;
pub mod pace;
pub mod process;
pub mod watch;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use tcpclose_common::record::{Connection, Task, holder as holder_kind, role};

use self::{
    holder::{Holder, Holders},
    process::{Image, Processes},
};
use crate::{
    correlate::{Ending, LateOwner},
    event::{Attribution, Process},
    judge,
    kernel::privilege,
};

/// See the module.
pub struct Attributor {
    processes: Arc<Mutex<Processes>>,
    holders: Holders,
}

impl Default for Attributor {
    fn default() -> Self {
        Self { processes: Arc::new(Mutex::new(Processes::of_kernel_half())), holders: Holders::default() }
    }
}

impl Attributor {
    /// The processes that are known, for the thread that watches for new ones.
    pub fn processes(&self) -> Arc<Mutex<Processes>> {
        Arc::clone(&self.processes)
    }

    /// Lets go of what is kept for processes that have ended. To be called every few seconds.
    pub fn sweep(&mut self) {
        lock(&self.processes).sweep(Instant::now());
    }

    /// Looks the holders of these sockets up, by inode; says for each whether one was found.
    pub fn find_owners(&mut self, inodes: &[u64]) -> Vec<bool> {
        // The ids in `/proc` are then not those in other lines.
        if !privilege::in_initial_pid_namespace() {
            return vec![false; inodes.len()];
        }
        self.holders.find(inodes)
    }

    /// Whose socket it was.
    pub fn owner(&mut self, ending: &Ending) -> Option<Process> {
        let connection = ending.connection()?;
        let actor = judge::actor(connection);
        if actor.pid != 0 {
            let attribution = if ending.close.as_ref().is_some_and(judge::is_unaccepted) {
                Attribution::Listener
            } else {
                Attribution::Syscall
            };
            return Some(self.process(actor, attribution));
        }
        // Who opened it, unless the descriptor turned out to be somebody else's by now, or in nobody's hands.
        let opener = connection.opener.pid;
        if opener != 0 && !ending.unheld && ending.late_owner.is_none_or(|owner| owner.task.pid == opener) {
            return Some(self.process(&connection.opener, opened(connection)));
        }
        if let Some(LateOwner { task, holds }) = &ending.late_owner {
            let attribution = if *holds { Attribution::Procfs } else { Attribution::Syscall };
            return Some(self.process(task, attribution));
        }
        if connection.holder_kind == holder_kind::LISTENER {
            return Some(self.process(&connection.holder, Attribution::Listener));
        }
        if connection.holder_kind == holder_kind::DESCRIPTOR && !ending.unheld {
            return Some(self.process(&connection.holder, Attribution::Procfs));
        }
        self.holder(connection)
    }

    /// Who opened it.
    pub fn opener(&mut self, connection: &Connection) -> Option<Process> {
        (connection.opener.pid != 0).then(|| self.process(&connection.opener, opened(connection)))
    }

    /// What is known of the program that process `pid` ran with `mm` as its memory, for these addresses in it.
    pub fn image(&mut self, (pid, mm): (u32, u64), frames: &[u64]) -> Option<Arc<Image>> {
        lock(&self.processes).image_for(pid, mm, frames, Instant::now())
    }

    fn process(&mut self, task: &Task, attribution: Attribution) -> Process {
        let image = lock(&self.processes).image(task.pid, task.mm);
        Process {
            pid: task.pid,
            tid: Some(task.tid).filter(|tid| *tid != 0),
            comm: comm(&task.comm),
            exe: image.as_ref().and_then(|image| image.exe.clone()),
            uid: Some(task.uid),
            container: image.and_then(|image| image.container.clone()),
            attribution,
        }
    }

    fn holder(&mut self, connection: &Connection) -> Option<Process> {
        let holder = self.holders.of(connection.inode)?;
        Some(describe(holder, &mut lock(&self.processes), Attribution::Procfs))
    }
}

/// What a line says of a process that was found through `/proc`.
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

/// The opener of a connection that came in accepted it.
fn opened(connection: &Connection) -> Attribution {
    if connection.role == role::SERVER { Attribution::Accept } else { Attribution::Connect }
}

/// A thread that panicked while it held the lock has left at worst an image half read.
pub(crate) fn lock(processes: &Mutex<Processes>) -> MutexGuard<'_, Processes> {
    processes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread's name: up to 15 bytes, ended by a zero.
pub fn comm(bytes: &[u8; 16]) -> String {
    let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}
