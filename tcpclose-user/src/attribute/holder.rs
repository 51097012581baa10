//! Who has a socket open, according to `/proc/PID/fd`: for kernels on which the inventory cannot run, and for what is
//! looked at without any program in the kernel. A look takes from 3 ms (a hundred processes) to a second (a hundred
//! thousand sockets).

use std::{collections::HashMap, sync::Arc};

use procfs::{
    ProcError,
    process::{FDTarget, Process},
};

use super::pace::Pace;

/// How many sockets' holders are remembered. Beyond it all are forgotten, and looked up again when asked for.
const MAX_HOLDERS: usize = 16_384;

/// A process that has a socket open.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Holder {
    /// Process id, as this tool's `/proc` shows it.
    pub pid: u32,
    /// Its name.
    pub comm: String,
    /// Its real user id.
    pub uid: Option<u32>,
    /// When it started, in clock ticks since boot. Of several holders, a parent and the children that inherited its
    /// descriptors, the oldest one is the owner.
    pub started: u64,
}

impl Holder {
    /// Takes the place of another holder of the same socket if it has been there for longer. Processes are listed by id,
    /// which is not age.
    pub fn replace_if_older(self: &Arc<Self>, owner: &mut Arc<Self>) {
        if self.started < owner.started {
            *owner = Arc::clone(self);
        }
    }
}

/// A process whose descriptors are being looked at.
pub struct Looked {
    process: Process,
    holder: Option<Arc<Holder>>,
}

impl Looked {
    /// What is known of it, read when it is first asked for; `None` if it is gone.
    pub fn holder(&mut self) -> Option<&Arc<Holder>> {
        if self.holder.is_none() {
            self.holder = describe(&self.process).map(Arc::new);
        }
        self.holder.as_ref()
    }
}

/// Looks at every descriptor of every process, once. `socket` is told of each that is a socket: the process, the
/// descriptor, the socket's inode. Returns how many processes may not be looked at.
pub fn walk(mut socket: impl FnMut(&mut Looked, u32, u64)) -> usize {
    let mut refused = 0;
    let Ok(processes) = procfs::process::all_processes() else { return refused };
    for process in processes.flatten() {
        let descriptors = match process.fd() {
            Ok(descriptors) => descriptors,
            Err(error) => {
                // Any other error: gone meanwhile.
                refused += usize::from(matches!(error, ProcError::PermissionDenied(_)));
                continue;
            }
        };
        let mut looked = Looked { process, holder: None };
        for descriptor in descriptors.flatten() {
            if let (FDTarget::Socket(inode), Ok(fd)) = (descriptor.target, u32::try_from(descriptor.fd)) {
                socket(&mut looked, fd, inode);
            }
        }
    }
    refused
}

/// See the module.
#[derive(Default)]
pub struct Holders {
    by_inode: HashMap<u64, Arc<Holder>>,
    pace: Pace,
}

impl Holders {
    /// Looks for the holders of `inodes`, all in one pass; says for each whether it is known now.
    pub fn find(&mut self, inodes: &[u64]) -> Vec<bool> {
        let unknown: Vec<_> =
            inodes.iter().filter(|inode| !self.by_inode.contains_key(inode)).copied().collect();
        if !unknown.is_empty() {
            if self.by_inode.len() + unknown.len() > MAX_HOLDERS {
                self.by_inode.clear();
            }
            let mut pace = self.pace;
            pace.look(|| {
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

    /// The holder of a socket that was looked for, and found.
    pub fn of(&self, inode: u64) -> Option<Arc<Holder>> {
        if inode == 0 { None } else { self.by_inode.get(&inode).cloned() }
    }
}

fn describe(process: &Process) -> Option<Holder> {
    let stat = process.stat().ok()?;
    Some(Holder {
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
