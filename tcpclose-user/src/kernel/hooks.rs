//! The table of hooks: what is watched, in which ways, when, and what is lost without it. The loader attaches from it,
//! `tcpclose doctor` and docs/kernels.md are made of it; nothing else knows the hooks.

/// One thing that is watched.
#[derive(Debug)]
pub struct Hook {
    /// What that is: a tracepoint as perf writes it, or a word for what several ways lead to.
    pub name: &'static str,
    /// Ways to watch it, the best first. Of those that were asked for, the first that the kernel allows is taken.
    pub variants: &'static [Variant],
    /// What it means that none of them works.
    pub need: Need,
    /// What cannot be told then, as the end of a sentence.
    pub lost: &'static str,
    /// Fields of the output that are null then, for some events or for all.
    pub null: &'static [&'static str],
    /// What to do about it.
    pub fix: &'static str,
}

/// One way to watch it.
#[derive(Debug)]
pub struct Variant {
    /// What kind of program that takes.
    pub kind: Kind,
    /// Programs, each with what it is attached to; all of them or none.
    pub programs: &'static [(&'static str, &'static str)],
    /// When it may be taken.
    pub when: When,
    /// What is worse than in the first variant, as a sentence; empty if nothing is.
    pub worse: &'static str,
}

/// Kinds of program. Of a tracepoint, `at` is `group:name`; of other kinds, the function or what is iterated over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// BTF-typed raw tracepoint (`tp_btf`).
    TypedTracepoint,
    /// Classic tracepoint, through tracefs and perf; the global takes the layout of its record.
    ClassicTracepoint(&'static str),
    /// Classic tracepoint on the return of a system call.
    SystemCall,
    /// On the entry of a kernel function (`fentry`).
    FunctionEntry,
    /// On its return (`fexit`).
    FunctionReturn,
    /// Iterator: loaded, and run by tcpclose itself when it wants to know.
    Iterator,
    /// Raw tracepoint program that is attached to nothing: run by tcpclose itself, through `BPF_PROG_TEST_RUN`.
    TestRun,
    /// No program: the user half reads `/proc`.
    Procfs,
}

/// When a variant may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Always.
    Always,
    /// Without `--linger off`.
    Linger,
    /// With `-- COMMAND`.
    Command,
    /// With `--ttl`.
    Ttl,
    /// With one of these values of `--accept-hook`.
    Accept(&'static [AcceptHook]),
}

/// What it means that a hook cannot be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// There is nothing to trace.
    Essential,
    /// Tracing goes on, and the loss is told when it begins.
    Useful,
    /// Not every kernel has it: `doctor` tells. It has to work if an option asks for it by name.
    Extra,
}

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

impl Kind {
    /// The name of the kind, as bpftrace and libbpf users know it.
    pub fn name(self) -> &'static str {
        match self {
            Self::TypedTracepoint => "tp_btf",
            Self::ClassicTracepoint(_) | Self::SystemCall => "tracepoint",
            Self::FunctionEntry => "fentry",
            Self::FunctionReturn => "fexit",
            Self::Iterator => "iter",
            Self::TestRun => "test_run",
            Self::Procfs => "/proc",
        }
    }

    /// What it takes.
    pub fn needs(self) -> &'static str {
        match self {
            Self::TypedTracepoint => "BTF, CAP_BPF, CAP_PERFMON",
            Self::ClassicTracepoint(_) => {
                "tracefs (mounted, or CAP_SYS_ADMIN to mount it), CAP_BPF, CAP_PERFMON"
            }
            Self::SystemCall => {
                "tracefs (mounted, or CAP_SYS_ADMIN to mount it), CONFIG_FTRACE_SYSCALLS, CAP_BPF, CAP_PERFMON"
            }
            Self::FunctionEntry | Self::FunctionReturn => {
                "BTF, BPF trampolines that may be used (x86-64 from 5.5, arm64 from 6.4), CAP_BPF, CAP_PERFMON"
            }
            Self::Iterator => "BTF, 5.8, CAP_BPF, CAP_PERFMON",
            Self::TestRun => "5.10, CAP_BPF, CAP_PERFMON",
            Self::Procfs => "CAP_SYS_PTRACE for processes of other users",
        }
    }
}

impl When {
    /// The option without which the variant is not taken.
    pub fn option(self) -> Option<&'static str> {
        match self {
            Self::Always | Self::Linger => None,
            Self::Command => Some("-- COMMAND"),
            Self::Ttl => Some("--ttl"),
            Self::Accept(ways) if ways.contains(&AcceptHook::Auto) => None,
            Self::Accept(_) => Some("--accept-hook syscall"),
        }
    }
}

/// What all classic tracepoints have in common: they share one guard against recursion on each CPU
/// (`bpf_prog_active` of `kernel/trace/bpf_trace.c`), typed ones have one each.
const SHARED_GUARD: &str =
    "what happens while another classic program runs on the same CPU is skipped, and counted";

const fn typed(programs: &'static [(&'static str, &'static str)], when: When) -> Variant {
    Variant { kind: Kind::TypedTracepoint, programs, when, worse: "" }
}

const fn classic(
    programs: &'static [(&'static str, &'static str)],
    layout: &'static str,
    when: When,
) -> Variant {
    Variant { kind: Kind::ClassicTracepoint(layout), programs, when, worse: SHARED_GUARD }
}

