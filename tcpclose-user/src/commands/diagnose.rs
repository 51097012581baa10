//! `tcpclose diagnose`: from lines to findings.

use std::io::{self, BufWriter, ErrorKind, Write};

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::{
    cli::DiagnoseArgs,
    diagnose::{Diagnosis, input::Broken, input::Input, report},
    event::Finding,
    sink::{Format, Palette},
};

/// Reads the files and writes what they show.
///
/// # Errors
/// A file cannot be opened or read, or the output cannot be written.
pub fn diagnose(args: &DiagnoseArgs) -> Result<()> {
    let mut input = Input::open(&args.files)?;
    let mut diagnosis = Diagnosis::new(input.names());
    input.read(|observation, source| diagnosis.add(observation, source)).context("cannot read events")?;
    let findings = diagnosis.findings(true);
    let mut out = BufWriter::new(io::stdout().lock());
    let written = match args.output {
        Format::Text => report::write(&mut out, &findings, diagnosis.totals(), Palette::of_stdout()),
        Format::Json => write_lines(&mut out, findings),
    };
    match written.and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
        result => result.context("cannot write to the standard output")?,
    }
    tell(&input.broken, &diagnosis);
    Ok(())
}

fn write_lines(out: &mut impl Write, findings: Vec<Finding>) -> io::Result<()> {
    #[derive(Serialize)]
    #[serde(tag = "event", rename_all = "snake_case")]
    enum Line {
        Finding(Box<Finding>),
    }
    for (seq, mut finding) in (1..).zip(findings) {
        finding.seq = seq;
        serde_json::to_writer(&mut *out, &Line::Finding(Box::new(finding)))?;
        out.write_all(b"\n")?;
    }
    Ok(())
}

/// Says on stderr what the findings do not rest on.
fn tell(broken: &Broken, diagnosis: &Diagnosis) {
    let totals = diagnosis.totals();
    if let Some((file, number, error)) = &broken.first {
        let count = broken.count;
        let lines = if count == 1 { "line is" } else { "lines are" };
        eprintln!("tcpclose: {count} {lines} not events and left out; the first is line {number} of {file}: {error}");
    }
    if totals.lines == 0 {
        eprintln!("tcpclose: no events; `diagnose` reads what `tcpclose -o json` writes");
    }
    if totals.lost > 0 {
        eprintln!("tcpclose: {} events were lost when these were traced; counts are too low", totals.lost);
    }
    if totals.left_out > 0 {
        eprintln!("tcpclose: too many different services; {} that showed little are left out", totals.left_out);
    }
}
