//! Loads the kernel half: finds out what the running kernel offers, passes it to the programs as read-only
//! globals, and attaches the best variant of each hook that works.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    os::fd::{AsFd as _, AsRawFd as _, RawFd},
    path::PathBuf,
    str::FromStr,
    sync::{Arc, LazyLock, Mutex, PoisonError},
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::{
    Btf, BtfError, Ebpf, EbpfLoader, Endianness, VerifierLogLevel,
    maps::ProgramArray,
    programs::{
        BtfTracePoint, FEntry, FExit, Iter, Program, ProgramError, ProgramType, RawTracePoint, TracePoint,
    },
    sys::{BpfHelper, is_helper_supported},
};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use tcpclose_common::{
    offsets::{ABSENT, ArgumentOffsets, IteratorOffsets, NamespaceOffsets, RecordOffsets, StructOffsets},
    params::Params,
    table,
};

use crate::{
    failure::Failure,
    kernel::{
        ResetReasons, TypeFacts, arguments, btf,
        handle::{KernelHalf, Outcome},
        hooks::{AcceptHook, HOOKS, Hook, HookNeed, Kind, Variant, When},
        lockdown, privilege, tracefs,
    },
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
    /// None: only tracefs is used.
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

impl BtfSource {
    /// Raw BTF.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        match self {
            Self::None => bail!("not to be used (--btf none)"),
            Self::Kernel => btf::running_kernel(),
            Self::File(path) => std::fs::read(path)
                .with_context(|| format!("cannot read the BTF that --btf names, {}", path.display())),
        }
    }

    /// The facts about this kernel that it contains.
    ///
    /// # Errors
    /// There is none, or it is malformed.
    pub fn facts(&self) -> Result<TypeFacts> {
        self.with(TypeFacts::of)
    }

    /// The result of `read` on it.
    fn with<T>(&self, read: impl FnOnce(&btf::Btf<'_>) -> T) -> Result<T> {
        let bytes = self.bytes()?;
        let btf = btf::Btf::parse(&bytes).with_context(|| match self {
            Self::File(path) => format!("cannot use {}", path.display()),
            Self::Kernel | Self::None => format!("cannot make sense of {}", btf::VMLINUX),
        })?;
        Ok(read(&btf))
    }
}

/// Size of the table of live sockets, unless `--connections` sets another one.
pub const DEFAULT_CONNECTIONS: u32 = 65_536;

/// The configuration with which the kernel half is loaded.
#[derive(Clone, Debug)]
pub struct Request {
    /// Filters and stacks; what depends on the kernel is filled in here.
    pub params: Params,
    /// Whether children of followed processes are followed.
    pub follow_children: bool,
    /// How accepts are observed.
    pub accept_hook: AcceptHook,
    /// Size of the table of live sockets.
    pub connections: u32,
    /// See [`BtfSource`].
    pub btf: BtfSource,
    /// Level of the kernel half's own log; `None` for no messages.
    pub log: Option<aya_log::Level>,
    /// Try every variant, whether or not an option requests it, and continue if one fails: `doctor` reports,
    /// and does not trace.
    pub rehearsal: bool,
}

impl Request {
    /// A request for these programs, without the options that change what is attached.
    pub fn new(params: Params, btf: BtfSource) -> Self {
        Self {
            params,
            follow_children: false,
            accept_hook: AcceptHook::Auto,
            connections: DEFAULT_CONNECTIONS,
            btf,
            log: None,
            rehearsal: false,
        }
    }

    /// A request for everything, so that the verifier checks every program in full; with a small table.
    pub fn rehearsal(btf: BtfSource) -> Self {
        let params = Params { user_stack: 1, kernel_stack: 1, ttl: 1, ..Params::NONE };
        Self { follow_children: true, connections: 128, rehearsal: true, ..Self::new(params, btf) }
    }

