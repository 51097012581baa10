//! Finds tracefs, and mounts it for this process alone if it is not mounted.
//!
//! Tracefs describes the layout of tracepoint records, and aya reads a tracepoint's number from it, at the
//! two usual mount points only. Not every machine has it mounted. Mounting it for all processes would change
//! the host, so [`ensure`] mounts it in a new mount namespace, and [`with`] in one that exists only while the
//! work runs.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::{fs, io, thread};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::format::TracepointFormat;
use crate::failure::Failure;

/// The usual mount points: its own, since Linux 4.1, and the older one inside debugfs. aya 0.14 looks at the
/// same two.
const PLACES: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// A tracefs that can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracefs {
    root: PathBuf,
    mounted_here: bool,
}

impl Tracefs {
    /// The mount point.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether [`ensure`] mounted it. In that case only the calling thread, and the threads and processes
    /// that it starts afterwards, can see it.
    pub fn mounted_here(&self) -> bool {
        self.mounted_here
    }

    /// Whether the kernel has a tracepoint, named by group and name, such as `tcp/tcp_send_reset`.
    pub fn has_event(&self, event: &str) -> bool {
        self.event(event).is_dir()
    }

    /// The layout of a tracepoint's records. `event` consists of group and name, such as
    /// `tcp/tcp_send_reset`.
    ///
    /// # Errors
    /// The kernel has no such tracepoint, or its file cannot be read or parsed.
    pub fn format(&self, event: &str) -> anyhow::Result<TracepointFormat> {
        let path = self.event(event).join("format");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        TracepointFormat::parse(&text).with_context(|| format!("cannot parse {}", path.display()))
    }

    fn event(&self, event: &str) -> PathBuf {
        self.root.join("events").join(event)
    }
}

/// Finds a tracefs that is already mounted; `None` if there is none.
///
/// # Errors
/// Tracefs is mounted, but this user may not read it.
pub fn find() -> Result<Option<Tracefs>, Failure> {
    find_in(&PLACES)
}

/// Finds tracefs, or mounts it at `/sys/kernel/tracing` in a new mount namespace of the calling thread.
///
/// The new namespace receives mounts and unmounts from the host and propagates none back. Only the calling
/// thread moves into it, along with the threads and processes that it starts afterwards. So call this at the
/// very start of the program, or in a thread of its own, as [`with`] does. `/proc/PID/root` of other
/// processes is not affected. aya caches the place of tracefs, even if there is none, so this function has to
/// be called before aya's first lookup.
///
/// # Errors
/// Tracefs is mounted but may not be read, or it is not mounted and may not be: mounting requires
/// `CAP_SYS_ADMIN`.
pub fn ensure() -> Result<Tracefs, Failure> {
    if let Some(tracefs) = find()? {
        return Ok(tracefs);
    }
    let [place, _] = PLACES;
    mount_privately(place).map_err(|(step, errno)| cannot_mount(place, step, errno))?;
    match find()? {
        Some(tracefs) => Ok(Tracefs { mounted_here: true, ..tracefs }),
        // The tracefs of a kernel without tracepoints has no such directory.
        None => Err(cannot_mount(place, "find tracepoints in tracefs", Errno::ENODEV)),
    }
}

/// Calls `work` with a tracefs. If it has to be mounted first, `work` runs in a thread of its own and the
/// mount ends when it returns. What `work` has opened and attached remains. No other thread, and no process
/// that is started later, sees the mount.
///
/// # Errors
/// Those of [`ensure`], or no thread can be started. `work` was not called then.
///
/// # Panics
/// If `work` panics.
pub fn with<T: Send>(work: impl FnOnce(&Tracefs) -> T + Send) -> Result<T, Failure> {
    if let Some(tracefs) = find()? {
        return Ok(work(&tracefs));
    }
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, || ensure().map(|tracefs| work(&tracefs)));
        let thread = thread.map_err(|error| Failure::no_thread(&error))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn find_in(places: &[&str]) -> Result<Option<Tracefs>, Failure> {
    let mut denied = None;
    for place in places {
        // If nothing is mounted, the mount point exists but is empty.
        match fs::read_dir(Path::new(place).join("events")) {
            Ok(_) => return Ok(Some(Tracefs { root: place.into(), mounted_here: false })),
            // If debugfs may not be entered, the mount point inside it is not visible, and nothing is known
            // about it.
            Err(error) if error.kind() == ErrorKind::PermissionDenied && Path::new(place).exists() => {
                denied.get_or_insert_with(|| cannot_read(place, &error));
            }
            Err(_) => {}
        }
    }
    denied.map_or(Ok(None), Err)
}

