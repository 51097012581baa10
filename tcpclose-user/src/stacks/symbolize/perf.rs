//! Names of functions that were compiled at run time, from the file in which a just-in-time compiler lists
//! them for `perf`: `/tmp/perf-PID.map`, a line `START SIZE NAME` for each, numbers in hexadecimal. Most
//! compilers append to it; the JVM writes a new one, with what exists at that time, whenever `jcmd` requests
//! it.
//!
//! <https://git.kernel.org/pub/scm/linux/kernel/git/torvalds/linux.git/tree/tools/perf/Documentation/jit-interface.txt>

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use crate::processes::Image;

/// The number of bytes of one file that are read: more than node and the JVM write in days. The rest is
/// ignored.
const MAX_SIZE: u64 = 16 << 20;

/// The number of bytes that are read again, and compared, before new ones are read: some ten lines of the
/// JVM.
const TAIL: usize = 1024;

/// The content of one process's file, as far as it was read.
#[derive(Debug, Default)]
pub struct PerfMap {
    /// Device and inode number.
    file: (u64, u64),
    /// Bytes that were read.
    read: u64,
    /// The last of them, at most [`TAIL`].
    tail: Vec<u8>,
    /// End address and name, by start address.
    functions: BTreeMap<u64, (u64, String)>,
}

impl PerfMap {
    /// Reads what the process has added since the last call.
    pub fn update(&mut self, image: &Image) {
        let Some(file) = image.open_perf_map() else { return };
        let Ok(metadata) = file.metadata() else { return };
        let identity = (metadata.dev(), metadata.ino());
        if identity != self.file || !self.is_start_of(&file) {
            *self = Self { file: identity, ..Self::default() };
        }
        let end = metadata.size().min(MAX_SIZE);
        let Some(size) = end.checked_sub(self.read).and_then(|size| usize::try_from(size).ok()) else {
            return;
        };
        let mut added = vec![0; size];
        if file.read_exact_at(&mut added, self.read).is_ok() {
            self.add(&added);
        }
    }

    /// Whether the last bytes that were read are still there. If not, the file was rewritten.
    fn is_start_of(&self, file: &File) -> bool {
        let mut tail = vec![0; self.tail.len()];
        file.read_exact_at(&mut tail, self.read - self.tail.len() as u64).is_ok() && tail == self.tail
    }

    /// Parses lines, except for a last one that is incomplete.
    pub fn add(&mut self, added: &[u8]) {
        let Some(last) = added.iter().rposition(|byte| *byte == b'\n') else { return };
        self.read += last as u64 + 1;
        self.tail.extend_from_slice(&added[(last + 1).saturating_sub(TAIL)..=last]);
        self.tail.drain(..self.tail.len().saturating_sub(TAIL));
        for line in added[..last].split(|byte| *byte == b'\n') {
            if let Some((start, end, name)) = parse(line) {
                // Memory is reused: code that was compiled to the same place before does not exist any more.
                while let Some((older, _)) =
                    self.functions.range(..end).next_back().filter(|it| it.1.0 > start)
                {
                    let older = *older;
                    self.functions.remove(&older);
                }
                self.functions.insert(start, (end, name));
            }
        }
    }

    /// The name and the start address of the function at an address.
    pub fn find(&self, address: u64) -> Option<(&str, u64)> {
        let (start, (end, name)) = self.functions.range(..=address).next_back()?;
        (address < *end).then_some((name, *start))
    }
}

fn parse(line: &[u8]) -> Option<(u64, u64, String)> {
    let line = String::from_utf8_lossy(line.trim_ascii_end());
    let (start, rest) = line.split_once(' ')?;
    let (size, name) = rest.split_once(' ')?;
    let number = |digits: &str| u64::from_str_radix(digits.trim_start_matches("0x"), 16).ok();
    let start = number(start)?;
    let end = start.checked_add(number(size)?)?;
    (start < end && !name.is_empty()).then(|| (start, end, name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_wins() {
        let mut map = PerfMap::default();
        map.add(b"1000 100 first\n1100 80 second a b\n1200 10 third\n12");
        assert_eq!(map.find(0xfff), None);
        assert_eq!(map.find(0x10ff), Some(("first", 0x1000)));
        assert_eq!(map.find(0x1100), Some(("second a b", 0x1100)));
        assert_eq!(map.find(0x1180), None);
        assert_eq!(map.read, 48, "the incomplete line is for next time");
        map.add(b"1080 100 fourth\nrubbish\n\n1 2\nffffffffffffffff ff far\n9 0 nothing\n");
        assert_eq!(map.find(0x1000), None, "overwritten");
        assert_eq!(map.find(0x1090), Some(("fourth", 0x1080)));
        assert_eq!(map.find(0x117f), Some(("fourth", 0x1080)));
        assert_eq!(map.find(0x1200), Some(("third", 0x1200)));
        assert_eq!(map.functions.len(), 2);
    }
}