    /// Whether a variant may be used.
    fn allows(&self, variant: &Variant) -> bool {
        self.rehearsal
            || match variant.when {
                When::Always => true,
                When::Linger => self.params.stuck != 0,
                When::Command => self.follow_children,
                When::Ttl => self.params.ttl != 0,
                When::Accept(ways) => ways.contains(&self.accept_hook),
            }
    }

    /// Whether an option requests this hook by name, so that failing to attach it is an error.
    fn insists(&self, hook: &Hook) -> bool {
        !self.rehearsal
            && hook.variants.iter().any(|variant| match variant.when {
                When::Always | When::Linger | When::Command => false,
                When::Ttl => self.params.ttl != 0,
                When::Accept(ways) => {
                    self.accept_hook != AcceptHook::Auto && ways.contains(&self.accept_hook)
                }
            })
    }
}

/// What is known about the running kernel before anything is loaded.
struct RunningKernel {
    structs: StructOffsets,
    /// For attaching by type; `None` if that is not possible.
    types: Option<Arc<AttachTypes>>,
    reset_reasons: BTreeMap<i64, String>,
    has_reset_reason: bool,
    arguments: ArgumentOffsets,
    iterators: IteratorOffsets,
    /// Absent in the initial pid namespace, where ids need no translation.
    namespace: NamespaceOffsets,
    code_pages: u16,
    thread_pointer: u16,
    losses: Vec<String>,
}

/// The types that programs are attached to, as aya has them.
type AttachTypes = LazyLock<Result<Btf, BtfError>, Box<dyn FnOnce() -> Result<Btf, BtfError> + Send>>;

/// Parses BTF in a thread of its own, while maps are created; without the thread, when the types are first
/// needed.
fn parse_ahead(bytes: Vec<u8>) -> Arc<AttachTypes> {
    let types: AttachTypes = LazyLock::new(Box::new(move || Btf::parse(&bytes, Endianness::default())));
    let types = Arc::new(types);
    let ahead = Arc::clone(&types);
    let parse = move || {
        LazyLock::force(&ahead);
    };
    let _ = thread::Builder::new().name("types".to_owned()).spawn(parse);
    types
}

impl RunningKernel {
    /// The types that programs are attached to.
    fn types(&self) -> Result<&Btf> {
        let types = self.types.as_ref().context("no BTF")?;
        types.as_ref().as_ref().map_err(|error| anyhow!("aya cannot read its types: {error}"))
    }

    fn read(source: &BtfSource) -> Result<Self> {
        let targets = attach_targets();
        let targets: Vec<_> = targets.iter().map(String::as_str).collect();
        Ok(match source.with(|btf| (TypeFacts::of(btf), btf.named_only(&targets))) {
            Ok((facts, targets)) => Self {
                structs: facts.offsets,
                // The whole of the kernel's BTF is not in memory any more.
                types: (*source == BtfSource::Kernel).then(|| parse_ahead(targets)),
                reset_reasons: facts.reset_reasons,
                has_reset_reason: facts.send_reset_has_reason.unwrap_or(false),
                arguments: facts.arguments,
                iterators: facts.iterators,
                namespace: if privilege::in_initial_pid_namespace() {
                    NamespaceOffsets::ABSENT
                } else {
                    facts.namespace
                },
                code_pages: facts.code_pages,
                thread_pointer: facts.thread_pointer,
                losses: Vec::new(),
            },
            Err(error) if matches!(source, BtfSource::File(_)) => return Err(error),
            Err(error) => Self {
                structs: StructOffsets::ABSENT,
                types: None,
                reset_reasons: BTreeMap::new(),
                has_reset_reason: false,
                arguments: ArgumentOffsets::ABSENT,
                iterators: IteratorOffsets::ABSENT,
                namespace: NamespaceOffsets::ABSENT,
                code_pages: ABSENT,
                thread_pointer: ABSENT,
                losses: vec![format!(
                    "no BTF, so bytes, idle times, namespaces, triggers, causes and most owners are null: \
                     {error:#}"
                )],
            },
        })
    }
}

