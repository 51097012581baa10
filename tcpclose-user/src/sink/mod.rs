//! The outputs of events: text for people, JSON lines and other formats for programs.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd as _;

use anstream::{AutoStream, ColorChoice};

use crate::event::Event;

pub mod flamegraph;
mod folded;
mod json;
pub mod losses;
mod serializer;
pub mod summary;
mod text;

pub use folded::FoldedSink;
pub use json::JsonSink;
#[cfg(feature = "otlp")]
pub(crate) use serializer::append as append_json;
pub(crate) use text::{COLUMNS, bounds, cut, endpoint, escape, or_dash, width, wrap};
pub use text::{Palette, TextSink, human_millis};

/// The format in which events are written. A report (`list`, `doctor`) has a
/// [`ReportFormat`](crate::cli::ReportFormat) of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// One aligned line for each event, with further facts indented below it
    #[default]
    Text,
    /// One JSON object a line
    Json,
    /// Closing stacks by count, when the trace ends: one folded stack a line, for flame graph tools
    Folded,
}

impl Palette {
    /// The palette for the standard output: colours on a terminal, unless variables such as `NO_COLOR`
    /// disable them.
    pub fn of_stdout() -> Self {
        match AutoStream::choice(&io::stdout()) {
            ColorChoice::Never => Self::PLAIN,
            _ => Self::COLOUR,
        }
    }
}

/// Writes events in one format.
pub trait Sink {
    /// Writes one event. It may stay in a buffer until [`Sink::flush`].
    fn write(&mut self, event: &Event) -> io::Result<()>;
    /// Passes on everything that was written.
    fn flush(&mut self) -> io::Result<()>;
    /// Writes what is complete only at the end, and flushes the sink. To be called once.
    fn finish(&mut self) -> io::Result<()> {
        self.flush()
    }
    /// How many events were written to it, and are lost.
    fn lost(&self) -> u64 {
        0
    }
}

/// A sink for traces of which only the summary is wanted.
struct Nowhere;

impl Sink for Nowhere {
    fn write(&mut self, _: &Event) -> io::Result<()> {
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether the output still has a reader.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// It has, as far as is known.
    Yes,
    /// The other end of the pipe is closed, so nothing that is written from now on is read.
    ReaderGone,
}

/// Numbers the lines and writes them.
pub struct Output {
    sink: Box<dyn Sink + Send>,
    /// Gets the same lines.
    second: Option<Box<dyn Sink + Send>>,
    /// Whether findings are written as lines among the others.
    pub(crate) takes_findings: bool,
    lines: u64,
    /// Lines that are in the sink's buffer.
    buffered: u64,
    /// Lines that could not be written because nobody reads any more.
    unwritten: u64,
    reader_gone: bool,
}

impl Output {
    /// Writes to `sink`.
    pub fn new(sink: impl Sink + Send + 'static) -> Self {
        Self {
            sink: Box::new(sink),
            second: None,
            takes_findings: false,
            lines: 0,
            buffered: 0,
            unwritten: 0,
            reader_gone: false,
        }
    }

    /// Writes to `writer`, in colour only if `palette` has any. `details` is [`TextSink`]'s.
    pub fn to(format: Format, writer: impl Write + Send + 'static, palette: Palette, details: bool) -> Self {
        match format {
            Format::Text => Self::new(TextSink::new(writer, palette, details)),
            Format::Json => Self { takes_findings: true, ..Self::new(JsonSink::new(writer)) },
            Format::Folded => Self::new(FoldedSink::new(writer)),
        }
    }

    /// Writes to the standard output; in colour on a terminal, unless variables such as `NO_COLOR` disable
    /// it.
    pub fn stdout(format: Format, details: bool) -> Self {
        let palette = Palette::of_stdout();
        // A duplicate of the descriptor, if possible: `Stdout` searches its input for the last newline, and
        // writes the rest separately.
        match io::stdout().as_fd().try_clone_to_owned() {
            Ok(stdout) => Self::to(format, File::from(stdout), palette, details),
            Err(_) => Self::to(format, io::stdout(), palette, details),
        }
    }

    /// Writes nothing.
    pub fn nowhere() -> Self {
        Self::new(Nowhere)
    }

    /// Also passes the lines on to a second sink, which gets findings too.
    #[must_use]
    pub fn with_second(self, second: Option<Box<dyn Sink + Send>>) -> Self {
        Self { second, ..self }
    }

    /// Gives the event the next number, the first being 1, and writes it.
    ///
    /// A line that could not be written does not use up its number.
    pub fn write(&mut self, mut event: Event) -> io::Result<Written> {
        if self.reader_gone {
            self.unwritten += 1;
            return Ok(Written::ReaderGone);
        }
        event.set_seq(self.lines + 1);
        self.buffered += 1;
        let result = self.sink.write(&event);
        let written = self.judge(result)?;
        if written == Written::Yes {
            self.lines += 1;
            if let Some(second) = &mut self.second {
                second.write(&event)?;
            }
        }
        Ok(written)
    }

    /// Gives the event the next number, and writes it to the second sink only.
    pub fn write_second(&mut self, mut event: Event) -> io::Result<()> {
        let Some(second) = &mut self.second else { return Ok(()) };
        event.set_seq(self.lines + 1);
        self.lines += 1;
        second.write(&event)
    }

