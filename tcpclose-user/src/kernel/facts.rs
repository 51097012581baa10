//! The table of facts: which fields of the output hang on something other than a hook, and on what. What hangs on hooks
//! stands in [`crate::kernel::hooks`].

use tcpclose_common::offsets::{ABSENT, StructOffsets};

/// A field of the output that is null, for some events or for all, where its source is missing.
#[derive(Debug)]
pub struct Fact {
    /// Its name; with a dot where it lies within another one.
    pub field: &'static str,
    /// Where it comes from.
    pub source: Source,
}

/// Where a fact comes from.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// Members of kernel structs that BTF describes, by their names in [`StructOffsets`].
    Members(&'static [&'static str]),
    /// The registers that a task entered the kernel with: by `bpf_task_pt_regs`, or by these members.
    Registers(&'static [&'static str]),
    /// `bpf_get_socket_cookie`, for programs on typed tracepoints.
    CookieHelper,
    /// `enum sk_rst_reason`.
    ResetReasons,
    /// `/proc` of other users' processes.
    OtherProcesses,
    /// Addresses in `/proc/kallsyms`.
    KernelSymbols,
}

const fn members(field: &'static str, members: &'static [&'static str]) -> Fact {
    Fact { field, source: Source::Members(members) }
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
    Fact {
        field: "trigger",
        source: Source::Registers(&["pt_regs_syscall", "task_stack", "thread_size", "pt_regs_size"]),
    },
    members("signal", &["task_flags", "task_exit_code"]),
    members("cause", &["sk_err", "sk_flags", "sk_lingertime", "tcp_rcv_nxt", "tcp_copied_seq"]),
    Fact { field: "connection.cookie", source: Source::CookieHelper },
    Fact { field: "reason", source: Source::ResetReasons },
    Fact { field: "process.exe", source: Source::OtherProcesses },
    Fact { field: "stack.kernel.symbol", source: Source::KernelSymbols },
];

/// What is known of the sources, here.
#[derive(Debug)]
pub struct Sources {
    /// Offsets of members.
    pub members: StructOffsets,
    /// Whether there is `bpf_task_pt_regs`; `None` if that could not be tried.
    pub registers_helper: Option<bool>,
    /// Likewise `bpf_get_socket_cookie`.
    pub cookie_helper: Option<bool>,
    /// Whether the kernel has reset reasons; `None` if it did not say.
    pub reset_reasons: Option<bool>,
    /// Whether other users' processes can be looked up.
    pub other_processes: bool,
    /// Whether `/proc/kallsyms` shows addresses.
    pub kernel_symbols: bool,
}

impl Source {
    /// What it takes, for the table in docs/kernels.md.
    pub fn needs(self) -> String {
        match self {
            Self::Members(members) => format!("BTF ({})", members.join(", ")),
            Self::Registers(members) => format!("`bpf_task_pt_regs` (5.15) or BTF ({})", members.join(", ")),
            Self::CookieHelper => "tp_btf and `bpf_get_socket_cookie` (5.12)".to_owned(),
            Self::ResetReasons => "`enum sk_rst_reason` (6.10)".to_owned(),
            Self::OtherProcesses => "CAP_SYS_PTRACE, the host's pid namespace".to_owned(),
            Self::KernelSymbols => {
                "addresses in /proc/kallsyms (CAP_SYSLOG, `kernel.kptr_restrict`)".to_owned()
            }
        }
    }

    /// What to do where it is missing.
    pub fn fix(self) -> &'static str {
        match self {
            Self::Members(_) | Self::Registers(_) => {
                "a kernel with BTF (CONFIG_DEBUG_INFO_BTF), or --btf FILE with the BTF of this one"
            }
            Self::CookieHelper => "Linux 5.12 or later, with BTF",
            Self::ResetReasons => "Linux 6.10 or later; `cause` is told without it",
            Self::OtherProcesses => "CAP_SYS_PTRACE, and in a container the host's processes: --pid host",
            Self::KernelSymbols => "CAP_SYSLOG, and kernel.kptr_restrict below 2",
        }
    }

    /// Why it is missing; `None` if it is there, or if there is no telling.
    pub fn missing(self, here: &Sources) -> Option<String> {
        let lacks = |members: &[&str]| {
            if here.members == StructOffsets::ABSENT {
                return Some("no BTF".to_owned());
            }
            let absent = here.members.named().into_iter().filter(|(_, offset)| *offset == ABSENT);
            let absent: Vec<_> = absent.map(|(name, _)| name).filter(|name| members.contains(name)).collect();
            (!absent.is_empty())
                .then(|| format!("where the kernel keeps it is not known: {}", absent.join(", ")))
        };
        let if_not = |there: Option<bool>, why: &str| (there == Some(false)).then(|| why.to_owned());
        match self {
            // The helper gives the registers, but where the number lies in them is for BTF to say.
            Self::Registers([number, ..]) if here.registers_helper == Some(true) => lacks(&[number]),
            Self::Members(members) | Self::Registers(members) => lacks(members),
            Self::CookieHelper => if_not(here.cookie_helper, "the kernel does not let programs ask for it"),
            Self::ResetReasons => if_not(here.reset_reasons, "the kernel gives none"),
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
            let (Source::Members(members) | Source::Registers(members)) = fact.source else { continue };
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
    fn without_btf_all_that_is_read_is_missing() {
        let here = Sources {
            members: StructOffsets::ABSENT,
            registers_helper: Some(true),
            cookie_helper: None,
            reset_reasons: Some(true),
            other_processes: true,
            kernel_symbols: true,
        };
        for fact in FACTS {
            let read = matches!(fact.source, Source::Members(_) | Source::Registers(_));
            assert_eq!(fact.source.missing(&here).is_some(), read, "{}", fact.field);
        }
    }
}
