//! Threads that parse lines.

use std::{
    io,
    num::NonZero,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, Sender, SyncSender},
    },
    thread,
};

use self_cell::self_cell;

use super::{lines, repeated::KnownStacks};
use crate::diagnose::observation::Observation;

/// The largest number of threads. More of them would wait for the thread that reads.
const THREADS: usize = 8;

type Observations<'a> = Vec<Observation<'a>>;

self_cell!(
    struct ParsedText {
        owner: Vec<u8>,
        #[covariant]
        dependent: Observations,
    }
);

/// The parsed lines of a block.
pub(super) struct Parsed {
    text: ParsedText,
    /// The block.
    pub(super) block: Vec<u8>,
    /// The number of lines.
    pub(super) lines: u64,
    /// The number of lines that are not events.
    pub(super) broken: u64,
    /// The first of them: its number, and the error.
    pub(super) first_broken: Option<(u64, String)>,
}

impl Parsed {
    fn of(block: Vec<u8>, stacks: Option<&mut KnownStacks>) -> Self {
        let text = match stacks {
            Some(stacks) => stacks.leave_out(&block),
            None => block.clone(),
        };
        let (mut count, mut broken, mut first_broken) = (0, 0, None);
        let text = ParsedText::new(text, |text| {
            let mut observations = Vec::new();
            for line in lines(text) {
                count += 1;
                if line.trim_ascii().is_empty() {
                    continue;
                }
                // Checking at once whether the whole line is UTF-8 takes a fraction of the time that checking
                // each of its strings takes.
                let parsed = match str::from_utf8(line) {
                    Ok(line) => serde_json::from_str(line),
                    Err(_) => serde_json::from_slice(line),
                };
                match parsed {
                    Ok(observation) => observations.push(observation),
                    Err(error) => {
                        broken += 1;
                        first_broken.get_or_insert((count, error));
                    }
                }
            }
            observations
        });
        // The error is that of the original line, because without its stacks the column is another one.
        let first_broken = first_broken.map(|(number, error)| {
            let line = lines(&block).zip(1..).find(|(_, other)| *other == number).map(|(line, _)| line);
            let whole = line.and_then(|line| serde_json::from_slice::<Observation<'_>>(line).err());
            (number, whole.unwrap_or(error).to_string())
        });
        Self { text, block, lines: count, broken, first_broken }
    }

    /// The events.
    pub(super) fn observations(&self) -> &[Observation<'_>] {
        self.text.borrow_dependent()
    }
}

struct Job {
    block: Vec<u8>,
    done: SyncSender<Parsed>,
}

/// Threads that parse blocks. Each takes the next block that no other thread has taken. They end when this is
/// dropped.
pub(super) struct Parsers {
    jobs: Sender<Job>,
    /// The number of threads.
    pub(super) count: usize,
}

/// A block that is being parsed.
pub(super) struct ParsedLater(Receiver<Parsed>);

impl Parsers {
    /// Starts the threads. `with_stacks` says whether stacks of ends are needed.
    pub(super) fn start(with_stacks: bool) -> io::Result<Self> {
        let count = thread::available_parallelism().map_or(1, NonZero::get).min(THREADS);
        let (sender, jobs) = mpsc::channel::<Job>();
        let jobs = Arc::new(Mutex::new(jobs));
        for _ in 0..count {
            let jobs = Arc::clone(&jobs);
            let mut stacks = (!with_stacks).then(KnownStacks::default);
            thread::Builder::new().name("parse".to_owned()).spawn(move || {
                while let Ok(Job { block, done }) = next(&jobs) {
                    // If reading has failed, nobody waits for the result.
                    let _ = done.send(Parsed::of(block, stacks.as_mut()));
                }
            })?;
        }
        Ok(Self { jobs: sender, count })
    }

    /// Passes a block to the threads.
    pub(super) fn parse(&self, block: Vec<u8>) -> ParsedLater {
        let (done, pending) = mpsc::sync_channel(1);
        // If no thread is left, `ParsedLater::wait()` returns an error.
        let _ = self.jobs.send(Job { block, done });
        ParsedLater(pending)
    }
}

fn next(jobs: &Mutex<Receiver<Job>>) -> Result<Job, mpsc::RecvError> {
    jobs.lock().unwrap_or_else(PoisonError::into_inner).recv()
}

impl ParsedLater {
    /// Waits until the block is parsed.
    pub(super) fn wait(self) -> io::Result<Parsed> {
        self.0.recv().map_err(|_| io::Error::other("a thread that parses lines has failed"))
    }
}