/// The types by whose ids programs are attached, as aya names them.
fn attach_targets() -> Vec<String> {
    let variants = HOOKS.iter().flat_map(|hook| hook.variants);
    let programs = variants.flat_map(|variant| variant.programs.iter().map(|(_, at)| (variant.kind, *at)));
    let target = |(kind, at)| match kind {
        Kind::TypedTracepoint => Some(format!("btf_trace_{}", point(at))),
        Kind::FunctionEntry | Kind::FunctionReturn => Some(String::from(at)),
        Kind::Iterator => Some(format!("bpf_iter_{at}")),
        Kind::ClassicTracepoint(_)
        | Kind::SystemCall
        | Kind::RawTracepoint
        | Kind::TestRun
        | Kind::Procfs => None,
    };
    programs.filter_map(target).collect()
}

/// Loads and attaches what `request` needs. No other thread of this process may open files meanwhile: for a
/// moment, no descriptor is left.
///
/// # Errors
/// A privilege is missing, the kernel lacks something essential, or it refuses a program.
pub fn load(request: &Request) -> Result<KernelHalf> {
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
    may_read_kernel_memory()?;
    raise_memlock_limit();
    let kernel = RunningKernel::read(&request.btf)?;
    let mut params = request.params;
    params.has_reset_reason = u32::from(kernel.has_reset_reason);
    params.has_pt_regs_helper = u32::from(
        is_helper_supported(ProgramType::TracePoint, BpfHelper::BPF_FUNC_task_pt_regs).unwrap_or(false),
    );
    params.has_destroy = 1;
    params.buckets = table::buckets(request.connections);
    params.code_pages = kernel.code_pages;
    params.thread_pointer = kernel.thread_pointer;
    if params.stack_bytes != 0 && !can_copy_stacks(&kernel.structs, &params) {
        params.stack_bytes = 0;
        params.recipes = 0;
    }
    params.recipes *= u32::from(params.code_pages != ABSENT);

    let mut refusal = anyhow!("no BTF");
    if kernel.types.is_some() {
        for has_cookie_helper in [1, 0] {
            params.has_cookie_helper = has_cookie_helper;
            match attach(request, &kernel, &params, Layouts::default(), None) {
                Ok(loaded) => return Ok(loaded),
                // The second refusal is decisive, because the first may concern only the helper.
                Err(error) => refusal = error,
            }
        }
    }
    params.has_cookie_helper = 0;
    let refusal = format!("{refusal:#}");
    let loaded = tracefs::with(|tracefs| {
        let layouts = Layouts::read(request, tracefs);
        params.has_destroy = u32::from(layouts.records.contains_key("DESTROY_SOCK_RECORD"));
        attach(request, &kernel, &params, layouts, Some(&refusal))
    });
    loaded.map_err(|mut failure| {
        failure.found = format!("{}; typed tracepoints: {refusal}", failure.found);
        if kernel.types.is_none() {
            failure.needed.push_str("; with BTF (CONFIG_DEBUG_INFO_BTF) it would not be needed");
        }
        failure
    })?
}

/// A loader that does not relocate by the kernel's BTF, which the programs do not need.
///
/// A new loader parses that BTF, which takes 20 ms and 15 MB, and then `btf(None)` drops it. There is no other
/// constructor; but it does without if it cannot open the file, as when no descriptor is left.
fn without_btf<'a>() -> EbpfLoader<'a> {
    let limit = getrlimit(Resource::RLIMIT_NOFILE);
    if let Ok((_, most)) = limit {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, 0, most);
    }
    let mut loader = EbpfLoader::new();
    if let Ok((usual, most)) = limit
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, usual, most)
    {
        log::warn!("cannot restore the limit of open files to {usual}: {error}");
    }
    loader.btf(None);
    loader
}

