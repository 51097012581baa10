//! The table of facts: the fields of the output that do not depend on a hook, and what each of them depends
//! on. Fields that depend on hooks are in [`crate::kernel::hooks`].

use tcpclose_common::offsets::{ABSENT, StructOffsets};

/// A field of the output that is null, for some events or for all, if its source is missing.
#[derive(Debug)]
pub struct Fact {
    /// Its name; `outer.inner` for a field of an object.
    pub field: &'static str,
    /// Its source.
    pub source: FactSource,
}

/// The source of a fact.
#[derive(Clone, Copy, Debug)]
pub enum FactSource {
    /// Members of kernel structs, by their names in [`StructOffsets`].
    Members(&'static [&'static str]),
    /// The registers with which a task entered the kernel, through `bpf_task_pt_regs` or through these
    /// members.
    Registers(&'static [&'static str]),
    /// `bpf_get_socket_cookie`, which must be allowed in programs on typed tracepoints.
    CookieHelper,
    /// `enum sk_rst_reason`.
    ResetReasons,
    /// `/proc` of other users' processes.
    OtherProcesses,
    /// Addresses in `/proc/kallsyms`.
    KernelSymbols,
}

const fn members(field: &'static str, members: &'static [&'static str]) -> Fact {
    Fact { field, source: FactSource::Members(members) }
}

/// Every such field.
pub const FACTS: &[Fact] = &[
    members("process", &["sk_socket", "socket_inode", "file_private", "socket_sk"]),
    members("connection.netns", &["sk_net", "net_inum"]),
    members("connection.bytes_sent", &["tcp_bytes_sent", "tcp_bytes_retrans"]),
    members("connection.bytes_received", &["tcp_bytes_received", "sk_flags"]),
    members("connection.retransmits", &["tcp_total_retrans"]),
    members("connection.rtt_us", &["tcp_srtt_us"]),
    members("idle_ms", &["tcp_lsndtime", "icsk_lrcvtime"]),
    members("last_data", &["tcp_lsndtime", "icsk_lrcvtime"]),
    members("since_sent_ms", &["tcp_lsndtime", "tcp_bytes_sent", "tcp_bytes_retrans"]),
    members("since_received_ms", &["icsk_lrcvtime", "tcp_bytes_received"]),
    members("unread_bytes", &["tcp_rcv_nxt", "tcp_copied_seq", "sk_flags"]),
    members("unacked_bytes", &["tcp_write_seq", "tcp_snd_una"]),
    Fact {
        field: "trigger",
        source: FactSource::Registers(&["pt_regs_syscall", "task_stack", "thread_size", "pt_regs_size"]),
    },
    members("signal", &["task_flags", "task_exit_code"]),
    members("signal_from", &["task_tgid"]),
    members("unsent_bytes", &["tcp_write_seq", "tcp_snd_nxt", "icsk_probes_out"]),
    members("cause", &["sk_err", "sk_flags", "sk_lingertime", "tcp_rcv_nxt", "tcp_copied_seq"]),
    Fact { field: "connection.cookie", source: FactSource::CookieHelper },
    Fact { field: "reason", source: FactSource::ResetReasons },
    Fact { field: "process.exe", source: FactSource::OtherProcesses },
    Fact { field: "stack.kernel.symbol", source: FactSource::KernelSymbols },
];

/// Which sources this kernel and these privileges provide.
#[derive(Debug)]
pub struct Sources {
    /// Offsets of members.
    pub members: StructOffsets,
    /// Whether there is `bpf_task_pt_regs`; `None` if that could not be tried.
    pub registers_helper: Option<bool>,
    /// Whether there is `bpf_get_socket_cookie`; `None` if that could not be tried.
    pub cookie_helper: Option<bool>,
    /// Whether the kernel has reset reasons; `None` if that is not known.
    pub reset_reasons: Option<bool>,
    /// Whether other users' processes can be looked up.
    pub other_processes: bool,
    /// Whether `/proc/kallsyms` shows addresses.
    pub kernel_symbols: bool,
}

impl FactSource {
    /// What it requires, for the table in docs/kernels.md.
    pub fn needs(self) -> String {
        match self {
            Self::Members(members) => format!("BTF ({})", members.join(", ")),
            Self::Registers(members) => format!("`bpf_task_pt_regs` (5.15) or BTF ({})", members.join(", ")),
            Self::CookieHelper => "tp_btf and `bpf_get_socket_cookie` (5.12)".to_owned(),
            Self::ResetReasons => "`enum sk_rst_reason` (6.10)".to_owned(),
            Self::OtherProcesses => "CAP_SYS_PTRACE and the host's pid namespace".to_owned(),
            Self::KernelSymbols => {
                "addresses in /proc/kallsyms (CAP_SYSLOG, `kernel.kptr_restrict`)".to_owned()
            }
        }
    }

    /// What to do if it is missing.
    pub fn fix(self) -> &'static str {
        match self {
            Self::Members(_) | Self::Registers(_) => {
                "a kernel with BTF (CONFIG_DEBUG_INFO_BTF), or --btf FILE with the BTF of this kernel"
            }
            Self::CookieHelper => "Linux 5.12 or later, with BTF",
            Self::ResetReasons => "Linux 6.10 or later; `cause` does not need it",
            Self::OtherProcesses => "CAP_SYS_PTRACE, and in a container --pid host",
            Self::KernelSymbols => "CAP_SYSLOG, and kernel.kptr_restrict below 2",
        }
    }

    /// Why it is missing; `None` if it is available or if that is not known.
    pub fn missing(self, here: &Sources) -> Option<String> {
        let lacks = |members: &[&str]| {
            if here.members == StructOffsets::ABSENT {
                return Some("no BTF".to_owned());
            }
            let absent = here.members.named().into_iter().filter(|(_, offset)| *offset == ABSENT);
            let absent: Vec<_> = absent.map(|(name, _)| name).filter(|name| members.contains(name)).collect();
            (!absent.is_empty()).then(|| format!("BTF of this kernel has no usable {}", absent.join(", ")))
        };
        let if_not = |there: Option<bool>, why: &str| (there == Some(false)).then(|| why.to_owned());
        match self {
            // The helper returns the registers. The offset of the system call's number in them still comes
            // from BTF.
            Self::Registers([number, ..]) if here.registers_helper == Some(true) => lacks(&[number]),
            Self::Members(members) | Self::Registers(members) => lacks(members),
            Self::CookieHelper => if_not(here.cookie_helper, "the kernel does not let programs read it"),
            Self::ResetReasons => if_not(here.reset_reasons, "the kernel gives no reasons"),
            Self::OtherProcesses => {
                if_not(Some(here.other_processes), "processes of other users cannot be looked up in /proc")
            }
            Self::KernelSymbols => if_not(Some(here.kernel_symbols), "/proc/kallsyms hides addresses"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{event::schema, kernel::hooks::HOOKS};

    #[test]
    fn members_are_looked_up() {
        let names = StructOffsets::ABSENT.named().map(|(name, _)| name);
        for fact in FACTS {
            let (FactSource::Members(members) | FactSource::Registers(members)) = fact.source else {
                continue;
            };
            for member in members {
                assert!(names.contains(member), "{}: no offset is called {member}", fact.field);
            }
        }
    }

    #[test]
    fn fields_are_those_of_the_schema() {
        let schema = schema::pretty();
        let of_hooks = HOOKS.iter().flat_map(|hook| hook.null).copied();
        for field in FACTS.iter().map(|fact| fact.field).chain(of_hooks) {
            for name in field.split('.') {
                assert!(schema.contains(&format!("\"{name}\": {{")), "{field} is not in the schema");
            }
        }
    }

    #[test]
    fn without_btf_every_member_is_missing() {
        let here = Sources {
            members: StructOffsets::ABSENT,
            registers_helper: Some(true),
            cookie_helper: None,
            reset_reasons: Some(true),
            other_processes: true,
            kernel_symbols: true,
        };
        for fact in FACTS {
            let read = matches!(fact.source, FactSource::Members(_) | FactSource::Registers(_));
            assert_eq!(fact.source.missing(&here).is_some(), read, "{}", fact.field);
        }
    }
}