    /// Finishes the second sink, which may take a while.
    pub fn finish_second(&mut self) -> io::Result<()> {
        self.second.as_mut().map_or(Ok(()), |second| second.finish())
    }

    /// How many lines the second sink has lost; `None` if there is none.
    pub fn second_lost(&self) -> Option<u64> {
        self.second.as_ref().map(|second| second.lost())
    }

    /// Flushes the sink. To be called whenever there is nothing left to read.
    pub fn flush(&mut self) -> io::Result<Written> {
        let result = if self.reader_gone { Ok(()) } else { self.sink.flush() };
        self.handed_on(result)
    }

    /// Writes what is complete only at the end, and flushes the sink. To be called once.
    pub fn finish(&mut self) -> io::Result<Written> {
        let result = if self.reader_gone { Ok(()) } else { self.sink.finish() };
        self.handed_on(result)
    }

    fn handed_on(&mut self, result: io::Result<()>) -> io::Result<Written> {
        if self.reader_gone {
            return Ok(Written::ReaderGone);
        }
        let written = self.judge(result)?;
        if written == Written::Yes {
            self.buffered = 0;
        }
        Ok(written)
    }

    /// Whether the other end of the pipe was found to be closed.
    pub fn is_reader_gone(&self) -> bool {
        self.reader_gone
    }

    /// How many lines could not be written because nobody reads any more.
    pub fn unwritten(&self) -> u64 {
        self.unwritten
    }

    /// How many events were written.
    pub fn lines(&self) -> u64 {
        self.lines
    }

    fn judge(&mut self, result: io::Result<()>) -> io::Result<Written> {
        match result {
            Ok(()) => Ok(Written::Yes),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.reader_gone = true;
                self.unwritten += std::mem::take(&mut self.buffered);
                Ok(Written::ReaderGone)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, ErrorKind, Write};
    use std::sync::{Arc, Mutex};

    use crate::{
        event::examples,
        sink::{Format, Output, Palette, Written},
    };

    /// The bytes that were written, and the error that the next write returns.
    #[derive(Clone, Default)]
    struct Pipe {
        bytes: Arc<Mutex<Vec<u8>>>,
        error: Arc<Mutex<Option<ErrorKind>>>,
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match *self.error.lock().expect("not poisoned") {
                Some(kind) => Err(kind.into()),
                None => self.bytes.lock().expect("not poisoned").write(bytes),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn numbers_the_lines() {
        let pipe = Pipe::default();
        let mut output = Output::to(Format::Json, pipe.clone(), Palette::PLAIN, true);
        let events = examples::all();
        let count = events.len() as u64;
        for event in events {
            assert_eq!(output.write(event).expect("no error"), Written::Yes);
        }
        assert_eq!(pipe.bytes.lock().expect("not poisoned").len(), 0, "buffered until it is flushed");
        assert_eq!(output.flush().expect("no error"), Written::Yes);
        let bytes = pipe.bytes.lock().expect("not poisoned");
        let seqs: Vec<u64> = std::str::from_utf8(&bytes)
            .expect("UTF-8")
            .lines()
            .map(|line| {
                let value: serde_json::Value = serde_json::from_str(line).expect("one object a line");
                value["seq"].as_u64().expect("a number")
            })
            .collect();
        assert_eq!(seqs, (1..=count).collect::<Vec<_>>());
        assert_eq!(output.lines(), count);
    }

    #[test]
    fn notices_that_the_reader_is_gone() {
        for format in [Format::Text, Format::Json] {
            let pipe = Pipe::default();
            let mut output = Output::to(format, pipe.clone(), Palette::PLAIN, true);
            assert_eq!(output.write(examples::lost()).expect("no error"), Written::Yes);
            *pipe.error.lock().expect("not poisoned") = Some(ErrorKind::BrokenPipe);
            assert_eq!(output.flush().expect("not an error"), Written::ReaderGone);
            assert_eq!(output.write(examples::lost()).expect("not an error"), Written::ReaderGone);
            assert_eq!(output.flush().expect("not an error"), Written::ReaderGone);
            assert_eq!(output.lines(), 1);
        }
    }

    #[test]
    fn notices_it_in_the_middle_of_a_burst() {
        for format in [Format::Text, Format::Json] {
            let pipe = Pipe::default();
            *pipe.error.lock().expect("not poisoned") = Some(ErrorKind::BrokenPipe);
            let mut output = Output::to(format, pipe, Palette::PLAIN, true);
            let gone = (0..100_000)
                .any(|_| output.write(examples::reset_sent()).expect("not an error") == Written::ReaderGone);
            assert!(gone, "a full buffer is written without a flush");
        }
    }

    #[test]
    fn passes_other_errors_on() {
        let pipe = Pipe::default();
        *pipe.error.lock().expect("not poisoned") = Some(ErrorKind::StorageFull);
        let mut output = Output::to(Format::Json, pipe, Palette::PLAIN, true);
        assert_eq!(output.write(examples::lost()).expect("buffered"), Written::Yes);
        assert_eq!(output.flush().expect_err("full").kind(), ErrorKind::StorageFull);
    }
}
