//! Raw records in a file: what the ring held, for tests that need no kernel, and for bug reports. Each record is its
//! length as a little-endian u32, then its bytes.

use std::{
    fs::File,
    io::{self, BufWriter, Write as _},
    path::Path,
};

use bytes::{Buf as _, Bytes};

/// Writes records to a file.
pub struct Capture(BufWriter<File>);

impl Capture {
    /// Makes the file, or empties it.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self(BufWriter::new(File::create(path)?)))
    }

    /// Adds a record.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&mut self, record: &[u8]) -> io::Result<()> {
        let length = u32::try_from(record.len()).map_err(io::Error::other)?;
        self.0.write_all(&length.to_le_bytes())?;
        self.0.write_all(record)
    }

    /// Hands on what was written.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Takes the records out of a capture again. A last one that was cut short is left out.
pub fn records(mut capture: Bytes) -> Vec<Bytes> {
    let mut records = Vec::new();
    while capture.remaining() >= 4 {
        let length = usize::try_from(capture.get_u32_le()).unwrap_or(usize::MAX);
        if length > capture.remaining() {
            break;
        }
        records.push(capture.split_to(length));
    }
    records
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;
    use crate::{
        correlate::{Correlator, Ending},
        ingest::decode::{Record, decode},
        judge,
        kernel::ResetReasons,
    };

    /// Recorded on a 6.18 kernel while `fixtures/records/provoke.py` ran.
    const RECORDED: &[u8] = include_bytes!("../../fixtures/records/6.18-amd64.bin");
    /// What that script did, in the words of [`describe`].
    const EXPECTED: &str = include_str!("../../fixtures/records/6.18-amd64.txt");

    /// Runs the user half from the ring to the judgement on records that a kernel wrote.
    fn judged(records: &[Bytes]) -> String {
        let mut correlator = Correlator::default();
        let mut endings = Vec::new();
        for bytes in records {
            endings.extend(match decode(bytes).unwrap() {
                Record::Close(life) => correlator.close(life),
                Record::Reset(life, reset) => correlator.reset(life, reset),
                Record::Closer(id, task) => correlator.closer(id, task),
                Record::StillOpen(id, task) => {
                    correlator.still_open(id, task);
                    None
                }
                Record::Descriptor(..) | Record::Stuck(_) | Record::Process(_) | Record::Stack(..) => None,
            });
        }
        for _ in 0..2 {
            endings.extend(correlator.caught_up(u64::MAX, |inodes| vec![false; inodes.len()]));
        }
        let mut text = String::new();
        for ending in &endings {
            describe(&mut text, ending);
        }
        text
    }

    fn describe(text: &mut String, ending: &Ending) {
        let reasons = ResetReasons(
            [(1, "NO_SOCKET"), (8, "TCP_ABORT_ON_DATA"), (11, "TCP_ABORT_ON_CLOSE"), (14, "TCP_STATE")]
                .map(|(number, name)| (number, name.to_owned()))
                .into(),
        );
        let Ending { life, resets, is_end, .. } = ending;
        for reset in resets {
            let cause = judge::reset_cause(life, reset, &reasons);
            writeln!(text, "reset {} {cause}", reset.direction).unwrap();
        }
        if *is_end {
            let verdict = judge::of(life, &reasons);
            let path: Vec<_> = life.path.steps().iter().map(|(state, _)| state.to_string()).collect();
            let bytes = |count: Option<u64>| count.unwrap_or(u64::MAX);
            let or_dash = |word: Option<String>| word.unwrap_or_else(|| "-".to_owned());
            let words = [
                verdict.closed_by.map(|by| by.to_string()),
                verdict.ended.map(|ended| ended.to_string()),
                verdict.trigger.map(|trigger| trigger.to_string()),
                verdict.signal,
                verdict.cause.map(|cause| cause.to_string()),
                Some(path.join(">")),
                Some(format!("{}B/{}B", bytes(life.sample.bytes_sent), bytes(life.sample.bytes_received))),
            ];
            writeln!(text, "close {}", words.map(or_dash).join(" ")).unwrap();
        }
    }

    #[test]
    fn recorded_records_are_judged_as_the_script_acted() {
        let text = judged(&records(Bytes::from_static(RECORDED)));
        // The scheduler decides which of two ends comes first.
        let sorted = |text: &str| {
            let mut lines: Vec<_> =
                text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&text), sorted(EXPECTED), "\n{text}");
    }

    #[test]
    fn what_was_written_is_read() {
        let path = std::env::temp_dir().join(format!("tcpclose-capture-{}", std::process::id()));
        let mut capture = Capture::create(&path).unwrap();
        for record in [&b"one"[..], b"", b"three"] {
            capture.write(record).unwrap();
        }
        capture.flush().unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(records(Bytes::copy_from_slice(&bytes)), [&b"one"[..], b"", b"three"]);
        bytes.pop();
        assert_eq!(records(bytes.into()), [&b"one"[..], b""]);
    }
}
