//! `tcpclose trace`: the pipeline, from the rings to the sink, and when it ends.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tcpclose_common::{params::Params, record::holds};
use tokio::{
    io::{Interest, unix::AsyncFd},
    process::Child,
    signal::unix::{SignalKind, signal},
    time::{Interval, MissedTickBehavior},
};

use crate::{
    attribute::{
        Attributor,
        inventory::{self, Inventory},
        pace::Pace,
        watch,
    },
    cli::{CallGraph, Linger, Stacks as WhichStacks, TraceArgs},
    commands::child::{self, Followed},
    correlate::{Correlator, Ending},
    event::Event,
    event::compose::Composer,
    filter::Filter,
    ingest::capture::Capture,
    ingest::decode::{Record, decode},
    ingest::reader::{GATHER, Records, poll},
    kernel::clock::Clock,
    kernel::loader::{self, Loaded, Request},
    sink::losses::Losses,
    sink::summary::Summary,
    sink::{Output, Written},
    stacks::{Stacks, store::Store, unwind},
    stuck::{self, Lingerers},
};

/// How long connections of a command that has ended may take to end as well.
const AFTER_COMMAND: Duration = Duration::from_secs(5);

/// How often files that were kept open for programs that have ended are looked through.
const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// How often a tool that waits for the connections of its command looks for them.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Traces until something ends it. The exit status is the command's, if there was one.
///
/// # Errors
/// The kernel half cannot be loaded, the command cannot be run, or output cannot be written.
pub async fn trace(args: TraceArgs) -> Result<ExitCode> {
    // Signals that come from now on end the tool in order, those that come while it starts included.
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let filter = Filter::new(args.filter.clone());
    let mut loaded = loader::load(&request(&args, &filter))?;
    for loss in &loaded.losses {
        eprintln!("tcpclose: {loss}");
    }
    let mut records = Records::take(&mut loaded.ebpf)?;
    let mut logger = if args.debug {
        Some(poll(aya_log::EbpfLogger::init(&mut loaded.ebpf)?, Interest::READABLE)?)
    } else {
        None
    };
    let mut pipeline = Pipeline::new(&args, filter, loaded)?;
    let mut child = pipeline.start_command(&args)?;
    if let Some(path) = &args.ready_file {
        write_ready_file(path)?;
    }
    let mut sweep = tokio::time::interval(SWEEP_EVERY);
    let mut linger = pipeline.lingerers.period().map(tokio::time::interval);
    if let Some(linger) = &mut linger {
        linger.set_missed_tick_behavior(MissedTickBehavior::Delay);
    }
    let started = Instant::now();
    let reader_gone = ReaderGone::watch();
    let end = args.duration.map(|duration| tokio::time::Instant::now() + duration);
    let mut code = ExitCode::SUCCESS;
    let mut command_over: Option<Instant> = None;
    loop {
        tokio::select! {
            result = records.ready() => {
                result?;
                if pipeline.read(&mut records)? == Going::Done {
                    break;
                }
            }
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            () = reader_gone.wait() => break,
            () = at(end) => break,
            status = exited(&mut child) => {
                code = ExitCode::from(child::exit_code(status?));
                child = None;
                command_over = Some(Instant::now());
            }
            () = tokio::time::sleep(LOOK_EVERY), if command_over.is_some() => {
                if command_over.is_some_and(|over| over.elapsed() >= AFTER_COMMAND) || !pipeline.followed_alive() {
                    break;
                }
            }
            result = debug_messages(&mut logger) => result?,
            _ = sweep.tick() => pipeline.composer.sweep(),
            () = tick(&mut linger) => {
                if pipeline.look_for_lingerers(&mut records)? == Going::Done {
                    break;
                }
            }
        }
    }
    pipeline.finish(&mut records)?;
    pipeline.summary(started.elapsed());
    Ok(code)
}

/// What the kernel half is asked for.
fn request(args: &TraceArgs, filter: &Filter) -> Request {
    let mut params = Params::NONE;
    filter.to_kernel(&mut params);
    params.user_stack = u32::from(matches!(args.stack, WhichStacks::User | WhichStacks::Both));
    params.kernel_stack = u32::from(matches!(args.stack, WhichStacks::Kernel | WhichStacks::Both));
    if let (1, CallGraph::Dwarf(bytes)) = (params.user_stack, args.call_graph) {
        params.stack_bytes = bytes;
        params.registers = unwind::REGISTERS;
    }
    params.ttl = u32::from(args.ttl);
    params.linger = u32::from(args.linger != Linger::Off);
    let follow_children = !args.command.is_empty();
    params.by_process |= u32::from(follow_children);
    Request {
        params,
        follow_children,
        accept_hook: args.accept_hook,
        connections: args.connections,
        btf: args.btf.clone(),
        log: args.debug.then_some(aya_log::Level::Debug),
        rehearsal: false,
    }
}

