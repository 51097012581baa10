//! The last stage: decides which events are reported, writes them, and collects what the summary and the
//! findings need.

use std::{
    collections::HashMap,
    io::{self, Write as _},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    diagnose::{self, Diagnosis},
    event::{Event, Finding, Lost, LostPlace, Time},
    filter::Filter,
    metrics,
    sink::{Output, Palette, Written, flamegraph::FlameGraph, human_millis, summary::Summary},
};

/// Whether to go on.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Going {
    /// There may be more to report.
    On,
    /// The count given with `--count` is reached, or nobody reads the output any more.
    Done,
}

/// Reports events that the filters let through.
pub struct Report {
    /// An event has to pass all of them.
    filters: Vec<Filter>,
    output: Output,
    /// How many events `--count` still lets through.
    left: Option<u64>,
    events: u64,
    summary: Summary,
    /// With `--flamegraph`.
    flame_graph: Option<FlameGraph>,
    /// With `--metrics`.
    metrics: Option<metrics::SharedMetrics>,
    findings: Option<Box<RunningDiagnosis>>,
}

/// The diagnosis of the events so far.
struct RunningDiagnosis {
    diagnosis: Diagnosis,
    /// The number of connections of each finding when it was reported.
    reported: HashMap<String, u64>,
}

impl RunningDiagnosis {
    /// The findings that more connections show than when they were reported.
    fn news(&mut self, now: Time) -> Vec<Finding> {
        // A finding keeps the time of its first connection, while it may lose its process: another process of
        // the same program may join it.
        let subject = |finding: &Finding| {
            let Finding { kind, process, remote, evidence, first, .. } = finding;
            let comm = process.as_ref().map(|process| &process.comm);
            let remote = remote.as_ref().map(|remote| (remote.address, remote.port));
            format!("{:?}", (kind, comm, remote, evidence.get("local_port"), first))
        };
        self.diagnosis.advance_to(now);
        let before = std::mem::take(&mut self.reported);
        let mut news = self.diagnosis.findings(false);
        news.retain(|finding| {
            let subject = subject(finding);
            let is_new = before.get(&subject) != Some(&finding.count);
            self.reported.insert(subject, finding.count);
            is_new
        });
        news
    }
}

/// How user stacks were taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StackCounts {
    /// Copied, and then unwound.
    pub copied: u64,
    /// Recognized in the kernel half, so that they were not copied.
    pub recognized: u64,
    /// Followed by frame pointers, and found to end at the innermost frame.
    pub without_callers: u64,
}

impl Report {
    /// Writes the events that all `filters` let through to `output`, at most `count` of them.
    pub fn new(filters: Vec<Filter>, output: Output, count: Option<u64>) -> Self {
        Self {
            filters,
            output,
            left: count,
            events: 0,
            summary: Summary::default(),
            flame_graph: None,
            metrics: None,
            findings: None,
        }
    }

    /// Also draws the events as a flame graph.
    #[must_use]
    pub fn with_flame_graph(self, flame_graph: Option<FlameGraph>) -> Self {
        Self { flame_graph, ..self }
    }

    /// Begins to count events in `metrics`.
    pub fn count_in(&mut self, metrics: metrics::SharedMetrics) {
        self.metrics = Some(metrics);
    }

    /// Also diagnoses the events. The findings are written at the end, among the other lines or, if the
    /// output is not JSON lines, to stderr.
    #[must_use]
    pub fn with_findings(self) -> Self {
        let findings = RunningDiagnosis { diagnosis: Diagnosis::of_trace(), reported: HashMap::new() };
        Self { findings: Some(Box::new(findings)), ..self }
    }

    /// Whether the count given with `--count` is reached.
    pub fn is_full(&self) -> bool {
        self.left == Some(0)
    }

    /// How many events could not be written because nobody reads the output any more.
    pub fn unwritten(&self) -> u64 {
        self.output.unwritten()
    }

