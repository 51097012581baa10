//! Network namespaces that belong to one test, and the veth pair between two of them.

use std::{
    borrow::Borrow,
    collections::BTreeSet,
    fmt::Debug,
    fs::{self, File},
    io::Write,
    os::{
        fd::{AsFd, AsRawFd},
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::Path,
    process::{Command, Stdio},
    sync::{LazyLock, Mutex, PoisonError},
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    ifaddrs::getifaddrs,
    net::if_::InterfaceFlags,
    sched::{CloneFlags, setns, unshare},
    unistd::{geteuid, gettid},
};

use crate::until;

/// A network namespace with its loopback up. It has no name, and exists as long as somebody has it open.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    inode: u64,
}

/// Namespaces that no test uses any more. They are kept until all tests have ended, because the kernel reuses
/// inode numbers and a shared tool ([`crate::window`]) may still report something of the earlier namespace.
static LEFT: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// The inode numbers of all namespaces that this process has made.
static MADE: Mutex<BTreeSet<u64>> = Mutex::new(BTreeSet::new());

/// Whether a namespace is neither one that this process has made nor its own.
pub(crate) fn is_foreign(inode: u64) -> bool {
    static OWN: LazyLock<Option<u64>> =
        LazyLock::new(|| Some(fs::metadata(format!("/proc/{}/ns/net", std::process::id())).ok()?.ino()));
    Some(inode) != *OWN && !MADE.lock().unwrap_or_else(PoisonError::into_inner).contains(&inode)
}

impl Namespace {
    /// Creates a namespace. It fails without root, because the tests cannot work then.
    pub fn new() -> Result<Self> {
        let namespace = Self::bare()?;
        namespace.ip(&[LOOPBACK_UP])?;
        Ok(namespace)
    }

    /// Creates a namespace whose loopback is down.
    fn bare() -> Result<Self> {
        ensure!(geteuid().is_root(), "these tests need root: run `cargo xtask test`");
        let made = thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
            Ok(File::open("/proc/thread-self/ns/net")?)
        });
        let file = made.join().map_err(|_| anyhow!("the thread that makes a namespace panicked"))??;
        let inode = file.metadata()?.ino();
        MADE.lock().unwrap_or_else(PoisonError::into_inner).insert(inode);
        Ok(Self { file, inode })
    }

    /// Creates two namespaces joined by a veth pair, each end with its addresses (`10.77.0.1/24`,
    /// `fd00:77::1/64`), and waits until both ends carry packets: packets sent earlier are lost, and their
    /// retransmission would appear in the results.
    pub fn pair(addresses: [&[&str]; 2]) -> Result<[Self; 2]> {
        let pair = [Self::bare()?, Self::bare()?];
        let there = pair[1].path();
        // If the interface indexes of both ends are equal, the kernel reports the second end as down for up
        // to a second although it is up (`linkwatch_urgent_event()` in `net/core/link_watch.c`).
        let mut orders = vec![format!(
            "link add {DEVICE} index 1001 type veth peer name {DEVICE} index 1002 netns {there}"
        )];
        for (namespace, addresses) in pair.iter().zip(addresses) {
            orders.extend(addresses.iter().map(|address| add_address(address)));
            orders.extend([LOOPBACK_UP.to_owned(), format!("link set {DEVICE} up")]);
            namespace.ip(&orders)?;
            orders.clear();
        }
        for namespace in &pair {
            until("the veth pair is up", || namespace.inside(|| Ok(carries_packets(DEVICE)?.then_some(()))))?;
        }
        Ok(pair)
    }

    /// Joins two namespaces by a further veth pair, each end with a name and an address (`eth1`,
    /// `10.78.0.1/24`), and waits until both ends carry packets.
    pub fn join(ends: [(&Self, &str, &str); 2]) -> Result<()> {
        let [(near, near_device, _), (far, far_device, _)] = ends;
        let there = far.path();
        near.ip(&[format!(
            "link add {near_device} index 2001 type veth peer name {far_device} index 2002 netns {there}"
        )])?;
        for (namespace, device, address) in ends {
            namespace
                .ip(&[format!("address add {address} dev {device}"), format!("link set {device} up")])?;
        }
        for (namespace, device, _) in ends {
            until("the veth pair is up", || namespace.inside(|| Ok(carries_packets(device)?.then_some(()))))?;
        }
        Ok(())
    }

    /// A path by which another process finds it. This thread may have a descriptor table of its own.
    fn path(&self) -> String {
        format!("/proc/{}/task/{}/fd/{}", std::process::id(), gettid(), self.file.as_raw_fd())
    }

    /// The inode number, by which the tool identifies a namespace.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `ip` in this namespace with one or several commands, and returns its output. Starting a process
    /// is slow on an emulated processor, so commands are batched.
    pub fn ip(&self, orders: &[impl Borrow<str> + Debug]) -> Result<String> {
        let mut ip = Command::new("ip");
        self.enter(&mut ip)?;
        feed(ip.args(["-batch", "-"]), &orders.join("\n")).with_context(|| format!("{orders:?}"))
    }

    /// Makes `command` run in this namespace, without a helper process in between that would change its pid
    /// or name.
    pub fn enter(&self, command: &mut Command) -> Result<()> {
        let file = self.file()?;
        // SAFETY: between fork and exec the closure makes one system call and does not allocate.
        unsafe { command.pre_exec(move || Ok(setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?)) };
        Ok(())
    }

    /// The file that a process enters this namespace with.
    pub(crate) fn file(&self) -> Result<File> {
        Ok(self.file.try_clone()?)
    }

    /// Runs `act` inside this namespace, for instance to read or write files of `/proc`, on a separate
    /// thread, which is the only one that enters it.
    pub fn inside<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let moved = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)?;
                act()
            });
            moved.join().map_err(|_| anyhow!("the thread inside a namespace panicked"))?
        })
    }

    /// Sets a sysctl of this namespace. The key is written with slashes: `net/ipv4/tcp_syn_retries`.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.inside(|| {
            fs::write(&path, value).with_context(|| format!("writing {value} to {}", path.display()))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Ok(file) = self.file() {
            LEFT.lock().unwrap_or_else(PoisonError::into_inner).push(file);
        }
    }
}

/// The device at each end of a [`Namespace::pair`]. The name is free in both namespaces, because they are
/// new.
pub const DEVICE: &str = "eth0";

/// The `ip` command that brings the loopback up.
const LOOPBACK_UP: &str = "link set lo up";

/// The `ip` command that adds an address to [`DEVICE`].
pub fn add_address(address: &str) -> String {
    // Duplicate address detection would keep an IPv6 address unusable for a while; IPv4 has none.
    let detection = if address.contains(':') { "nodad" } else { "" };
    format!("address add {address} dev {DEVICE} {detection}")
}

/// Whether a device of this thread's namespace is up and carries packets.
fn carries_packets(device: &str) -> Result<bool> {
    let mut addresses = getifaddrs()?;
    Ok(addresses.any(|one| one.interface_name == device && one.flags.contains(InterfaceFlags::IFF_RUNNING)))
}

/// Runs a command and returns its output, or fails with its stderr.
pub fn run(command: &mut Command) -> Result<String> {
    feed(command, "")
}

/// Same as [`run`], with standard input for the command.
fn feed(command: &mut Command, input: &str) -> Result<String> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
    // If the command does not read its input, its exit status explains why. Dropping the pipe closes the
    // input.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {}", complaint.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
