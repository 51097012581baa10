//! Network namespaces that belong to one test, and the veth pair between two of them.

use std::{
    fs::{self, File},
    os::{
        fd::AsFd,
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    sched::{CloneFlags, setns},
    unistd::geteuid,
};

use crate::{unique_name, until};

/// A network namespace with its loopback up; removed on drop.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
    inode: u64,
}

impl Namespace {
    /// Makes one. Fails when this is not root, because these tests are of no use without it.
    pub fn new() -> Result<Self> {
        ensure!(geteuid().is_root(), "these tests need root: run `cargo xtask test`");
        let name = unique_name();
        ip(&["netns", "add", &name])?;
        let open = || -> Result<Self> {
            let file = File::open(path_of(&name))?;
            let inode = file.metadata()?.ino();
            Ok(Self { name: name.clone(), file, inode })
        };
        let namespace = open().inspect_err(|_| remove(&name))?;
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// The inode number, by which the tool names a namespace.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `ip` on this namespace.
    pub fn ip(&self, args: &[&str]) -> Result<String> {
        ip(&[&["-n", &self.name], args].concat())
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
            moved.join().map_err(|_| anyhow!("the thread inside {} panicked", self.name))?
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
        remove(&self.name);
    }
}

/// The device at each end of the pair that [`join`] makes; the name is free in both namespaces, as they are
/// new.
pub const DEVICE: &str = "eth0";

/// Joins two namespaces by a veth pair, each end with its addresses (`10.77.0.1/24`, `fd00:77::1/64`), and
/// waits until both ends carry packets: what is sent before is lost, and its retransmission would be in the
/// results.
pub fn join(ends: [(&Namespace, &[&str]); 2]) -> Result<()> {
    let [(one, _), (other, _)] = ends;
    ip(&[
        "link",
        "add",
        DEVICE,
        "netns",
        &one.name,
        "type",
        "veth",
        "peer",
        "name",
        DEVICE,
        "netns",
        &other.name,
    ])?;
    for (namespace, addresses) in ends {
        for address in addresses {
            // Duplicate address detection would keep the address unusable for a while; IPv4 knows no such
            // thing.
            let detection: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
            namespace.ip(&[&["address", "add", address, "dev", DEVICE], detection].concat())?;
        }
        namespace.ip(&["link", "set", DEVICE, "up"])?;
    }
    for (namespace, _) in ends {
        until("the veth pair is up", || {
            Ok(namespace.ip(&["link", "show", DEVICE])?.contains("state UP").then_some(()))
        })?;
    }
    Ok(())
}

/// Runs `ip` and returns what it prints.
fn ip(args: &[&str]) -> Result<String> {
    run(Command::new("ip").args(args))
}

/// Runs a command to its end and returns what it prints, or fails with its own complaint.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {}", complaint.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn path_of(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// Removes a namespace. A failure is told but fails nothing: the namespace is empty and in nobody's way.
fn remove(name: &str) {
    if let Err(error) = ip(&["netns", "delete", name]) {
        eprintln!("{error:#}");
    }
}