/// Whether to go on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Going {
    On,
    /// The count is reached, or nobody reads any more.
    Done,
}

struct Pipeline {
    correlator: Correlator,
    composer: Composer,
    losses: Losses,
    inventory: Inventory,
    lingerers: Lingerers,
    /// Keeps looks for lingering sockets from taking more than a tenth of a CPU.
    pace: Pace,
    filter: Filter,
    /// With `-- COMMAND`: its processes.
    followed: Option<Followed>,
    output: Output,
    /// With `--record`.
    capture: Option<Capture>,
    /// Events that `--count` still lets through.
    left: Option<u64>,
    events: u64,
    summary: Summary,
}

impl Pipeline {
    /// Takes the maps that it needs, and starts to watch for new processes.
    fn new(args: &TraceArgs, filter: Filter, mut loaded: Loaded) -> Result<Self> {
        let mut map =
            |name| loaded.ebpf.take_map(name).with_context(|| format!("the object has no map {name}"));
        let stacks = map("STACKS")?.try_into().context("STACKS is not what it should be")?;
        let processes = map("PROCESSES")?.try_into().context("PROCESSES is not what it should be")?;
        let mut followed = Followed::take(&mut loaded.ebpf)?;
        for pid in filter.pids() {
            followed.add(*pid)?;
        }
        let has_inventory = loaded.has(inventory::PROGRAM);
        let linger = if loaded.has(inventory::LOOK) { args.linger } else { Linger::Off };
        let losses = Losses::take(&mut loaded.ebpf, args.connections, loaded.guarded)?;
        let mut lingerers = Lingerers::take(&mut loaded.ebpf, linger)?;
        let mut inventory = Inventory::new(loaded.ebpf, has_inventory);
        inventory.take_stock();
        lingerers.take_stock();
        let attributor = Attributor::default();
        watch::start(processes, attributor.processes())?;
        let stacks = Stacks::new(Store::new(stacks, args.connections), attributor.processes());
        Ok(Self {
            correlator: Correlator::default(),
            composer: Composer::new(attributor, stacks, loaded.reset_reasons),
            losses,
            inventory,
            lingerers,
            pace: Pace::default(),
            filter,
            followed: (!args.command.is_empty()).then_some(followed),
            output: if args.summary {
                Output::nowhere()
            } else {
                Output::stdout(args.output, args.stack != WhichStacks::None)
            },
            capture: match &args.record {
                Some(path) => {
                    Some(Capture::create(path).with_context(|| format!("cannot make {}", path.display()))?)
                }
                None => None,
            },
            left: args.count,
            events: 0,
            summary: Summary::default(),
        })
    }

    /// Starts the command that was asked for, if one was.
    fn start_command(&mut self, args: &TraceArgs) -> Result<Option<Child>> {
        let (Some(followed), Some(program)) = (&mut self.followed, args.command.first()) else {
            return Ok(None);
        };
        // Its own children are the command and nothing else.
        followed.add(std::process::id())?;
        let child = child::start(&args.command, args.output);
        child.map(Some).with_context(|| format!("cannot run {}", program.to_string_lossy()))
    }

    /// Reads the ring to its end and tells what is whole.
    fn read(&mut self, records: &mut Records) -> Result<Going> {
        self.composer.clock.synchronize();
        let now = Clock::boot_now();
        if self.drain(records)? == Going::Done {
            return Ok(Going::Done);
        }
        // The inventory's answers are in the ring at once.
        let arrivals = self.correlator.arrivals();
        if self.correlator.lacks_owners() && self.inventory.find_owners() {
            if self.drain(records)? == Going::Done {
                return Ok(Going::Done);
            }
            if self.inventory.sees_all() {
                self.correlator.searched(arrivals);
            }
        }
        let (inventory, attributor) = (&self.inventory, &mut self.composer.attributor);
        let ready = self.correlator.caught_up(now, |inodes| {
            if inventory.works() { vec![false; inodes.len()] } else { attributor.find_owners(inodes) }
        });
        for ending in ready {
            if self.tell(&ending)? == Going::Done {
                return Ok(Going::Done);
            }
        }
        self.tell_losses()?;
        if self.correlator.is_waiting() {
            records.read_again_soon();
        }
        self.flush()
    }