/// Fails on a kernel whose lockdown does not let programs read kernel memory, as all of ours do.
///
/// This is not left to the verifier, because classic tracepoints would be tried next, and Linux 6.12 crashes
/// when a tracefs that lockdown has kept empty is unmounted (in `tracefs_destroy_inode()`).
fn may_read_kernel_memory() -> Result<(), Failure> {
    // The helper is then withheld: `bpf_tracing_func_proto()` in `kernel/trace/bpf_trace.c`.
    if is_helper_supported(ProgramType::TracePoint, BpfHelper::BPF_FUNC_probe_read_kernel).unwrap_or(true) {
        return Ok(());
    }
    Err(Failure {
        failed: "cannot trace: programs may not read kernel memory".to_owned(),
        found: lockdown::mode().map_or_else(
            || "the helper for it is withheld, as on a kernel that is locked down".to_owned(),
            |mode| format!("the kernel is locked down, in mode `{mode}`"),
        ),
        needed: "mode `integrity` or `none` (/sys/kernel/security/lockdown), and Linux 5.5 or later"
            .to_owned(),
        fix: "boot with lockdown=integrity, or without lockdown".to_owned(),
    })
}

/// Layouts of the records of classic tracepoints, by the global that the programs read them from.
#[derive(Default)]
struct Layouts {
    records: BTreeMap<&'static str, RecordOffsets>,
    /// Layouts that could not be read, and why.
    missing: BTreeMap<&'static str, String>,
    /// Names of reset reasons, from the tracepoint's format.
    reset_reasons: BTreeMap<i64, String>,
}

impl Layouts {
    fn read(request: &Request, tracefs: &tracefs::Tracefs) -> Self {
        let mut layouts = Self::default();
        for variant in HOOKS.iter().flat_map(|hook| hook.variants).filter(|variant| request.allows(variant)) {
            let (Kind::ClassicTracepoint(global), [(_, at)]) = (variant.kind, variant.programs) else {
                continue;
            };
            match tracefs.format(&at.replace(':', "/")) {
                Ok(format) => {
                    if layouts.reset_reasons.is_empty() {
                        layouts.reset_reasons = format.value_names("reason");
                    }
                    layouts.records.insert(global, format.record_offsets());
                }
                Err(error) => {
                    layouts.missing.insert(global, format!("{error:#}"));
                }
            }
        }
        layouts
    }
}

/// Size of the ring, bytes, if all stacks are copied: half of it holds 2,000 copies of 16 KiB between two
/// reads.
const RING_WITH_STACKS: u32 = 64 << 20;

/// Size of the ring, bytes, if stacks are copied until they are recognized: half of it holds a burst of 2,000
/// unknown ones.
const RING_WITH_RECIPES: u32 = 32 << 20;

/// Sets the globals and the sizes of maps, and creates the maps.
fn prepare(request: &Request, kernel: &RunningKernel, params: &Params, layouts: &Layouts) -> Result<Ebpf> {
    let wants_syscall = request.rehearsal || request.accept_hook == AcceptHook::Syscall;
    // If it is not found, attaching fails with an error that reports this.
    let syscall_result = if wants_syscall { syscall_result().unwrap_or(ABSENT) } else { ABSENT };
    let level = request.log.map_or(0, |level| level as u8);
    let mut loader = without_btf();
    loader
        .verifier_log_level(VerifierLogLevel::STATS)
        .override_global("STRUCTS", &kernel.structs, true)
        .override_global("ARGUMENTS", &kernel.arguments, true)
        .override_global("ITERATORS", &kernel.iterators, true)
        .override_global("NAMESPACE", &kernel.namespace, true)
        .override_global("ACCEPT_SYSCALL_RESULT", &syscall_result, true)
        .override_global("PARAMS", params, true)
        .override_global(aya_log::LEVEL, &level, false)
        .map_max_entries("BUCKETS", table::buckets(request.connections))
        .map_max_entries("ENTRIES", table::buckets(request.connections) * table::WAYS)
        .map_max_entries("OVERFLOW", table::overflow(request.connections))
        .map_max_entries("TEARDOWNS", table::overflow(request.connections));
    if params.stack_bytes != 0 {
        let size = if params.recipes == 0 { RING_WITH_STACKS } else { RING_WITH_RECIPES };
        loader.map_max_entries("RECORDS", size);
    }
    if params.recipes == 0 {
        loader.map_max_entries("RECIPES", 1).map_max_entries("RECIPE_EDGES", 1);
    }
    for (global, layout) in &layouts.records {
        loader.override_global(global, layout, true);
    }
    loader.load(OBJECT).context(if privilege::is_filtered() {
        "the kernel refuses the maps (a filter of system calls is installed, which may forbid bpf(); in \
             a container try --security-opt seccomp=unconfined)"
    } else {
        "the kernel refuses the maps (before 5.11 they count against RLIMIT_MEMLOCK; raise it with \
             `ulimit -l unlimited`)"
    })
}

