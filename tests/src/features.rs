//! The features of the running kernel, found by asking the kernel, and their consequences for the tests. This
//! is the only place that describes permitted differences between kernels. Versions are not compared, because
//! distributions backport changes.

use std::{
    env,
    ffi::c_void,
    fs, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::PathBuf,
    process::Command,
    sync::OnceLock,
};

use anyhow::{Context, Result};
use nix::{
    libc,
    sys::resource::{RLIM_INFINITY, Resource, setrlimit},
};
use serde_json::{Value, json};

use crate::expect::{self, one_of};

/// The file with the kernel's BTF.
const BTF: &str = "/sys/kernel/btf/vmlinux";

/// A feature that not every kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// The tracepoint of sent RSTs also fires for RSTs without a full socket, and has the reason of a RST.
    /// Both came with one commit (<https://git.kernel.org/linus/19822a980e19>, 6.10).
    EveryReset,
    /// That tracepoint also has the reason of a RST that does not answer a segment.
    ReasonsOfOwnResets,
    /// Tracing programs may call `bpf_get_socket_cookie()` (5.12).
    Cookies,
    /// Programs on the return of a function can be loaded and attached. On arm64, loading works from 6.0 on,
    /// and attaching from 6.4 on (<https://git.kernel.org/linus/2aa6ac03516d>).
    FunctionReturns,
    /// Programs on the entry of a function can be attached, and the function that processes a received RST
    /// has the packet as an argument (5.15).
    PacketOfReset,
    /// Multipath TCP.
    Mptcp,
    /// `io_uring` can shut down a socket.
    UringShutdown,
    /// Maps do not count as locked memory (5.11).
    UnlockedMaps,
    /// The kernel and the processor run 32-bit programs.
    Programs32,
    /// The tool may read the kernel's BTF. [`TYPES_VARIABLE`] disables it.
    Types,
    /// The machine exists for the tests only, and tests may change it. [`MACHINE_VARIABLE`] says so.
    OwnMachine,
}

/// The value `none` makes the tool run without the kernel's BTF.
pub const TYPES_VARIABLE: &str = "TCPCLOSE_TESTS_BTF";
/// Set to any value on a machine that tests may change.
const MACHINE_VARIABLE: &str = "TCPCLOSE_TESTS_MACHINE";

/// The features that may be missing, as a comma-separated list of their names here. It is set where the
/// kernel is known.
const MAY_LACK_VARIABLE: &str = "TCPCLOSE_TESTS_MAY_LACK";

/// The features that are missing although this kernel has to have them.
pub fn unlawfully_missing() -> Vec<Feature> {
    let Ok(lawful) = env::var(MAY_LACK_VARIABLE) else { return Vec::new() };
    let may_lack = |feature: &Feature| lawful.split(',').any(|name| name == format!("{feature:?}"));
    Feature::ALL.into_iter().filter(|feature| !feature.is_here() && !may_lack(feature)).collect()
}

impl Feature {
    const ALL: [Self; 11] = [
        Self::EveryReset,
        Self::ReasonsOfOwnResets,
        Self::Cookies,
        Self::FunctionReturns,
        Self::PacketOfReset,
        Self::Mptcp,
        Self::UringShutdown,
        Self::UnlockedMaps,
        Self::Programs32,
        Self::Types,
        Self::OwnMachine,
    ];

    /// Whether the kernel has the feature. The result is cached, because probing is slow on an emulated
    /// processor and tests ask often.
    pub fn is_here(self) -> bool {
        static ANSWERS: [OnceLock<bool>; Feature::ALL.len()] =
            [const { OnceLock::new() }; Feature::ALL.len()];
        *ANSWERS[self as usize].get_or_init(|| self.is_found())
    }

    fn is_found(self) -> bool {
        match self {
            Self::EveryReset => has_name("sk_rst_reason"),
            Self::ReasonsOfOwnResets => has_name("SK_RST_REASON_TCP_ABORT_ON_CLOSE"),
            Self::Cookies => has_name("bpf_get_socket_ptr_cookie"),
            Self::FunctionReturns => can_attach_to("inet_csk_accept", AT_RETURN, &NOTHING),
            Self::PacketOfReset => can_attach_to("tcp_reset", AT_ENTRY, &SECOND_ARGUMENT),
            Self::Mptcp => fs::exists("/proc/sys/net/mptcp").unwrap_or(false),
            Self::UringShutdown => has_name("IORING_OP_SHUTDOWN"),
            Self::UnlockedMaps => !has_name("bpf_map_charge_init"),
            Self::Programs32 => compat().is_ok_and(|program| Command::new(program).status().is_ok()),
            Self::Types => env::var_os(TYPES_VARIABLE).is_none_or(|value| value != "none"),
            Self::OwnMachine => env::var_os(MACHINE_VARIABLE).is_some(),
        }
    }

