//! What this process may do. Capabilities decide, not user ids: root without them is refused as well.

use std::{fs, os::unix::fs::MetadataExt as _};

use caps::{CapSet, Capability};

use crate::failure::Failure;

/// A capability (`capabilities(7)`) that tcpclose uses.
#[derive(Debug)]
pub struct Privilege {
    /// The capability.
    pub capability: Capability,
    /// What it is for, as an infinitive.
    pub purpose: &'static str,
    /// What happens without it.
    pub need: CapabilityNeed,
    /// What is lost without it, as a sentence; empty if nothing is.
    pub lost: &'static str,
}

/// What happens without a capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapabilityNeed {
    /// Nothing can be loaded.
    Essential,
    /// Facts are lost, and a warning at the start of tracing reports it.
    Useful,
    /// Little or nothing is lost, and only `doctor` reports it.
    Minor,
}

/// The capabilities that tcpclose uses. `CAP_SYS_ADMIN` includes the first two, as it does in the kernel.
pub const PRIVILEGES: &[Privilege] = &[
    Privilege {
        capability: Capability::CAP_BPF,
        purpose: "to load programs and create maps",
        need: CapabilityNeed::Essential,
        lost: "nothing can be traced",
    },
    Privilege {
        capability: Capability::CAP_PERFMON,
        purpose: "to attach programs to tracepoints and read kernel memory",
        need: CapabilityNeed::Essential,
        lost: "nothing can be traced",
    },
    Privilege {
        capability: Capability::CAP_SYS_ADMIN,
        purpose: "to mount tracefs where it is not mounted, which is only necessary without BTF",
        need: CapabilityNeed::Minor,
        lost: "",
    },
    Privilege {
        capability: Capability::CAP_SYS_PTRACE,
        purpose: "to look up other users' processes in /proc",
        need: CapabilityNeed::Useful,
        lost: "other users' processes cannot be looked up in /proc: `exe`, symbols, and owners known only \
               there are null",
    },
    Privilege {
        capability: Capability::CAP_DAC_READ_SEARCH,
        purpose: "to read programs and directories that this user may not read",
        need: CapabilityNeed::Minor,
        lost: "stack frames in programs that this user may not read have no symbols",
    },
    Privilege {
        capability: Capability::CAP_SYSLOG,
        purpose: "to see addresses in /proc/kallsyms if the kernel hides them",
        need: CapabilityNeed::Minor,
        // The file itself shows whether the kernel hides them, and `doctor` reports that.
        lost: "",
    },
    Privilege {
        capability: Capability::CAP_SYS_NICE,
        purpose: "to look up short-lived processes in time",
        need: CapabilityNeed::Minor,
        lost: "on a busy host `exe` and symbols of short-lived processes are null more often",
    },
    Privilege {
        capability: Capability::CAP_NET_ADMIN,
        purpose: "to destroy sockets (`ss -K`), which tcpclose never does",
        need: CapabilityNeed::Minor,
        lost: "",
    },
];

impl Privilege {
    /// How to grant it.
    pub fn grant(&self) -> String {
        let name = self.capability.to_string();
        let short = name.trim_start_matches("CAP_");
        format!("sudo, or in a container: --cap-add {short}")
    }
}

/// Makes every permitted capability effective.
///
/// The binary in a container image has capabilities that are permitted and not effective, because the kernel
/// refuses to execute a file with effective capabilities if the container lacks one of them.
pub fn raise() {
    if let Ok(permitted) = caps::read(None, CapSet::Permitted) {
        // If it fails, `check` names what is missing.
        let _ = caps::set(None, CapSet::Effective, &permitted);
    }
}

/// Whether the effective set has `capability`; false on a kernel that does not know it.
pub fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

/// What is lost in a pid namespace whose `/proc` does not show the host's processes.
pub const OUTSIDE: &str =
    "processes outside it have no `pid`, and their `exe`, container, and symbols are null";

/// Whether pids here are those that the kernel half reports.
pub fn in_initial_pid_namespace() -> bool {
    is_namespace("pid", PROC_PID_INIT_INO)
}

/// Whether a filter of system calls is installed for this process, as container engines do.
pub fn is_filtered() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| status.contains("\nSeccomp:\t2"))
}

/// Inode number of the network namespace that tcpclose runs in.
pub fn own_netns() -> Option<u32> {
    u32::try_from(fs::metadata("/proc/thread-self/ns/net").ok()?.ino()).ok()
}

/// Whether capabilities here are valid for the whole kernel.
pub fn in_initial_user_namespace() -> bool {
    is_namespace("user", PROC_USER_INIT_INO)
}

/// Inode numbers of the initial namespaces: `include/linux/proc_ns.h`, and since 6.18 part of the user
/// interface (`include/uapi/linux/nsfs.h`).
const PROC_PID_INIT_INO: u64 = 0xefff_fffc;
const PROC_USER_INIT_INO: u64 = 0xefff_fffd;

/// If the file cannot be read, this assumes the initial namespace, in which most processes are.
fn is_namespace(kind: &str, inode: u64) -> bool {
    fs::metadata(format!("/proc/self/ns/{kind}")).map_or(true, |file| file.ino() == inode)
}

/// Checks the privileges that loading requires.
///
/// # Errors
/// A capability is missing, or is not valid because this is not the initial user namespace.
pub fn check() -> Result<(), Failure> {
    if !in_initial_user_namespace() {
        return Err(Failure {
            failed: "cannot load the kernel programs: not permitted".to_owned(),
            found: "a separate user namespace, whose capabilities are not valid outside it".to_owned(),
            needed: "the host's user namespace".to_owned(),
            fix: "run tcpclose as the host's root, in a container: rootful and without --userns".to_owned(),
        });
    }
    if has(Capability::CAP_SYS_ADMIN) {
        return Ok(());
    }
    let missing: Vec<_> = missing(CapabilityNeed::Essential).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> =
        missing.iter().map(|privilege| format!("{} {}", privilege.capability, privilege.purpose)).collect();
    let found = if nix::unistd::geteuid().is_root() {
        "root without this capability: a container or a service manager has dropped it".to_owned()
    } else {
        format!("user id {}, without this capability", nix::unistd::geteuid())
    };
    Err(Failure {
        failed: "cannot load the kernel programs: not permitted".to_owned(),
        found,
        needed: names.join(", and "),
        fix: grant(),
    })
}

/// How to grant tcpclose the capabilities that it needs.
pub fn grant() -> String {
    let program =
        std::env::current_exe().map_or_else(|_| "tcpclose".to_owned(), |path| path.display().to_string());
    format!(
        "sudo {program}, or once: sudo setcap cap_bpf,cap_perfmon,cap_sys_ptrace=ep {program}; in a \
         container: --cap-add BPF --cap-add PERFMON --cap-add SYS_PTRACE"
    )
}

/// What is lost because a useful capability or the host's pid namespace is missing, one sentence each.
pub fn losses() -> Vec<String> {
    let capabilities = missing(CapabilityNeed::Useful)
        .map(|privilege| format!("without {}, {}", privilege.capability, privilege.lost));
    let elsewhere = (!in_initial_pid_namespace())
        .then(|| format!("in a separate pid namespace, {OUTSIDE} (in a container: --pid host)"));
    capabilities.chain(elsewhere).collect()
}

fn missing(need: CapabilityNeed) -> impl Iterator<Item = &'static Privilege> {
    PRIVILEGES.iter().filter(move |privilege| privilege.need == need && !has(privilege.capability))
}
