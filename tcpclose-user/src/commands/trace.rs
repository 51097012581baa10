//! `tcpclose trace`: loads the kernel half, then handles whatever happens next until the trace ends.

use std::{
    ffi::OsString,
    io,
    os::fd::{AsFd as _, OwnedFd},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tcpclose_common::params::Params;
use tokio::{
    io::{Interest, unix::AsyncFd},
    process::Child,
    signal::unix::{SignalKind, signal},
    time::{Interval, MissedTickBehavior},
};

use super::{child, ready};
use crate::{
    cli::{AUTO_STACK_BYTES, CallGraph, Findings, Linger, Netns, Sandbox, TraceArgs, WhichStacks},
    failure::Failure,
    filter::Filter,
    ingest::reader::poll,
    kernel::{
        followed::Followed,
        handle::KernelHalf,
        loader::{self, Request},
        privilege,
    },
    live::{Live, Options},
    metrics,
    recording::{RecordedStep, Recorder},
    report::{Going, Report},
    sandbox,
    sink::{Output, flamegraph::FlameGraph},
    stacks::unwind,
};

/// How long to wait for the connections of a command that has ended.
const AFTER_COMMAND: Duration = Duration::from_secs(5);

/// How often to close files that were kept open for programs that have ended.
const SWEEP_PERIOD: Duration = Duration::from_secs(10);

/// How often to check for connections of a command that has ended.
const CHECK_PERIOD: Duration = Duration::from_millis(100);

/// Traces until something ends it. The exit status is the command's, if there was one.
///
/// # Errors
/// The kernel half cannot be loaded, the command cannot be run, or output cannot be written.
pub async fn trace(mut args: TraceArgs) -> Result<ExitCode> {
    // From here on, signals end the tool in an orderly way, even while it starts.
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let mut live = begin(&mut args)?;
    let mut logger = if args.debug { Some(poll(live.logger()?, Interest::READABLE)?) } else { None };
    let mut child = start_command(&args)?;
    let metrics = match args.metrics {
        Some(address) => Some(metrics::Server::bind(address, live.serve_metrics()).await?),
        None => None,
    };
    live.find_older_stuck()?;
    if let Some(path) = &args.ready_file {
        ready::write(path)?;
    }
    let mut sweep = tokio::time::interval(SWEEP_PERIOD);
    let mut stuck = live.stuck_period().map(tokio::time::interval);
    if let Some(stuck) = &mut stuck {
        stuck.set_missed_tick_behavior(MissedTickBehavior::Delay);
    }
    let mut findings = match args.findings {
        Findings::Every(time) => Some(tokio::time::interval_at(tokio::time::Instant::now() + time, time)),
        Findings::Off | Findings::AtEnd => None,
    };
    let started = Instant::now();
    let reader_gone = ReaderGone::watch();
    // Everything that needs further privileges has been started.
    if args.sandbox == Sandbox::Auto
        && let Err(error) = sandbox::enter()
    {
        eprintln!("tcpclose: continues with all its privileges: {error:#}");
    }
    let _serving = metrics.map(|server| tokio::spawn(server.run()));
    let end = args.duration.map(|duration| tokio::time::Instant::now() + duration);
    let mut code = ExitCode::SUCCESS;
    let mut command_ended: Option<Instant> = None;
    loop {
        tokio::select! {
            result = live.ready() => {
                result?;
                if live.read()? == Going::Done {
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
                command_ended = Some(Instant::now());
            }
            () = tokio::time::sleep(CHECK_PERIOD), if command_ended.is_some() => {
                let waited = command_ended.is_some_and(|ended| ended.elapsed() >= AFTER_COMMAND);
                if waited || !live.followed_alive() {
                    break;
                }
            }
            result = debug_messages(&mut logger) => result?,
            _ = sweep.tick() => live.sweep(),
            () = tick(&mut stuck) => {
                if live.report_stuck()? == Going::Done {
                    break;
                }
            }
            () = tick(&mut findings) => {
                if live.report_findings()? == Going::Done {
                    break;
                }
            }
        }
    }
    live.finish()?;
    live.summarize(started.elapsed());
    Ok(code)
}

/// Loads the kernel half, and prepares everything that processes its records.
fn begin(args: &mut TraceArgs) -> Result<Live> {
    let is_contained = !privilege::in_initial_pid_namespace();
    let chose_own_netns = is_contained && args.filter.socket.netns.is_empty();
    if chose_own_netns {
        args.filter.socket.netns.push(Netns::Own);
    }
    let filter = Filter::new(args.filter.clone());
    let flame_graph = args.flamegraph.as_deref().map(FlameGraph::create).transpose()?;
    let mut kernel = loader::load(&request(args, &filter))?;
    if filter.is_about_namespaces() && !kernel.has_netns {
        return Err(no_namespaces().into());
    }
    for loss in &kernel.losses {
        eprintln!("tcpclose: {loss}");
    }
    if chose_own_netns {
        eprintln!(
            "tcpclose: in a separate pid namespace: tracing this network namespace alone; --netns host traces all of them"
        );
    }
    let followed = follow(&mut kernel, &filter, &args.command)?;
    let output = if args.summary {
        Output::nowhere()
    } else {
        Output::stdout(args.output, args.stack != WhichStacks::None)
    };
    let recorder = recorder(&kernel, args)?;
    let mut report = Report::new(vec![filter], output, args.count).with_flame_graph(flame_graph);
    if args.findings != Findings::Off {
        report = report.with_findings();
    }
    let options = Options {
        linger: args.linger,
        connections: args.connections,
        followed,
        recorder,
        sandbox: args.sandbox == Sandbox::Auto,
    };
    Live::new(kernel, report, options)
}

/// The configuration of the kernel half.
fn request(args: &TraceArgs, filter: &Filter) -> Request {
    let mut params = Params::NONE;
    filter.to_kernel(&mut params);
    params.by_process *= u32::from(privilege::in_initial_pid_namespace());
    params.user_stack = u32::from(matches!(args.stack, WhichStacks::User | WhichStacks::Both));
    params.kernel_stack = u32::from(matches!(args.stack, WhichStacks::Kernel | WhichStacks::Both));
    if params.user_stack != 0 && args.call_graph != CallGraph::FramePointers {
        (params.stack_bytes, params.recipes) = match args.call_graph {
            CallGraph::Dwarf(bytes) => (bytes, 0),
            CallGraph::Auto | CallGraph::FramePointers => (AUTO_STACK_BYTES, 1),
        };
    }
    params.registers = unwind::REGISTERS;
    params.ttl = u32::from(args.ttl);
    params.stuck = u32::from(args.linger != Linger::Off);
    let follow_children = !args.command.is_empty();
    params.by_process |= u32::from(follow_children);
    Request {
        follow_children,
        accept_hook: args.accept_hook,
        connections: args.connections,
        log: args.debug.then_some(aya_log::Level::Debug),
        ..Request::new(params, args.btf.clone())
    }
}

/// With `--record`: the recording, and its first step.
fn recorder(kernel: &KernelHalf, args: &TraceArgs) -> Result<Option<(Recorder, RecordedStep)>> {
    let Some(path) = &args.record else { return Ok(None) };
    let recorder = Recorder::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(Some((recorder, beginning(kernel, args))))
}

/// The first step of a recording.
fn beginning(kernel: &KernelHalf, args: &TraceArgs) -> RecordedStep {
    let arguments = std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned());
    RecordedStep::Start {
        reset_reasons: kernel.reset_reasons.0.clone(),
        stacks: args.stack != WhichStacks::None,
        command: !args.command.is_empty(),
        arguments: arguments.take_while(|argument| argument != "--").collect(),
    }
}

/// The failure of a trace that is limited to network namespaces, on a kernel where the programs cannot
/// distinguish them.
fn no_namespaces() -> Failure {
    Failure {
        failed: "cannot trace some network namespaces and not others".to_owned(),
        found: "a kernel without BTF, whose programs cannot tell them apart".to_owned(),
        needed: "BTF (CONFIG_DEBUG_INFO_BTF), or to trace all network namespaces of the host".to_owned(),
        fix: "--btf FILE with the BTF of this kernel, or --netns host".to_owned(),
    }
}

/// Makes the kernel half follow the processes of `--pid` and, with `-- COMMAND`, this process, whose only
/// child will be the command. Returns the table of followed processes if there is a command.
fn follow(kernel: &mut KernelHalf, filter: &Filter, command: &[OsString]) -> Result<Option<Followed>> {
    let mut followed = Followed::new(kernel)?;
    // In another pid namespace, the kernel half does not know these ids, and the user half alone decides.
    if privilege::in_initial_pid_namespace() {
        for pid in filter.pids() {
            followed.add(*pid)?;
        }
    }
    if command.is_empty() {
        return Ok(None);
    }
    let own = kernel.own_pid().context(
        "cannot follow the command in a separate pid namespace: this kernel does not tell its ids outside; \
         in a container use --pid host",
    )?;
    followed.add(own)?;
    Ok(Some(followed))
}

/// Starts the command, if there is one.
fn start_command(args: &TraceArgs) -> Result<Option<Child>> {
    let Some(program) = args.command.first() else { return Ok(None) };
    let child = child::start(&args.command, args.output);
    child.map(Some).with_context(|| format!("cannot run {}", program.to_string_lossy()))
}

/// Detects that the other end of a pipe on the standard output was closed, even while nothing is written.
struct ReaderGone(Option<AsyncFd<OwnedFd>>);

impl ReaderGone {
    fn watch() -> Self {
        // A file cannot be polled, and need not be.
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
