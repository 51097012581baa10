//! Time and memory that `tcpclose diagnose` takes for many lines.

use std::{
    fs,
    io::{BufWriter, Write as _},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{
    Bench,
    bed::{Ends, LoadExtent},
    compare::tcpclose,
    table,
    table::{Row, rounded},
    tool::{Kind, Tracer},
};
use crate::command::{line, say};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many lines it reads
    #[arg(long, value_name = "N", default_value_t = 10_000_000)]
    lines: u64,
}

/// The connections that are traced for lines that are then repeated.
const CONNECTIONS: u64 = 10_000;

/// Repeated lines are this far apart.
const STEP: Duration = Duration::from_micros(50);

/// The limits for ten million lines.
const MOST_SECONDS: f64 = 60.0;
const MOST_MIB: f64 = 200.0;

/// What each repetition replaces in a line: the time, and the beginning of addresses and the name of the load
/// generator, so that each has programs and destinations of its own.
const TIME: &str = r#""time":""#;
const NETWORK: &str = r#"{"address":"127.0."#;
const PROGRAM: &str = r#""comm":"load"#;

pub(crate) fn measure(bench: &mut Bench, args: &Args) -> Result<Value> {
    let tool = bench.tool()?.to_owned();
    let mut rows = Vec::<Row>::new();
    for (ends, stacks) in [(Ends::Fin, "none"), (Ends::Fin, "user"), (Ends::Rst, "none")] {
        let bed = &mut bench.bed;
        bed.renew()?;
        let command = tcpclose(&tool, &["--stack", stacks, "--findings", "off"])?;
        let mut tracer = Tracer::start(bed, Kind::Tcpclose, &command)?;
        bed.churn(LoadExtent::Connections(CONNECTIONS), ends)?;
        tracer.settle()?;
        tracer.stop()?;
        let text = fs::read_to_string(bed.path("output"))?;
        let lines = text.lines().filter(|line| line.starts_with('{')).map(Template::new);
        let lines = lines.collect::<Result<Vec<_>>>()?;
        say(&format!("reading {} lines", args.lines));

        let mut command = Command::new(&tool);
        command.args(["diagnose", "-o", "json"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let start = Instant::now();
        let mut child = command.spawn().with_context(|| format!("cannot start {}", line(&command)))?;
        let mut input = BufWriter::with_capacity(1 << 18, child.stdin.take().context("no pipe")?);
        let (mut time, mut bytes) = (Duration::ZERO, 0);
        let mut written = 0;
        for repetition in 0_u64.. {
            for template in lines.iter().take(usize::try_from(args.lines - written)?) {
                time += STEP;
                bytes += template.write(&mut input, time, repetition)?;
                written += 1;
            }
            if written == args.lines {
                break;
            }
        }
        input.flush()?;
        // The rest in the pipe takes a hundredth of a second.
        let (cpu, resident) = (cpu(child.id())?, most_resident(child.id())?);
        drop(input);
        let status = child.wait()?;
        ensure!(status.success(), "this command failed ({status}): {}", line(&command));
        let elapsed = start.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a number of lines")]
        let of_all = args.lines as f64 / 1e7;
        rows.push(vec![
            ("ends", json!(ends.name())),
            ("stacks", json!(stacks)),
            ("lines", json!(args.lines)),
            ("bytes/line", json!(bytes / args.lines)),
            ("seconds", rounded(elapsed, 1)),
            ("of 60 s for 10,000,000", rounded(elapsed / of_all / MOST_SECONDS, 2)),
            ("lines/s", rounded(of_all * 1e7 / elapsed, 0)),
            ("CPU s", rounded(cpu.as_secs_f64(), 1)),
            ("peak MiB", json!(resident)),
            ("of 200 MiB", rounded(f64::from(resident) / MOST_MIB, 2)),
        ]);
    }
    table::print(&rows);
    Ok(table::json(&rows))
}

/// The CPU time of a process.
fn cpu(pid: u32) -> Result<Duration> {
    let clock =
        clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?)).context("its CPU clock cannot be found")?;
    Ok(clock_gettime(clock).context("its CPU clock cannot be read")?.into())
}

/// The most memory that a process has had, in MiB.
fn most_resident(pid: u32) -> Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = kib.and_then(|kib| kib.trim().strip_suffix(" kB")).context("it has no VmHWM")?;
    Ok(kib.parse::<u32>()? / 1024)
}

/// A line without what each repetition replaces.
struct Template<'a>(Vec<Part<'a>>);

enum Part<'a> {
    Text(&'a str),
    Time,
    Network,
    Program,
}

impl<'a> Template<'a> {
    fn new(line: &'a str) -> Result<Self> {
        let (before, rest) = line.split_once(TIME).with_context(|| format!("no time in {line}"))?;
        let (_, mut rest) = rest.split_once('"').with_context(|| format!("no end of the time in {line}"))?;
        let mut parts = vec![Part::Text(before), Part::Time];
        let next = |text: &str| {
            let found = [(NETWORK, Part::Network), (PROGRAM, Part::Program)]
                .into_iter()
                .filter_map(|(marker, part)| Some((text.find(marker)?, marker.len(), part)));
            found.min_by_key(|(at, ..)| *at)
        };
        while let Some((at, length, part)) = next(rest) {
            parts.extend([Part::Text(&rest[..at]), part]);
            rest = &rest[at + length..];
        }
        parts.push(Part::Text(rest));
        Ok(Self(parts))
    }

    /// Writes the line and returns its length.
    fn write(&self, out: &mut impl std::io::Write, time: Duration, repetition: u64) -> Result<u64> {
        let (seconds, nanos) = (time.as_secs(), time.subsec_nanos());
        let [hours, minutes, seconds] = [seconds / 3600 % 24, seconds / 60 % 60, seconds % 60];
        let mut length = 1;
        for part in &self.0 {
            let text = match part {
                Part::Text(text) => *text,
                Part::Time => &format!("{TIME}2026-03-01T{hours:02}:{minutes:02}:{seconds:02}.{nanos:09}Z\""),
                Part::Network => &format!("{}{}.", NETWORK.trim_end_matches("0."), repetition % 256),
                Part::Program => &format!("{PROGRAM}-{repetition}"),
            };
            out.write_all(text.as_bytes())?;
            length += text.len() as u64;
        }
        out.write_all(b"\n")?;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_network_and_program_are_replaced() {
        let line = concat!(
            r#"{"time":"2026-01-01T00:00:00.000000000Z","remote":{"address":"127.0.0.1"},"#,
            r#""process":{"comm":"load"},"seq":1}"#
        );
        let mut written = Vec::new();
        let template = Template::new(line).expect("a line");
        let length = template.write(&mut written, Duration::from_millis(3_661_500), 258).expect("memory");
        let expected = concat!(
            r#"{"time":"2026-03-01T01:01:01.500000000Z","remote":{"address":"127.2.0.1"},"#,
            r#""process":{"comm":"load-258"},"seq":1}"#
        );
        assert_eq!(String::from_utf8(written).expect("text"), format!("{expected}\n"));
        assert_eq!(length, expected.len() as u64 + 1);
    }
}