/// Every hook, in the order in which they are attached: the one that begins lives comes last, so that no life begins
/// that could not be ended.
pub static HOOKS: &[Hook] = &[
    Hook {
        name: "tcp:tcp_destroy_sock",
        variants: &[
            typed(&[("destroy_sock", "tcp:tcp_destroy_sock")], When::Always),
            classic(&[("destroy_sock_classic", "tcp:tcp_destroy_sock")], "DESTROY_SOCK_RECORD", When::Always),
        ],
        need: Need::Useful,
        lost: "the owner of an accepted socket that a reset ended, where only its later close could have told",
        null: &["process"],
        fix: "a kernel with this tracepoint (4.16 and later)",
    },
    Hook {
        name: "tcp:tcp_receive_reset",
        variants: &[
            typed(&[("receive_reset", "tcp:tcp_receive_reset")], When::Always),
            classic(
                &[("receive_reset_classic", "tcp:tcp_receive_reset")],
                "RECEIVE_RESET_RECORD",
                When::Always,
            ),
        ],
        need: Need::Useful,
        lost: "`reset` lines for RSTs received, and the word of a peer's RST in `close` lines",
        null: &[],
        fix: "a kernel with this tracepoint (4.16 and later)",
    },
    Hook {
        name: "tcp:tcp_send_reset",
        variants: &[
            typed(&[("send_reset", "tcp:tcp_send_reset")], When::Always),
            classic(&[("send_reset_classic", "tcp:tcp_send_reset")], "SEND_RESET_RECORD", When::Always),
        ],
        need: Need::Useful,
        lost: "`reset` lines for RSTs sent, and the kernel's reason for them",
        null: &["reason"],
        fix: "a kernel with this tracepoint (4.16 and later)",
    },
    Hook {
        name: "descriptors",
        variants: &[
            Variant {
                kind: Kind::Iterator,
                programs: &[("inventory", "task_file")],
                when: When::Always,
                worse: "",
            },
            Variant {
                kind: Kind::Procfs,
                programs: &[],
                when: When::Always,
                worse: "owners of older sockets are looked up in /proc when they end, which may be too late",
            },
        ],
        need: Need::Useful,
        lost: "owners and roles of sockets older than the trace",
        null: &["process", "connection.role"],
        fix: "a kernel with BTF (CONFIG_DEBUG_INFO_BTF), 5.8 or later",
    },
    Hook {
        name: "teardowns",
        variants: &[Variant {
            kind: Kind::TestRun,
            programs: &[("look", "a socket")],
            when: When::Linger,
            worse: "",
        }],
        need: Need::Useful,
        lost: "`lingering` lines; `tcpclose list` shows what lingers now",
        null: &[],
        fix: "Linux 5.10 or later",
    },
    Hook {
        name: "accept",
        variants: &[
            Variant {
                kind: Kind::FunctionReturn,
                programs: &[("accept", "inet_csk_accept"), ("accept_nested", "inet_csk_accept")],
                when: When::Accept(&[AcceptHook::Auto, AcceptHook::Fexit]),
                worse: "",
            },
            Variant {
                kind: Kind::SystemCall,
                programs: &[
                    ("accept_syscall", "syscalls:sys_exit_accept"),
                    ("accept_syscall", "syscalls:sys_exit_accept4"),
                ],
                when: When::Accept(&[AcceptHook::Syscall]),
                worse: "every system call of the host takes about 40 ns longer, and accepts by io_uring are not seen",
            },
        ],
        need: Need::Extra,
        lost: "who accepted a connection, and where; owners are known when they act on it, or looked up",
        null: &["opener"],
        fix: "--accept-hook syscall, which slows every system call of the host by about 40 ns",
    },
    Hook {
        name: "time to live",
        variants: &[
            // The packet that resets, and the last one that the peer sent to establish the connection.
            Variant {
                kind: Kind::FunctionEntry,
                programs: &[
                    ("reset_ttl", "tcp_reset"),
                    ("connect_ttl", "tcp_finish_connect"),
                    ("child_ttl", "tcp_child_process"),
                ],
                when: When::Always,
                worse: "",
            },
            typed(&[("receive_skb", "net:netif_receive_skb")], When::Ttl),
            classic(&[("receive_skb_classic", "net:netif_receive_skb")], "RECEIVE_SKB_RECORD", When::Ttl),
        ],
        need: Need::Extra,
        lost: "the times to live of RSTs, and so the suspicion that one was forged",
        null: &["ttl", "handshake_ttl"],
        fix: "--ttl, which takes a look at every packet that the host receives",
    },
    Hook {
        name: "sched:sched_process_fork",
        variants: &[
            typed(&[("fork", "sched:sched_process_fork")], When::Command),
            classic(&[("fork_classic", "sched:sched_process_fork")], "FORK_RECORD", When::Command),
        ],
        need: Need::Useful,
        lost: "the children of the command",
        null: &[],
        fix: "--comm or --pid in place of `-- COMMAND`",
    },
    Hook {
        name: "sock:inet_sock_set_state",
        variants: &[
            // The second program takes what comes while the first one runs on the same CPU; attached after it.
            typed(
                &[
                    ("set_state", "sock:inet_sock_set_state"),
                    ("set_state_nested", "sock:inet_sock_set_state"),
                ],
                When::Always,
            ),
            classic(&[("set_state_classic", "sock:inet_sock_set_state")], "SET_STATE_RECORD", When::Always),
        ],
        need: Need::Essential,
        lost: "everything",
        null: &[],
        fix: "Linux 5.10 or later, with CONFIG_TRACEPOINTS and CONFIG_BPF_EVENTS, and BTF or tracefs",
    },
];