    /// Writes an event and counts it, if the filters let it through.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn event(&mut self, event: Event) -> Result<Going> {
        let is_wanted = self.wants(&event);
        self.count(&event, is_wanted);
        if !is_wanted {
            return Ok(Going::On);
        }
        self.summary.add(&event);
        if let Some(flame_graph) = &mut self.flame_graph {
            flame_graph.add(&event);
        }
        if self.write(event)? == Written::ReaderGone {
            return Ok(Going::Done);
        }
        self.events += 1;
        if let Some(left) = &mut self.left {
            *left -= 1;
        }
        Ok(if self.is_full() { Going::Done } else { Going::On })
    }

    /// Counts the event of a socket that is still stuck when the trace ends, if the filters let it through.
    pub fn still_stuck(&mut self, event: &Event) {
        if self.wants(event) {
            self.summary.add_lingering(event);
        }
    }

    /// Writes the findings that are new, or that more connections show than when they were written. They do
    /// not count as events.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn new_findings(&mut self, now: Time) -> Result<Going> {
        let new = self.findings.as_mut().map(|findings| findings.news(now)).unwrap_or_default();
        self.write_findings(new)?;
        self.flush()
    }

    /// Writes all findings, when there will be no more events.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn last_findings(&mut self) -> Result<()> {
        let Some(findings) = &mut self.findings else { return Ok(()) };
        let all = findings.diagnosis.findings(true);
        if self.output.takes_findings {
            self.write_findings(all)?;
            let _ = self.flush()?;
        } else if !all.is_empty() {
            let totals = findings.diagnosis.totals();
            let mut text = Vec::new();
            // As with the rest of the summary, it is not an error if nobody reads it.
            let _ = diagnose::report::write(
                &mut text,
                &all,
                totals,
                Palette::PLAIN,
                diagnose::report::Seqs::Hidden,
            )
            .and_then(|()| io::stderr().write_all(&text));
            for finding in all {
                self.output.write_second(Event::Finding(Box::new(finding)))?;
            }
        }
        Ok(())
    }

    fn write_findings(&mut self, findings: Vec<Finding>) -> Result<()> {
        for finding in findings {
            if self.write(Event::Finding(Box::new(finding)))? == Written::ReaderGone {
                break;
            }
        }
        Ok(())
    }

    /// Counts an event in the metrics.
    fn count(&self, event: &Event, is_wanted: bool) {
        if let Some(metrics) = &self.metrics {
            metrics::lock(metrics).add(event, is_wanted);
        }
    }

    /// Writes an event, and adds it to the diagnosis.
    fn write(&mut self, event: Event) -> Result<Written> {
        if let Some(findings) = &mut self.findings {
            findings.diagnosis.add_event(&event, self.output.lines() + 1);
        }
        self.output.write(event).context("cannot write to the standard output")
    }

    /// Whether nobody reads the output any more, as far as is known.
    pub fn is_reader_gone(&self) -> bool {
        self.output.is_reader_gone()
    }

    /// Writes a `lost` line. It does not count as an event, and no filter applies to it. Once nobody reads
    /// the output any more, the line is not written, and does not count as lost: the summary contains the
    /// same count.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn lost(&mut self, lost: Lost) -> Result<()> {
        let event = Event::Lost(lost);
        self.count(&event, true);
        if !self.is_reader_gone() {
            let _ = self.write(event)?;
        }
        Ok(())
    }

    /// Flushes the output.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn flush(&mut self) -> Result<Going> {
        match self.output.flush().context("cannot write to the standard output")? {
            Written::Yes => Ok(Going::On),
            Written::ReaderGone => Ok(Going::Done),
        }
    }

    /// Waits for a limited time until the collector of `--otlp` has all lines. Later ones are not sent.
    ///
    /// # Errors
    /// The lines cannot be passed on.
    pub fn finish_export(&mut self) -> Result<()> {
        self.output.finish_second().context("cannot export lines")
    }

    /// How many lines are lost to the collector of `--otlp`; `None` if there is none.
    pub fn unexported(&self) -> Option<u64> {
        self.output.second_lost()
    }

    /// Writes what is complete only at the end. To be called once, after the last findings.
    ///
    /// # Errors
    /// The output or the flame graph cannot be written.
    pub fn finish(&mut self) -> Result<()> {
        let _ = self.output.finish().context("cannot write to the standard output")?;
        self.flame_graph.take().map_or(Ok(()), FlameGraph::finish)
    }

    /// Writes the summary of a trace to stderr: how long it took, what it lost, and how user stacks were
    /// taken.
    pub fn summarize(&self, took: Duration, lost: &[(LostPlace, u64)], stacks: &StackCounts) {
        eprint!("{}", self.summary);
        if stacks.without_callers > 0 {
            eprintln!(
                "tcpclose: some stacks end at the system call, because their programs keep no frame \
                 pointers; `--call-graph auto`, the default, follows them without where the kernel has BTF"
            );
        }
        if stacks.copied > 0 {
            eprintln!(
                "tcpclose: user stacks: {} copied and unwound, {} recognized",
                stacks.copied, stacks.recognized
            );
        }
        let lost: Vec<_> = lost
            .iter()
            .map(|(place, count)| format!("{} {count}", place.to_string().replace('_', " ")))
            .collect();
        eprintln!(
            "tcpclose: {} events in {}; lost: {}",
            self.events,
            human_millis(took.as_secs_f64() * 1000.0),
            lost.join(", ")
        );
    }

    fn wants(&self, event: &Event) -> bool {
        self.filters.iter().all(|filter| filter.wants(event))
    }
}
