//! A BPF ring buffer, whose records are read in place.
//!
//! The pages of the data are mapped once. The kernel also offers them twice in a row, so that a record that
//! extends beyond the end is contiguous, but then all pages count twice as memory of the process: 16 MiB for
//! a ring of 8. Such a record, one in thousands, is copied to a buffer instead.
//!
//! The layout and the rules are those of `kernel/bpf/ringbuf.c` and `tools/lib/bpf/ringbuf.c` of Linux.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::atomic::{AtomicU32, AtomicUsize, Ordering, fence},
};

use aya::maps::{Map, MapData};
use memmap2::{MmapOptions, MmapRaw};

/// The header of each record: its length, whose top bits are flags, and an offset that the kernel uses.
const HEADER: usize = 8;

/// The kernel is still writing the record.
const BUSY: u32 = 1 << 31;

/// The record was discarded, and is skipped.
const DISCARDED: u32 = 1 << 30;

/// The number of bytes after which they are released to the kernel. If each record were released separately,
/// the CPUs that write would have to fetch the changed position for each record.
const RELEASE_AFTER: usize = 64 << 10;

/// The ring buffer of a map.
pub struct Ring {
    map: MapData,
    memory: Memory,
}

impl Ring {
    /// The next record; `None` if the ring is empty, or if the kernel is still writing the next one.
    pub fn next_record(&mut self) -> Option<&[u8]> {
        self.memory.next_record()
    }
}

impl TryFrom<Map> for Ring {
    type Error = io::Error;