/// Attaches every requested hook, each by its first variant that works. Either all tracepoints are typed, or
/// all are classic; in the second case, `untyped` is the reason why typed ones do not work.
fn attach(
    request: &Request,
    kernel: &RunningKernel,
    params: &Params,
    layouts: Layouts,
    untyped: Option<&str>,
) -> Result<KernelHalf> {
    let mut ebpf = prepare(request, kernel, params, &layouts)?;
    if params.has_cookie_helper != 0 {
        try_cookie_helper(&mut ebpf, kernel)?;
    }
    let mut refused = if untyped.is_none() { load_ahead(&mut ebpf, request, kernel) } else { HashMap::new() };
    let mut losses = privilege::losses();
    losses.extend(kernel.losses.iter().cloned());
    if request.params.stack_bytes != 0 && params.stack_bytes == 0 {
        losses.push(
            "user stacks are followed by frame pointers alone, which leaves out the caller of a system call \
             wrapper: --call-graph auto and dwarf need BTF"
                .to_owned(),
        );
    }
    let mut hooks = Vec::new();
    for hook in HOOKS {
        let mut outcome = Outcome { hook, variant: None, refused: Vec::new() };
        for variant in hook.variants.iter().filter(|variant| request.allows(variant)) {
            let result = match (variant.kind, untyped) {
                (Kind::TypedTracepoint, Some(why)) => Err(anyhow!("{why}")),
                (Kind::ClassicTracepoint(_), None) => continue,
                (Kind::ClassicTracepoint(global), _) if layouts.missing.contains_key(global) => {
                    Err(anyhow!("{}", layouts.missing[global]))
                }
                _ => start(&mut ebpf, kernel, variant, &mut refused),
            };
            match result {
                Ok(()) => {
                    outcome.variant = Some(variant);
                    break;
                }
                Err(error) => outcome.refused.push((variant, brief(&error))),
            }
        }
        if outcome.variant.is_none() && outcome.refused.is_empty() {
            // No option requests it.
            continue;
        }
        let must = hook.need == HookNeed::Essential || request.insists(hook);
        let lost = match outcome.variant {
            Some(variant) => variant.worse.to_owned(),
            // Classic tracepoints may work although typed ones do not.
            None if untyped.is_none() && (must || hook.need == HookNeed::Useful) => {
                bail!("{} cannot be traced: {}", hook.name, outcome.why());
            }
            None if must => return Err(unmet(&outcome).into()),
            None if hook.need == HookNeed::Useful => {
                format!("the hook {} does not work; lost without it: {}", hook.name, hook.lost)
            }
            None => String::new(),
        };
        if !outcome.refused.is_empty() {
            log::debug!("{}: {}", hook.name, outcome.why());
        }
        // A variant that was requested by name is not a loss.
        let by_necessity = !lost.is_empty() && !outcome.refused.is_empty();
        if by_necessity && !losses.iter().any(|known| known.starts_with(&lost)) {
            losses.push(format!("{lost} ({})", outcome.why()));
        }
        hooks.push(outcome);
    }
    let reset_reasons =
        if kernel.reset_reasons.is_empty() { layouts.reset_reasons } else { kernel.reset_reasons.clone() };
    let guarded = guarded(&ebpf, &hooks);
    let mut half = KernelHalf::new(ebpf, hooks, guarded)?;
    half.reset_reasons = ResetReasons(reset_reasons);
    half.has_cookie = params.has_cookie_helper != 0;
    half.has_registers = params.has_pt_regs_helper != 0;
    half.has_recipes = params.recipes != 0;
    half.has_netns = ![kernel.structs.sk_net, kernel.structs.net_inum].contains(&ABSENT);
    half.losses = losses;
    Ok(half)
}