    /// Whether a test has to be skipped for lack of the feature. The skip is printed, and `cargo xtask test`
    /// reads it.
    pub fn is_missed(self) -> bool {
        let missed = !self.is_here();
        if missed {
            println!("skipped: here is no {}", self.name());
        }
        missed
    }

    fn name(self) -> &'static str {
        match self {
            Self::EveryReset => "tracing of RSTs without a socket",
            Self::ReasonsOfOwnResets => "reason of RSTs that are no answers",
            Self::Cookies => "way for tracing programs to ask for cookies",
            Self::FunctionReturns => "way to have programs on the return of functions",
            Self::PacketOfReset => "way to see the packets of RSTs in the function that deals with them",
            Self::Mptcp => "MPTCP",
            Self::UringShutdown => "shutdown by io_uring",
            Self::UnlockedMaps => "map that is not locked memory",
            Self::Programs32 => "way to run 32-bit programs",
            Self::Types => "description of the kernel's types",
            Self::OwnMachine => "machine of the tests' own (TCPCLOSE_TESTS_MACHINE is not set)",
        }
    }
}

/// The 32-bit program, which `cargo xtask test` builds. Without arguments it does nothing.
pub fn compat() -> Result<PathBuf> {
    let program = env::var_os("TCPCLOSE_TESTS_COMPAT");
    program.map(PathBuf::from).context("TCPCLOSE_TESTS_COMPAT does not name it: run `cargo xtask test`")
}

/// The expected `reason` of a RST: this name, where the kernel reports reasons.
pub fn reason(name: Value) -> Value {
    if Feature::ReasonsOfOwnResets.is_here() {
        name
    } else if Feature::EveryReset.is_here() {
        one_of(&[name, json!("NOT_SPECIFIED")])
    } else {
        Value::Null
    }
}

/// The part of the expected lines that the tool can report on this kernel.
pub fn reportable(expected: Vec<Value>) -> Vec<Value> {
    let every_reset = Feature::EveryReset.is_here();
    let is_reported = |line: &Value| {
        let state = line.get("state");
        let without_socket = state == Some(&Value::Null) || state == Some(&json!("TIME_WAIT"));
        every_reset || line["event"] != "reset" || line["direction"] != "sent" || !without_socket
    };
    let reported = expected
        .into_iter()
        .filter(is_reported)
        .map(|line| if every_reset { line } else { without_reason(line) });
    if Feature::Types.is_here() { reported.collect() } else { reported.map(without_types).collect() }
}

/// An expected line on a kernel without reasons, which are the only source for why a listener sends a RST.
fn without_reason(mut line: Value) -> Value {
    if line["event"] == "reset" && line["direction"] == "sent" && line["state"] == "LISTEN" {
        line["cause"] = one_of(&[json!("unknown"), line["cause"].clone()]);
    }
    line
}

/// An expected line where the tool cannot read the kernel's structures and has only the arguments of
/// tracepoints. A fact that is only in these structures must be null. Of the others, a cause may be unknown,
/// and a field may be null or the expected value unless it follows from the arguments alone.
fn without_types(expected: Value) -> Value {
    const IN_ARGUMENTS: [&str; 8] =
        ["event", "direction", "local", "remote", "states", "opened", "age_ms", "close_wait_ms"];
    const IN_STRUCTURES: [&str; 12] = [
        "netns",
        "cookie",
        "bytes_sent",
        "bytes_received",
        "retransmits",
        "rtt_us",
        "idle_ms",
        "last_data",
        "since_sent_ms",
        "since_received_ms",
        "unread_bytes",
        "unacked_bytes",
    ];
    let Value::Object(fields) = expected else { return expected };
    let lessened = fields.into_iter().map(|(name, value)| {
        let value = match name.as_str() {
            "connection" => without_types(value),
            "cause" => one_of(&[Value::Null, json!("unknown"), value]),
            // Acts are seen, but their kinds are not known.
            "acts" => expect::known(),
            name if IN_ARGUMENTS.contains(&name) => value,
            name if IN_STRUCTURES.contains(&name) => Value::Null,
            _ => or_null(value),
        };
        (name, value)
    });
    lessened.collect()
}

/// The expectation or null, at every leaf.
fn or_null(expected: Value) -> Value {
    let lessened = match expected {
        Value::Object(fields) if !expect::is_mark(&fields) => fields
            .into_iter()
            .map(|(name, value)| {
                // The acting process may be known from something other than its action.
                let value = if name == "attribution" { expect::known() } else { or_null(value) };
                (name, value)
            })
            .collect(),
        other => other,
    };
    one_of(&[Value::Null, lessened])
}

/// The kernel's BTF; empty if there is none.
fn btf() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| fs::read(BTF).unwrap_or_default())
}

