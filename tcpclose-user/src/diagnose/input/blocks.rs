//! Reads a file in blocks of whole lines.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::AsFd as _,
    path::Path,
};

use nix::fcntl::{FcntlArg, fcntl};

/// The number of bytes that are read at once.
const BLOCK: usize = 1 << 18;

/// The size of a pipe, in bytes: the largest that needs no privilege.
const PIPE: i32 = 1 << 20;

/// The longest line. A line with two complete stacks has about 50 kB.
const LONGEST: usize = 1 << 20;

/// Reads a file.
pub(super) struct Blocks {
    reader: Box<dyn Read>,
    /// The beginning of the next line.
    rest: Vec<u8>,
    /// Blocks that are no longer needed. Their memory is reused, because the kernel has to clear new memory.
    spare: Vec<Vec<u8>>,
    /// Whether the next bytes belong to a line that was too long.
    is_skipping: bool,
    is_at_end: bool,
}

impl Blocks {
    /// Opens a file; `-` means the standard input.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = if path == Path::new("-") {
            // `Stdin` has a buffer of its own, through which all data would be copied.
            io::stdin().as_fd().try_clone_to_owned().map(File::from)
        } else {
            File::open(path)
        };
        let file = file?;
        // With a larger pipe, its writer has to wait less often. The kernel may refuse the size, and it does
        // for files that are not pipes.
        let _ = fcntl(&file, FcntlArg::F_SETPIPE_SZ(PIPE));
        Ok(Self::new(Box::new(file)))
    }

    pub(super) fn new(reader: Box<dyn Read>) -> Self {
        Self { reader, rest: Vec::new(), spare: Vec::new(), is_skipping: false, is_at_end: false }
    }

    /// The next lines; `None` at the end of the file. If the last line of a block has no line end, it is the
    /// last line of the file, or the beginning of a line that is too long.
    pub(super) fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut block = self.spare.pop().unwrap_or_default();
        block.clear();
        block.append(&mut self.rest);
        while !self.is_at_end {
            block.reserve(BLOCK);
            self.is_at_end = self.reader.by_ref().take(BLOCK as u64).read_to_end(&mut block)? < BLOCK;
            if self.is_skipping {
                let end = memchr::memchr(b'\n', &block);
                self.is_skipping = end.is_none();
                block.drain(..end.map_or(block.len(), |end| end + 1));
            }
            if let Some(end) = memchr::memrchr(b'\n', &block) {
                self.rest.extend(block.drain(end + 1..));
                return Ok(Some(block));
            }
            if block.len() >= LONGEST {
                self.is_skipping = true;
                return Ok(Some(block));
            }
        }
        Ok((!block.is_empty()).then_some(block))
    }

    /// Takes back a block that is no longer needed.
    pub(super) fn reuse(&mut self, block: Vec<u8>) {
        self.spare.push(block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader that gives the bytes in pieces of this length.
    struct Pieces(Vec<u8>, usize, usize);

    impl Read for Pieces {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let end = (self.2 + self.1.min(buffer.len())).min(self.0.len());
            let piece = &self.0[self.2..end];
            buffer[..piece.len()].copy_from_slice(piece);
            self.2 = end;
            Ok(piece.len())
        }
    }

    #[test]
    fn blocks_are_whole_lines_and_all_of_the_file() {
        let text = "some line\n".repeat(200_000) + "last";
        for length in [1_000, BLOCK, usize::MAX / 2] {
            let mut blocks = Blocks::new(Box::new(Pieces(text.clone().into_bytes(), length, 0)));
            let (mut read, mut count) = (Vec::new(), 0);
            while let Some(block) = blocks.next().expect("memory") {
                assert!(block.ends_with(b"\n") || block == b"last", "{length}");
                read.extend_from_slice(&block);
                blocks.reuse(block);
                count += 1;
            }
            assert!(read == text.as_bytes() && count > 2, "{length}");
        }
    }
}
