//! `tcpclose diagnose`: reads lines and writes findings.

use std::{
    fs::File,
    io::{self, BufWriter, ErrorKind, IsTerminal as _, Write},
    path::Path,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::{
    cli::{DiagnoseArgs, ReportFormat},
    diagnose::{
        Diagnosis,
        input::{Broken, Input},
        page,
        pictures::Pictures,
        report::{self, Seqs},
    },
    event::{Event, Finding},
    sink::{Format, Output, Palette, Written},
};

/// Reads the files and writes findings.
///
/// # Errors
/// A file cannot be opened or read, or the output cannot be written.
pub fn diagnose(args: &DiagnoseArgs) -> Result<()> {
    let reads_stdin = args.files.is_empty() || args.files.iter().any(|file| file == Path::new("-"));
    if reads_stdin && !io::stdin().is_terminal() {
        outlast_the_writer().context("cannot catch SIGINT")?;
    }
    let mut input = Input::open(&args.files, args.html.is_some())?;
    let mut diagnosis = Diagnosis::new(input.names());
    let mut pictures = args.html.as_ref().map(|_| Pictures::default());
    input
        .read(|observation, source| {
            diagnosis.add(observation, source);
            if let Some(pictures) = &mut pictures {
                pictures.add(observation);
            }
        })
        .context("cannot read events")?;
    let findings = diagnosis.findings(true);
    if let Some((path, pictures)) = args.html.as_deref().zip(pictures) {
        write_page(path, &findings, &diagnosis, &pictures)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    match args.output {
        ReportFormat::Text => write_report(&findings, &diagnosis)?,
        ReportFormat::Json => {
            let mut output = Output::stdout(Format::Json, true);
            for finding in findings {
                if output.write(Event::Finding(Box::new(finding)))? == Written::ReaderGone {
                    break;
                }
            }
            let _ = output.flush()?;
        }
    }
    report_gaps(&input.broken, &diagnosis);
    Ok(())
}

/// Lets the first SIGINT pass. In `tcpclose -o json | tcpclose diagnose`, Ctrl-C ends the trace, and the
/// findings follow when everything that it wrote has been read. A second SIGINT ends this process.
fn outlast_the_writer() -> nix::Result<()> {
    extern "C" fn nothing(_: nix::libc::c_int) {}
    let once = SaFlags::SA_RESETHAND | SaFlags::SA_RESTART;
    let action = SigAction::new(SigHandler::Handler(nothing), once, SigSet::empty());
    // SAFETY: the handler does nothing, which is safe at any time.
    unsafe { sigaction(Signal::SIGINT, &action) }.map(drop)
}

fn write_page(
    path: &Path,
    findings: &[Finding],
    diagnosis: &Diagnosis,
    pictures: &Pictures,
) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    page::write(&mut file, findings, diagnosis.totals(), pictures)?;
    file.flush()
}

fn write_report(findings: &[Finding], diagnosis: &Diagnosis) -> Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    let written = report::write(&mut out, findings, diagnosis.totals(), Palette::of_stdout(), Seqs::Named);
    match written.and_then(|()| out.flush()) {
        // The reader has closed the pipe.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to the standard output"),
    }
}

/// Reports on stderr what the findings leave out.
fn report_gaps(broken: &Broken, diagnosis: &Diagnosis) {
    let totals = diagnosis.totals();
    if let Some((file, number, error)) = &broken.first {
        let count = broken.count;
        let lines = if count == 1 { "line is not an event and was" } else { "lines are not events and were" };
        eprintln!("tcpclose: {count} {lines} left out; the first is line {number} of {file}: {error}");
    }
    if totals.lines == 0 {
        eprintln!("tcpclose: no events; `diagnose` reads what `tcpclose -o json` writes");
    }
    if totals.lost > 0 {
        let events = if totals.lost == 1 { "event was" } else { "events were" };
        eprintln!("tcpclose: {} {events} lost in tracing, so counts are too low", totals.lost);
    }
    if totals.left_out > 0 {
        eprintln!(
            "tcpclose: there are too many different services; {} that showed little are left out",
            totals.left_out
        );
    }
}
