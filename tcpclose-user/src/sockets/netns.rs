//! The network namespaces of the host, and a function that runs code inside one.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
};

use nix::sched::{CloneFlags, setns};

/// A network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its inode number, which identifies it.
    pub inode: u32,
    /// A file that represents it.
    path: PathBuf,
    /// A process in it, if one is known.
    pub pid: Option<u32>,
    /// Whether tcpclose itself is in it.
    is_ours: bool,
}

/// All namespaces that can be found: that of tcpclose, those of other processes, and those that a mount keeps
/// alive (`ip netns`, container engines). A namespace that only a socket or a single thread keeps alive is
/// not found.
pub fn all() -> Vec<Namespace> {
    let mut found = HashMap::new();
    let mut add = |path: PathBuf, pid: Option<u32>, is_ours: bool| {
        // The process has ended meanwhile, or this user may not read it.
        let Some(inode) = inode(&path) else { return };
        let known = found.entry(inode).or_insert(Namespace { inode, path, pid, is_ours });
        known.pid = known.pid.or(pid);
    };
    add("/proc/thread-self/ns/net".into(), Some(std::process::id()), true);
    // Mounts come before processes, because their paths are valid for longer.
    let mounts = procfs::process::Process::myself().and_then(|this| this.mountinfo());
    for mount in mounts.into_iter().flatten() {
        if mount.fs_type == "nsfs" && mount.root.starts_with("net:") {
            add(mount.mount_point, None, false);
        }
    }
    for process in procfs::process::all_processes().into_iter().flatten().flatten() {
        let pid = process.pid();
        add(format!("/proc/{pid}/ns/net").into(), u32::try_from(pid).ok(), false);
    }
    let mut all: Vec<_> = found.into_values().collect();
    all.sort_by_key(|namespace| (!namespace.is_ours, namespace.inode));
    all
}

impl Namespace {
    /// Runs `work` inside the namespace. It runs in a separate thread, because entering a namespace affects
    /// the whole thread.
    ///
    /// # Errors
    /// The namespace may not be entered, which requires `CAP_SYS_ADMIN`, or it has ended
    /// ([`io::ErrorKind::NotFound`]).
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        if self.is_ours {
            return Ok(work());
        }
        let file = File::open(&self.path)?;
        if u32::try_from(file.metadata()?.ino()) != Ok(self.inode) {
            // The id now belongs to another process.
            return Err(io::ErrorKind::NotFound.into());
        }
        thread::scope(|scope| {
            let moved = thread::Builder::new().name("tcpclose-netns".into()).spawn_scoped(scope, || {
                setns(&file, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })?;
            moved.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside it panicked")))
        })
    }
}

fn inode(path: &Path) -> Option<u32> {
    u32::try_from(fs::metadata(path).ok()?.ino()).ok()
}

/// The range of ports from which `connect()` chooses in the namespace of this thread, first and last.
pub fn port_range() -> Option<(u16, u16)> {
    parse_range(&fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?)
}

fn parse_range(text: &str) -> Option<(u16, u16)> {
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next()?, numbers.next()?) {
        (Ok(first), Ok(last)) if first <= last => Some((first, last)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_comes_first_and_can_be_entered() {
        let all = all();
        let ours = &all[0];
        assert_eq!(Some(ours.inode), inode(Path::new("/proc/self/ns/net")));
        assert!(ours.inside(port_range).unwrap().is_some());
        let mut inodes: Vec<_> = all.iter().map(|namespace| namespace.inode).collect();
        inodes.dedup();
        assert_eq!(inodes.len(), all.len());
    }

    #[test]
    fn a_file_of_another_namespace_is_not_entered() {
        let other = Namespace { inode: 1, path: "/proc/self/ns/net".into(), pid: None, is_ours: false };
        assert_eq!(other.inside(|| ()).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn ranges() {
        assert_eq!(parse_range("32768\t60999\n"), Some((32768, 60999)));
        assert_eq!(parse_range("7 7"), Some((7, 7)));
        for bad in ["", "1", "2 1", "1 65536", "a b"] {
            assert_eq!(parse_range(bad), None, "{bad}");
        }
    }
}