/// Whether the BTF has a type, a member, a function or a value of this name.
fn has_name(name: &str) -> bool {
    position_of(name).is_some()
}

/// The offset of a name in the BTF.
fn position_of(name: &str) -> Option<usize> {
    let wanted = format!("\0{name}\0");
    let (bytes, length) = (btf(), wanted.len());
    // SAFETY: both pointers are valid for the given lengths during the call.
    let found = unsafe {
        libc::memmem(bytes.as_ptr().cast::<c_void>(), bytes.len(), wanted.as_ptr().cast::<c_void>(), length)
    };
    (!found.is_null()).then(|| found as usize - bytes.as_ptr() as usize + 1)
}

/// The BTF ID of a function (`Documentation/bpf/btf.rst`).
fn function_id(name: &str) -> Option<u32> {
    const FUNCTION: u32 = 12;
    let number = |at: usize| Some(u32::from_ne_bytes(btf().get(at..at + 4)?.try_into().ok()?));
    let size = |at: usize| number(at).map(|number| number as usize);
    let header = size(4)?;
    let (types, types_length, names) = (header + size(8)?, size(12)?, header + size(16)?);
    let wanted = position_of(name)?.checked_sub(names)?;
    let mut at = types;
    for id in 1.. {
        if at >= types + types_length {
            break;
        }
        let info = number(at + 4)?;
        let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        if kind == FUNCTION && size(at)? == wanted {
            return Some(id);
        }
        // The size of what follows the twelve bytes that all types have in common.
        at += 12
            + match kind {
                1 | 14 | 17 => 4,
                3 => 12,
                4 | 5 | 15 | 19 => 12 * count,
                6 | 13 => 8 * count,
                _ => 0,
            };
    }
    None
}

/// The attach types of programs on functions, by the kernel's numbers.
const AT_ENTRY: u32 = 24;
const AT_RETURN: u32 = 25;

/// `r0 = 0; exit`.
const NOTHING: [u64; 2] = [0xb7, 0x95];
/// `r1 = the second argument; r0 = 0; exit`. The verifier accepts it only for a function with a second
/// argument.
const SECOND_ARGUMENT: [u64; 3] = [0x8_1179, 0xb7, 0x95];

/// Whether the kernel accepts a program on a function. A kernel may describe the function and support such
/// programs, and still refuse this one.
fn can_attach_to(function: &str, when: u32, instructions: &[u64]) -> bool {
    load(function, when, instructions).is_some_and(|program| attach(&program).is_some())
}

fn load(function: &str, when: u32, instructions: &[u64]) -> Option<OwnedFd> {
    const PROG_LOAD: libc::c_int = 5;
    const TRACING: u32 = 26;

    /// The part of `union bpf_attr` that `BPF_PROG_LOAD` needs here.
    #[repr(C)]
    #[derive(Default)]
    struct LoadAttributes {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log: [u32; 4],
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
        prog_btf_fd: u32,
        func_info: [u32; 4],
        line_info: [u32; 4],
        attach_btf_id: u32,
    }
    let attributes = LoadAttributes {
        prog_type: TRACING,
        insn_cnt: u32::try_from(instructions.len()).ok()?,
        insns: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type: when,
        attach_btf_id: function_id(function)?,
        ..LoadAttributes::default()
    };
    // Before 5.11 programs count as locked memory. If the limit cannot be raised, loading fails and shows it.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    // SAFETY: the pointers in the attributes are valid for the given lengths during the call.
    unsafe { bpf(PROG_LOAD, &attributes) }
}

/// Attaches a program to the hook that it was loaded for. Dropping the link detaches it.
fn attach(program: &OwnedFd) -> Option<OwnedFd> {
    const RAW_TRACEPOINT_OPEN: libc::c_int = 17;

    /// `union bpf_attr` for `BPF_RAW_TRACEPOINT_OPEN`.
    #[repr(C)]
    struct LinkAttributes {
        name: u64,
        prog_fd: RawFd,
        padding: u32,
    }
    let attributes = LinkAttributes { name: 0, prog_fd: program.as_raw_fd(), padding: 0 };
    // SAFETY: these attributes contain no pointers.
    unsafe { bpf(RAW_TRACEPOINT_OPEN, &attributes) }
}

/// The `bpf` system call, for a command that returns a new descriptor.
///
/// # Safety
///
/// The attributes must be those of the command, and their pointers must be valid.
unsafe fn bpf<A>(command: libc::c_int, attributes: &A) -> Option<OwnedFd> {
    // SAFETY: the attributes are valid for their size during the call; the caller guarantees the rest.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, mem::size_of::<A>()) };
    let descriptor = RawFd::try_from(result).ok().filter(|descriptor| *descriptor >= 0)?;
    // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
    Some(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
