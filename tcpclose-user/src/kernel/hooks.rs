//! The table of hooks: each hook with its variants, and what is lost without it. The loader attaches what is
//! in this table, and `tcpclose doctor` and docs/kernels.md are made from it. Hooks are not described
//! anywhere else.

/// A hook: one thing to observe, in one of several ways.
#[derive(Debug)]
pub struct Hook {
    /// The tracepoint as perf writes it, or a name for what the variants have in common.
    pub name: &'static str,
    /// The ways to observe it, the best first. The first one that the options permit and the kernel allows is
    /// used.
    pub variants: &'static [Variant],
    /// What happens if none of them works.
    pub need: HookNeed,
    /// What is lost without the hook, as the end of a sentence.
    pub lost: &'static str,
    /// The fields of the output that are null without it, in some events or in all.
    pub null: &'static [&'static str],
    /// What to do about it.
    pub fix: &'static str,
}

/// One way to observe it.
#[derive(Debug)]
pub struct Variant {
    /// The kind of its programs.
    pub kind: Kind,
    /// The programs, each with its attach point. Either all of them are attached or none.
    pub programs: &'static [(&'static str, &'static str)],
    /// The program that they call, if any: it is loaded as they are, and not attached.
    pub called: Option<&'static str>,
    /// When it may be used.
    pub when: When,
    /// Its drawback compared with the first variant, as a sentence; empty if it has none.
    pub worse: &'static str,
}

/// Kinds of programs. The attach point of a tracepoint is `group:name`; of the other kinds it is a function,
/// or what is iterated over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// BTF-typed raw tracepoint (`tp_btf`).
    TypedTracepoint,
    /// Classic tracepoint, through tracefs and perf. The string names the global that receives the record's
    /// layout.
    ClassicTracepoint(&'static str),
    /// Classic tracepoint on the return of a system call.
    SystemCall,
    /// Entry of a kernel function (`fentry`).
    FunctionEntry,
    /// Return of a kernel function (`fexit`).
    FunctionReturn,
    /// Iterator, which tcpclose runs on demand.
    Iterator,
    /// Raw tracepoint (`raw_tp`), whose arguments are plain numbers.
    RawTracepoint,
    /// Raw tracepoint program that is attached to nothing. tcpclose runs it on demand, with
    /// `BPF_PROG_TEST_RUN`.
    TestRun,
    /// No program: the user half reads `/proc`.
    Procfs,
}

/// When a variant may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Always.
    Always,
    /// Unless `--linger off` is given.
    Linger,
    /// With `-- COMMAND`.
    Command,
    /// With `--ttl`.
    Ttl,
    /// With one of these values of `--accept-hook`.
    Accept(&'static [AcceptHook]),
}

/// What happens if a hook cannot be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookNeed {
    /// Nothing can be traced.
    Essential,
    /// Tracing works, and a warning at its start reports the loss.
    Useful,
    /// Not every kernel allows it, and `doctor` reports that. If an option requests it by name, it has to
    /// work.
    Extra,
}

/// Ways to see who accepts a connection, chosen by `--accept-hook`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum AcceptHook {
    /// Use fexit if the kernel allows it, else nothing.
    #[default]
    Auto,
    /// Use fexit on `inet_csk_accept()`, at no measurable cost; fail if the kernel refuses it.
    Fexit,
    /// Use tracepoints on the return of accept and accept4, which slow every system call of the host by about
    /// 40 ns.
    Syscall,
    /// Use no hook: accepted sockets get their owners when those act on them, or by a lookup, and `opener` is
    /// null.
    Off,
}

