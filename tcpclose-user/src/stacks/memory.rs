//! The memory of a process.

use std::{fs::File, os::unix::fs::FileExt as _};

/// A string that is longer is none.
const MAX_STRING: usize = 1024;

/// The memory that a process had when this was opened: once it has ended, or called exec, nothing can be read of it.
pub(super) struct Target(File);

impl Target {
    /// `None` if it is gone, or is not to be looked at.
    pub(super) fn open(pid: u32) -> Option<Self> {
        File::open(format!("/proc/{pid}/mem")).ok().map(Self)
    }

    /// Fills the buffer.
    pub(super) fn read(&self, address: u64, buffer: &mut [u8]) -> Option<()> {
        // What is beyond could be no address, and reading it no offset.
        i64::try_from(address).ok()?;
        self.0.read_exact_at(buffer, address).ok()
    }

    fn number<const SIZE: usize>(&self, address: u64) -> Option<[u8; SIZE]> {
        let mut bytes = [0; SIZE];
        self.read(address, &mut bytes)?;
        Some(bytes)
    }

    pub(super) fn u64(&self, address: u64) -> Option<u64> {
        self.number(address).map(u64::from_ne_bytes)
    }

    pub(super) fn u32(&self, address: u64) -> Option<u32> {
        self.number(address).map(u32::from_ne_bytes)
    }

    pub(super) fn u16(&self, address: u64) -> Option<u16> {
        self.number(address).map(u16::from_ne_bytes)
    }

    pub(super) fn u8(&self, address: u64) -> Option<u8> {
        self.number(address).map(u8::from_ne_bytes)
    }

    /// As much as can be read of `size` bytes.
    pub(super) fn up_to(&self, address: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        let read = i64::try_from(address).ok().and_then(|_| self.0.read_at(&mut bytes, address).ok());
        bytes.truncate(read.unwrap_or(0));
        bytes
    }

    /// A string that ends with a zero.
    pub(super) fn string(&self, address: u64) -> Option<String> {
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
