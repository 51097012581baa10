//! Writes findings as text: one screen, the most costly first.

use std::fmt::Write as _;

use std::io::{self, Write};

use crate::{
    diagnose::Totals,
    event::Finding,
    sink::{COLUMNS, Palette, escape, wrap},
};

/// The number of findings that are written. The rest is counted, and JSON output has all of them.
const MOST: usize = 8;

/// The width of the column that numbers the findings.
const INDENT: usize = 3;

/// Whether the lines that show a finding are listed by their numbers, which only JSON lines have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seqs {
    /// They are listed.
    Named,
    /// They are not listed.
    Hidden,
}

/// Writes findings and the statistics of the input.
pub fn write(
    out: &mut impl Write,
    findings: &[Finding],
    totals: Totals,
    palette: Palette,
    seqs: Seqs,
) -> io::Result<()> {
    let Palette { alarm, header, dim, .. } = palette;
    if findings.is_empty() {
        writeln!(out, "{header}No findings{header:#} in {}.", read(totals))?;
    } else {
        let noun = if findings.len() == 1 { "finding" } else { "findings" };
        writeln!(
            out,
            "{header}{} {noun}{header:#} in {}, the most costly first.",
            findings.len(),
            read(totals)
        )?;
    }
    for (number, finding) in findings.iter().take(MOST).enumerate() {
        let kind = finding.kind;
        let number = number + 1;
        writeln!(out, "\n{number:>2} {alarm}{kind}{alarm:#} {dim}{}{dim:#}", span(finding, seqs))?;
        paragraph(out, &escape(&finding.summary))?;
        paragraph(out, &format!("→ {}", escape(&finding.advice)))?;
    }
    if findings.len() > MOST {
        writeln!(out, "\n{} more are in the JSON (`-o json`).", findings.len() - MOST)?;
    }
    if !findings.is_empty() {
        writeln!(
            out,
            "\n{dim}`tcpclose explain KIND` explains how a finding is derived. Behind NAT, the two ends of a \
             connection{dim:#}"
        )?;
        writeln!(out, "{dim}have different addresses, and are judged separately.{dim:#}")?;
    }
    Ok(())
}

fn read(totals: Totals) -> String {
    let mut text = format!("{} lines, {} ends of connections", totals.lines, totals.ends);
    if totals.lost > 0 {
        let _ = write!(text, " (events lost in tracing: {})", totals.lost);
    }
    text
}

fn span(finding: &Finding, seqs: Seqs) -> String {
    let clock = |time: crate::event::Time| time.0.strftime("%H:%M:%S").to_string();
    let (first, last) = (clock(finding.first), clock(finding.last));
    let mut text = format!("{} · {first} to {last} UTC · {}", finding.count, finding.confidence);
    if seqs == Seqs::Named {
        let numbers: Vec<_> = finding.lines.iter().map(u64::to_string).collect();
        let _ = write!(text, " · seq {}", numbers.join(", "));
    }
    text
}

fn paragraph(out: &mut impl Write, text: &str) -> io::Result<()> {
    wrap(text, COLUMNS - INDENT).iter().try_for_each(|line| writeln!(out, "{:INDENT$}{line}", ""))
}
