//! The environment of this process: the kernel, mounts, limits and namespaces. Everything is read from files
//! in `/proc` and `/sys` that every user may read.

use std::{
    fs,
    io::{BufRead as _, BufReader},
};

use caps::Capability;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::{Check, Mark};
use crate::{
    kernel::loader::BtfSource,
    kernel::privilege,
    kernel::{TypeFacts, btf, lockdown, tracefs},
    sandbox,
};

/// All findings, in the order of the report.
pub(super) fn findings(source: &BtfSource, facts: Result<&TypeFacts, String>) -> Vec<Check> {
    vec![
        kernel(),
        architecture(),
        types(source, facts),
        tracefs(),
        lockdown(),
        memlock(),
        cgroups(),
        pid_namespace(),
        user_namespace(),
        sandbox(),
        kernel_symbols(),
    ]
}

fn kernel() -> Check {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease");
    Check::new("kernel", Mark::Ok, release.as_deref().map_or("unknown", str::trim))
}

fn architecture() -> Check {
    let here = std::env::consts::ARCH;
    match here {
        "x86_64" | "aarch64" => Check::new("architecture", Mark::Ok, here),
        _ => Check::new("architecture", Mark::Less, here)
            .lost(
                "the system call numbers of this architecture are not known, so `trigger` is null for most \
                   closes",
            )
            .fix("x86_64 or aarch64"),
    }
}

fn types(source: &BtfSource, facts: Result<&TypeFacts, String>) -> Check {
    let place = match source {
        BtfSource::File(path) => path.display().to_string(),
        BtfSource::Kernel | BtfSource::None => btf::VMLINUX.to_owned(),
    };
    match facts {
        Ok(facts) if facts.missing.is_empty() => Check::new("BTF", Mark::Ok, place),
        Ok(facts) => {
            let missing: Vec<_> = facts.missing.iter().map(ToString::to_string).collect();
            Check::new("BTF", Mark::Ok, format!("{place}, without {}", missing.join(", ")))
        }
        Err(error) => Check::new("BTF", Mark::Less, error)
            .lost("everything that is read from kernel structures")
            .fix("a kernel with CONFIG_DEBUG_INFO_BTF, or --btf FILE with the BTF of this kernel"),
    }
}

fn tracefs() -> Check {
    const USE: &str = "needed only without BTF, and for --accept-hook syscall";
    match tracefs::find() {
        Ok(Some(tracefs)) => {
            Check::new("tracefs", Mark::Ok, format!("{}, readable", tracefs.root().display()))
        }
        Ok(None) if privilege::has(Capability::CAP_SYS_ADMIN) => {
            Check::new("tracefs", Mark::Ok, "not mounted; tcpclose mounts it privately when it needs it")
        }
        Ok(None) => Check::new("tracefs", Mark::Note, format!("not mounted; {USE}"))
            .fix("sudo mount -t tracefs -o gid=$(id -g),mode=750 tracefs /sys/kernel/tracing"),
        Err(error) => Check::new("tracefs", Mark::Note, format!("{}: {}; {USE}", error.failed, error.found))
            .fix(error.fix),
    }
}

fn lockdown() -> Check {
    match lockdown::mode() {
        Some(mode) if mode == "confidentiality" => Check::new("lockdown", Mark::No, mode)
            .lost("BPF programs may not read kernel memory, so nothing can be traced")
            .fix("boot with lockdown=integrity, or without lockdown"),
        Some(mode) => Check::new("lockdown", Mark::Ok, format!("{mode}: reading kernel memory is allowed")),
        None => Check::new(
            "lockdown",
            Mark::Note,
            "unknown: securityfs is not mounted, or the kernel has no lockdown",
        ),
    }
}

fn memlock() -> Check {
    let limit = match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((RLIM_INFINITY, _)) => "unlimited".to_owned(),
        Ok((bytes, _)) => format!("{} KiB; maps count against it only before 5.11", bytes / 1024),
        Err(errno) => format!("unknown: {errno}"),
    };
    Check::new("RLIMIT_MEMLOCK", Mark::Ok, limit)
}

fn cgroups() -> Check {
    // The file system type follows the separator: proc_pid_mountinfo(5).
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let kinds = mounts.lines().filter_map(|line| line.split_once(" - ")?.1.split(' ').next());
    let (mut one, mut two) = (false, false);
    for kind in kinds {
        one |= kind == "cgroup";
        two |= kind == "cgroup2";
    }
    let version = match (one, two) {
        (false, true) => "v2",
        (true, false) => "v1",
        (true, true) => "v1 and v2 (hybrid)",
        (false, false) => "not mounted",
    };
    Check::new("cgroups", Mark::Ok, version)
}

fn pid_namespace() -> Check {
    if privilege::in_initial_pid_namespace() {
        return Check::new("pid namespace", Mark::Ok, "the host's");
    }
    Check::new("pid namespace", Mark::Less, "a separate one")
        .lost(privilege::OUTSIDE)
        .fix("in a container: --pid host")
}

fn sandbox() -> Check {
    let actions = fs::read_to_string(sandbox::ACTIONS).unwrap_or_default();
    if actions.split_whitespace().any(|action| action == "errno") {
        let found = "a trace drops capabilities, sets no_new_privs and filters its system calls (--sandbox)";
        return Check::new("sandbox", Mark::Ok, found);
    }
    Check::new("sandbox", Mark::Note, "no filters of system calls (CONFIG_SECCOMP_FILTER)")
        .lost("a trace drops capabilities, but does not restrict system calls")
}

fn user_namespace() -> Check {
    if privilege::in_initial_user_namespace() {
        return Check::new("user namespace", Mark::Ok, "the host's");
    }
    Check::new("user namespace", Mark::No, "a separate one")
        .lost("its capabilities are not valid outside it, so programs cannot be loaded")
        .fix("run tcpclose as the host's root, in a container: rootful and without --userns")
}

fn kernel_symbols() -> Check {
    if kernel_symbols_are_shown() {
        return Check::new("/proc/kallsyms", Mark::Ok, "shows kernel addresses");
    }
    let restrict = fs::read_to_string("/proc/sys/kernel/kptr_restrict");
    let restrict = restrict.as_deref().map_or("unknown", str::trim);
    Check::new(
        "/proc/kallsyms",
        Mark::Less,
        format!("hides kernel addresses (kernel.kptr_restrict={restrict})"),
    )
    .lost("frames of kernel stacks have no symbols")
    .fix(if restrict == "2" { "sudo sysctl kernel.kptr_restrict=1" } else { "CAP_SYSLOG" })
}

/// Whether `/proc/kallsyms` shows addresses to this process. Hidden addresses are all 0: `s_show()` of
/// `kernel/kallsyms.c`.
pub(super) fn kernel_symbols_are_shown() -> bool {
    let Ok(file) = fs::File::open("/proc/kallsyms") else { return false };
    // The per-CPU symbols at the beginning may really be at 0.
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    lines
        .take(1000)
        .any(|line| line.split(' ').next().is_some_and(|address| !address.trim_matches('0').is_empty()))
}
