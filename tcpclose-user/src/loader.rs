//! Loads the kernel half: finds out what this kernel is like, hands that to the programs as read-only globals, and
//! attaches each hook the best way there is.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, AsRawFd as _, RawFd},
    path::PathBuf,
    str::FromStr,
};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Btf, Ebpf, EbpfLoader, VerifierLogLevel,
    programs::{BtfTracePoint, FExit, Iter, ProgramType, TracePoint},
    sys::{BpfHelper, is_helper_supported},
};
use tcpclose_common::{
    offsets::{ABSENT, RecordOffsets, StructOffsets},
    params::Params,
};

use crate::{
    attribute::inventory,
    failure::Failure,
    hook::{
        ACCEPT_FUNCTION, ACCEPT_PROGRAM, ACCEPT_SYSCALL_PROGRAM, ACCEPT_SYSCALLS, AcceptHook, HOOKS, Hook,
        Need, Variant,
    },
    kernel::{TypeFacts, tracefs},
    privilege,
};

/// The BPF object that `build.rs` found, or nothing.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tcpclose.bpf.o"));

/// Where descriptions of the kernel's types come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BtfSource {
    /// The running kernel, if it has them.
    #[default]
    Kernel,
    /// A file of raw BTF, for a kernel built without.
    File(PathBuf),
    /// Nowhere: do with what tracefs tells.
    None,
}

impl FromStr for BtfSource {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "kernel" => Self::Kernel,
            "none" => Self::None,
            path => Self::File(path.into()),
        })
    }
}

/// What is asked of the kernel half.
#[derive(Clone, Debug)]
pub struct Request {
    /// Filters and stacks; what depends on the kernel is filled in here.
    pub params: Params,
    /// Whether children of followed processes are followed.
    pub follow_children: bool,
    /// How to see who accepts a connection.
    pub accept_hook: AcceptHook,
    /// Size of the table of live sockets.
    pub connections: u32,
    /// See [`BtfSource`].
    pub btf: BtfSource,
    /// Level of the kernel half's own log, `None` for silence.
    pub log: Option<aya_log::Level>,
}