fn mount_privately(place: &'static str) -> Result<(), (&'static str, Errno)> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| ("make a mount namespace", errno))?;
    // Slave, not private: file systems that are mounted later, such as those of new containers, have to be
    // visible when the symbols of their programs are read.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(|errno| ("keep mounts from the host", errno))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tracefs"), place, Some("tracefs"), flags, none).map_err(|errno| ("mount tracefs", errno))
}

fn cannot_read(place: &str, error: &io::Error) -> Failure {
    Failure {
        failed: format!("cannot read the tracepoints in {place}"),
        found: format!("reading its events directory: {error}"),
        needed: "root, or a tracefs that one of this user's groups may read".to_owned(),
        fix: format!("sudo mount -o remount,gid=$(id -g),mode=750 {place}"),
    }
}

fn cannot_mount(place: &str, step: &str, errno: Errno) -> Failure {
    let places = PLACES.join(" or ");
    let (needed, fix) = match errno {
        Errno::ENODEV => (
            "a kernel built with CONFIG_EVENT_TRACING".to_owned(),
            "boot a kernel that has tracefs in /proc/filesystems".to_owned(),
        ),
        Errno::ENOENT | Errno::ENOTDIR => (
            format!("the directory {place}, which sysfs provides"),
            format!("in a container, bind-mount it: podman run -v {place}:{place}:ro …"),
        ),
        _ => (
            format!("tracefs mounted at {place}, or CAP_SYS_ADMIN to mount it"),
            // Without these options, only root could read it.
            format!("sudo mount -t tracefs -o gid=$(id -g),mode=750 tracefs {place}"),
        ),
    };
    let failed = format!("cannot {step}: {}", errno.desc());
    Failure { failed, found: format!("no tracefs at {places}"), needed, fix }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_first_mount_point_with_events() {
        let base = std::env::temp_dir().join(format!("tcpclose-tracefs-{}", std::process::id()));
        let (empty, full) = (base.join("empty"), base.join("full"));
        fs::create_dir_all(&empty).unwrap();
        fs::create_dir_all(full.join("events/tcp/tcp_send_reset")).unwrap();
        let format = include_str!("../../fixtures/format/6.18/tcp_send_reset");
        fs::write(full.join("events/tcp/tcp_send_reset/format"), format).unwrap();

        let [none, empty, full] =
            [base.join("none"), empty, full].map(|path| path.into_os_string().into_string().unwrap());
        assert_eq!(find_in(&[&none, &empty]), Ok(None));
        let tracefs = find_in(&[&none, &empty, &full]).unwrap().unwrap();
        assert_eq!(tracefs.root(), Path::new(&full));
        assert!(!tracefs.mounted_here());
        assert!(tracefs.has_event("tcp/tcp_send_reset"));
        assert!(!tracefs.has_event("tcp/tcp_no_such_event"));
        assert_eq!(tracefs.format("tcp/tcp_send_reset").unwrap(), TracepointFormat::parse(format).unwrap());
        let error = tracefs.format("tcp/tcp_no_such_event").unwrap_err().to_string();
        assert!(error.ends_with("events/tcp/tcp_no_such_event/format"), "{error}");

        fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn errors_end_in_a_command() {
        let error = cannot_mount(PLACES[0], "mount tracefs", Errno::EPERM).to_string();
        assert_eq!(
            error,
            "cannot mount tracefs: Operation not permitted\n  \
             found:  no tracefs at /sys/kernel/tracing or /sys/kernel/debug/tracing\n  \
             needed: tracefs mounted at /sys/kernel/tracing, or CAP_SYS_ADMIN to mount it\n  \
             try:    sudo mount -t tracefs -o gid=$(id -g),mode=750 tracefs /sys/kernel/tracing"
        );
    }

    /// The mounts and the mount namespace of this thread.
    fn mounts() -> (String, PathBuf) {
        let namespace = fs::read_link("/proc/thread-self/ns/mnt").unwrap();
        (fs::read_to_string("/proc/thread-self/mountinfo").unwrap(), namespace)
    }

    #[test]
    #[ignore = "mounts tracefs, for which it needs CAP_SYS_ADMIN"]
    fn leaves_no_mount_behind() {
        let before = mounts();
        let was_there = find().unwrap().is_some();
        let inside = with(|tracefs| {
            assert_eq!(tracefs.mounted_here(), !was_there);
            let format = tracefs.format("sock/inet_sock_set_state").unwrap();
            assert_eq!(format.record_offsets().skaddr, 8);
            mounts()
        });
        let (_, namespace) = inside.unwrap();
        assert_eq!(namespace == before.1, was_there, "own namespace only if it was needed");
        assert_eq!(mounts(), before);
        assert_eq!(find().unwrap().is_some(), was_there);
    }
}
