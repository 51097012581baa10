//! What this process is allowed to do. Capabilities count, not user ids: a root without them is refused as well.

use caps::{CapSet, Capability};

use crate::failure::Failure;

/// Capabilities that loading the programs takes (`capabilities(7)`), each with what it is for.
const NEEDED: [(Capability, &str); 2] = [
    (Capability::CAP_BPF, "to load programs and make maps"),
    (Capability::CAP_PERFMON, "to attach them to tracepoints and read kernel memory"),
];

/// Capabilities that tracing goes without, each with what is lost.
const USEFUL: [(Capability, &str); 1] = [(
    Capability::CAP_SYS_PTRACE,
    "other users' programs cannot be looked up in /proc: `exe`, symbols, and owners known only there are null",
)];

/// Whether the effective set has `capability`. A kernel that does not know it says no.
fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

/// Where the kernel says what it keeps from everybody, root included; the mode in force stands in brackets.
const LOCKDOWN: &str = "/sys/kernel/security/lockdown";

/// Refuses to go on without what loading takes.
///
/// # Errors
/// A capability is missing (`CAP_SYS_ADMIN` stands for both, as it does in the kernel), or no capability would help.
pub fn check() -> Result<(), Failure> {
    // Who cannot read this is told what the kernel says when it refuses the programs.
    if std::fs::read_to_string(LOCKDOWN).is_ok_and(|modes| modes.contains("[confidentiality]")) {
        return Err(Failure {
            failed: "cannot trace: this kernel lets no program read its memory".to_owned(),
            found: format!("lockdown in the mode confidentiality ({LOCKDOWN})"),
            needed: "lockdown in the mode integrity, or none".to_owned(),
            fix: "boot without lockdown=confidentiality on the kernel's command line; \
                  lockdown=integrity goes with Secure Boot as well"
                .to_owned(),
        });
    }
    if has(Capability::CAP_SYS_ADMIN) {
        return Ok(());
    }
    let missing: Vec<_> = NEEDED.iter().filter(|(capability, _)| !has(*capability)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|(capability, what)| format!("{capability} {what}")).collect();
    let found = if nix::unistd::geteuid().is_root() {
        "root without it: a container or a service manager has taken it away".to_owned()
    } else {
        format!("user id {}, without it", nix::unistd::geteuid())
    };
    let program =
        std::env::current_exe().map_or_else(|_| "tcpclose".to_owned(), |path| path.display().to_string());
    Err(Failure {
        failed: "cannot load the kernel programs: not permitted".to_owned(),
        found,
        needed: names.join(", and "),
        fix: format!(
            "sudo {program}, or once: sudo setcap cap_bpf,cap_perfmon,cap_sys_ptrace=ep {program}; in a container: \
             --cap-add BPF --cap-add PERFMON --cap-add SYS_PTRACE"
        ),
    })
}

/// What is lost for want of capabilities that are merely useful, a sentence each.
pub fn losses() -> Vec<String> {
    USEFUL
        .iter()
        .filter(|(capability, _)| !has(*capability))
        .map(|(capability, lost)| format!("without {capability}, {lost}"))
        .collect()
}