/// Fails if the kernel does not let typed tracepoints read a socket's cookie (5.12 and later do), or does not
/// let them attach at all. There is no other way to find out which helpers this kind of program has.
fn try_cookie_helper(ebpf: &mut Ebpf, kernel: &RunningKernel) -> Result<()> {
    const NAME: &str = "read_cookie";
    let program = <&mut BtfTracePoint>::try_from(program(ebpf, NAME)?)?;
    program.load("inet_sock_set_state", kernel.types()?)?;
    Ok(program.unload()?)
}

/// Whether programs can find the current task's user stack, and know whether it has one.
fn can_copy_stacks(structs: &StructOffsets, params: &Params) -> bool {
    let is_known = |offsets: &[u16]| offsets.iter().all(|offset| *offset != ABSENT);
    let registers = [structs.task_stack, structs.thread_size, structs.pt_regs_size];
    is_known(&[structs.task_mm, structs.task_flags])
        && (params.has_pt_regs_helper != 0 || is_known(&registers))
}

/// Loads the first variant of each hook, several programs at a time: the verifier takes most of the start-up
/// time. Returns the programs that the kernel refuses; [`start`] reports them when it comes to their hooks.
fn load_ahead(
    ebpf: &mut Ebpf,
    request: &Request,
    kernel: &RunningKernel,
) -> HashMap<&'static str, anyhow::Error> {
    let is_typed = |variant: &&Variant| !matches!(variant.kind, Kind::ClassicTracepoint(_));
    let first =
        |hook: &'static Hook| hook.variants.iter().filter(is_typed).find(|variant| request.allows(variant));
    let wanted: HashMap<&str, (&'static str, Kind, &str)> = HOOKS
        .iter()
        .filter_map(first)
        .flat_map(|variant| variant.all_programs().map(|(name, at)| (name, (name, variant.kind, at))))
        .collect();
    let programs = ebpf.programs_mut().filter_map(|(name, program)| Some((*wanted.get(name)?, program)));
    let mut queue: Vec<_> = programs.collect();
    queue.sort_by_key(|((name, ..), _)| LONGEST.iter().position(|long| long == name));
    let queue = Mutex::new(queue);
    let take = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let load = || {
        let mut refused = Vec::new();
        while let Some(((name, kind, at), program)) = take() {
            if let Err(error) = load_program(program, kernel, kind, at) {
                refused.push((name, error));
            }
        }
        refused
    };
    thread::scope(|scope| {
        let others = thread::available_parallelism().map_or(0, |count| count.get().min(MAX_LOADERS) - 1);
        // If there is no room for more threads, fewer do all the work.
        let start = |_| thread::Builder::new().spawn_scoped(scope, load).ok();
        let others: Vec<_> = (0..others).map_while(start).collect();
        let mut refused = load();
        refused.extend(others.into_iter().flat_map(|thread| thread.join().unwrap_or_default()));
        refused.into_iter().collect()
    })
}

/// The programs that the verifier examines longest, the longest last. They are loaded first, so that no thread
/// begins with one when the others have nothing left.
const LONGEST: [&str; 3] = ["inventory", "send_reset", "change_state"];

