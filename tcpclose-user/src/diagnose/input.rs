//! Lines from the files of one host or several, in the order of their times.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
};

use serde::Deserialize;

use crate::diagnose::observation::{Observation, nanoseconds_of};

/// The longest line. A line with two complete stacks has about 50 kB.
const LONGEST: u64 = 1 << 20;

const BUFFER: usize = 1 << 18;

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
    reader: Box<dyn BufRead>,
    line: Vec<u8>,
    number: u64,
}

/// The files to read.
pub struct Input {
    sources: Vec<Source>,
    /// The malformed lines so far.
    pub broken: Broken,
}

impl Input {
    /// Opens files; `-` or no file means the standard input.
    pub fn open(paths: &[std::path::PathBuf]) -> io::Result<Self> {
        let stdin = [std::path::PathBuf::from("-")];
        let paths = if paths.is_empty() { &stdin } else { paths };
        let sources = paths.iter().map(|path| Source::open(path)).collect::<io::Result<_>>()?;
        Ok(Self { sources, broken: Broken::default() })
    }

    /// Reads from memory.
    #[cfg(test)]
    pub(crate) fn of(texts: &[&str]) -> Self {
        let source =
            |text: &&str| Source::new("memory".to_owned(), Box::new(io::Cursor::new((*text).to_owned())));
        Self { sources: texts.iter().map(source).collect(), broken: Broken::default() }
    }

    /// The names of the files.
    pub fn names(&self) -> Vec<String> {
        self.sources.iter().map(|source| source.name.clone()).collect()
    }

    /// Passes on every line with the number of its file. A trace writes its lines in order, so each file is sorted;
    /// lines of several files are merged by their times.
    pub fn read(&mut self, mut each: impl FnMut(&Observation<'_>, u16)) -> io::Result<()> {
        if let [source] = self.sources.as_mut_slice() {
            while source.next()? {
                self.broken.parse(source, |observation| each(observation, 0));
            }
            return Ok(());
        }
        let mut next = BinaryHeap::new();
        for index in 0..self.sources.len() {
            self.advance(index, i64::MIN, &mut next)?;
        }
        while let Some(Reverse((time, index))) = next.pop() {
            let number = u16::try_from(index).unwrap_or(u16::MAX);
            self.broken.parse(&self.sources[index], |observation| each(observation, number));
            self.advance(index, time, &mut next)?;
        }
        Ok(())
    }

    /// Reads the next line of a file; a line without a time gets that of the line before it.
    fn advance(
        &mut self,
        index: usize,
        before: i64,
        next: &mut BinaryHeap<Reverse<(i64, usize)>>,
    ) -> io::Result<()> {
        let source = &mut self.sources[index];
        if source.next()? {
            let time = serde_json::from_slice::<Timed>(&source.line).map_or(before, |timed| timed.time);
            next.push(Reverse((time, index)));
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Timed {
    #[serde(deserialize_with = "nanoseconds_of")]
    time: i64,
}

impl Source {
    fn open(path: &Path) -> io::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::new(
                "(standard input)".to_owned(),
                Box::new(BufReader::with_capacity(BUFFER, io::stdin())),
            ));
        }
        let name = path.display().to_string();
        let file = File::open(path)
            .map_err(|error| io::Error::new(error.kind(), format!("cannot open {name}: {error}")))?;
        Ok(Self::new(name, Box::new(BufReader::with_capacity(BUFFER, file))))
    }

    fn new(name: String, reader: Box<dyn BufRead>) -> Self {
        Self { name, reader, line: Vec::new(), number: 0 }
    }

    /// Reads the next line that is not empty; returns `false` at the end.
    fn next(&mut self) -> io::Result<bool> {
        loop {
            self.line.clear();
            let length = (&mut self.reader).take(LONGEST).read_until(b'\n', &mut self.line)?;
            if length == 0 {
                return Ok(false);
            }
            self.number += 1;
            if length as u64 == LONGEST && self.line.last() != Some(&b'\n') {
                // The truncated line is not valid JSON, so it is counted as malformed; the rest of it is skipped.
                self.skip_line()?;
                return Ok(true);
            }
            if !self.line.trim_ascii().is_empty() {
                return Ok(true);
            }
        }
    }

    fn skip_line(&mut self) -> io::Result<()> {
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Ok(());
            }
            let (length, found) = match buffer.iter().position(|byte| *byte == b'\n') {
                Some(end) => (end + 1, true),
                None => (buffer.len(), false),
            };
            self.reader.consume(length);
            if found {
                return Ok(());
            }
        }
    }
}

impl Broken {
    fn parse(&mut self, source: &Source, each: impl FnOnce(&Observation<'_>)) {
        match serde_json::from_slice::<Observation<'_>>(&source.line) {
            Ok(observation) => each(&observation),
            Err(error) => {
                self.count += 1;
                self.first.get_or_insert_with(|| (source.name.clone(), source.number, error.to_string()));
            }
        }
    }
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
    fn several_files_are_read_in_the_order_of_their_times() {
        let at = |second: u32, seq: u32| {
            format!(r#"{{"event":"lost","time":"2026-03-01T12:01:{second:02}Z","seq":{seq}}}"#)
        };
        let one = [at(1, 1), at(4, 2), "broken".to_owned(), at(5, 3)].join("\n");
        let two = [at(2, 7), at(3, 8), at(6, 9)].join("\n");
        assert_eq!(seqs(&[&one, &two]), (vec![(0, 1), (1, 7), (1, 8), (0, 2), (0, 3), (1, 9)], 1));
    }
}
