//! `tcpclose trace`: loads the kernel half, then handles whatever happens next until the trace ends.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Interval, MissedTickBehavior},
};

use super::{child::TracedCommand, debug::KernelLog, output_pipe::OutputPipe, ready};
use crate::{
    cli::{Findings, Sandbox, TraceArgs},
    live::Live,
    metrics,
    report::Going,
    sandbox,
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
pub async fn trace(args: &TraceArgs) -> Result<ExitCode> {
    // From here on, signals end the tool in an orderly way, even while it starts.
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let mut live = Live::start(args)?;
    let mut kernel_log = if args.debug { KernelLog::of(live.logger()?)? } else { KernelLog::none() };
    let mut command = TracedCommand::start(&args.command, args.output)?;
    let metrics = match args.metrics {
        Some(address) => Some(metrics::Server::bind(address, live.serve_metrics()).await?),
        None => None,
    };
    live.find_older_stuck();
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
    let output = OutputPipe::watch();
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
            () = output.closed() => break,
            () = at(end) => break,
            status = command.ended() => {
                code = ExitCode::from(status?);
                command_ended = Some(Instant::now());
            }
            () = tokio::time::sleep(CHECK_PERIOD), if command_ended.is_some() => {
                let waited = command_ended.is_some_and(|ended| ended.elapsed() >= AFTER_COMMAND);
                if waited || !live.followed_alive() {
                    break;
                }
            }
            result = kernel_log.print() => result?,
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
