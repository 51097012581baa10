//! Control groups, created as container runtimes create them.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

use crate::{program::Program, scratch::Scratch, servers::is_missing, until};

/// A mounted hierarchy; unmounted on drop.
#[derive(Debug)]
pub struct Hierarchy {
    root: PathBuf,
    // Removed last, when nothing is mounted in it any more.
    _scratch: Scratch,
}

impl Hierarchy {
    /// Mounts a named hierarchy of cgroup v1 without controllers, whose names container runtimes use. Moves
    /// the calling thread into a mount namespace of its own.
    pub fn first_version() -> Result<Self> {
        Self::mount("cgroup", Some("none,name=tcpclose-tests"))
    }

    /// Mounts the cgroup v2 hierarchy. Moves the calling thread into a mount namespace of its own.
    pub fn second_version() -> Result<Self> {
        Self::mount("cgroup2", None)
    }

    fn mount(kind: &str, data: Option<&str>) -> Result<Self> {
        const NOTHING: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOTHING)?;
        let scratch = Scratch::new()?;
        // A subdirectory, because removing the scratch directory itself reads its contents.
        let root = scratch.path().join("mounted");
        fs::create_dir(&root)?;
        mount(Some(kind), &root, Some(kind), MsFlags::empty(), data)
            .with_context(|| format!("mounting {kind}"))?;
        Ok(Self { root, _scratch: scratch })
    }
}

impl Drop for Hierarchy {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.root, MntFlags::MNT_DETACH) {
            eprintln!("unmounting {}: {error}", self.root.display());
        }
    }
}

/// A group and its ancestors; removed on drop, before which its processes must have ended.
#[derive(Debug)]
pub struct Group {
    /// The created directories, innermost first.
    made: Vec<PathBuf>,
}

impl Group {
    /// Creates a group of this name; slashes separate nested groups.
    pub fn new(hierarchy: &Hierarchy, name: &str) -> Result<Self> {
        let mut group = Self { made: Vec::new() };
        let paths: Vec<&Path> =
            Path::new(name).ancestors().filter(|path| !path.as_os_str().is_empty()).collect();
        for path in paths.into_iter().rev() {
            let path = hierarchy.root.join(path);
            if !path.exists() {
                fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
                group.made.insert(0, path);
            }
        }
        Ok(group)
    }

    /// Moves a process into the group.
    pub fn take_in(&self, pid: u32) -> Result<()> {
        let group = self.made.first().context("the group is not new")?;
        fs::write(group.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("moving {pid} to {}", group.display()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for path in &self.made {
            // A process that has ended may remain in the group for a moment.
            if let Err(error) = until("the group is empty", || Ok(fs::remove_dir(path).ok())) {
                eprintln!("removing {}: {error:#}", path.display());
            }
        }
    }
}

/// Where control groups with a limit of memory are made, and the file with the limit: version 1, and
/// version 2.
const HIERARCHIES: [(&str, &str); 2] =
    [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];

/// More than the programs of the tests need before they take more.
const LIMIT: &str = "64M";

/// The number of groups that this process has made.
static MADE: AtomicU32 = AtomicU32::new(0);

/// A control group of the host's hierarchy whose processes have a limit of memory; removed on drop, when they
/// have ended.
#[derive(Debug)]
pub struct MemoryLimit(PathBuf);

impl MemoryLimit {
    /// `None` if this host has no hierarchy with limits of memory, which is printed as a skip.
    pub fn new() -> Result<Option<Self>> {
        let name = format!("tcpclose-tests-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        for (hierarchy, limit) in HIERARCHIES {
            let folder = Path::new(hierarchy).join(&name);
            if Path::new(hierarchy).join("cgroup.procs").exists() && fs::create_dir(&folder).is_ok() {
                let group = Self(folder);
                if fs::write(group.0.join(limit), LIMIT).is_ok() {
                    return Ok(Some(group));
                }
            }
        }
        let [(first, _), _] = HIERARCHIES;
        ensure!(is_missing(&[first]), "no control group with a limit of memory can be made");
        Ok(None)
    }

    /// Moves a program into the group.
    pub fn add(&self, program: &Program) -> Result<()> {
        fs::write(self.0.join("cgroup.procs"), program.pid().to_string()).context("joining the group")
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}
