//! Reads lines from the files of one host or several, in the order of their times.
//!
//! One thread reads [`blocks`] of whole lines, and others parse them ([`parsers`]). The first thread then
//! uses the parsed lines in their order in the files, so that the findings do not depend on the threads.

mod blocks;
mod parsers;
mod repeated;

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    io,
    path::{Path, PathBuf},
};

use self::{
    blocks::Blocks,
    parsers::{Parsed, ParsedLater, Parsers},
};
use crate::diagnose::observation::Observation;

/// The number of blocks that are parsed in advance, for each thread that parses.
const AHEAD: usize = 2;

/// Lines that could not be read.
#[derive(Debug, Default)]
pub struct Broken {
    /// The number of such lines.
    pub count: u64,
    /// The first of them: its file, its line number, and the error.
    pub first: Option<(String, u64, String)>,
}

struct Source {
    name: String,
    blocks: Blocks,
    ahead: VecDeque<ParsedLater>,
    /// The block with the current line.
    parsed: Option<Parsed>,
    /// The index of the current line among the events of the block.
    index: usize,
    /// The number of lines up to the end of the block.
    lines: u64,
    /// The time of the current line; a line without a time has that of the line before it.
    time: i64,
}

/// The files to read.
pub struct Input {
    sources: Vec<Source>,
    parsers: Parsers,
    /// The malformed lines so far.
    pub broken: Broken,
}

impl Input {
    /// Opens files; `-` or no file means the standard input. `with_stacks` says whether stacks of ends are
    /// needed.
    pub fn open(paths: &[PathBuf], with_stacks: bool) -> io::Result<Self> {
        let stdin = [PathBuf::from("-")];
        let paths = if paths.is_empty() { &stdin } else { paths };
        let sources = paths.iter().map(|path| Source::open(path)).collect::<io::Result<_>>()?;
        Ok(Self { sources, parsers: Parsers::start(with_stacks)?, broken: Broken::default() })
    }

    /// Reads from memory.
    #[cfg(test)]
    pub(crate) fn of(texts: &[&str]) -> Self {
        let blocks = |text: &str| Blocks::new(Box::new(io::Cursor::new(text.to_owned())));
        let source = |text: &&str| Source::new("memory".to_owned(), blocks(text));
        let parsers = Parsers::start(true).expect("threads");
        Self { sources: texts.iter().map(source).collect(), parsers, broken: Broken::default() }
    }

    /// The names of the files.
    pub fn names(&self) -> Vec<String> {
        self.sources.iter().map(|source| source.name.clone()).collect()
    }

    /// Passes every line to `each`, with the number of its file. A trace writes its lines in order, so each
    /// file is sorted. Lines of several files are merged by their times.
    pub fn read(&mut self, mut each: impl FnMut(&Observation<'_>, u16)) -> io::Result<()> {
        let Self { sources, parsers, broken } = self;
        let ahead = (AHEAD * parsers.count).div_ceil(sources.len().max(1));
        let mut next = BinaryHeap::new();
        for (index, source) in sources.iter_mut().enumerate() {
            if source.advance(ahead, parsers, broken)? {
                next.push(Reverse((source.time, index)));
            }
        }
        while let Some(Reverse((_, index))) = next.pop() {
            let Some(source) = sources.get_mut(index) else { continue };
            if let Some(observation) = source.current() {
                each(observation, u16::try_from(index).unwrap_or(u16::MAX));
            }
            source.index += 1;
            if source.advance(ahead, parsers, broken)? {
                next.push(Reverse((source.time, index)));
            }
        }
        Ok(())
    }
}

impl Source {
    fn open(path: &Path) -> io::Result<Self> {
        let is_stdin = path == Path::new("-");
        let name = if is_stdin { "(standard input)".to_owned() } else { path.display().to_string() };
        let blocks = Blocks::open(path)
            .map_err(|error| io::Error::new(error.kind(), format!("cannot open {name}: {error}")))?;
        Ok(Self::new(name, blocks))
    }

    fn new(name: String, blocks: Blocks) -> Self {
        Self { name, blocks, ahead: VecDeque::new(), parsed: None, index: 0, lines: 0, time: i64::MIN }
    }

