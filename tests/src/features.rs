//! What the running kernel has and what it lacks, asked of the kernel itself, and what follows for the tests: this is
//! the one place for lawful differences between kernels. Versions do not count, since distributions change kernels.

use std::{
    ffi::c_void,
    fs, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::OnceLock,
};

use nix::{
    libc,
    sys::resource::{RLIM_INFINITY, Resource, setrlimit},
};
use serde_json::{Value, json};

use crate::expect::{self, one_of};

/// Where a kernel describes its types.
const BTF: &str = "/sys/kernel/btf/vmlinux";

/// Something that not every kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// The tracepoint of sent RSTs tells of those without a full socket behind them, and why any is sent: both came at
    /// once (<https://git.kernel.org/linus/19822a980e19>, 6.10).
    EveryReset,
    /// It also tells why a RST is sent that is no answer to a segment.
    ReasonsOfOwnResets,
    /// Programs on tracepoints may ask for a socket's cookie (from 5.12 on).
    Cookies,
    /// Programs on the return of a function may be loaded and attached: arm64 did the former from 6.0 on, the latter from
    /// 6.4 on (<https://git.kernel.org/linus/2aa6ac03516d>).
    FunctionReturns,
    /// Programs on the entry of a function may be loaded, and the function that deals with a RST that came is given the
    /// packet (from 5.15 on).
    PacketOfReset,
    /// Connections over several paths.
    Mptcp,
    /// An `io_uring` can shut a socket down.
    UringShutdown,
    /// Maps do not count as locked memory (from 5.11 on).
    UnlockedMaps,
    /// The tool may read the kernel's description of its types. [`TYPES_VARIABLE`] takes it away.
    Types,
    /// A machine that is there for the tests alone, and may be spoiled. [`MACHINE_VARIABLE`] says so.
    OwnMachine,
}

/// `none` has the tool do without the kernel's description of its types.
pub const TYPES_VARIABLE: &str = "TCPCLOSE_TESTS_BTF";
/// Set to anything on a machine that tests may spoil.
const MACHINE_VARIABLE: &str = "TCPCLOSE_TESTS_MACHINE";

/// The features that are no failure if they are missing, by their names here and with commas between; set where it is known
/// what kernel this is.
const MAY_LACK_VARIABLE: &str = "TCPCLOSE_TESTS_MAY_LACK";

/// What is missing on a kernel of which it is known that it has to be there.
pub fn unlawfully_missing() -> Vec<Feature> {
    let Ok(lawful) = std::env::var(MAY_LACK_VARIABLE) else { return Vec::new() };
    let may_lack = |feature: &Feature| lawful.split(',').any(|name| name == format!("{feature:?}"));
    Feature::ALL.into_iter().filter(|feature| !feature.is_here() && !may_lack(feature)).collect()
}

impl Feature {
    const ALL: [Self; 10] = [
        Self::EveryReset,
        Self::ReasonsOfOwnResets,
        Self::Cookies,
        Self::FunctionReturns,
        Self::PacketOfReset,
        Self::Mptcp,
        Self::UringShutdown,
        Self::UnlockedMaps,
        Self::Types,
        Self::OwnMachine,
    ];

    /// Whether it is here. Looked for once: an emulated processor takes its time for that, and a test asks often.
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
            Self::Types => std::env::var_os(TYPES_VARIABLE).is_none_or(|value| value != "none"),
            Self::OwnMachine => std::env::var_os(MACHINE_VARIABLE).is_some(),
        }
    }

    /// Whether a test has to do without it, which is then told to whoever runs it: `cargo xtask test` reads this.
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
            Self::Types => "description of the kernel's types",
            Self::OwnMachine => "machine of the tests' own (TCPCLOSE_TESTS_MACHINE is not set)",
        }
    }
}

/// The expected `reason` of a RST, which has this name where the kernel tells reasons.
pub fn reason(name: Value) -> Value {
    if Feature::ReasonsOfOwnResets.is_here() {
        name
    } else if Feature::EveryReset.is_here() {
        one_of(&[name, json!("NOT_SPECIFIED")])
    } else {
        Value::Null
    }
}

/// Of the lines that ought to come, what can be told here.
pub fn tellable(expected: Vec<Value>) -> Vec<Value> {
    let every_reset = Feature::EveryReset.is_here();
    let is_told = |line: &Value| {
        let state = line.get("state");
        let without_socket = state == Some(&Value::Null) || state == Some(&json!("TIME_WAIT"));
        every_reset || line["event"] != "reset" || line["direction"] != "sent" || !without_socket
    };
    let told = expected
        .into_iter()
        .filter(is_told)
        .map(|line| if every_reset { line } else { without_reason(line) });
    if Feature::Types.is_here() { told.collect() } else { told.map(without_types).collect() }
}

/// A line as it may be where the kernel gives no reasons: why a listener sends a RST can be told from nothing else.
fn without_reason(mut line: Value) -> Value {
    if line["event"] == "reset" && line["direction"] == "sent" && line["state"] == "LISTEN" {
        line["cause"] = one_of(&[json!("unknown"), line["cause"].clone()]);
    }
    line
}

