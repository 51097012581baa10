//! The running kernel: which hooks it offers and what it allows (`hooks`, `privilege`, `lockdown`), the
//! layout of its types and records (`btf`, `offsets`, `arguments`, `tracefs`, `format`), and the loaded
//! programs (`loader`, `handle`).

pub mod arguments;
pub mod btf;
pub mod clock;
pub mod facts;
pub mod followed;
pub mod format;
pub mod handle;
pub mod hooks;
pub mod loader;
pub mod lockdown;
#[cfg(test)]
mod members;
pub mod offsets;
pub mod privilege;
pub mod search;
pub mod table;
pub mod tracefs;

use std::collections::BTreeMap;

use anyhow::Result;
use tcpclose_common::offsets::{ABSENT, ArgumentOffsets, IteratorOffsets, NamespaceOffsets, StructOffsets};

use self::btf::Btf;
use self::offsets::Missing;

/// The names of the running kernel's `enum sk_rst_reason`, by number. Empty on kernels without reset reasons.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResetReasons(pub BTreeMap<i64, String>);

impl ResetReasons {
    /// The kernel's name of a reason.
    pub fn name(&self, number: Option<u32>) -> Option<&str> {
        self.0.get(&i64::from(number?)).map(String::as_str)
    }
}

/// Everything that tcpclose reads from BTF.
#[derive(Debug)]
pub struct TypeFacts {
    /// Offsets of the members that the programs read.
    pub offsets: StructOffsets,
    /// The members that [`Self::offsets`] lacks, and why.
    pub missing: Vec<Missing>,
    /// Names of `enum sk_rst_reason` without their common prefix, such as 11 `TCP_ABORT_ON_CLOSE`. Numbers
    /// above 10 differ between kernels. Empty before 6.10; `MAX` is the last.
    pub reset_reasons: BTreeMap<i64, String>,
    /// Whether the third argument of a raw tracepoint program on `tcp_send_reset` is a reason, as from 6.10
    /// on. `None` if BTF does not describe the tracepoint.
    pub send_reset_has_reason: Option<bool>,
    /// Offsets of the arguments of programs on kernel functions.
    pub arguments: ArgumentOffsets,
    /// What shows whether a task reads a BPF iterator.
    pub iterators: IteratorOffsets,
    /// Offsets of the members that hold the ids of processes in each pid namespace.
    pub namespace: NamespaceOffsets,
    /// Offset of `mm_struct.exec_vm`, unsigned long; [`ABSENT`] if BTF does not describe it.
    pub code_pages: u16,
    /// Offset of the user thread pointer, unsigned long, in `task_struct`; [`ABSENT`] as above.
    pub thread_pointer: u16,
}

impl TypeFacts {
    /// Reads the facts from raw BTF.
    ///
    /// # Errors
    /// The bytes are not BTF.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        Ok(Self::of(&Btf::parse(bytes)?))
    }

    /// Reads the facts from parsed BTF.
    pub fn of(btf: &Btf<'_>) -> Self {
        let (offsets, missing) = offsets::struct_offsets(btf);
        Self {
            offsets,
            missing,
            reset_reasons: btf.enum_values("sk_rst_reason", "SK_RST_REASON_"),
            // `void *`, sock, skb, and then the reason.
            send_reset_has_reason: btf.func_proto_params("btf_trace_tcp_send_reset").map(|count| count >= 4),
            arguments: arguments::argument_offsets(btf),
            iterators: offsets::iterator_offsets(btf),
            namespace: offsets::namespace_offsets(btf),
            code_pages: long(btf, "mm_struct.exec_vm"),
            thread_pointer: long(btf, THREAD_POINTER),
        }
    }
}

/// The user thread pointer as the kernel last saved it. A value that a system call has set is there at once.
const THREAD_POINTER: &str = if cfg!(target_arch = "aarch64") {
    "task_struct.thread.uw.tp_value"
} else {
    "task_struct.thread.fsbase"
};

/// The offset of a member of type unsigned long; [`ABSENT`] if BTF does not describe it.
fn long(btf: &Btf<'_>, path: &str) -> u16 {
    let place = btf.member(path).ok().filter(|place| place.size == 8);
    place.and_then(|place| u16::try_from(place.offset).ok()).unwrap_or(ABSENT)
}

/// Reduced BTF of several kernels, with their names; see `fixtures/README.md`.
#[cfg(test)]
const FIXTURES: [(&str, &[u8]); 6] = [
    ("5.10-amd64", include_bytes!("../../fixtures/btf/5.10-amd64.btf")),
    ("6.1-amd64", include_bytes!("../../fixtures/btf/6.1-amd64.btf")),
    ("6.12-amd64", include_bytes!("../../fixtures/btf/6.12-amd64.btf")),
    ("6.12-arm64", include_bytes!("../../fixtures/btf/6.12-arm64.btf")),
    ("6.18-amd64", include_bytes!("../../fixtures/btf/6.18-amd64.btf")),
    ("7.2-amd64", include_bytes!("../../fixtures/btf/7.2-amd64.btf")),
];

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn reset_reasons_came_with_6_10() {
        for (name, bytes) in FIXTURES {
            let facts = TypeFacts::parse(bytes).unwrap();
            let old = ["5.10-amd64", "6.1-amd64"].contains(&name);
            assert_eq!(facts.send_reset_has_reason, Some(!old), "{name}");
            // As `bpftool btf dump` shows them for 6.12, 6.18 and 7.2.
            let reasons: Vec<_> =
                facts.reset_reasons.iter().map(|(&value, name)| (value, name.as_str())).collect();
            if old {
                assert_eq!(reasons, [], "{name}");
            } else {
                assert_eq!(reasons.len(), 26, "{name}");
                assert_eq!(reasons[0], (0, "NOT_SPECIFIED"), "{name}");
                assert_eq!(reasons[1], (1, "NO_SOCKET"), "{name}");
                assert_eq!(reasons[11], (11, "TCP_ABORT_ON_CLOSE"), "{name}");
                assert_eq!(reasons[17], (17, "MPTCP_RST_EUNSPEC"), "{name}");
                assert_eq!(reasons[25], (25, "MAX"), "{name}");
            }
        }
    }

    #[test]
    fn btf_and_format_agree_on_reset_reasons() {
        for (name, format) in [
            ("6.12-amd64", include_str!("../../fixtures/format/6.12/tcp_send_reset")),
            ("6.18-amd64", include_str!("../../fixtures/format/6.18/tcp_send_reset")),
            ("7.2-amd64", include_str!("../../fixtures/format/7.2/tcp_send_reset")),
        ] {
            let (_, bytes) = FIXTURES.into_iter().find(|(fixture, _)| *fixture == name).unwrap();
            let from_btf = TypeFacts::parse(bytes).unwrap().reset_reasons;
            assert_eq!(
                format::TracepointFormat::parse(format).unwrap().value_names("reason"),
                from_btf,
                "{name}"
            );
        }
    }

    #[test]
    fn running_kernel() {
        if !fs::exists(btf::VMLINUX).unwrap() {
            eprintln!("skipped: this kernel has no {}", btf::VMLINUX);
            return;
        }
        let facts = TypeFacts::parse(&btf::running_kernel().unwrap()).unwrap();
        assert_eq!(facts.offsets.sk_daddr, 0, "skc_daddr is the first member of sock_common");
        let missing: Vec<_> = facts.missing.iter().map(|missing| missing.field).collect();
        assert!(missing.iter().all(|field| *field == "thread_size"), "{missing:?}");
    }
}
