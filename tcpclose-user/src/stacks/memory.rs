//! Memory that is read while a stack is unwound: the copied part of the stack, and the process it belongs to.

use std::{cell::RefCell, collections::HashMap, fs::File, os::unix::fs::FileExt as _, rc::Rc};

use foldhash::fast::RandomState;

/// Longest string that is read, in bytes.
const MAX_STRING: usize = 1024;

/// The copied part of a stack. It records which words were read.
pub struct StackMemory<'a> {
    start: u64,
    bytes: &'a [u8],
    read: RefCell<Vec<(u64, Option<u64>)>>,
}

impl<'a> StackMemory<'a> {
    /// A copy of the memory from address `start` on.
    pub fn new(start: u64, bytes: &'a [u8]) -> Self {
        Self { start, bytes, read: RefCell::default() }
    }

    /// The word at an address; `None` if it was not copied.
    pub fn word(&self, address: u64) -> Option<u64> {
        let word = self.copied(address).map(u64::from_ne_bytes);
        self.read.borrow_mut().push((address, word));
        word
    }

    /// The word at an address; `None` if it was not copied. It is not recorded: use it only to find what other
    /// words identify, or if the stack is to be unwound each time.
    pub fn peek(&self, address: u64) -> Option<u64> {
        self.copied(address).map(u64::from_ne_bytes)
    }

    /// The word at an address, for a 32-bit program; `None` if it was not copied. It is not recorded.
    pub fn word_32(&self, address: u64) -> Option<u32> {
        self.copied(address).map(u32::from_ne_bytes)
    }

    /// The addresses that were read since the last call, in order, with their values.
    pub fn take_reads(&self) -> Vec<(u64, Option<u64>)> {
        self.read.take()
    }

    /// Whether an address is in the part of the stack that may lie above the copy.
    pub fn is_above(&self, address: u64) -> bool {
        address.checked_sub(self.start).is_some_and(|offset| offset >= self.bytes.len() as u64)
    }

    /// The bytes at an address; `None` if not all of them were copied.
    fn copied<const SIZE: usize>(&self, address: u64) -> Option<[u8; SIZE]> {
        let offset = usize::try_from(address.checked_sub(self.start)?).ok()?;
        self.bytes.get(offset..)?.first_chunk().copied()
    }
}

/// Bytes that are read at a time.
const PAGE: usize = 4096;

/// How many pages are kept, 1 MiB. When there are more, all are dropped and read again.
const MAX_PAGES: usize = 256;

/// The memory of a process, as the kernel shows it in `/proc/PID/mem`. It belongs to the program image that
/// the process had when this was opened: after an exit or exec, every read fails.
///
/// Naming the frames of one stack reads hundreds of words, which are on some dozens of pages, and every read is
/// a system call. Pages are therefore kept until [`forget`](Self::forget), which the unwinder calls after each
/// stack. Clones share them.
#[derive(Clone)]
pub struct ProcessMemory(Rc<OpenMemory>);

struct OpenMemory {
    file: File,
    /// By their addresses. One that cannot be read whole is shorter.
    pages: RefCell<HashMap<u64, Vec<u8>, RandomState>>,
    #[cfg(test)]
    reads: std::cell::Cell<usize>,
}

impl ProcessMemory {
    /// `None` if the process has exited, or if this process may not read its memory.
    pub fn open(pid: u32) -> Option<Self> {
        File::open(format!("/proc/{pid}/mem")).ok().map(Self::from)
    }

    /// Drops the pages that were read, so that what is read next is as it is by then.
    pub fn forget(&self) {
        self.0.pages.borrow_mut().clear();
    }

    /// Whether there is memory at an address now.
    pub fn is_there(&self, address: u64) -> bool {
        self.read_now(address, &mut [0]) == 1
    }

