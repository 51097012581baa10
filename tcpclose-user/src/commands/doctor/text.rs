//! The report as text that people read and paste: aligned, [`WIDTH`] columns wide.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};

use super::{Availability, Check, DoctorReport, HookFinding, Mark, Null, Tried, VariantFinding};

const WIDTH: usize = 100;
/// Widths of the columns of the mark and the name, and the column where the text begins.
const MARK: usize = 8;
const NAME: usize = 27;
const TEXT: usize = MARK + NAME;

const HEADING: Style = Style::new().bold();

/// Writes the report with colours, which `out` strips if they are not wanted.
pub(super) fn write(out: &mut impl Write, report: &DoctorReport) -> io::Result<()> {
    let verdict = match report.verdict {
        Availability::Everything => "works in full",
        Availability::Less => "works, with restrictions",
        Availability::Nothing => "cannot trace",
    };
    writeln!(out, "{HEADING}tcpclose {}: {verdict}{HEADING:#}", report.version)?;
    if let Some(cannot) = &report.cannot {
        writeln!(out, "\n{cannot}")?;
    }
    heading(out, "Environment")?;
    for found in &report.place {
        finding(out, found)?;
    }
    heading(out, "Capabilities")?;
    for found in &report.capabilities {
        finding(out, found)?;
    }
    heading(out, "Hooks")?;
    for found in &report.hooks {
        hook(out, found)?;
    }
    if !report.null.is_empty() {
        heading(out, "Null in some events or in all")?;
        for alike in report.null.chunk_by(|one, other| one.why == other.why && one.fix == other.fix) {
            null(out, alike)?;
        }
    }
    out.flush()
}

fn heading(out: &mut impl Write, text: &str) -> io::Result<()> {
    writeln!(out, "\n{HEADING}{text}{HEADING:#}")
}

fn finding(out: &mut impl Write, finding: &Check) -> io::Result<()> {
    line(out, Some(finding.mark), &finding.name, &finding.found)?;
    consequences(out, finding.lost.as_deref(), finding.fix.as_deref())
}

fn hook(out: &mut impl Write, hook: &HookFinding) -> io::Result<()> {
    let shown = hook.variants.iter().filter(|variant| variant.result != Tried::NotNeeded);
    for (number, variant) in shown.enumerate() {
        let first = number == 0;
        line(out, first.then_some(hook.mark), if first { hook.name } else { "" }, &sentence(variant))?;
    }
    // If fields are null, the loss is reported with them.
    if hook.null.is_empty() { consequences(out, hook.lost, hook.fix) } else { Ok(()) }
}

fn sentence(variant: &VariantFinding) -> String {
    let result = match variant.result {
        Tried::Attached => " works",
        Tried::Refused => " does not work",
        Tried::NotNeeded => " is not needed",
        Tried::Untried => " was not tried",
    };
    let option = variant.option.map(|option| format!(", with {option}")).unwrap_or_default();
    let why = variant.why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    format!("{}{result}{option}{why}", variant.kind)
}

/// Fields that are null for the same reason.
fn null(out: &mut impl Write, alike: &[Null]) -> io::Result<()> {
    let Some((last, others)) = alike.split_last() else { return Ok(()) };
    for other in others {
        line(out, None, other.field, "")?;
    }
    line(out, None, last.field, &last.why)?;
    consequences(out, None, Some(&last.fix))
}

fn consequences(out: &mut impl Write, lost: Option<&str>, fix: Option<&str>) -> io::Result<()> {
    for (word, text) in [("lost", lost), ("try", fix)] {
        if let Some(text) = text {
            line(out, None, "", &format!("{word}: {text}"))?;
        }
    }
    Ok(())
}

/// Writes the mark, the name, and the text wrapped in the remaining columns.
fn line(out: &mut impl Write, mark: Option<Mark>, name: &str, text: &str) -> io::Result<()> {
    let (word, style) = match mark {
        Some(Mark::Ok) => ("ok", AnsiColor::Green.on_default()),
        Some(Mark::Less) => ("less", AnsiColor::Yellow.on_default()),
        Some(Mark::No) => ("no", AnsiColor::Red.on_default()),
        Some(Mark::Note) => ("-", Style::new()),
        None => ("", Style::new()),
    };
    let begin = format!("  {style}{word}{style:#}{:pad$}{name:<NAME$}", "", pad = MARK - 2 - word.len());
    let mut lines = wrap(text, WIDTH - TEXT).into_iter();
    writeln!(out, "{}", format!("{begin}{}", lines.next().unwrap_or_default()).trim_end())?;
    lines.try_for_each(|rest| writeln!(out, "{:TEXT$}{rest}", ""))
}

/// Breaks text into lines of at most `width` columns; a longer word gets a line of its own.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_filled() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("a longer-than-that b", 5), ["a", "longer-than-that", "b"]);
        assert_eq!(wrap("", 5), Vec::<String>::new());
    }

    #[test]
    fn text_is_aligned() {
        let mut out = Vec::new();
        let found = Check::new("RLIMIT_MEMLOCK", Mark::Less, "8 KiB").lost("words ".repeat(20)).fix("more");
        finding(&mut out, &found).unwrap();
        let text = anstream::adapter::strip_str(std::str::from_utf8(&out).unwrap()).to_string();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "  less  RLIMIT_MEMLOCK             8 KiB");
        assert!(lines.iter().all(|line| line.len() <= WIDTH), "{text}");
        assert!(lines[1..].iter().all(|line| line.starts_with(&" ".repeat(TEXT))), "{text}");
        assert_eq!(*lines.last().unwrap(), format!("{}try: more", " ".repeat(TEXT)));
    }
}
