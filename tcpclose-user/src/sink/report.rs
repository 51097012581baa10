//! The last stage: decides which events are reported, writes them, and counts them for the summary.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Output, Written, human_millis, summary::Summary};
use crate::{
    event::{Event, Lost, LostPlace},
    filter::Filter,
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
}

/// How user stacks were taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StackCounts {
    /// Copied, and then unwound.
    pub copied: u64,
    /// Recognized in the kernel half, so that they were not copied.
    pub recognized: u64,
    /// Followed by frame pointers no further than the innermost frame.
    pub without_callers: u64,
}

impl Report {
    /// Writes to `output` what all `filters` let through, `count` events at most.
    pub fn new(filters: Vec<Filter>, output: Output, count: Option<u64>) -> Self {
        Self { filters, output, left: count, events: 0, summary: Summary::default() }
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
        if !self.wants(&event) {
            return Ok(Going::On);
        }
        self.summary.add(&event);
        if self.output.write(event).context("cannot write to the standard output")? == Written::ReaderGone {
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

    /// Writes a `lost` line. It does not count as an event, and no filter applies to it.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn lost(&mut self, lost: Lost) -> Result<()> {
        let _ = self.output.write(Event::Lost(lost)).context("cannot write to the standard output")?;
        Ok(())
    }

    /// Hands on all that was written.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn flush(&mut self) -> Result<Going> {
        match self.output.flush().context("cannot write to the standard output")? {
            Written::Yes => Ok(Going::On),
            Written::ReaderGone => Ok(Going::Done),
        }
    }

    /// Writes the summary of a trace to stderr: how long it took, what it lost, and how user stacks were taken.
    pub fn summarize(&self, took: Duration, lost: &[(LostPlace, u64)], stacks: &StackCounts) {
        eprint!("{}", self.summary);
        if stacks.without_callers > 0 {
            eprintln!(
                "tcpclose: some stacks end at the system call, because their programs keep no frame pointers; \
                 `--call-graph auto`, the default, follows them without where the kernel has BTF"
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