    /// Fills the buffer from an address.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> Option<()> {
        (self.fill(address, buffer) == buffer.len()).then_some(())
    }

    fn number<const SIZE: usize>(&self, address: u64) -> Option<[u8; SIZE]> {
        let mut bytes = [0; SIZE];
        self.read(address, &mut bytes)?;
        Some(bytes)
    }

    /// The number at an address, in native byte order.
    pub fn u64(&self, address: u64) -> Option<u64> {
        self.number(address).map(u64::from_ne_bytes)
    }

    /// The number at an address, in native byte order.
    pub fn u32(&self, address: u64) -> Option<u32> {
        self.number(address).map(u32::from_ne_bytes)
    }

    /// The number at an address, in native byte order.
    pub fn u16(&self, address: u64) -> Option<u16> {
        self.number(address).map(u16::from_ne_bytes)
    }

    /// The byte at an address.
    pub fn u8(&self, address: u64) -> Option<u8> {
        self.number(address).map(u8::from_ne_bytes)
    }

    /// Up to `size` bytes from an address: those before the first that cannot be read.
    pub fn up_to(&self, address: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        let filled = self.fill(address, &mut bytes);
        bytes.truncate(filled);
        bytes
    }

    /// Fills the buffer as far as the memory can be read. Returns how far.
    fn fill(&self, address: u64, buffer: &mut [u8]) -> usize {
        if buffer.len() > PAGE {
            return self.read_now(address, buffer);
        }
        let mut filled = 0;
        while filled < buffer.len() {
            let rest = &mut buffer[filled..];
            let copied = address.checked_add(filled as u64).map_or(0, |address| self.copy(address, rest));
            if copied == 0 {
                break;
            }
            filled += copied;
        }
        filled
    }

    /// Copies from the page at an address, to its end. Returns the number of bytes.
    fn copy(&self, address: u64, buffer: &mut [u8]) -> usize {
        let start = address - address % PAGE as u64;
        let Ok(offset) = usize::try_from(address - start) else { return 0 };
        let mut pages = self.0.pages.borrow_mut();
        if !pages.contains_key(&start) {
            let mut page = vec![0; PAGE];
            let size = self.read_now(start, &mut page);
            if size == 0 {
                return 0;
            }
            page.truncate(size);
            if pages.len() >= MAX_PAGES {
                pages.clear();
            }
            pages.insert(start, page);
        }
        let Some(bytes) = pages.get(&start).and_then(|page| page.get(offset..)) else { return 0 };
        let count = bytes.len().min(buffer.len());
        buffer[..count].copy_from_slice(&bytes[..count]);
        count
    }

    /// Fills the buffer as far as a single read does. Returns how far.
    fn read_now(&self, address: u64, buffer: &mut [u8]) -> usize {
        #[cfg(test)]
        self.0.reads.set(self.0.reads.get() + 1);
        // `pread` takes a signed offset, and no process has memory beyond it.
        i64::try_from(address).ok().and_then(|_| self.0.file.read_at(buffer, address).ok()).unwrap_or(0)
    }

    /// The number of system calls so far.
    #[cfg(test)]
    pub fn reads(&self) -> usize {
        self.0.reads.get()
    }

    /// A string of at most 1 KiB that ends with a zero.
    pub fn string(&self, address: u64) -> Option<String> {
        let mut bytes = Vec::new();
        while bytes.len() < MAX_STRING {
            let piece = self.up_to(address.checked_add(bytes.len() as u64)?, 64);
            if let Some(end) = piece.iter().position(|byte| *byte == 0) {
                bytes.extend_from_slice(&piece[..end]);
                return String::from_utf8(bytes).ok();
            }
            if piece.is_empty() {
                return None;
            }
            bytes.extend(piece);
        }
        None
    }
}

impl From<File> for ProcessMemory {
    /// A file whose offsets are addresses.
    fn from(file: File) -> Self {
        Self(Rc::new(OpenMemory {
            file,
            pages: RefCell::default(),
            #[cfg(test)]
            reads: std::cell::Cell::default(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory of as many words, each of which is its own address, and the file that it is in.
    fn memory(words: usize) -> (File, ProcessMemory) {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..words as u64).flat_map(|word| (8 * word).to_ne_bytes()).collect();
        file.write_all_at(&bytes, 0).unwrap();
        (file.try_clone().unwrap(), ProcessMemory::from(file))
    }

    #[test]
    fn each_page_is_read_once_until_it_is_forgotten() {
        let (file, memory) = memory(3 * PAGE / 8);
        for address in (0..3 * PAGE as u64).step_by(8) {
            assert_eq!(memory.u64(address), Some(address));
        }
        assert_eq!(memory.clone().u32(8), Some(8));
        assert_eq!(memory.reads(), 3);
        file.write_all_at(&[1; 8], 8).unwrap();
        assert_eq!(memory.u32(8), Some(8));
        memory.forget();
        assert_eq!(memory.u32(8), Some(0x0101_0101));
        assert_eq!(memory.reads(), 4);
    }

    #[test]
    fn words_and_strings_extend_into_the_next_page() {
        let (file, memory) = memory(2 * PAGE / 8);
        file.write_all_at(&[b'a'; 16], PAGE as u64 - 8).unwrap();
        file.write_all_at(b"b\0", PAGE as u64 + 8).unwrap();
        assert_eq!(memory.u64(PAGE as u64 - 4), Some(u64::from_ne_bytes([b'a'; 8])));
        assert_eq!(memory.string(PAGE as u64 - 8), Some(format!("{}b", "a".repeat(16))));
        assert_eq!(memory.reads(), 2);
        assert_eq!(memory.up_to(0, 2 * PAGE).len(), 2 * PAGE);
        assert_eq!(memory.reads(), 3, "what is longer than a page is read at once");
    }

    #[test]
    fn a_page_that_ends_early_is_read_as_far_as_it_goes() {
        let (file, memory) = memory(5);
        assert_eq!(memory.up_to(8, 64).len(), 32);
        assert_eq!(memory.u64(32), Some(32));
        assert_eq!([memory.u64(33), memory.u64(40), memory.u64(PAGE as u64)], [None; 3]);
        assert_eq!([memory.u64(u64::MAX), memory.u64(1 << 63), memory.u64((1 << 63) - 4)], [None; 3]);
        assert!(memory.is_there(39) && !memory.is_there(40));
        file.set_len(0).unwrap();
        assert_eq!(memory.u64(32), Some(32));
        assert!(!memory.is_there(32), "as it is now");
    }

    #[test]
    fn a_bounded_number_of_pages_is_kept() {
        let (_, memory) = memory((MAX_PAGES + 1) * PAGE / 8);
        for page in 0..=MAX_PAGES as u64 {
            assert!(memory.u64(page * PAGE as u64).is_some());
            assert!(memory.0.pages.borrow().len() <= MAX_PAGES);
        }
        assert_eq!(memory.0.pages.borrow().len(), 1);
    }
}