    fn try_from(map: Map) -> io::Result<Self> {
        let Map::RingBuf(map) = map else { return Err(io::Error::other("the map is no ring buffer")) };
        let size = map.info().map_err(io::Error::other)?.max_entries();
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let memory = Memory::new(map.fd().as_fd().as_raw_fd(), size)?;
        Ok(Self { map, memory })
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.fd().as_fd()
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// The memory of a ring buffer. Positions count bytes since its creation, and wrap around.
struct Memory {
    /// A page that begins with the position up to which records were consumed.
    consumer: MmapRaw,
    /// A page that begins with the position up to which the kernel has reserved room, and the data.
    producer: MmapRaw,
    page: usize,
    /// Size of the data, a power of two.
    size: usize,
    /// Where the next record begins.
    position: usize,
    /// The position up to which records were released to the kernel.
    released: usize,
    /// The position up to which the kernel had reserved room when this was last read.
    reserved: usize,
    /// The last record that extended beyond the end.
    joined: Vec<u8>,
}

impl Memory {
    /// Maps a ring of `size` bytes.
    fn new(ring: RawFd, size: usize) -> io::Result<Self> {
        let page = usize::try_from(nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.unwrap_or(4096))
            .map_err(io::Error::other)?;
        if !size.is_power_of_two() || size < page {
            return Err(io::Error::other(format!("a ring buffer of {size} bytes")));
        }
        let offset = u64::try_from(page).map_err(io::Error::other)?;
        let consumer = MmapOptions::new().len(page).map_raw(ring)?;
        let producer = MmapOptions::new().offset(offset).len(page + size).map_raw_read_only(ring)?;
        let mut memory = Self {
            consumer,
            producer,
            page,
            size,
            position: 0,
            released: 0,
            reserved: 0,
            joined: Vec::new(),
        };
        memory.position = memory.consumed().load(Ordering::Acquire);
        (memory.released, memory.reserved) = (memory.position, memory.position);
        Ok(memory)
    }

    fn next_record(&mut self) -> Option<&[u8]> {
        loop {
            if self.position == self.reserved && !self.look_again() {
                return None;
            }
            let mut header = self.header(self.position);
            if header & BUSY != 0 {
                // It may have been finished since. Its writer wakes no reader if it has seen an old position.
                self.release();
                header = self.header(self.position);
                if header & BUSY != 0 {
                    return None;
                }
            }
            if self.position.wrapping_sub(self.released) >= RELEASE_AFTER {
                self.release();
            }
            let length = usize::try_from(header & !(BUSY | DISCARDED)).unwrap_or(usize::MAX);
            let start = self.position.wrapping_add(HEADER);
            if length > self.size - HEADER {
                log::error!("a record in the ring buffer claims {length} bytes, which it has no room for");
                return None;
            }
            self.position = start.wrapping_add(length.next_multiple_of(8));
            if header & DISCARDED == 0 {
                return Some(self.record(start, length));
            }
        }
    }

    /// Publishes the position of this side, then reads that of the kernel. Returns whether there is more.
    fn look_again(&mut self) -> bool {
        self.release();
        self.reserved = self.reserved().load(Ordering::Acquire);
        self.position != self.reserved
    }

    /// Lets the kernel overwrite what was consumed.
    fn release(&mut self) {
        if self.released != self.position {
            self.released = self.position;
            self.consumed().store(self.position, Ordering::Release);
            // Reads from here on see everything that the kernel wrote before it saw the new position.
            fence(Ordering::SeqCst);
        }
    }

    fn consumed(&self) -> &AtomicUsize {
        // SAFETY: the page is mapped for as long as `self` lives, begins with an aligned word, and the kernel
        // and this side access that word by atomic operations alone.
        unsafe { AtomicUsize::from_ptr(self.consumer.as_mut_ptr().cast()) }
    }

    fn reserved(&self) -> &AtomicUsize {
        // SAFETY: as in `consumed`. The page is read-only, and the word is only loaded.
        unsafe { AtomicUsize::from_ptr(self.producer.as_mut_ptr().cast()) }
    }

    /// The length and the flags of the record at a position.
    fn header(&self, position: usize) -> u32 {
        let offset = position & (self.size - 1) & !(HEADER - 1);
        // SAFETY: the data are mapped behind the first page for as long as `self` lives. The offset is below
        // their size, which is a multiple of 8, and is itself one. The kernel writes the word by atomic
        // operations.
        let header =
            unsafe { AtomicU32::from_ptr(self.producer.as_mut_ptr().add(self.page + offset).cast()) };
        header.load(Ordering::Acquire)
    }

    /// The bytes of a record that the kernel has finished. They stay as they are until `self.position` is
    /// released, which takes `&mut self`.
    fn record(&mut self, start: usize, length: usize) -> &[u8] {
        let offset = start & (self.size - 1);
        let in_place = length.min(self.size - offset);
        if in_place == length {
            return self.bytes(offset, length);
        }
        let mut joined = std::mem::take(&mut self.joined);
        joined.clear();
        joined.extend_from_slice(self.bytes(offset, in_place));
        joined.extend_from_slice(self.bytes(0, length - in_place));
        self.joined = joined;
        &self.joined
    }

    fn bytes(&self, offset: usize, length: usize) -> &[u8] {
        assert!(offset <= self.size && length <= self.size - offset, "within the ring");
        // SAFETY: the range is within the data, which are mapped behind the first page for as long as `self`
        // lives. The kernel does not write to a finished record before it is released.
        unsafe { std::slice::from_raw_parts(self.producer.as_ptr().add(self.page + offset), length) }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt as _};

    use super::*;

    const PAGE: u64 = 4096;
    const SIZE: u64 = 4096;

    /// The kernel's side, simulated in a file with the layout of a ring buffer.
    struct KernelSide {
        file: File,
        reserved: u64,
    }

    impl KernelSide {
        fn new() -> Self {
            let file = tempfile::tempfile().unwrap();
            file.set_len(2 * PAGE + SIZE).unwrap();
            Self { file, reserved: 0 }
        }

        fn put(&self, position: u64, bytes: &[u8]) {
            for (at, byte) in (position..).zip(bytes) {
                self.file.write_all_at(&[*byte], 2 * PAGE + at % SIZE).unwrap();
            }
        }

        fn header(&self, position: u64, length: usize, flags: u32) {
            self.put(position, &(u32::try_from(length).unwrap() | flags).to_ne_bytes());
        }

        /// Writes a record; returns where its header is.
        fn write(&mut self, bytes: &[u8], flags: u32) -> u64 {
            let position = self.reserved;
            self.put(position + HEADER as u64, bytes);
            self.header(position, bytes.len(), flags);
            self.reserved += (HEADER + bytes.len().next_multiple_of(8)) as u64;
            self.file.write_all_at(&self.reserved.to_ne_bytes(), PAGE).unwrap();
            position
        }

        fn consumed(&self) -> u64 {
            let mut word = [0; 8];
            self.file.read_exact_at(&mut word, 0).unwrap();
            u64::from_ne_bytes(word)
        }
    }

    fn is_possible() -> bool {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).unwrap();
        if page != Some(4096) {
            eprintln!("skipped: pages of {page:?} bytes, and the test lays out a ring with pages of 4096");
        }
        page == Some(4096)
    }

    #[test]
    fn records_come_in_order_and_whole() {
        if !is_possible() {
            return;
        }
        let mut kernel = KernelSide::new();
        let mut ring = Memory::new(kernel.file.as_raw_fd(), 4096).unwrap();
        assert_eq!(ring.next_record(), None);
        // This fills the ring several times, with lengths that make records extend beyond the end at
        // different places.
        let mut joined = 0;
        for number in 0..1000_usize {
            let record: Vec<u8> = (0..=number % 300).map(|byte| (byte + number).to_le_bytes()[0]).collect();
            let start = kernel.write(&record, 0) + HEADER as u64;
            kernel.write(b"given up", DISCARDED);
            joined += u32::from(start % SIZE + record.len() as u64 > SIZE);
            assert_eq!(ring.next_record(), Some(&record[..]), "record {number}");
            assert_eq!(ring.next_record(), None);
            assert_eq!(kernel.consumed(), kernel.reserved, "all room is given back before the reader sleeps");
        }
        assert!(joined > 10, "{joined} records reached over the end");
    }

    #[test]
    fn a_record_that_is_being_written_holds_up_those_behind_it() {
        if !is_possible() {
            return;
        }
        let mut kernel = KernelSide::new();
        let mut ring = Memory::new(kernel.file.as_raw_fd(), 4096).unwrap();
        kernel.write(b"one", 0);
        let busy = kernel.write(b"two", BUSY);
        kernel.write(b"three", 0);
        assert_eq!(ring.next_record(), Some(&b"one"[..]));
        assert_eq!(ring.next_record(), None);
        assert_eq!(kernel.consumed(), busy);
        kernel.header(busy, 3, 0);
        assert_eq!(ring.next_record(), Some(&b"two"[..]));
        assert_eq!(ring.next_record(), Some(&b"three"[..]));
        assert_eq!(ring.next_record(), None);
    }

    #[test]
    fn a_length_that_makes_no_sense_ends_the_reading() {
        if !is_possible() {
            return;
        }
        let mut kernel = KernelSide::new();
        let mut ring = Memory::new(kernel.file.as_raw_fd(), 4096).unwrap();
        let position = kernel.write(b"one", 0);
        kernel.header(position, 4096, 0);
        assert_eq!(ring.next_record(), None);
        assert!(Memory::new(kernel.file.as_raw_fd(), 100).is_err());
    }
}
