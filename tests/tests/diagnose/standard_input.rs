//! Lines that `diagnose` reads from its standard input: those of a trace that is running, through a pipe.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tcpclose_tests::{
    descriptors,
    netns::Namespace,
    tool::{Launch, Tool},
    until,
};

use super::{SEVERAL, connect_in_vain, only};

/// A trace of a namespace, and a diagnosis that reads what it writes and expects a SIGINT.
fn pipeline(namespace: &Namespace, arguments: &[&str]) -> Result<[Tool; 2]> {
    let trace = Launch::new()?.trace([namespace]).args(["--stack", "none"]);
    let [trace, diagnosis] = trace.piped_into(Launch::new()?.args(arguments.iter().copied()))?;
    let (trace, diagnosis) = (trace.start()?, diagnosis.spawn()?);
    expects_sigint(&diagnosis, true)?;
    Ok([trace, diagnosis])
}

/// Waits until a process has a handler for SIGINT, or has none.
fn expects_sigint(process: &Tool, expected: bool) -> Result<()> {
    let file = format!("/proc/{}/status", process.pid());
    until("SIGINT is expected, or not", || {
        let status = fs::read_to_string(&file)?;
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).context("no SigCgt")?;
        let caught = u64::from_str_radix(caught.trim(), 16)?;
        Ok((expected == (caught >> (Signal::SIGINT as u32 - 1) & 1 == 1)).then_some(()))
    })
}

/// `tcpclose -o json | tcpclose diagnose -`, and Ctrl-C, with which a terminal sends SIGINT to both: the trace
/// ends, and the diagnosis reads to the end of what it has written.
#[test]
fn a_diagnosis_outlasts_the_trace_that_it_reads() -> Result<()> {
    descriptors::keep_to_this_thread()?;
    for arguments in [&["diagnose", "-", "-o", "json"][..], &["diagnose", "-o", "json"]] {
        let namespace = Namespace::new()?;
        let [trace, diagnosis] = pipeline(&namespace, arguments)?;
        connect_in_vain(&namespace)?;
        diagnosis.signal(Signal::SIGINT)?;
        trace.signal(Signal::SIGINT)?;
        trace.wait()?.successful()?;
        let ended = diagnosis.wait()?.with_code(0)?;
        ensure!(ended.stderr.is_empty(), "{ended}");
        let finding = only(&ended.lines, "refused")?;
        ensure!(finding["count"] == SEVERAL, "{finding:#}");
    }
    Ok(())
}

/// A second Ctrl-C ends a diagnosis whose writer does not end.
#[test]
fn a_second_signal_ends_a_diagnosis() -> Result<()> {
    descriptors::keep_to_this_thread()?;
    let namespace = Namespace::new()?;
    let [trace, diagnosis] = pipeline(&namespace, &["diagnose", "-"])?;
    diagnosis.signal(Signal::SIGINT)?;
    expects_sigint(&diagnosis, false)?;
    diagnosis.signal(Signal::SIGINT)?;
    let ended = diagnosis.wait()?;
    ensure!(ended.code().is_none(), "it was not ended by the signal\n{ended}");
    drop(trace);
    Ok(())
}
