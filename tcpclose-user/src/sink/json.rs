//! One JSON object a line.

use std::io::{self, Write};

use crate::event::Event;
use crate::sink::{Sink, serializer};

/// The number of bytes that gather before they are written, so that a burst of events costs few system calls.
const GATHERED: usize = 256 << 10;

/// Writes one JSON object a line.
///
/// Lines are serialized into memory, which costs a third of what a `BufWriter` would: braces, commas and
/// values come one by one.
pub struct JsonSink<W: Write> {
    writer: W,
    lines: Vec<u8>,
}

impl<W: Write> JsonSink<W> {
    /// Writes to `writer`, through a buffer of its own.
    pub fn new(writer: W) -> Self {
        Self { writer, lines: Vec::new() }
    }

    fn write_lines(&mut self) -> io::Result<()> {
        let result = self.writer.write_all(&self.lines);
        // After an error, it is not known how much was written, and no byte may be written twice.
        self.lines.clear();
        result
    }
}

impl<W: Write> Sink for JsonSink<W> {
    fn write(&mut self, event: &Event) -> io::Result<()> {
        let complete = self.lines.len();
        if let Err(error) = serializer::append(&mut self.lines, event) {
            self.lines.truncate(complete);
            return Err(error.into());
        }
        self.lines.push(b'\n');
        if self.lines.len() >= GATHERED { self.write_lines() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_lines()?;
        self.writer.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};

    use serde_json::Value;

    use super::GATHERED;
    use crate::event::Event;
    use crate::{
        event::examples,
        sink::{JsonSink, Sink},
    };

    fn written(events: &[Event]) -> String {
        let mut bytes = Vec::new();
        let mut sink = JsonSink::new(&mut bytes);
        for event in events {
            sink.write(event).expect("memory");
        }
        sink.flush().expect("memory");
        drop(sink);
        String::from_utf8(bytes).expect("UTF-8")
    }

    fn value(event: Event) -> Value {
        serde_json::from_str(&written(&[event])).expect("JSON")
    }

    /// The names of an object's fields.
    fn fields(value: &Value) -> Vec<&String> {
        value.as_object().expect("an object").keys().collect()
    }

    #[test]
    fn golden() {
        // This fixes the order of the fields as well.
        let text = written(&examples::all());
        assert_eq!(text, include_str!("golden/events.jsonl"), "\n{text}");
    }

    /// The tests of `event/schema.rs` compare the fields of all examples with the schema.
    #[test]
    fn what_is_not_known_is_null_and_not_left_out() {
        let (known, unknown) = (value(examples::orderly()), value(examples::unknown_owner()));
        assert_eq!(fields(&unknown), fields(&known));
        assert_eq!(fields(&unknown["connection"]), fields(&known["connection"]));
        assert!(
            unknown["connection"].as_object().expect("an object").values().all(Value::is_null),
            "{unknown}"
        );
        assert_eq!(unknown["process"], Value::Null);
    }

    #[test]
    fn a_burst_is_written_in_large_pieces() {
        /// How long the pieces are.
        struct PieceLengths(Vec<usize>);
        impl Write for PieceLengths {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.push(bytes.len());
                Ok(bytes.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut pieces = PieceLengths(Vec::new());
        let mut sink = JsonSink::new(&mut pieces);
        for _ in 0..1_000 {
            sink.write(&examples::orderly()).expect("memory");
        }
        sink.flush().expect("memory");
        drop(sink);
        let bytes: usize = pieces.0.iter().sum();
        assert!(bytes > 1_000 * 1_000, "{bytes}");
        assert!(pieces.0.len() <= bytes / GATHERED + 1, "{:?}", pieces.0);
    }

    #[test]
    fn time_has_nine_digits() {
        for event in examples::all() {
            let line = value(event);
            let time = line["time"].as_str().expect("a string");
            let (_, fraction) = time.split_once('.').expect("a fraction");
            assert_eq!(fraction.len(), "123456789Z".len(), "{time}");
            assert!(fraction.ends_with('Z'), "{time}");
        }
    }

    #[test]
    fn stays_one_line_whatever_comes() {
        let Event::Close(mut close) = examples::orderly() else { unreachable!() };
        close.process.as_mut().expect("known").comm = "a\n\u{1b}[2J\"\\".into();
        let text = written(&[Event::Close(close)]);
        assert_eq!(text.matches('\n').count(), 1);
        assert!(!text.contains('\u{1b}'));
        let value: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value["process"]["comm"], "a\n\u{1b}[2J\"\\");
    }
}
