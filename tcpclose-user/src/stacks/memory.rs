//! Memory that is read while a stack is unwound: the copied part of the stack, and the process it belongs to.

use std::{cell::RefCell, fs::File, os::unix::fs::FileExt as _};

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

/// The memory of a process, as the kernel shows it in `/proc/PID/mem`. It belongs to the program image that
/// the process had when this was opened: after an exit or exec, every read fails.
pub struct ProcessMemory(File);

impl ProcessMemory {
    /// `None` if the process has exited, or if this process may not read its memory.
    pub fn open(pid: u32) -> Option<Self> {
        File::open(format!("/proc/{pid}/mem")).ok().map(Self)
    }

    /// Fills the buffer from an address.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> Option<()> {
        // `pread` takes a signed offset, and no process has memory beyond it.
        i64::try_from(address).ok()?;
        self.0.read_exact_at(buffer, address).ok()
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

    /// Up to `size` bytes from an address: as many as a single read yields.
    pub fn up_to(&self, address: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        let read = i64::try_from(address).ok().and_then(|_| self.0.read_at(&mut bytes, address).ok());
        bytes.truncate(read.unwrap_or(0));
        bytes
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
        Self(file)
    }
}
