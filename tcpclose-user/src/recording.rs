//! Recordings (`--record FILE`): all input of the stages behind the ring, in order, so that `tcpclose replay
//! FILE` writes the same lines without privileges.
//!
//! A file is [`MAGIC`] followed by frames. A frame is one byte that says what it is, the length of the rest
//! as a little-endian u32, and the rest: a record as it was in the ring, or a [`RecordedStep`] as JSON.
//! Answers of the host follow the record or step that asked for them.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufWriter, Write as _},
    path::Path,
};

use anyhow::{Result, bail};
use bytes::{Buf as _, Bytes};
use serde::{Deserialize, Serialize};

use crate::{
    event::{Lingering, Lost},
    host::{Answer, Question},
    processes::holder::ProcfsHolder,
};

/// The first bytes of a recording; the number is the version of the format.
const MAGIC: &[u8] = b"tcpclose recording 1\n";

const RECORD: u8 = b'R';
const STEP: u8 = b'S';

/// The longest frame, bytes: longer than any record, and than the names of any stack.
const MAX_FRAME: usize = 16 << 20;

/// What happened between two records.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum RecordedStep {
    /// The trace began.
    Start {
        /// Names of the kernel's reset reasons, by number.
        reset_reasons: BTreeMap<i64, String>,
        /// Whether stacks were taken.
        stacks: bool,
        /// Whether only the processes of a command were traced.
        command: bool,
        /// The command line, without the command that was traced.
        arguments: Vec<String>,
    },
    /// The clocks were read: nanoseconds from `CLOCK_BOOTTIME` to the wall clock, and from `CLOCK_MONOTONIC`
    /// to `CLOCK_BOOTTIME`.
    Clock {
        /// Wall clock minus `CLOCK_BOOTTIME`.
        wall_minus_boot: i64,
        /// `CLOCK_BOOTTIME` minus `CLOCK_MONOTONIC`.
        suspended: i64,
    },
    /// The next record is that of a socket that was inspected, with its age. Nanoseconds of `CLOCK_BOOTTIME`.
    Inspected {
        /// When.
        at: u64,
        /// When it entered its state.
        since: Option<u64>,
        /// Its age at least.
        at_least: u64,
        /// Its age at most.
        at_most: Option<u64>,
    },
    /// `/proc` showed a descriptor of an inspected socket.
    Descriptor {
        /// Address of the socket.
        address: u64,
        /// When its life began.
        born: u64,
        /// The descriptor.
        fd: u32,
        /// The process.
        holder: ProcfsHolder,
    },
    /// All descriptors were searched after this many endings had arrived.
    Searched(u64),
    /// The ring was read to its end.
    CaughtUp {
        /// `CLOCK_BOOTTIME` before that, nanoseconds.
        now: u64,
        /// For each ending that lacked an owner, whether one was found in `/proc`.
        found: Vec<bool>,
    },
    /// The sockets that were inspected since the last such step were reported.
    Stuck {
        /// In the summary at the end of the trace.
        at_end: bool,
    },
    /// A socket without a descriptor was reported that was stuck before the trace.
    Orphan(Box<Lingering>),
    /// Something was lost.
    Lost(Lost),
    /// The host answered a question.
    Answer(Question, Answer),
}

/// A frame of a recording.
#[derive(Clone, Debug, PartialEq)]
pub enum RecordingFrame {
    /// A record of the kernel half.
    Record(Bytes),
    /// What happened between two records.
    Step(Box<RecordedStep>),
}

/// Writes a recording.
pub struct Recorder(BufWriter<File>);

impl Recorder {
    /// Creates the file, or empties it.
    ///
    /// # Errors
    /// It cannot be created or written.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(MAGIC)?;
        Ok(Self(file))
    }

    /// Adds a record.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn record(&mut self, record: &[u8]) -> io::Result<()> {
        self.frame(RECORD, record)
    }

    /// Adds a step.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn step(&mut self, step: &RecordedStep) -> io::Result<()> {
        self.frame(STEP, &serde_json::to_vec(step)?)
    }

    fn frame(&mut self, kind: u8, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.0.write_all(&[kind])?;
        self.0.write_all(&length.to_le_bytes())?;
        self.0.write_all(bytes)
    }

    /// Passes everything that was written to the kernel.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Splits a recording into frames. A last frame that is incomplete is left out: the tool may have been
/// killed.
///
/// # Errors
/// The bytes are not a recording, or a frame is invalid.
pub fn frames(mut recording: Bytes) -> Result<Vec<RecordingFrame>> {
    if !recording.starts_with(MAGIC) {
        bail!("not a recording of this version of tcpclose (`tcpclose --record FILE` makes one)");
    }
    recording.advance(MAGIC.len());
    let mut frames = Vec::new();
    while recording.remaining() >= 5 {
        let kind = recording.get_u8();
        let length = usize::try_from(recording.get_u32_le()).unwrap_or(usize::MAX);
        if length > MAX_FRAME {
            bail!("frame {} claims {length} bytes; the longest has {MAX_FRAME}", frames.len());
        }
        if length > recording.remaining() {
            break;
        }
        let bytes = recording.split_to(length);
        frames.push(match kind {
            RECORD => RecordingFrame::Record(bytes),
            STEP => RecordingFrame::Step(serde_json::from_slice(&bytes)?),
            unknown => bail!("frame {} is of the unknown kind {unknown}", frames.len()),
        });
    }
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_were_written() {
        let path = std::env::temp_dir().join(format!("tcpclose-recording-{}", std::process::id()));
        let mut recorder = Recorder::create(&path).unwrap();
        let step = RecordedStep::CaughtUp { now: u64::MAX, found: vec![true, false] };
        recorder.record(b"one").unwrap();
        recorder.step(&step).unwrap();
        recorder.record(b"").unwrap();
        recorder.flush().unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let expected = [
            RecordingFrame::Record(Bytes::from_static(b"one")),
            RecordingFrame::Step(Box::new(step)),
            RecordingFrame::Record(Bytes::new()),
        ];
        assert_eq!(frames(Bytes::copy_from_slice(&bytes)).unwrap(), expected);
        bytes.pop();
        assert_eq!(frames(bytes.into()).unwrap(), expected[..2]);
    }

    #[test]
    fn other_files_are_refused() {
        let frame = |kind: u8, length: u32, bytes: &[u8]| {
            let mut file = MAGIC.to_vec();
            file.push(kind);
            file.extend(length.to_le_bytes());
            file.extend(bytes);
            Bytes::from(file)
        };
        for file in [
            Bytes::new(),
            Bytes::from_static(b"{\"event\":\"close\"}\n"),
            frame(b'X', 0, b""),
            frame(STEP, 2, b"{}"),
            frame(RECORD, u32::MAX, b""),
        ] {
            assert!(frames(file.clone()).is_err(), "{file:?}");
        }
        assert_eq!(frames(frame(RECORD, 0, b"")).unwrap().len(), 1);
    }
}
