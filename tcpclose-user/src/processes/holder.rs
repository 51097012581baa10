//! Finds the processes that have a socket open, in `/proc/PID/fd`: for kernels on which the inventory cannot
//! run, and for commands that load no program into the kernel. A scan takes from 3 ms (a hundred processes)
//! to a second (a hundred thousand sockets).

use std::{collections::HashMap, sync::Arc};

use procfs::{
    ProcError,
    process::{self, FDTarget},
};

use crate::{kernel::privilege, pace::Pace};

/// How many sockets' holders are cached. When there are more, all are dropped and found again when needed.
const MAX_HOLDERS: usize = 16_384;

/// A process that has a socket open.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ProcfsHolder {
    /// Process id, in the pid namespace of this tool's `/proc`.
    pub pid: u32,
    /// Name of its main thread.
    pub comm: String,
    /// Its real user id.
    pub uid: Option<u32>,
    /// When it started, in clock ticks since boot. If there are several holders, such as a parent and the
    /// children that inherited its descriptors, the oldest is the owner.
    pub started: u64,
}

impl ProcfsHolder {
    /// Its process id in the initial pid namespace; `None` if `/proc` shows the ids of another one.
    pub fn host_pid(&self) -> Option<u32> {
        privilege::in_initial_pid_namespace().then_some(self.pid)
    }

    /// Replaces `owner`, another holder of the same socket, if this one started earlier. Processes are listed
    /// by id, which does not show their age.
    pub fn replace_if_older(self: &Arc<Self>, owner: &mut Arc<Self>) {
        if self.started < owner.started {
            *owner = Arc::clone(self);
        }
    }
}

/// A process whose descriptors are being listed.
pub struct Listed {
    process: process::Process,
    holder: Option<Arc<ProcfsHolder>>,
}

impl Listed {
    /// The process, read when this is first called; `None` if it has exited.
    pub fn holder(&mut self) -> Option<&Arc<ProcfsHolder>> {
        if self.holder.is_none() {
            self.holder = describe(&self.process).map(Arc::new);
        }
        self.holder.as_ref()
    }
}

/// Lists every descriptor of every process, and calls `socket` for each that is a socket with the process,
/// the descriptor and the socket's inode. Returns the number of processes whose descriptors this process may
/// not list.
pub fn walk(mut socket: impl FnMut(&mut Listed, u32, u64)) -> usize {
    let mut refused = 0;
    let Ok(processes) = procfs::process::all_processes() else { return refused };
    for process in processes.flatten() {
        let descriptors = match process.fd() {
            Ok(descriptors) => descriptors,
            Err(error) => {
                // Any other error means that the process has exited meanwhile.
                refused += usize::from(matches!(error, ProcError::PermissionDenied(_)));
                continue;
            }
        };
        let mut listed = Listed { process, holder: None };
        for descriptor in descriptors.flatten() {
            if let (FDTarget::Socket(inode), Ok(fd)) = (descriptor.target, u32::try_from(descriptor.fd)) {
                socket(&mut listed, fd, inode);
            }
        }
    }
    refused
}

/// Finds the holders of sockets, and caches them.
#[derive(Default)]
pub struct Holders {
    by_inode: HashMap<u64, Arc<ProcfsHolder>>,
    pace: Pace,
}

impl Holders {
    /// Finds the holders of the sockets with these inodes, in one scan. Returns for each whether a holder is
    /// known.
    pub fn find(&mut self, inodes: &[u64]) -> Vec<bool> {
        let unknown: Vec<_> =
            inodes.iter().filter(|inode| !self.by_inode.contains_key(inode)).copied().collect();
        if !unknown.is_empty() {
            if self.by_inode.len() + unknown.len() > MAX_HOLDERS {
                self.by_inode.clear();
            }
            let mut pace = self.pace;
            pace.run(|| {
                walk(|process, _, inode| {
                    if unknown.contains(&inode)
                        && let Some(holder) = process.holder()
                    {
                        let known = self.by_inode.entry(inode).or_insert_with(|| Arc::clone(holder));
                        holder.replace_if_older(known);
                    }
                })
            });
            self.pace = pace;
        }
        inodes.iter().map(|inode| self.by_inode.contains_key(inode)).collect()
    }

    /// The holder of a socket, if [`find`](Self::find) has found it.
    pub fn of(&self, inode: u64) -> Option<Arc<ProcfsHolder>> {
        if inode == 0 { None } else { self.by_inode.get(&inode).cloned() }
    }
}

fn describe(process: &process::Process) -> Option<ProcfsHolder> {
    let stat = process.stat().ok()?;
    Some(ProcfsHolder {
        pid: u32::try_from(stat.pid).ok()?,
        comm: stat.comm,
        uid: process.status().ok().map(|status| status.ruid),
        started: stat.starttime,
    })
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, os::fd::AsRawFd};

    use super::*;

    fn inode(socket: &impl AsRawFd) -> u64 {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
        let text = link.to_str().unwrap().to_owned();
        text.trim_start_matches("socket:[").trim_end_matches(']').parse().unwrap()
    }

    #[test]
    fn our_own_socket() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = inode(&socket);
        let mut holders = Holders::default();
        assert_eq!(holders.find(&[inode, u64::MAX]), [true, false]);
        let holder = holders.of(inode).unwrap();
        assert_eq!(holder.pid, std::process::id());
        assert_eq!(holder.uid, Some(nix::unistd::getuid().as_raw()));
        assert_eq!(holders.of(u64::MAX), None);
        assert_eq!(holders.of(0), None);
    }
}