impl Kind {
    /// The name of the kind, as in bpftrace and libbpf.
    pub fn name(self) -> &'static str {
        match self {
            Self::TypedTracepoint => "tp_btf",
            Self::ClassicTracepoint(_) | Self::SystemCall => "tracepoint",
            Self::FunctionEntry => "fentry",
            Self::FunctionReturn => "fexit",
            Self::Iterator => "iter",
            Self::RawTracepoint => "raw_tp",
            Self::TestRun => "test_run",
            Self::Procfs => "/proc",
        }
    }

    /// What it requires.
    pub fn needs(self) -> &'static str {
        match self {
            Self::TypedTracepoint | Self::RawTracepoint => "BTF, CAP_BPF, CAP_PERFMON",
            Self::ClassicTracepoint(_) => {
                "tracefs (mounted, or CAP_SYS_ADMIN to mount it), CAP_BPF, CAP_PERFMON"
            }
            Self::SystemCall => {
                "tracefs (mounted, or CAP_SYS_ADMIN to mount it), CONFIG_FTRACE_SYSCALLS, CAP_BPF, \
                 CAP_PERFMON"
            }
            Self::FunctionEntry | Self::FunctionReturn => {
                "BTF, BPF trampolines (x86-64 from 5.5, arm64 from 6.4) that the kernel allows, CAP_BPF, \
                 CAP_PERFMON"
            }
            Self::Iterator => "BTF, 5.8, CAP_BPF, CAP_PERFMON",
            Self::TestRun => "5.10, CAP_BPF, CAP_PERFMON",
            Self::Procfs => "CAP_SYS_PTRACE for processes of other users",
        }
    }
}

impl Variant {
    /// All of its programs, each with its attach point: those that are attached, and the one that they call.
    pub fn all_programs(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let called = self.called.and_then(|name| Some((name, self.programs.first()?.1)));
        self.programs.iter().copied().chain(called)
    }
}