    /// Reads the ring to its end.
    fn drain(&mut self, records: &mut Records) -> Result<Going> {
        // Each time: what the inventory and the looks write takes our word back, and would be all that wakes us.
        records.ask_to_be_woken()?;
        loop {
            let batch = records.batch();
            if batch.is_empty() {
                return Ok(Going::On);
            }
            for bytes in batch {
                if let Some(capture) = &mut self.capture {
                    capture.write(&bytes).context("cannot write to the file that --record names")?;
                }
                let whole = match decode(&bytes) {
                    Ok(Record::Close(close)) => self.correlator.close(*close),
                    Ok(Record::Reset(reset)) => self.correlator.reset(*reset),
                    Ok(Record::Owner(owner)) if owner.holds == holds::ASKED => {
                        self.lingerers.held(&owner);
                        None
                    }
                    Ok(Record::Owner(owner)) => self.correlator.owner(&owner),
                    Ok(Record::Lingering(connection)) => {
                        self.lingerers.seen(connection, Clock::boot_now());
                        None
                    }
                    Ok(Record::Stack(copy, bytes)) => {
                        self.composer.stacks.copied(&copy, &bytes);
                        None
                    }
                    Ok(Record::Process(_)) => None,
                    Err(error) => {
                        log::warn!("{error}");
                        self.losses.undecodable += 1;
                        None
                    }
                };
                if let Some(ending) = whole
                    && self.tell(&ending)? == Going::Done
                {
                    return Ok(Going::Done);
                }
            }
        }
    }

    fn tell(&mut self, ending: &Ending) -> Result<Going> {
        for event in self.composer.events(ending) {
            if !self.wants(&event) {
                continue;
            }
            if self.write(event)? == Going::Done {
                self.flush()?;
                return Ok(Going::Done);
            }
        }
        Ok(Going::On)
    }

    /// Tells of sockets that stay where they are, if it is time to.
    fn look_for_lingerers(&mut self, records: &mut Records) -> Result<Going> {
        let mut pace = self.pace;
        let going = pace.look(|| self.tell_lingerers(records)).unwrap_or(Ok(Going::On));
        self.pace = pace;
        going
    }

    fn tell_lingerers(&mut self, records: &mut Records) -> Result<Going> {
        self.composer.clock.synchronize();
        let due = self.lingerers.due(Clock::boot_now());
        if self.look(&due, records, false)? == Going::Done {
            return Ok(Going::Done);
        }
        for orphaned in self.lingerers.orphaned() {
            let event = self.composer.lingering_before(&orphaned);
            if self.wants(&event) && self.write(event)? == Going::Done {
                self.flush()?;
                return Ok(Going::Done);
            }
        }
        self.flush()
    }

    /// Looks at sockets in a state of the teardown, and tells of those that linger; when it `is_last`, in the summary.
    fn look(&mut self, sockets: &[u64], records: &mut Records, is_last: bool) -> Result<Going> {
        for sockets in sockets.chunks(stuck::AT_ONCE) {
            // What was there before must not fill the ring.
            if self.drain(records)? == Going::Done {
                return Ok(Going::Done);
            }
            let pass = self.lingerers.ask()?;
            if !sockets.iter().all(|sk| self.inventory.look(*sk, pass)) {
                break;
            }
            if self.drain(records)? == Going::Done {
                return Ok(Going::Done);
            }
            if self.lingerers.lack_holders() && !self.inventory.works() {
                self.lingerers.look_up_holders();
            } else if self.lingerers.lack_holders() {
                self.inventory.tell_holders();
                if self.drain(records)? == Going::Done {
                    return Ok(Going::Done);
                }
            }
            for lingerer in self.lingerers.found() {
                let event = self.composer.lingering(&lingerer).filter(|event| self.wants(event));
                let Some(event) = event else { continue };
                if is_last {
                    self.summary.add_lingering(&event);
                } else if self.write(event)? == Going::Done {
                    self.flush()?;
                    return Ok(Going::Done);
                }
            }
        }
        self.flush()
    }