    fn current(&self) -> Option<&Observation<'_>> {
        self.parsed.as_ref()?.observations().get(self.index)
    }

    /// Goes to the next block if the current one has no further event; returns `false` at the end of the
    /// file.
    fn advance(&mut self, ahead: usize, parsers: &Parsers, broken: &mut Broken) -> io::Result<bool> {
        loop {
            if let Some(observation) = self.current() {
                if observation.time != 0 {
                    self.time = observation.time;
                }
                return Ok(true);
            }
            while self.ahead.len() < ahead
                && let Some(block) = self.blocks.next()?
            {
                self.ahead.push_back(parsers.parse(block));
            }
            let Some(pending) = self.ahead.pop_front() else { return Ok(false) };
            let parsed = pending.wait()?;
            if let Some(former) = self.parsed.take() {
                self.blocks.reuse(former.block);
            }
            broken.count += parsed.broken;
            if let Some((number, error)) = &parsed.first_broken {
                broken.first.get_or_insert_with(|| (self.name.clone(), self.lines + number, error.clone()));
            }
            self.lines += parsed.lines;
            self.index = 0;
            self.parsed = Some(parsed);
        }
    }
}

/// The lines of a text, without their ends.
fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut begin = 0;
    let ends = memchr::memchr_iter(b'\n', text);
    let last = if text.last().is_some_and(|byte| *byte != b'\n') { Some(text.len()) } else { None };
    ends.chain(last).map(move |end| {
        let line = text.get(begin..end).unwrap_or_default();
        begin = end + 1;
        line
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"event":"lost","time":"2026-03-01T12:01:02Z","seq":1,"where":"output","count":1}"#;

    fn seqs(texts: &[&str]) -> (Vec<(u16, u64)>, u64) {
        let mut input = Input::of(texts);
        let mut seen = Vec::new();
        input.read(|observation, source| seen.push((source, observation.seq))).expect("memory");
        (seen, input.broken.count)
    }

    #[test]
    fn a_broken_line_is_counted_and_no_stop() {
        let text = format!("{LINE}\n\nnonsense\n{{\"event\":1}}\n{LINE}\n{}", &LINE[..20]);
        assert_eq!(seqs(&[&text]), (vec![(0, 1), (0, 1)], 3));
        let mut input = Input::of(&[&text]);
        input.read(|_, _| {}).expect("memory");
        let (_, number, error) = input.broken.first.expect("one");
        assert_eq!(number, 3, "{error}");
    }

    #[test]
    fn a_line_without_end_is_one_broken_line() {
        let long = "x".repeat(3 << 20);
        assert_eq!(seqs(&[&format!("{LINE}\n{long}\n{LINE}\n")]), (vec![(0, 1), (0, 1)], 1));
    }

    #[test]
    fn lines_of_many_blocks_are_in_order() {
        let long = "x".repeat(300);
        let line = |seq: usize| match seq % 1_000 {
            999 => "broken\n".to_owned(),
            _ => format!(
                "{{\"event\":\"lost\",\"time\":\"2026-03-01T12:01:02Z\",\"seq\":{seq},\"x\":\"{long}\"}}\n"
            ),
        };
        let text: String = (0..10_000).map(line).collect();
        let expected: Vec<_> = (0..10_000).filter(|seq| seq % 1_000 != 999).map(|seq| (0, seq)).collect();
        assert_eq!(seqs(&[&text]), (expected, 10));
        let mut input = Input::of(&[&text]);
        input.read(|_, _| {}).expect("memory");
        assert_eq!(input.broken.first.map(|(_, number, _)| number), Some(1_000));
        assert!(input.sources[0].lines == 10_000);
    }

    #[test]
    fn several_files_are_read_in_the_order_of_their_times() {
        let at = |second: u32, seq: u32| {
            format!(r#"{{"event":"lost","time":"2026-03-01T12:01:{second:02}Z","seq":{seq}}}"#)
        };
        let one = [at(1, 1), at(4, 2), "broken".to_owned(), at(5, 3)].join("\n");
        let two = [at(2, 7), at(3, 8), at(6, 9)].join("\n");
        assert_eq!(seqs(&[&one, &two]), (vec![(0, 1), (1, 7), (1, 8), (0, 2), (0, 3), (1, 9)], 1));
    }
}