/// The kernel half at work. Dropping it detaches everything.
pub struct Loaded {
    /// Programs, links and maps.
    pub ebpf: Ebpf,
    /// Names of `enum sk_rst_reason` by number; empty on kernels without.
    pub reset_reasons: BTreeMap<i64, String>,
    /// Whether the program that looks at all descriptors is loaded.
    pub has_inventory: bool,
    /// Descriptors of programs whose skipped runs are losses: those without an understudy.
    pub guarded: Vec<RawFd>,
    /// What is attached, and how.
    pub attached: Vec<(&'static Hook, Variant)>,
    /// What is lost on this kernel with these privileges, a sentence each.
    pub losses: Vec<String>,
}

/// What is known of the running kernel before anything is loaded.
struct Kernel {
    structs: StructOffsets,
    /// For attaching by type; `None` where that is out of the question.
    btf: Option<Btf>,
    reset_reasons: BTreeMap<i64, String>,
    has_reset_reason: bool,
    accept_params: Option<usize>,
    losses: Vec<String>,
}

impl Kernel {
    fn read(source: &BtfSource) -> Result<Self> {
        let facts = match source {
            BtfSource::None => Err(anyhow!("told to do without (--btf none)")),
            BtfSource::Kernel => TypeFacts::of_running_kernel(),
            BtfSource::File(path) => {
                let bytes = std::fs::read(path)
                    .with_context(|| format!("cannot read the BTF that --btf names, {}", path.display()))?;
                Ok(TypeFacts::parse(&bytes).with_context(|| format!("cannot use {}", path.display()))?)
            }
        };
        Ok(match facts {
            Ok(facts) => Self {
                structs: facts.offsets,
                btf: if *source == BtfSource::Kernel { Btf::from_sys_fs().ok() } else { None },
                reset_reasons: facts.reset_reasons,
                has_reset_reason: facts.send_reset_has_reason.unwrap_or(false),
                accept_params: facts.accept_params,
                losses: Vec::new(),
            },
            Err(error) => Self {
                structs: StructOffsets::ABSENT,
                btf: None,
                reset_reasons: BTreeMap::new(),
                has_reset_reason: false,
                accept_params: None,
                losses: vec![format!(
                    "no BTF, so bytes, idle times, namespaces, triggers, causes and most owners are null: {error:#}"
                )],
            },
        })
    }
}

/// Loads and attaches what `request` needs.
///
/// # Errors
/// A privilege is missing, the kernel lacks what nothing can be traced without, or it refuses a program.
pub fn load(request: &Request) -> Result<Loaded> {
    if OBJECT.is_empty() {
        return Err(Failure {
            failed: "this build of tcpclose has no kernel half".to_owned(),
            found: "it was built by a plain `cargo build`".to_owned(),
            needed: "the BPF object, which `cargo xtask` builds first".to_owned(),
            fix: "cargo xtask run -- [ARGUMENTS]".to_owned(),
        }
        .into());
    }
    privilege::check()?;
    raise_memlock_limit();
    let kernel = Kernel::read(&request.btf)?;
    let mut params = request.params;
    params.has_reset_reason = u32::from(kernel.has_reset_reason);
    params.has_pt_regs_helper = u32::from(
        is_helper_supported(ProgramType::TracePoint, BpfHelper::BPF_FUNC_task_pt_regs).unwrap_or(false),
    );
    params.has_destroy = 1;
    let mut losses = privilege::losses();
    losses.extend(kernel.losses.iter().cloned());

    let mut refusal = None;
    if kernel.btf.is_some() {
        // Whether this kind of program may ask for a socket's cookie (5.12 and later) cannot be probed for: try.
        params.has_cookie_helper = 1;
        for has_cookie_helper in [1, 0] {
            params.has_cookie_helper = has_cookie_helper;
            match load_btf(request, &kernel, &params) {
                Ok((mut ebpf, attached)) => {
                    let has_inventory = load_inventory(&mut ebpf, &kernel, &mut losses);
                    attach_accept(request, &kernel, &mut ebpf)?;
                    let reset_reasons = kernel.reset_reasons;
                    let guarded = guarded(&ebpf);
                    return Ok(Loaded { ebpf, reset_reasons, has_inventory, guarded, attached, losses });
                }
                // The second refusal counts: the first may be of the helper alone.
                Err(error) => refusal = Some(error),
            }
        }
        if let Some(error) = &refusal {
            losses.push(format!(
                "programs on typed tracepoints are refused, classic ones are used, which skip what happens while \
                 another one runs on the same CPU: {error:#}"
            ));
        }
    }
    params.has_cookie_helper = 0;
    let loaded =
        tracefs::with(|tracefs| load_classic(request, &kernel, &params, tracefs)).map_err(|error| {
            let mut failure = Failure::from(error);
            if let Some(refusal) = &refusal {
                // The better way was refused first, and what mends that is in its words.
                failure.failed = format!("{refusal:#}; nor by classic tracepoints: {}", failure.failed);
            }
            if kernel.btf.is_none() {
                failure.needed.push_str("; with BTF (CONFIG_DEBUG_INFO_BTF) it would not be needed");
            }
            failure
        })?;
    let loaded = loaded.map_err(|error| match refusal {
        Some(refusal) => error.context(format!("{refusal:#}; nor by classic tracepoints")),
        None => error,
    })?;
    losses.extend(loaded.losses);
    Ok(Loaded { losses, ..loaded })
}

/// Sets globals and sizes, and makes the maps.
fn prepare(
    request: &Request,
    kernel: &Kernel,
    params: &Params,
    records: &[(&'static str, RecordOffsets)],
) -> Result<Ebpf> {
    let accept_syscall_result =
        if request.accept_hook == AcceptHook::Syscall { syscall_result()? } else { ABSENT };
    // A program on a function's return finds the arguments, eight bytes each, and then the result.
    let accept_result =
        kernel.accept_params.and_then(|params| u16::try_from(params * 8).ok()).unwrap_or(ABSENT);
    let level = request.log.map_or(0, |level| level as u8);
    let mut loader = EbpfLoader::new();
    loader
        .btf(None)
        .verifier_log_level(VerifierLogLevel::STATS)
        .override_global("STRUCTS", &kernel.structs, true)
        .override_global("ACCEPT_RESULT", &accept_result, true)
        .override_global("ACCEPT_SYSCALL_RESULT", &accept_syscall_result, true)
        .override_global("PARAMS", params, true)
        .override_global(aya_log::LEVEL, &level, false)
        .map_max_entries("CONNECTIONS", request.connections);
    for (global, layout) in records {
        loader.override_global(global, layout, true);
    }
    loader.load(OBJECT).context(
        "the kernel refuses the maps (before 5.11 they count against RLIMIT_MEMLOCK: `ulimit -l unlimited` mends that)",
    )
}

fn load_btf(
    request: &Request,
    kernel: &Kernel,
    params: &Params,
) -> Result<(Ebpf, Vec<(&'static Hook, Variant)>)> {
    let btf = kernel.btf.as_ref().context("no BTF")?;
    let mut ebpf = prepare(request, kernel, params, &[])?;
    let mut attached = Vec::new();
    for hook in wanted(request) {
        for name in [Some(hook.btf_program), hook.nested_program].into_iter().flatten() {
            let program: &mut BtfTracePoint = ebpf
                .program_mut(name)
                .with_context(|| format!("the object has no program {name}"))?
                .try_into()?;
            program
                .load(hook.tracepoint, btf)
                .with_context(|| format!("cannot load the program for {}", hook.name()))?;
            program.attach().with_context(|| format!("cannot attach to {}", hook.name()))?;
        }
        attached.push((hook, Variant::Btf));
    }
    Ok((ebpf, attached))
}

fn load_classic(
    request: &Request,
    kernel: &Kernel,
    params: &Params,
    tracefs: &tracefs::Tracefs,
) -> Result<Loaded> {
    let mut params = *params;
    let mut losses = Vec::new();
    let mut present = Vec::new();
    let mut records = Vec::new();
    let mut reset_reasons = kernel.reset_reasons.clone();
    for hook in wanted(request) {
        let format = match tracefs.format(&format!("{}/{}", hook.group, hook.tracepoint)) {
            Ok(format) => format,
            Err(error) if hook.need == Need::Essential => return Err(no_tracepoint(hook, &error).into()),
            Err(error) => {
                if hook.tracepoint == "tcp_destroy_sock" {
                    params.has_destroy = 0;
                }
                losses.push(format!("without {}, no {}: {error:#}", hook.name(), hook.lost));
                continue;
            }
        };
        if reset_reasons.is_empty() {
            reset_reasons = format.value_names("reason");
        }
        records.push((hook.record_global, format.record_offsets()));
        present.push(hook);
    }
    let mut ebpf = prepare(request, kernel, &params, &records)?;
    let mut attached = Vec::new();
    for hook in present {
        let program: &mut TracePoint = ebpf
            .program_mut(hook.classic_program)
            .with_context(|| format!("the object has no program {}", hook.classic_program))?
            .try_into()?;
        program.load().with_context(|| format!("cannot load the program for {}", hook.name()))?;
        program
            .attach(hook.group, hook.tracepoint)
            .with_context(|| format!("cannot attach to {}", hook.name()))?;
        attached.push((hook, Variant::Classic));
    }
    let has_inventory = load_inventory(&mut ebpf, kernel, &mut losses);
    attach_accept(request, kernel, &mut ebpf)?;
    let guarded = guarded(&ebpf);
    Ok(Loaded { ebpf, reset_reasons, has_inventory, guarded, attached, losses })
}

/// The kernel skips a program that is running on the same CPU already, and counts that with the program.
fn guarded(ebpf: &Ebpf) -> Vec<RawFd> {
    let alone = HOOKS.iter().filter(|hook| hook.nested_program.is_none()).map(|hook| hook.btf_program);
    let classic = HOOKS.iter().map(|hook| hook.classic_program);
    let loaded = alone.chain(classic).filter_map(|name| ebpf.program(name)?.fd().ok());
    loaded.map(|fd| fd.as_fd().as_raw_fd()).collect()
}

/// Loads the program that looks at all descriptors. Without it, `/proc` is read for the same purpose.
fn load_inventory(ebpf: &mut Ebpf, kernel: &Kernel, losses: &mut Vec<String>) -> bool {
    let result = kernel.btf.as_ref().context("no BTF").and_then(|btf| {
        let program = ebpf.program_mut(inventory::PROGRAM).context("the object has no such program")?;
        let program: &mut Iter = program.try_into()?;
        Ok(program.load("task_file", btf)?)
    });
    if let Err(error) = &result {
        losses.push(format!(
            "no iterator over descriptors, so owners of older sockets are looked up in /proc when they end, which may be \
             too late: {error:#}"
        ));
    }
    result.is_ok()
}

/// Attaches what tells of accepts. What was asked for by name must work; `auto` goes without where it does not.
fn attach_accept(request: &Request, kernel: &Kernel, ebpf: &mut Ebpf) -> Result<()> {
    match request.accept_hook {
        AcceptHook::Off => Ok(()),
        AcceptHook::Auto => {
            if let Err(error) = attach_accept_fexit(kernel, ebpf) {
                log::debug!("accepts are not seen: {error:#}");
            }
            Ok(())
        }
        AcceptHook::Fexit => attach_accept_fexit(kernel, ebpf).map_err(|error| {
            Failure {
                failed: "cannot see accepts by fexit".to_owned(),
                found: format!("{error:#}"),
                needed: "a kernel with BTF and BPF trampolines that may be used (x86-64 from 5.5 on, arm64 from 6.0 on)"
                    .to_owned(),
                fix: "--accept-hook syscall, which costs every system call of the host about 40 ns; or off".to_owned(),
            }
            .into()
        }),
        AcceptHook::Syscall => attach_accept_syscall(ebpf),
    }
}

fn attach_accept_fexit(kernel: &Kernel, ebpf: &mut Ebpf) -> Result<()> {
    let btf = kernel.btf.as_ref().context("no BTF")?;
    kernel.accept_params.with_context(|| format!("BTF does not describe {ACCEPT_FUNCTION}()"))?;
    let program: &mut FExit =
        ebpf.program_mut(ACCEPT_PROGRAM).context("the object has no such program")?.try_into()?;
    program.load(ACCEPT_FUNCTION, btf)?;
    program.attach()?;
    Ok(())
}

fn attach_accept_syscall(ebpf: &mut Ebpf) -> Result<()> {
    let program: &mut TracePoint =
        ebpf.program_mut(ACCEPT_SYSCALL_PROGRAM).context("the object has no such program")?.try_into()?;
    program.load().context("cannot load the program for accept")?;
    tracefs::with(|_| {
        for tracepoint in ACCEPT_SYSCALLS {
            program
                .attach("syscalls", tracepoint)
                .with_context(|| format!("cannot attach to syscalls:{tracepoint}"))?;
        }
        Ok(())
    })
    .map_err(Failure::from)?
}

/// Offset of the result in the record of `sys_exit_accept`.
fn syscall_result() -> Result<u16> {
    let [tracepoint, _] = ACCEPT_SYSCALLS;
    let format =
        tracefs::with(|tracefs| tracefs.format(&format!("syscalls/{tracepoint}"))).map_err(Failure::from)?;
    let format = format.context("--accept-hook syscall needs a kernel built with CONFIG_FTRACE_SYSCALLS")?;
    let result = format.field("ret", 8).and_then(|field| field.offset.try_into().ok());
    result.with_context(|| format!("the record of syscalls:{tracepoint} has no result of 8 bytes"))
}

fn no_tracepoint(hook: &Hook, error: &anyhow::Error) -> Failure {
    Failure {
        failed: format!("cannot trace: the tracepoint {} is not there", hook.name()),
        found: format!("{error:#}"),
        needed: "Linux 4.16 or later, built with CONFIG_TRACEPOINTS and CONFIG_BPF_EVENTS".to_owned(),
        fix: format!("grep -r . /sys/kernel/tracing/events/{}/{}/id", hook.group, hook.tracepoint),
    }
}

fn wanted(request: &Request) -> impl Iterator<Item = &'static Hook> {
    let (follow, ttl) = (request.follow_children, request.params.ttl != 0);
    HOOKS.iter().filter(move |hook| match hook.need {
        Need::Essential | Need::Useful => true,
        Need::Command => follow,
        Need::Ttl => ttl,
    })
}

/// Before 5.11, maps count against `RLIMIT_MEMLOCK`; later kernels charge the cgroup. A refusal is therefore no error
/// by itself: if it matters, making the maps fails and says so.
fn raise_memlock_limit() {
    let unlimited = nix::sys::resource::RLIM_INFINITY;
    if let Err(error) =
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK, unlimited, unlimited)
    {
        log::debug!("cannot raise RLIMIT_MEMLOCK ({error}); kernels from 5.11 on do not need it");
    }
}
