//! What this process is allowed to do. Capabilities count, not user ids: a root without them is refused as well.

use std::{fs, os::unix::fs::MetadataExt as _};

use caps::{CapSet, Capability};

use crate::failure::Failure;

/// A capability (`capabilities(7)`) that makes a difference.
#[derive(Debug)]
pub struct Privilege {
    /// Which.
    pub capability: Capability,
    /// What it is for.
    pub purpose: &'static str,
    /// What it means to go without.
    pub need: Need,
    /// What is lost without it, as a sentence; empty if nothing is.
    pub lost: &'static str,
}

/// What it means to go without a capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing can be loaded.
    Essential,
    /// Facts are lost, which is told when tracing begins.
    Useful,
    /// Little is lost, or nothing: `doctor` tells.
    Minor,
}

/// The capabilities that make a difference. `CAP_SYS_ADMIN` stands for the first two, as it does in the kernel.
pub const PRIVILEGES: &[Privilege] = &[
    Privilege {
        capability: Capability::CAP_BPF,
        purpose: "to load programs and make maps",
        need: Need::Essential,
        lost: "nothing can be traced",
    },
    Privilege {
        capability: Capability::CAP_PERFMON,
        purpose: "to attach them to tracepoints and read kernel memory",
        need: Need::Essential,
        lost: "nothing can be traced",
    },
    Privilege {
        capability: Capability::CAP_SYS_ADMIN,
        purpose: "to mount tracefs where nobody has, which only a kernel without BTF makes necessary",
        need: Need::Minor,
        lost: "",
    },
    Privilege {
        capability: Capability::CAP_SYS_PTRACE,
        purpose: "to look other users' programs up in /proc",
        need: Need::Useful,
        lost: "other users' programs cannot be looked up in /proc: `exe`, symbols, and owners known only there are null",
    },
    Privilege {
        capability: Capability::CAP_DAC_READ_SEARCH,
        purpose: "to read programs and directories that are closed to this user",
        need: Need::Minor,
        lost: "frames in programs that this user may not read have no names",
    },
    Privilege {
        capability: Capability::CAP_SYSLOG,
        purpose: "to see addresses in /proc/kallsyms, if the kernel hides them",
        need: Need::Minor,
        // Whether it hides them is seen in the file itself.
        lost: "",
    },
    Privilege {
        capability: Capability::CAP_SYS_NICE,
        purpose: "to be in time to look at programs that end at once",
        need: Need::Minor,
        lost: "on a busy host `exe` and symbols of programs that end at once are null more often",
    },
    Privilege {
        capability: Capability::CAP_NET_ADMIN,
        purpose: "to destroy sockets (`ss -K`), which tcpclose never does",
        need: Need::Minor,
        lost: "",
    },
];

impl Privilege {
    /// How to get it.
    pub fn grant(&self) -> String {
        let name = self.capability.to_string();
        let short = name.trim_start_matches("CAP_");
        format!("sudo, or in a container: --cap-add {short}")
    }
}

/// Makes every permitted capability effective.
///
/// The binary in a container image has capabilities that are permitted and not effective, because the kernel refuses to
/// execute a file with effective ones where the container lacks one of them.
pub fn raise() {
    if let Ok(permitted) = caps::read(None, CapSet::Permitted) {
        // If it fails, `check` names what is missing.
        let _ = caps::set(None, CapSet::Effective, &permitted);
    }
}

/// Whether the effective set has `capability`. A kernel that does not know it says no.
pub fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

/// What it means not to see the host's processes in `/proc`.
pub const OUTSIDE: &str = "pids are told as the host has them; /proc here does not show those processes, so `exe`, \
                           containers, symbols, and owners known only there are null";

/// Whether pids here are those that the kernel half sees.
pub fn in_initial_pid_namespace() -> bool {
    is_namespace("pid", PROC_PID_INIT_INO)
}

/// Whether capabilities here count for the whole kernel.
pub fn in_initial_user_namespace() -> bool {
    is_namespace("user", PROC_USER_INIT_INO)
}

/// Inode numbers of the namespaces that a kernel begins with: `include/linux/proc_ns.h`; part of the interface since 6.18
/// (`include/uapi/linux/nsfs.h`).
const PROC_PID_INIT_INO: u64 = 0xefff_fffc;
const PROC_USER_INIT_INO: u64 = 0xefff_fffd;

/// Where the file cannot be read there is no telling, and most processes are where the kernel began.
fn is_namespace(kind: &str, inode: u64) -> bool {
    fs::metadata(format!("/proc/self/ns/{kind}")).map_or(true, |file| file.ino() == inode)
}

/// Refuses to go on without what loading takes.
///
/// # Errors
/// A capability is missing, or counts for nothing here.
pub fn check() -> Result<(), Failure> {
    if !in_initial_user_namespace() {
        return Err(Failure {
            failed: "cannot load the kernel programs: not permitted".to_owned(),
            found: "a user namespace of its own, whose capabilities do not count outside it".to_owned(),
            needed: "the host's user namespace".to_owned(),
            fix: "run it as the host's root: a rootful container, without --userns".to_owned(),
        });
    }
    if has(Capability::CAP_SYS_ADMIN) {
        return Ok(());
    }
    let missing: Vec<_> = missing(Need::Essential).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> =
        missing.iter().map(|privilege| format!("{} {}", privilege.capability, privilege.purpose)).collect();
    let found = if nix::unistd::geteuid().is_root() {
        "root without it: a container or a service manager has taken it away".to_owned()
    } else {
        format!("user id {}, without it", nix::unistd::geteuid())
    };
    Err(Failure {
        failed: "cannot load the kernel programs: not permitted".to_owned(),
        found,
        needed: names.join(", and "),
        fix: grant(),
    })
}

/// How to give this program what it needs.
pub fn grant() -> String {
    let program =
        std::env::current_exe().map_or_else(|_| "tcpclose".to_owned(), |path| path.display().to_string());
    format!(
        "sudo {program}, or once: sudo setcap cap_bpf,cap_perfmon,cap_sys_ptrace=ep {program}; in a container: \
         --cap-add BPF --cap-add PERFMON --cap-add SYS_PTRACE"
    )
}

/// What is lost for want of capabilities that are merely useful, and of the host's pid namespace; a sentence each.
pub fn losses() -> Vec<String> {
    let capabilities = missing(Need::Useful)
        .map(|privilege| format!("without {}, {}", privilege.capability, privilege.lost));
    let elsewhere = (!in_initial_pid_namespace())
        .then(|| format!("in a pid namespace of its own, {OUTSIDE} (in a container: --pid host)"));
    capabilities.chain(elsewhere).collect()
}

fn missing(need: Need) -> impl Iterator<Item = &'static Privilege> {
    PRIVILEGES.iter().filter(move |privilege| privilege.need == need && !has(privilege.capability))
}
