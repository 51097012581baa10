//! Network namespaces that belong to one test, and the veth pair between two of them.

use std::{
    borrow::Borrow,
    fmt::Debug,
    fs::{self, File},
    io::Write,
    os::{
        fd::{AsFd, AsRawFd},
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::Path,
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    ifaddrs::getifaddrs,
    net::if_::InterfaceFlags,
    sched::{CloneFlags, setns, unshare},
    unistd::geteuid,
};

use crate::until;

/// A network namespace with its loopback up. It has no name, and is gone with whoever has it open.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    inode: u64,
}

/// Namespaces that no test has any more. They stay until all tests are over: the kernel gives the number of one that is
/// gone to the next, and a tool that goes on ([`crate::window`]) may still have something to tell of the former.
static LEFT: Mutex<Vec<File>> = Mutex::new(Vec::new());

impl Namespace {
    /// Makes one. Fails when this is not root, because these tests are of no use without it.
    pub fn new() -> Result<Self> {
        let namespace = Self::bare()?;
        namespace.ip(&[LOOPBACK_UP])?;
        Ok(namespace)
    }

    /// The same without its loopback.
    fn bare() -> Result<Self> {
        ensure!(geteuid().is_root(), "these tests need root: run `cargo xtask test`");
        let made = thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
            Ok(File::open("/proc/thread-self/ns/net")?)
        });
        let file = made.join().map_err(|_| anyhow!("the thread that makes a namespace panicked"))??;
        let inode = file.metadata()?.ino();
        Ok(Self { file, inode })
    }

    /// Makes two, joined by a veth pair, each end with its addresses (`10.77.0.1/24`, `fd00:77::1/64`), and waits until
    /// both ends carry packets: what is sent before is lost, and its retransmission would be in the results.
    pub fn pair(addresses: [&[&str]; 2]) -> Result<[Self; 2]> {
        let pair = [Self::bare()?, Self::bare()?];
        let there = format!("/proc/{}/fd/{}", std::process::id(), pair[1].file.as_raw_fd());
        // Where the numbers are the same, the kernel says for up to a second that the second end is down, which is up
        // (`linkwatch_urgent_event()` in `net/core/link_watch.c`).
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

    /// The inode number, by which the tool names a namespace.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Has `ip` do something in this namespace, or several things, and returns what it prints. Each time it is started
    /// is felt on an emulated processor.
    pub fn ip(&self, orders: &[impl Borrow<str> + Debug]) -> Result<String> {
        let mut ip = Command::new("ip");
        self.enter(&mut ip)?;
        feed(ip.args(["-batch", "-"]), &orders.join("\n")).with_context(|| format!("{orders:?}"))
    }

    /// Has `command` run in this namespace, without a helper process in between that would change its pid or
    /// name.
    pub fn enter(&self, command: &mut Command) -> Result<()> {
        let file = self.file()?;
        // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
        unsafe { command.pre_exec(move || Ok(setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?)) };
        Ok(())
    }

    /// What a process enters this namespace by.
    pub(crate) fn file(&self) -> Result<File> {
        Ok(self.file.try_clone()?)
    }

    /// Reads or writes files of `/proc` from within this namespace: on a thread of its own, which alone moves
    /// there.
    pub fn inside<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let moved = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)?;
                act()
            });
            moved.join().map_err(|_| anyhow!("the thread inside a namespace panicked"))?
        })
    }

    /// Sets a sysctl of this namespace, written with slashes: `net/ipv4/tcp_syn_retries`.
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

/// The device at each end of a [`Namespace::pair`]; the name is free in both namespaces, as they are new.
pub const DEVICE: &str = "eth0";

/// What `ip` is told for that.
const LOOPBACK_UP: &str = "link set lo up";

/// What `ip` is told to add an address to [`DEVICE`].
pub fn add_address(address: &str) -> String {
    // Duplicate address detection would keep the address unusable for a while; IPv4 knows no such thing.
    let detection = if address.contains(':') { "nodad" } else { "" };
    format!("address add {address} dev {DEVICE} {detection}")
}

/// Whether a device of this thread's namespace is up, as is the way to the other end.
fn carries_packets(device: &str) -> Result<bool> {
    let mut addresses = getifaddrs()?;
    Ok(addresses.any(|one| one.interface_name == device && one.flags.contains(InterfaceFlags::IFF_RUNNING)))
}

/// Runs a command to its end and returns what it prints, or fails with its own complaint.
pub fn run(command: &mut Command) -> Result<String> {
    feed(command, "")
}

/// The same with something to read for it.
fn feed(command: &mut Command, input: &str) -> Result<String> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
    // What it does not read, it gives the reason for at its end. Its standard input ends here.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {}", complaint.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
