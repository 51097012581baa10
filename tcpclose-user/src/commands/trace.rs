//! `tcpclose trace`: loads the kernel half, then waits for whatever comes next until the trace ends.

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
    cli::{AUTO_STACK_BYTES, CallGraph, Linger, TraceArgs, WhichStacks},
    filter::Filter,
    ingest::{
        reader::poll,
        recording::{Recorder, Step},
    },
    kernel::{
        followed::Followed,
        handle::KernelHalf,
        loader::{self, Request},
    },
    live::{Live, Options},
    sink::{
        Output,
        report::{Going, Report},
    },
    stacks::unwind,
};

/// How long the connections of a command that has ended may take to end as well.
const AFTER_COMMAND: Duration = Duration::from_secs(5);

/// How often files are closed that were held open for programs that have ended.
const SWEEP_PERIOD: Duration = Duration::from_secs(10);

/// How often to check for connections of a command that has ended.
const CHECK_PERIOD: Duration = Duration::from_millis(100);

/// Traces until something ends it. The exit status is the command's, if there was one.
///
/// # Errors
/// The kernel half cannot be loaded, the command cannot be run, or output cannot be written.
pub async fn trace(args: TraceArgs) -> Result<ExitCode> {
    // From here on signals end the tool cleanly, even while it starts.
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let filter = Filter::new(args.filter.clone());
    let mut kernel = loader::load(&request(&args, &filter))?;
    for loss in &kernel.losses {
        eprintln!("tcpclose: {loss}");
    }
    let followed = follow(&mut kernel, &filter, &args.command)?;
    let output = if args.summary {
        Output::nowhere()
    } else {
        Output::stdout(args.output, args.stack != WhichStacks::None)
    };
    let recorder = match &args.record {
        Some(path) => {
            let recorder =
                Recorder::create(path).with_context(|| format!("cannot create {}", path.display()))?;
            Some((recorder, beginning(&kernel, &args)))
        }
        None => None,
    };
    let report = Report::new(vec![filter], output, args.count);
    let options = Options { linger: args.linger, connections: args.connections, followed, recorder };
    let mut live = Live::new(kernel, report, options)?;
    let mut logger = if args.debug { Some(poll(live.logger()?, Interest::READABLE)?) } else { None };
    let mut child = start_command(&args)?;
    if let Some(path) = &args.ready_file {
        ready::write(path)?;
    }
    live.find_older_stuck()?;
    let mut sweep = tokio::time::interval(SWEEP_PERIOD);
    let mut stuck = live.stuck_period().map(tokio::time::interval);
    if let Some(stuck) = &mut stuck {
        stuck.set_missed_tick_behavior(MissedTickBehavior::Delay);
    }
    let started = Instant::now();
    let reader_gone = ReaderGone::watch();
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
        }
    }
    live.finish()?;
    live.summarize(started.elapsed());
    Ok(code)
}

/// What the kernel half is asked for.
fn request(args: &TraceArgs, filter: &Filter) -> Request {
    let mut params = Params::NONE;
    filter.to_kernel(&mut params);
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

/// What a recording begins with.
fn beginning(kernel: &KernelHalf, args: &TraceArgs) -> Step {
    let arguments = std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned());
    Step::Start {
        reset_reasons: kernel.reset_reasons.0.clone(),
        stacks: args.stack != WhichStacks::None,
        command: !args.command.is_empty(),
        arguments: arguments.take_while(|argument| argument != "--").collect(),
    }
}

/// Has the kernel half follow the processes that `--pid` names, and with `-- COMMAND` this process, whose only child the
/// command will be. Returns the table of followed processes if there is a command.
fn follow(kernel: &mut KernelHalf, filter: &Filter, command: &[OsString]) -> Result<Option<Followed>> {
    let mut followed = Followed::new(kernel)?;
    for pid in filter.pids() {
        followed.add(*pid)?;
    }
    if command.is_empty() {
        return Ok(None);
    }
    followed.add(std::process::id())?;
    Ok(Some(followed))
}

/// Starts the command, if there is one.
fn start_command(args: &TraceArgs) -> Result<Option<Child>> {
    let Some(program) = args.command.first() else { return Ok(None) };
    let child = child::start(&args.command, args.output);
    child.map(Some).with_context(|| format!("cannot run {}", program.to_string_lossy()))
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