/// What is left of a line when the tool cannot look into the kernel's structures: what tracepoints say by themselves.
/// Anything else may be null, or what it ought to be. A cause may be said to be unknown.
fn without_types(expected: Value) -> Value {
    const SURE: [&str; 5] = ["event", "direction", "local", "remote", "states"];
    let Value::Object(fields) = expected else { return expected };
    let lessened = fields.into_iter().map(|(name, value)| {
        let value = match name.as_str() {
            "connection" => without_types(value),
            "cause" => one_of(&[Value::Null, json!("unknown"), value]),
            sure if SURE.contains(&sure) => value,
            _ => or_null(value),
        };
        (name, value)
    });
    lessened.collect()
}

/// The same, or null, wherever there is something.
fn or_null(expected: Value) -> Value {
    let lessened = match expected {
        Value::Object(fields) if !expect::is_mark(&fields) => fields
            .into_iter()
            .map(|(name, value)| {
                // Who acted may be known by something else than the act.
                let value = if name == "attribution" { expect::known() } else { or_null(value) };
                (name, value)
            })
            .collect(),
        other => other,
    };
    one_of(&[Value::Null, lessened])
}

/// The kernel's description of its types; empty without.
fn btf() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| fs::read(BTF).unwrap_or_default())
}

/// Whether a type, a member, a function or a value of this name is described.
fn has_name(name: &str) -> bool {
    position_of(name).is_some()
}

/// Where a name begins that is described.
fn position_of(name: &str) -> Option<usize> {
    let wanted = format!("\0{name}\0");
    let (bytes, length) = (btf(), wanted.len());
    // SAFETY: both are alive through the call and as long as said.
    let found = unsafe {
        libc::memmem(bytes.as_ptr().cast::<c_void>(), bytes.len(), wanted.as_ptr().cast::<c_void>(), length)
    };
    (!found.is_null()).then(|| found as usize - bytes.as_ptr() as usize + 1)
}

/// The number of a function in the description of types (`Documentation/bpf/btf.rst`).
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
        // What follows the twelve bytes that every type has.
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

/// When a program runs, as the kernel numbers it.
const AT_ENTRY: u32 = 24;
const AT_RETURN: u32 = 25;

/// `r0 = 0; exit`.
const NOTHING: [u64; 2] = [0xb7, 0x95];
/// `r1 = the second argument; r0 = 0; exit`, which takes a function that has one.
const SECOND_ARGUMENT: [u64; 3] = [0x8_1179, 0xb7, 0x95];

/// Whether the kernel takes a program on a function. It may describe the function, have the means, and refuse all the
/// same.
fn can_attach_to(function: &str, when: u32, instructions: &[u64]) -> bool {
    load(function, when, instructions).is_some_and(|program| attach(&program).is_some())
}

fn load(function: &str, when: u32, instructions: &[u64]) -> Option<OwnedFd> {
    const PROG_LOAD: libc::c_int = 5;
    const TRACING: u32 = 26;

    /// `union bpf_attr` for `BPF_PROG_LOAD`, as far as it is needed.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
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
    let attributes = Attributes {
        prog_type: TRACING,
        insn_cnt: u32::try_from(instructions.len()).ok()?,
        insns: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type: when,
        attach_btf_id: function_id(function)?,
        ..Attributes::default()
    };
    // Before 5.11 programs count as locked memory. Where the limit cannot be raised, the answer tells.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    // SAFETY: what the attributes point to is alive through the call, and as long as they say.
    unsafe { bpf(PROG_LOAD, &attributes) }
}

/// The link by which a program is attached to what it was loaded for; it is detached when that is dropped.
fn attach(program: &OwnedFd) -> Option<OwnedFd> {
    const RAW_TRACEPOINT_OPEN: libc::c_int = 17;

    /// `union bpf_attr` for `BPF_RAW_TRACEPOINT_OPEN`.
    #[repr(C)]
    struct Attributes {
        name: u64,
        prog_fd: RawFd,
        padding: u32,
    }
    let attributes = Attributes { name: 0, prog_fd: program.as_raw_fd(), padding: 0 };
    // SAFETY: these attributes point to nothing.
    unsafe { bpf(RAW_TRACEPOINT_OPEN, &attributes) }
}

/// The bpf system call, for a command that answers with a new descriptor.
///
/// # Safety
/// The attributes are those of the command, and what they point to is valid.
unsafe fn bpf<A>(command: libc::c_int, attributes: &A) -> Option<OwnedFd> {
    // SAFETY: the attributes are alive through the call and as long as said; the caller vouches for the rest.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, mem::size_of::<A>()) };
    let descriptor = RawFd::try_from(result).ok().filter(|descriptor| *descriptor >= 0)?;
    // SAFETY: the kernel has just made this descriptor and nothing else has it.
    Some(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
