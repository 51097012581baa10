//! The file in which a just-in-time compiler lists the functions that it has compiled: `/tmp/perf-PID.map`,
//! as the process sees `/tmp` and its own id. It is opened when the process is first examined, because a
//! short-lived process has ended when its stacks are named, and its mount namespace may not exist any more.

use std::{
    fs::{self, File, Metadata},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use nix::{
    time::{ClockId, clock_gettime},
    unistd::{SysconfVar, sysconf},
};

use super::{
    beneath,
    mappings::{Held, Modules},
};

/// The perf map of a process, for the time when the process has ended.
#[derive(Clone, Debug, Default)]
pub struct LeftBehind {
    /// The file, if it existed when the process was examined. It is kept open for a minute after the process
    /// has ended.
    held: Option<Arc<Held>>,
    /// Its path in this process's mount namespace, if it is the same directory.
    path: Option<PathBuf>,
}

impl LeftBehind {
    /// Opens or finds the perf map of a running process. There is none if the process's id in its own pid
    /// namespace is not known.
    pub(super) fn of(pid: u32, inner_pid: Option<u32>, uid: Option<u32>, modules: &Modules) -> Self {
        let Some(inner_pid) = inner_pid else { return Self::default() };
        let held = open(pid, inner_pid, uid).and_then(|file| modules.hold(file)).map(Arc::new);
        let tmp = |root: &str| {
            let metadata = fs::metadata(format!("{root}/tmp")).ok()?;
            Some((metadata.dev(), metadata.ino()))
        };
        // In another directory, the file of the same name may belong to another process.
        let is_shared = inner_pid == pid && tmp("").is_some() && tmp("") == tmp(&format!("/proc/{pid}/root"));
        let path = is_shared.then(|| path(pid));
        Self { held, path }
    }

    /// Whether a file is kept open.
    pub(super) fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Closes it.
    pub(super) fn release(&mut self) {
        self.held = None;
    }

    /// Opens the map of a process that has ended. `started` is the start of the process in clock ticks after
    /// boot, if that is known.
    pub(super) fn reopen(&self, started: Option<u64>, uid: Option<u32>) -> Option<File> {
        if let Some(held) = &self.held {
            return held.open();
        }
        // If an earlier process with this id has written the file, the file was not changed after this
        // process had started.
        let start = wall_clock(started?)?;
        let is_its = |metadata: &Metadata| metadata.modified().is_ok_and(|modified| modified >= start);
        open_at(std::process::id(), self.path.as_deref()?, uid)
            .filter(|file| file.metadata().is_ok_and(|it| is_its(&it)))
    }
}

/// Opens the map of process `pid`, whose id in its own pid namespace is `inner_pid`, if root or this user has
/// written it.
pub(super) fn open(pid: u32, inner_pid: u32, uid: Option<u32>) -> Option<File> {
    open_at(pid, &path(inner_pid), uid)
}

/// The path, as seen by the process with this id in its own pid namespace.
fn path(inner_pid: u32) -> PathBuf {
    PathBuf::from(format!("/tmp/perf-{inner_pid}.map"))
}

/// Opens a perf map that root or this user has written, at a path as process `pid` sees it.
fn open_at(pid: u32, path: &Path, uid: Option<u32>) -> Option<File> {
    // Anyone may write to /tmp: this could be a symbolic link, a pipe, or another user's file.
    let file = beneath::read(&beneath::open(pid, path).ok()?).ok()?;
    let owner = file.metadata().ok()?.uid();
    (owner == 0 || Some(owner) == uid).then_some(file)
}

/// The time at this many clock ticks after boot.
fn wall_clock(ticks: u64) -> Option<SystemTime> {
    let frequency = u64::try_from(sysconf(SysconfVar::CLK_TCK).ok()??).ok().filter(|it| *it > 0)?;
    let since_boot = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?);
    let boot = SystemTime::now().checked_sub(since_boot)?;
    let nanoseconds = u128::from(ticks) * 1_000_000_000 / u128::from(frequency);
    boot.checked_add(Duration::from_nanos(u64::try_from(nanoseconds).ok()?))
}