    fn wants(&self, event: &Event) -> bool {
        let ours = self
            .followed
            .as_ref()
            .is_none_or(|followed| event.process().is_some_and(|process| followed.contains(process.pid)));
        ours && self.filter.wants(event)
    }

    fn write(&mut self, event: Event) -> Result<Going> {
        self.summary.add(&event);
        if self.output.write(event).context("cannot write to the standard output")? == Written::ReaderGone {
            return Ok(Going::Done);
        }
        self.events += 1;
        if let Some(left) = &mut self.left {
            *left -= 1;
            if *left == 0 {
                return Ok(Going::Done);
            }
        }
        Ok(Going::On)
    }

    fn tell_losses(&mut self) -> Result<()> {
        self.losses.stacks = self.composer.stacks.lost();
        self.losses.processes = watch::undecodable();
        for lost in self.losses.news() {
            // Losses do not count as events, and are told whatever the filters say.
            let _ = self.output.write(lost).context("cannot write to the standard output")?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<Going> {
        if let Some(capture) = &mut self.capture {
            capture.flush().context("cannot write to the file that --record names")?;
        }
        match self.output.flush().context("cannot write to the standard output")? {
            Written::Yes => Ok(Going::On),
            Written::ReaderGone => Ok(Going::Done),
        }
    }

    /// Reads what is there and tells what was held back.
    fn finish(&mut self, records: &mut Records) -> Result<()> {
        if self.left == Some(0) {
            return Ok(());
        }
        let sockets = self.lingerers.all();
        if self.look(&sockets, records, true)? == Going::Done {
            return Ok(());
        }
        while self.read(records)? == Going::On && self.correlator.is_waiting() {
            // What is held back goes with the second read.
            std::thread::sleep(GATHER / 10);
        }
        Ok(())
    }

    fn followed_alive(&self) -> bool {
        self.followed.as_ref().is_some_and(|followed| self.losses.any_alive(|pid| followed.contains(pid)))
    }

    fn summary(&mut self, took: Duration) {
        self.losses.stacks = self.composer.stacks.lost();
        let lost: Vec<_> = self
            .losses
            .totals()
            .into_iter()
            .map(|(place, count)| format!("{} {count}", place.to_string().replace('_', " ")))
            .collect();
        eprint!("{}", self.summary);
        if self.composer.stacks.without_callers() > 0 {
            eprintln!(
                "tcpclose: some stacks have no more than the system call, because programs keep no frame pointers; \
                 `--call-graph dwarf` does without"
            );
        }
        eprintln!(
            "tcpclose: {} events in {}; lost: {}",
            self.events,
            crate::sink::human_millis(took.as_secs_f64() * 1000.0),
            lost.join(", ")
        );
    }
}

/// Sees that the other end of a pipe on the standard output is closed, though nothing is being written.
struct ReaderGone(Option<AsyncFd<OwnedFd>>);

impl ReaderGone {
    fn watch() -> Self {
        // A file cannot be polled, and needs not be.
        let stdout = io::stdout().as_fd().try_clone_to_owned();
        Self(stdout.and_then(|stdout| poll(stdout, Interest::ERROR)).ok())
    }

    async fn wait(&self) {
        match &self.0 {
            Some(stdout) if stdout.ready(Interest::ERROR).await.is_ok() => {}
            _ => std::future::pending().await,
        }
    }
}

async fn tick(interval: &mut Option<Interval>) {
    match interval {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}

async fn at(time: Option<tokio::time::Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

async fn exited(child: &mut Option<Child>) -> io::Result<std::process::ExitStatus> {
    match child {
        Some(child) => child.wait().await,
        None => std::future::pending().await,
    }
}

async fn debug_messages(
    logger: &mut Option<AsyncFd<aya_log::EbpfLogger<&'static dyn log::Log>>>,
) -> Result<()> {
    match logger {
        Some(logger) => {
            let mut guard = logger.readable_mut().await?;
            guard.get_inner_mut().flush();
            guard.clear_ready();
            Ok(())
        }
        None => std::future::pending().await,
    }
}

/// Writes our pid beside `path` and moves it there, so that who sees the file sees it whole.
fn write_ready_file(path: &Path) -> Result<()> {
    let failed = || format!("cannot write the ready file {}", path.display());
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    std::fs::write(&temporary, format!("{}\n", std::process::id())).with_context(failed)?;
    std::fs::rename(&temporary, path).with_context(failed)
}