impl When {
    /// The option without which the variant is not used.
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

/// The drawback of classic tracepoints: on each CPU all of them share one guard against recursion
/// (`bpf_prog_active` of `kernel/trace/bpf_trace.c`), while each typed one has its own.
const SHARED_GUARD: &str =
    "events that occur while another classic program runs on the same CPU are skipped and counted";

const fn typed(programs: &'static [(&'static str, &'static str)], when: When) -> Variant {
    Variant { kind: Kind::TypedTracepoint, programs, called: None, when, worse: "" }
}

const fn classic(
    programs: &'static [(&'static str, &'static str)],
    layout: &'static str,
    when: When,
) -> Variant {
    Variant { kind: Kind::ClassicTracepoint(layout), programs, called: None, when, worse: SHARED_GUARD }
}

/// Every hook, in the order in which they are attached. The hook that starts tracking a connection comes
/// last, so that the hooks on its end are attached by then.
pub static HOOKS: &[Hook] = &[
    Hook {
        name: "tcp:tcp_destroy_sock",
        variants: &[
            typed(&[("destroy_sock", "tcp:tcp_destroy_sock")], When::Always),
            classic(&[("destroy_sock_classic", "tcp:tcp_destroy_sock")], "DESTROY_SOCK_RECORD", When::Always),
        ],
        need: HookNeed::Useful,
        lost: "the owner of an accepted socket that a reset ended, if only its later close reveals it",
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
        need: HookNeed::Useful,
        lost: "`reset` lines for RSTs received, and the evidence of the peer's RST for `close` lines",
        null: &[],
        fix: "a kernel with this tracepoint (4.16 and later)",
    },
    Hook {
        name: "tcp:tcp_send_reset",
        variants: &[
            typed(&[("send_reset", "tcp:tcp_send_reset")], When::Always),
            classic(&[("send_reset_classic", "tcp:tcp_send_reset")], "SEND_RESET_RECORD", When::Always),
        ],
        need: HookNeed::Useful,
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
                called: None,
                when: When::Always,
                worse: "",
            },
            Variant {
                kind: Kind::Procfs,
                programs: &[],
                called: None,
                when: When::Always,
                worse: "owners of older sockets are looked up in /proc when the sockets end, which may be \
                        too late",
            },
        ],
        need: HookNeed::Useful,
        lost: "the owners and roles of sockets that are older than the trace",
        null: &["process", "connection.role"],
        fix: "a kernel with BTF (CONFIG_DEBUG_INFO_BTF), 5.8 or later",
    },
    Hook {
        name: "teardowns",
        variants: &[Variant {
            kind: Kind::TestRun,
            programs: &[("inspect", "a socket")],
            called: None,
            when: When::Linger,
            worse: "",
        }],
        need: HookNeed::Useful,
        lost: "`lingering` lines; `tcpclose list` still shows the sockets that linger now",
        null: &[],
        fix: "Linux 5.10 or later",
    },
    Hook {
        name: "accept",
        variants: &[
            Variant {
                kind: Kind::FunctionReturn,
                programs: &[("accept", "inet_csk_accept"), ("accept_nested", "inet_csk_accept")],
                called: None,
                when: When::Accept(&[AcceptHook::Auto, AcceptHook::Fexit]),
                worse: "",
            },
            Variant {
                kind: Kind::SystemCall,
                programs: &[
                    ("accept_syscall", "syscalls:sys_exit_accept"),
                    ("accept_syscall", "syscalls:sys_exit_accept4"),
                ],
                called: None,
                when: When::Accept(&[AcceptHook::Syscall]),
                worse: "every system call of the host takes about 40 ns longer, and accepts by io_uring are \
                        not seen",
            },
        ],
        need: HookNeed::Extra,
        lost: "who accepted a connection, and where in the code; owners are known once they act on it, or by \
               a lookup",
        null: &["opener"],
        fix: "--accept-hook syscall, which slows every system call of the host by about 40 ns",
    },
    Hook {
        name: "time to live",
        variants: &[
            // They see the RST, and the last packet with which the peer established the connection.
            Variant {
                kind: Kind::FunctionEntry,
                programs: &[
                    ("reset_ttl", "tcp_reset"),
                    ("connect_ttl", "tcp_finish_connect"),
                    ("child_ttl", "tcp_child_process"),
                ],
                called: None,
                when: When::Always,
                worse: "",
            },
            typed(&[("receive_skb", "net:netif_receive_skb")], When::Ttl),
            classic(&[("receive_skb_classic", "net:netif_receive_skb")], "RECEIVE_SKB_RECORD", When::Ttl),
        ],
        need: HookNeed::Extra,
        lost: "the times to live of RSTs, and with them the detection of forged ones",
        null: &["ttl", "handshake_ttl"],
        fix: "--ttl, which hooks every packet that the host receives",
    },
    Hook {
        name: "signals",
        variants: &[Variant {
            kind: Kind::RawTracepoint,
            programs: &[("signal_generate", "signal:signal_generate"), ("mark_victim", "oom:mark_victim")],
            called: None,
            when: When::Always,
            worse: "",
        }],
        need: HookNeed::Extra,
        lost: "who sent the signal that ended a process, and whether it was the OOM killer",
        null: &["signal_from"],
        fix: "a kernel with these tracepoints and with BTF (CONFIG_DEBUG_INFO_BTF)",
    },
    Hook {
        name: "sched:sched_process_fork",
        variants: &[
            typed(&[("fork", "sched:sched_process_fork")], When::Command),
            classic(&[("fork_classic", "sched:sched_process_fork")], "FORK_RECORD", When::Command),
        ],
        need: HookNeed::Useful,
        lost: "the connections of the command's children",
        null: &[],
        fix: "--comm or --pid instead of `-- COMMAND`",
    },
    Hook {
        name: "sock:inet_sock_set_state",
        variants: &[
            // The second program is attached after the first one, and handles events that occur while the
            // first one runs on the same CPU.
            Variant {
                kind: Kind::TypedTracepoint,
                programs: &[
                    ("set_state", "sock:inet_sock_set_state"),
                    ("set_state_nested", "sock:inet_sock_set_state"),
                ],
                called: Some("change_state"),
                when: When::Always,
                worse: "",
            },
            classic(&[("set_state_classic", "sock:inet_sock_set_state")], "SET_STATE_RECORD", When::Always),
        ],
        need: HookNeed::Essential,
        lost: "everything",
        null: &[],
        fix: "Linux 5.10 or later, with CONFIG_TRACEPOINTS and CONFIG_BPF_EVENTS, and BTF or tracefs",
    },
];
