//! `tcpclose replay FILE`: writes the lines of a recorded trace again, without privileges and without the
//! kernel half.

use std::{collections::BTreeMap, fs, process::ExitCode, sync::Arc};

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;

use crate::{
    attribute::Attributor,
    cli::{Cli, Command, Findings, ReplayArgs},
    compose::Composer,
    correlate::Correlator,
    event::Event,
    filter::Filter,
    host::Recorded,
    ingest::{
        decode::{Record, decode},
        life::SocketId,
    },
    kernel::ResetReasons,
    pipeline::{Pipeline, StuckPhase},
    recording::{RecordedStep, RecordingFrame, frames},
    report::{Going, Report},
    sink::{Output, flamegraph::FlameGraph},
    stuck::{Descriptor, Found, FoundBy, age::Age},
};

/// Makes the lines of a recording again.
///
/// # Errors
/// The file cannot be read or is not a recording, or the output cannot be written.
pub fn replay(args: ReplayArgs) -> Result<ExitCode> {
    let path = args.file.display().to_string();
    let bytes = fs::read(&args.file).with_context(|| format!("cannot read {path}"))?;
    let output = |stacks| Output::stdout(args.output, stacks);
    let flame_graph = args.flamegraph.as_deref().map(FlameGraph::create).transpose()?;
    let with_findings = match args.findings {
        Findings::Off => false,
        Findings::AtEnd => true,
        Findings::Every(_) => bail!("--findings with a time is for traces; needed: `end` or `off`"),
    };
    run(frames(bytes.into()), Filter::new(args.filter), args.count, with_findings, output, flame_graph)
        .with_context(|| format!("cannot replay {path}"))?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the frames of a recording through the pipeline. `output` creates the output, depending on whether
/// there are stacks; `flame_graph` is that of `--flamegraph`.
///
/// # Errors
/// The frames are not those of a recording, a record cannot be decoded, or the output cannot be written.
pub fn run(
    frames: Result<Vec<RecordingFrame>>,
    filter: Filter,
    count: Option<u64>,
    with_findings: bool,
    output: impl FnOnce(bool) -> Output,
    flame_graph: Option<FlameGraph>,
) -> Result<()> {
    let mut frames = frames?.into_iter().peekable();
    let Some(RecordingFrame::Step(start)) = frames.next() else { bail!("it is empty") };
    let RecordedStep::Start { reset_reasons, stacks, command, arguments } = *start else {
        bail!("it does not begin with the start of a trace");
    };
    let mut report = Report::new(vec![original_filter(&arguments), filter], output(stacks), count)
        .with_flame_graph(flame_graph);
    if with_findings {
        report = report.with_findings();
    }
    let mut replay = Replay { pipeline: pipeline(reset_reasons, report, command), inspected: None };
    while let Some(frame) = frames.next() {
        // The host's answers follow the frame that led to the questions.
        while let Some(answer) = frames.next_if(is_answer) {
            if let RecordingFrame::Step(step) = answer
                && let RecordedStep::Answer(question, answer) = *step
            {
                replay.pipeline.host.learn(question, answer);
            }
        }
        let going = match frame {
            RecordingFrame::Record(bytes) => replay.record(decode(&bytes)?)?,
            RecordingFrame::Step(step) => replay.step(*step)?,
        };
        if going == Going::Done {
            break;
        }
    }
    replay.pipeline.report.last_findings()?;
    replay.pipeline.report.finish()
}

fn is_answer(frame: &RecordingFrame) -> bool {
    matches!(frame, RecordingFrame::Step(step) if matches!(**step, RecordedStep::Answer(..)))
}

/// The filters of the recorded trace. The kernel half has applied only those that it can decide.
fn original_filter(arguments: &[String]) -> Filter {
    let line = std::iter::once("tcpclose").chain(arguments.iter().map(String::as_str));
    match Cli::try_parse_from(line) {
        Ok(Cli { command: Some(Command::Trace(args)), .. }) => Filter::new(args.filter),
        Ok(cli) => Filter::new(cli.trace.filter),
        // The trace was recorded by a version with other options.
        Err(_) => Filter::default(),
    }
}

fn pipeline(reset_reasons: BTreeMap<i64, String>, report: Report, command_only: bool) -> Pipeline<Recorded> {
    Pipeline {
        host: Recorded::default(),
        correlator: Correlator::default(),
        attributor: Attributor::default(),
        composer: Composer::new(ResetReasons(reset_reasons)),
        report,
        found: Found::default(),
        command_only,
    }
}

/// A recording that is being replayed.
struct Replay {
    pipeline: Pipeline<Recorded>,
    /// When the next socket was inspected, and its age at that time.
    inspected: Option<(u64, Age)>,
}

impl Replay {
    fn record(&mut self, record: Record<'_>) -> Result<Going> {
        match (record, self.inspected.take()) {
            (Record::Stuck(life), Some((at, age))) => {
                self.pipeline.found.socket(life, at, age);
                Ok(Going::On)
            }
            (record, _) => self.pipeline.record(record),
        }
    }

    fn step(&mut self, step: RecordedStep) -> Result<Going> {
        match step {
            // Answers have been added to the host already. A second start has no meaning.
            RecordedStep::Start { .. } | RecordedStep::Answer(..) => {}
            RecordedStep::Clock { wall_minus_boot, suspended } => {
                self.pipeline.composer.clock.set_offsets((wall_minus_boot, suspended));
            }
            RecordedStep::Inspected { at, since, at_least, at_most } => {
                self.inspected = Some((at, Age { since, at_least, at_most }));
            }
            RecordedStep::Descriptor { address, born, fd, holder } => {
                let descriptor = Descriptor { fd, holder: FoundBy::Procfs(Arc::new(holder)) };
                self.pipeline.found.descriptor(SocketId { address, born }, descriptor);
            }
            RecordedStep::Searched(arrivals) => self.pipeline.correlator.searched(arrivals),
            RecordedStep::CaughtUp { now, found } => return self.pipeline.caught_up(now, |_, _| found),
            RecordedStep::Stuck { at_end } => {
                return self.pipeline.stuck(if at_end { StuckPhase::AtEnd } else { StuckPhase::Now });
            }
            RecordedStep::Orphan(lingering) => return self.pipeline.event(Event::Lingering(lingering)),
            RecordedStep::Lost(lost) => self.pipeline.report.lost(lost)?,
        }
        Ok(Going::On)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fmt::Write as _,
        io,
        sync::{Arc, Mutex},
    };

    use bytes::Bytes;
    use serde_json::Value;

    use super::*;
    use crate::sink::{Format, Palette};

    /// Recorded on a 6.18 kernel while `fixtures/records/provoke.py` ran.
    const RECORDED: &[u8] = include_bytes!("../../fixtures/records/6.18-amd64.bin");
    /// The acts of that script, as [`describe`] writes them.
    const EXPECTED: &str = include_str!("../../fixtures/records/6.18-amd64.txt");

    /// Memory that can be read while it is written to.
    #[derive(Clone, Default)]
    struct SharedBuffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for SharedBuffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn replayed(recording: &'static [u8], filter: Filter, count: Option<u64>) -> Result<Vec<Value>> {
        let written = SharedBuffer::default();
        let output = Output::to(Format::Json, written.clone(), Palette::PLAIN, true);
        run(frames(Bytes::from_static(recording)), filter, count, false, |_| output, None)?;
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        Ok(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    fn describe(events: &[Value]) -> String {
        let word = |value: &Value| value.as_str().unwrap_or("-").to_owned();
        let mut text = String::new();
        for event in events {
            if event["event"] == "reset" {
                writeln!(text, "reset {} {}", word(&event["direction"]), word(&event["cause"])).unwrap();
                continue;
            }
            let fields = ["closed_by", "ended", "trigger", "signal", "cause"].map(|name| word(&event[name]));
            let path: Vec<_> =
                event["states"].as_array().unwrap().iter().map(|step| word(&step["state"])).collect();
            let fields = fields.into_iter().filter(|field| !field.is_empty()).collect::<Vec<_>>().join(" ");
            let connection = &event["connection"];
            writeln!(
                text,
                "close {fields} {} {}B/{}B",
                path.join(">"),
                connection["bytes_sent"],
                connection["bytes_received"]
            )
            .unwrap();
        }
        text
    }

    #[test]
    fn a_recording_is_judged_as_the_script_acted() {
        let events = replayed(RECORDED, Filter::default(), None).unwrap();
        // The scheduler decides which of two ends comes first.
        let sorted = |text: &str| {
            let mut lines: Vec<_> =
                text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
            lines.sort();
            lines
        };
        let text = describe(&events);
        assert_eq!(sorted(&text), sorted(EXPECTED), "\n{text}");
        for event in &events {
            assert!(event["process"]["exe"].is_string(), "the host's answer is in the recording: {event}");
        }
    }

    #[test]
    fn an_event_that_is_like_others_takes_few_allocations() {
        let mut records = Vec::new();
        let report = Report::new(
            vec![Filter::default()],
            Output::to(Format::Json, io::sink(), Palette::PLAIN, true),
            None,
        )
        .with_findings();
        let mut replay = Replay { pipeline: pipeline(BTreeMap::new(), report, false), inspected: None };
        for frame in frames(Bytes::from_static(RECORDED)).unwrap() {
            match frame {
                RecordingFrame::Record(bytes) => records.push(bytes),
                RecordingFrame::Step(step) => match *step {
                    RecordedStep::Answer(question, answer) => replay.pipeline.host.learn(question, answer),
                    step @ RecordedStep::Clock { .. } => {
                        let _ = replay.step(step).unwrap();
                    }
                    _ => {}
                },
            }
        }
        let mut now = 0;
        let mut all = |replay: &mut Replay| {
            for record in &records {
                let _ = replay.record(decode(record).unwrap()).unwrap();
            }
            now += 1_000_000_000;
            let _ = replay.pipeline.caught_up(now, |_, inodes| vec![true; inodes.len()]).unwrap();
        };
        // From here on, processes and stacks are known, and buffers have their final size.
        (0..10).for_each(|_| all(&mut replay));
        let count = crate::allocations::during(|| all(&mut replay));
        let records = records.len() as u64;
        // These are the life, the event and its states, the RSTs of an ending, and the queue of waiting
        // endings.
        assert!(count <= 6 * records, "{count} allocations for {records} records");
        assert!(count >= records, "{count} allocations are too few to be all");
    }

    #[test]
    fn filters_and_the_count_apply() {
        let all = replayed(RECORDED, Filter::default(), None).unwrap();
        assert_eq!(replayed(RECORDED, Filter::default(), Some(3)).unwrap(), all[..3]);
        let resets = crate::cli::FilterArgs {
            event: vec![crate::cli::EventKind::Reset],
            ..crate::cli::FilterArgs::default()
        };
        let resets = replayed(RECORDED, Filter::new(resets), None).unwrap();
        assert!(!resets.is_empty() && resets.iter().all(|event| event["event"] == "reset"));
    }

    #[test]
    fn a_recording_that_was_cut_short_is_replayed_as_far_as_it_goes() {
        let all = replayed(RECORDED, Filter::default(), None).unwrap();
        for length in [RECORDED.len() / 2, RECORDED.len() - 1] {
            let some = replayed(&RECORDED[..length], Filter::default(), None).unwrap();
            assert!(all.starts_with(&some), "{length} bytes");
        }
        assert!(replayed(&[], Filter::default(), None).is_err());
    }
}
