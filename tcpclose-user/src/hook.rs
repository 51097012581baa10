//! The table of hooks: what is attached, in which variants, and what is lost without it. The loader, its messages and
//! the tests read this table, nothing else knows the hooks.

/// A tracepoint that the kernel half has programs for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    /// Name of the tracepoint, and of its `btf_trace_*` type.
    pub tracepoint: &'static str,
    /// Its group in tracefs.
    pub group: &'static str,
    /// Program for the BTF-typed raw tracepoint.
    pub btf_program: &'static str,
    /// Program that takes what comes while the one above runs on the same CPU; attached after it.
    pub nested_program: Option<&'static str>,
    /// Program for the classic tracepoint.
    pub classic_program: &'static str,
    /// Global with the layout of the classic tracepoint's record.
    pub record_global: &'static str,
    /// When it is attached.
    pub need: Need,
    /// What cannot be told without it, as the end of a sentence.
    pub lost: &'static str,
}

/// When a hook is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Always; there is nothing to trace without it.
    Essential,
    /// Always; its loss is told.
    Useful,
    /// For `-- COMMAND` alone.
    Command,
    /// For `--ttl` alone.
    Ttl,
}

impl Hook {
    /// `group:tracepoint`, as perf and bpftrace write it.
    pub fn name(&self) -> String {
        format!("{}:{}", self.group, self.tracepoint)
    }
}

/// How a hook was attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// BTF-typed raw tracepoint (`tp_btf`).
    Btf,
    /// Classic tracepoint, through tracefs and perf.
    Classic,
}

/// Every hook, in the order in which they are attached: the one that begins lives comes last, so that no life begins
/// that could not be ended.
pub const HOOKS: [Hook; 6] = [
    Hook {
        tracepoint: "tcp_destroy_sock",
        group: "tcp",
        btf_program: "destroy_sock",
        nested_program: None,
        classic_program: "destroy_sock_classic",
        record_global: "DESTROY_SOCK_RECORD",
        need: Need::Useful,
        lost: "the owner of an accepted socket that a reset ended, where only its later close could have told",
    },
    Hook {
        tracepoint: "tcp_receive_reset",
        group: "tcp",
        btf_program: "receive_reset",
        nested_program: None,
        classic_program: "receive_reset_classic",
        record_global: "RECEIVE_RESET_RECORD",
        need: Need::Useful,
        lost: "`reset` lines for RSTs received, and the word of a peer's RST in `close` lines",
    },
    Hook {
        tracepoint: "tcp_send_reset",
        group: "tcp",
        btf_program: "send_reset",
        nested_program: None,
        classic_program: "send_reset_classic",
        record_global: "SEND_RESET_RECORD",
        need: Need::Useful,
        lost: "`reset` lines for RSTs sent, and the kernel's reason for them",
    },
    Hook {
        tracepoint: "sched_process_fork",
        group: "sched",
        btf_program: "fork",
        nested_program: None,
        classic_program: "fork_classic",
        record_global: "FORK_RECORD",
        need: Need::Command,
        lost: "the children of the command",
    },
    Hook {
        tracepoint: "netif_receive_skb",
        group: "net",
        btf_program: "receive_skb",
        nested_program: None,
        classic_program: "receive_skb_classic",
        record_global: "RECEIVE_SKB_RECORD",
        need: Need::Ttl,
        lost: "the times to live of RSTs, and so the suspicion that one was forged",
    },
    Hook {
        tracepoint: "inet_sock_set_state",
        group: "sock",
        btf_program: "set_state",
        nested_program: Some("set_state_nested"),
        classic_program: "set_state_classic",
        record_global: "SET_STATE_RECORD",
        need: Need::Essential,
        lost: "everything",
    },
];

/// Ways to see who accepts a connection; chosen by `--accept-hook`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum AcceptHook {
    /// fexit where the kernel allows it, nothing elsewhere.
    #[default]
    Auto,
    /// The return of `inet_csk_accept()`: costs nothing measurable, must be allowed.
    Fexit,
    /// Tracepoints on the return of accept and accept4: slow every system call of the host down a little.
    Syscall,
    /// None: owners of accepted sockets are known when they act, or looked up; their opener is null.
    Off,
}

/// Program on the return of [`ACCEPT_FUNCTION`].
pub const ACCEPT_PROGRAM: &str = "accept";
/// The kernel function whose return tells of an accept.
pub const ACCEPT_FUNCTION: &str = "inet_csk_accept";
/// Program on the tracepoints of [`ACCEPT_SYSCALLS`].
pub const ACCEPT_SYSCALL_PROGRAM: &str = "accept_syscall";
/// Tracepoints, in the group `syscalls`, that tell of an accept.
pub const ACCEPT_SYSCALLS: [&str; 2] = ["sys_exit_accept", "sys_exit_accept4"];