/// The largest number of threads that load programs. There are about ten programs, and three of them take
/// most of the time.
const MAX_LOADERS: usize = 4;

/// The name of a tracepoint, without its group.
fn point(at: &str) -> &str {
    at.split_once(':').map_or(at, |(_, point)| point)
}

/// Loads a program that is to be attached to `at`.
fn load_program(program: &mut Program, kernel: &RunningKernel, kind: Kind, at: &str) -> Result<()> {
    match kind {
        Kind::TypedTracepoint => <&mut BtfTracePoint>::try_from(program)?.load(point(at), kernel.types()?)?,
        Kind::ClassicTracepoint(_) | Kind::SystemCall => <&mut TracePoint>::try_from(program)?.load()?,
        Kind::FunctionEntry => {
            ensure_arguments(kernel, at)?;
            <&mut FEntry>::try_from(program)?.load(at, kernel.types()?)?;
        }
        Kind::FunctionReturn => {
            ensure_arguments(kernel, at)?;
            <&mut FExit>::try_from(program)?.load(at, kernel.types()?)?;
        }
        Kind::Iterator => <&mut Iter>::try_from(program)?.load(at, kernel.types()?)?,
        Kind::RawTracepoint => {
            // The kernel does not need it, but without it the program cannot read the structures.
            kernel.types()?;
            <&mut RawTracePoint>::try_from(program)?.load()?;
        }
        Kind::TestRun => <&mut RawTracePoint>::try_from(program)?.load()?,
        Kind::Procfs => {}
    }
    Ok(())
}

/// Loads the programs of a variant, and attaches all but those that tcpclose runs itself. `refused` are those
/// that could not be loaded before.
fn start(
    ebpf: &mut Ebpf,
    kernel: &RunningKernel,
    variant: &Variant,
    refused: &mut HashMap<&'static str, anyhow::Error>,
) -> Result<()> {
    for (name, at) in variant.all_programs() {
        if let Some(error) = refused.remove(name) {
            return Err(error);
        }
        let program = program(ebpf, name)?;
        if program.fd().is_err() {
            load_program(program, kernel, variant.kind, at)?;
        }
    }
    if let Some(called) = variant.called {
        let descriptor = program(ebpf, called)?.fd()?.try_clone()?;
        let map = ebpf.map_mut(CALLED).with_context(|| format!("the object has no map {CALLED}"))?;
        ProgramArray::try_from(map)?.set(0, &descriptor, 0)?;
    }
    for &(name, at) in variant.programs {
        let program = program(ebpf, name)?;
        let group = at.split_once(':').map_or("", |(group, _)| group);
        match variant.kind {
            Kind::TypedTracepoint => {
                <&mut BtfTracePoint>::try_from(program)?.attach()?;
            }
            Kind::ClassicTracepoint(_) => {
                <&mut TracePoint>::try_from(program)?.attach(group, point(at))?;
            }
            Kind::SystemCall => {
                let program = <&mut TracePoint>::try_from(program)?;
                tracefs::with(|_| program.attach(group, point(at)))??;
            }
            Kind::FunctionEntry => {
                <&mut FEntry>::try_from(program)?.attach()?;
            }
            Kind::FunctionReturn => {
                <&mut FExit>::try_from(program)?.attach()?;
            }
            Kind::RawTracepoint => {
                <&mut RawTracePoint>::try_from(program)?.attach(point(at))?;
            }
            Kind::Iterator | Kind::TestRun | Kind::Procfs => {}
        }
    }
    Ok(())
}

/// The map of the kernel half through which programs call another one.
const CALLED: &str = "CALLED";

/// The program of this name.
fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program> {
    ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))
}

/// Fails if a function lacks an argument that its program needs.
fn ensure_arguments(kernel: &RunningKernel, function: &str) -> Result<()> {
    ensure!(kernel.types.is_some(), "no BTF");
    match arguments::missing(kernel.arguments, function) {
        Some(missing) => bail!("{missing}"),
        None => Ok(()),
    }
}

