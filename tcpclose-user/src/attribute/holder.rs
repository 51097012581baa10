//! Who has a socket open, according to `/proc/PID/fd`: for kernels on which the inventory cannot run. A look takes from
//! 3 ms (a hundred processes) to a second (a hundred thousand sockets).

use std::collections::HashMap;

use procfs::process::{FDTarget, Process};

use super::pace::Pace;

/// How many sockets' holders are remembered. Beyond it all are forgotten, and looked up again when asked for.
const MAX_HOLDERS: usize = 16_384;

/// A process that has a socket open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Process id, as this tool's `/proc` shows it.
    pub pid: u32,
    /// Its name.
    pub comm: String,
    /// Its real user id.
    pub uid: Option<u32>,
}

/// See the module.
#[derive(Default)]
pub struct Holders {
    by_inode: HashMap<u64, Holder>,
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
            pace.look(|| self.walk(&unknown));
            self.pace = pace;
        }
        inodes.iter().map(|inode| self.by_inode.contains_key(inode)).collect()
    }

    /// The holder of a socket that was looked for, and found.
    pub fn of(&self, inode: u64) -> Option<&Holder> {
        if inode == 0 { None } else { self.by_inode.get(&inode) }
    }

    /// Of several holders, a parent and the children that inherited its descriptors, the oldest one wins: processes
    /// are listed by id, which is not age, so ages are compared.
    fn walk(&mut self, wanted: &[u64]) {
        let mut oldest: HashMap<u64, u64> = HashMap::new();
        let Ok(processes) = procfs::process::all_processes() else { return };
        for process in processes.flatten() {
            // Gone meanwhile, or not ours to look at.
            let Ok(descriptors) = process.fd() else { continue };
            for descriptor in descriptors.flatten() {
                let FDTarget::Socket(inode) = descriptor.target else { continue };
                if !wanted.contains(&inode) {
                    continue;
                }
                let Some((holder, started)) = holder(&process) else { break };
                let age = oldest.entry(inode).or_insert(u64::MAX);
                if started < *age {
                    *age = started;
                    self.by_inode.insert(inode, holder);
                }
            }
        }
    }
}

/// The process with its start time, in clock ticks since boot.
fn holder(process: &Process) -> Option<(Holder, u64)> {
    let stat = process.stat().ok()?;
    let pid = u32::try_from(stat.pid).ok()?;
    Some((
        Holder { pid, comm: stat.comm, uid: process.status().ok().map(|status| status.ruid) },
        stat.starttime,
    ))
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