/// An error in one line. The last line of the verifier's log has the reason for a refusal; `--debug` shows
/// the whole log.
fn brief(error: &anyhow::Error) -> String {
    let Some(ProgramError::LoadError { io_error, verifier_log }) = error.downcast_ref() else {
        return format!("{error:#}");
    };
    let log = verifier_log.to_string();
    log::debug!("the verifier: {log}");
    let is_reason =
        |line: &&str| !line.is_empty() && !VERIFIER_STATISTICS.iter().any(|begin| line.starts_with(begin));
    let reason =
        log.lines().map(str::trim).rfind(is_reason).map(|line| format!(" ({line})")).unwrap_or_default();
    format!("the kernel refuses the program: {io_error}{reason}")
}

/// The beginnings of lines that end every log of the verifier, whatever the reason for the refusal.
const VERIFIER_STATISTICS: [&str; 4] = ["processed ", "verification time ", "stack depth ", "max_states"];

/// The kernel skips a program that is running on the same CPU already, and counts that with the program. It
/// is a loss for the program of a tracepoint, unless another program on the same tracepoint handles the
/// event.
///
/// A skipped run for a destroyed socket is not a loss if there is a second copy of the program on state
/// changes, because one of the three handles the end. If all are skipped, the entry stays, and the end is
/// reported and counted when the address is used again.
fn guarded(ebpf: &Ebpf, hooks: &[Outcome]) -> Vec<RawFd> {
    let variants = || hooks.iter().filter_map(|outcome| outcome.variant);
    let is_single = |variant: &&Variant| match variant.kind {
        Kind::TypedTracepoint => variant.programs.len() == 1,
        Kind::ClassicTracepoint(_) => true,
        _ => false,
    };
    let has_program =
        |variant: &Variant, name: &str| variant.programs.iter().any(|(program, _)| *program == name);
    let every_end_is_seen = variants().any(|variant| has_program(variant, "set_state_nested"));
    let is_harmless = |variant: &&Variant| every_end_is_seen && has_program(variant, "destroy_sock");
    let programs = variants()
        .filter(is_single)
        .filter(|variant| !is_harmless(variant))
        .flat_map(|variant| variant.programs);
    programs.filter_map(|(name, _)| Some(ebpf.program(name)?.fd().ok()?.as_fd().as_raw_fd())).collect()
}

/// Offset of the result in the record of a system call's return.
fn syscall_result() -> Result<u16> {
    let (_, at) = HOOKS
        .iter()
        .flat_map(|hook| hook.variants)
        .find(|variant| variant.kind == Kind::SystemCall)
        .and_then(|variant| variant.programs.first())
        .context("no hook is on system calls")?;
    let format = tracefs::with(|tracefs| tracefs.format(&at.replace(':', "/")))??;
    let result = format.field("ret", 8).and_then(|field| field.offset.try_into().ok());
    result.with_context(|| format!("the record of {at} has no result of 8 bytes"))
}

/// The failure when a hook cannot be attached and tracing makes no sense without it.
fn unmet(outcome: &Outcome) -> Failure {
    let Outcome { hook, refused, .. } = outcome;
    let needs: BTreeSet<_> = refused.iter().map(|(variant, _)| variant.kind.needs()).collect();
    Failure {
        failed: format!("cannot trace {}", hook.name),
        found: outcome.why(),
        needed: needs.into_iter().collect::<Vec<_>>().join("; or "),
        fix: hook.fix.to_owned(),
    }
}

/// Before 5.11, maps count against `RLIMIT_MEMLOCK`; later kernels charge the cgroup. A refusal is therefore
/// no error by itself: if it matters, creating the maps fails with an error that reports it.
fn raise_memlock_limit() {
    if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        log::debug!("cannot raise RLIMIT_MEMLOCK ({error}); kernels from 5.11 on do not need it");
    }
}
