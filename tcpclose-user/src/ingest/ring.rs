//! A BPF ring buffer, whose records are read in place.
//!
//! Pages that are mapped count as memory of the process, so only a part of the data is, a window that moves
//! along with the records: 2 MiB and not 32. The kernel offers the data twice in a row, so that a window, and a
//! record, that extends beyond the end is contiguous.
//!
//! The layout and the rules are those of `kernel/bpf/ringbuf.c` and `tools/lib/bpf/ringbuf.c` of Linux.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::atomic::{AtomicU32, AtomicUsize, Ordering, fence},
};

use aya::maps::Map;
use memmap2::{MmapOptions, MmapRaw};
use tcpclose_common::record::MAX_STACK_BYTES;

/// The header of each record: its length, whose top bits are flags, and an offset that the kernel uses.
const HEADER: usize = 8;

/// The kernel is still writing the record.
const BUSY: u32 = 1 << 31;

/// The record was discarded, and is skipped.
const DISCARDED: u32 = 1 << 30;

/// The number of bytes after which they are released to the kernel. If each record were released separately,
/// the CPUs that write would have to fetch the changed position for each record.
const RELEASE_AFTER: usize = 64 << 10;

/// The number of bytes of data that are mapped at a time, beside one page. To map a page takes about 0.15 µs,
/// and a page holds six records.
const WINDOW: usize = 2 << 20;

/// The longest record, with its header, that a window of a ring with `size` bytes of data has room for.
fn longest(size: usize) -> usize {
    size.min(WINDOW)
}

// The longest record, a copy of a stack with its header, is much shorter than a window.
const _: () = assert!(MAX_STACK_BYTES as usize <= WINDOW / 2);

/// A ring buffer. Positions count bytes since its creation, and wrap around.
pub struct Ring {
    map: OwnedFd,
    page: usize,
    /// Size of the data, a power of two.
    size: usize,
    /// A page that begins with the position up to which records were consumed.
    consumer: MmapRaw,
    /// A page that begins with the position up to which the kernel has reserved room.
    producer: MmapRaw,
    window: Window,
    /// Where the next record begins.
    position: usize,
    /// The position up to which records were released to the kernel.
    released: usize,
    /// The position up to which the kernel had reserved room when this was last read.
    reserved: usize,
}

/// The part of the data that is mapped.
struct Window {
    data: MmapRaw,
    /// The position of its first byte.
    start: usize,
}

impl Ring {
    /// Maps the ring buffer `map`, which has `size` bytes of data.
    fn new(map: OwnedFd, size: usize) -> io::Result<Self> {
        let page = usize::try_from(nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.unwrap_or(4096))
            .map_err(io::Error::other)?;
        if !size.is_power_of_two() || size < page {
            return Err(io::Error::other(format!("a ring buffer of {size} bytes")));
        }
        let consumer = MmapOptions::new().len(page).map_raw(map.as_raw_fd())?;
        let producer =
            MmapOptions::new().offset(offset(page)?).len(page).map_raw_read_only(map.as_raw_fd())?;
        let position = word(&consumer).load(Ordering::Acquire);
        let window = Window::at(position, map.as_raw_fd(), page, size)?;
        Ok(Self {
            map,
            page,
            size,
            consumer,
            producer,
            window,
            position,
            released: position,
            reserved: position,
        })
    }

    /// The next record; `None` if the ring is empty, or if the kernel is still writing the next one.
    ///
    /// # Errors
    /// Another part of the ring cannot be mapped.
    pub fn next_record(&mut self) -> io::Result<Option<&[u8]>> {
        loop {
            if self.position == self.reserved && !self.look_again() {
                return Ok(None);
            }
            self.move_to(HEADER)?;
            let mut header = self.header();
            if header & BUSY != 0 {
                // It may have been finished since. Its writer wakes no reader if it has seen an old position.
                self.release();
                header = self.header();
                if header & BUSY != 0 {
                    return Ok(None);
                }
            }
            if self.position.wrapping_sub(self.released) >= RELEASE_AFTER {
                self.release();
            }
            let length = usize::try_from(header & !(BUSY | DISCARDED)).unwrap_or(usize::MAX);
            if length > longest(self.size) - HEADER {
                log::error!("a record in the ring buffer claims {length} bytes, which it has no room for");
                return Ok(None);
            }
            self.move_to(HEADER + length)?;
            let start = self.position.wrapping_add(HEADER);
            self.position = start.wrapping_add(length.next_multiple_of(8));
            if header & DISCARDED == 0 {
                // SAFETY: the kernel has finished the record, and writes to it no more before it is released,
                // which takes `&mut self`. So does another window.
                let record =
                    unsafe { std::slice::from_raw_parts(self.window.pointer(start, length), length) };
                return Ok(Some(record));
            }
        }
    }

    /// Publishes the position of this side, then reads that of the kernel. Returns whether there is more.
    fn look_again(&mut self) -> bool {
        self.release();
        self.reserved = word(&self.producer).load(Ordering::Acquire);
        self.position != self.reserved
    }

    /// Lets the kernel overwrite what was consumed.
    fn release(&mut self) {
        if self.released != self.position {
            self.released = self.position;
            word(&self.consumer).store(self.position, Ordering::Release);
            // Reads from here on see everything that the kernel wrote before it saw the new position.
            fence(Ordering::SeqCst);
        }
    }

    /// Moves the window unless it contains `length` bytes of data from the current position on, which must
    /// not be more than a window has room for.
    fn move_to(&mut self, length: usize) -> io::Result<()> {
        if !self.window.contains(self.position, length) {
            self.window = Window::at(self.position, self.map.as_raw_fd(), self.page, self.size)?;
        }
        Ok(())
    }

    /// The length and the flags of the record at the current position, which the window contains.
    fn header(&self) -> u32 {
        let header = self.window.pointer(self.position & !(HEADER - 1), HEADER);
        // SAFETY: mapped for as long as the window lives, and aligned. The kernel writes the word by atomic
        // operations.
        unsafe { AtomicU32::from_ptr(header.cast_mut().cast()) }.load(Ordering::Acquire)
    }
}

impl Window {
    /// Maps the part of the ring that begins with the page of `position`. The longest record may begin
    /// anywhere in that page, so the window has one page more than that.
    fn at(position: usize, map: RawFd, page: usize, size: usize) -> io::Result<Self> {
        let start = position & !(page - 1);
        // The data come after the pages of the two positions.
        let from = offset(2 * page + (start & (size - 1)))?;
        let length = longest(size) + page;
        Ok(Self { data: MmapOptions::new().offset(from).len(length).map_raw_read_only(map)?, start })
    }

    fn contains(&self, position: usize, length: usize) -> bool {
        let offset = position.wrapping_sub(self.start);
        offset <= self.data.len() && length <= self.data.len() - offset
    }

    /// Where `length` bytes from `position` on are mapped, which it must contain.
    fn pointer(&self, position: usize, length: usize) -> *const u8 {
        assert!(self.contains(position, length), "within the window");
        self.data.as_ptr().wrapping_add(position.wrapping_sub(self.start))
    }
}

/// The position that a page begins with.
fn word(page: &MmapRaw) -> &AtomicUsize {
    // SAFETY: the page is mapped for as long as `page` lives, begins with an aligned word, and the kernel and
    // this side access that word by atomic operations alone. Of a read-only page, it is only loaded.
    unsafe { AtomicUsize::from_ptr(page.as_mut_ptr().cast()) }
}

/// An offset into the map, as a file has it.
fn offset(bytes: usize) -> io::Result<u64> {
    u64::try_from(bytes).map_err(io::Error::other)
}

impl TryFrom<Map> for Ring {
    type Error = io::Error;

    fn try_from(map: Map) -> io::Result<Self> {
        let Map::RingBuf(map) = map else { return Err(io::Error::other("the map is no ring buffer")) };
        let size = map.info().map_err(io::Error::other)?.max_entries();
        let size = usize::try_from(size).map_err(io::Error::other)?;
        Self::new(map.fd().as_fd().try_clone_to_owned()?, size)
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.map.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt as _};

    use super::*;

    const PAGE: u64 = 4096;
    /// More than a window has room for.
    const SIZE: u64 = 2 * WINDOW as u64;

    /// The kernel's side, simulated in a file with the layout of a ring buffer, which has the data twice.
    struct KernelSide {
        file: File,
        reserved: u64,
    }

    impl KernelSide {
        fn new() -> Self {
            let file = tempfile::tempfile().unwrap();
            file.set_len(2 * PAGE + 2 * SIZE).unwrap();
            Self { file, reserved: 0 }
        }

        /// The other side of the ring.
        fn ring(&self) -> Ring {
            Ring::new(self.file.try_clone().unwrap().into(), usize::try_from(SIZE).unwrap()).unwrap()
        }

        fn put(&self, position: u64, bytes: &[u8]) {
            let rest = usize::try_from(SIZE - position % SIZE).unwrap().min(bytes.len());
            let (before, after) = bytes.split_at(rest);
            for copy in [2 * PAGE, 2 * PAGE + SIZE] {
                self.file.write_all_at(before, copy + position % SIZE).unwrap();
                self.file.write_all_at(after, copy).unwrap();
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
        let mut ring = kernel.ring();
        assert_eq!(ring.next_record().unwrap(), None);
        // This fills the ring several times, with lengths that make records extend beyond its end, and beyond
        // that of a window, at different places.
        let (mut beyond_end, mut moved) = (0, 0);
        for number in 0..1000_usize {
            let length = 1 + number * 7919 % MAX_STACK_BYTES as usize;
            let record: Vec<u8> = (0..length).map(|byte| (byte + number).to_le_bytes()[0]).collect();
            let start = kernel.write(&record, 0) + HEADER as u64;
            kernel.write(b"given up", DISCARDED);
            beyond_end += u32::from(start % SIZE + record.len() as u64 > SIZE);
            let window = ring.window.start;
            assert!(ring.next_record().unwrap() == Some(&record[..]), "record {number}");
            moved += u32::from(ring.window.start != window);
            assert_eq!(ring.next_record().unwrap(), None);
            assert_eq!(kernel.consumed(), kernel.reserved, "all room is given back before the reader sleeps");
        }
        assert!(beyond_end > 5, "{beyond_end} records extended beyond the end");
        assert!((10..30).contains(&moved), "{moved} windows for {} bytes", kernel.reserved);
        assert!(ring.window.data.len() < WINDOW + 2 * ring.page);
    }

    #[test]
    fn a_record_that_is_being_written_holds_up_those_behind_it() {
        if !is_possible() {
            return;
        }
        let mut kernel = KernelSide::new();
        let mut ring = kernel.ring();
        kernel.write(b"one", 0);
        let busy = kernel.write(b"two", BUSY);
        kernel.write(b"three", 0);
        assert_eq!(ring.next_record().unwrap(), Some(&b"one"[..]));
        assert_eq!(ring.next_record().unwrap(), None);
        assert_eq!(kernel.consumed(), busy);
        kernel.header(busy, 3, 0);
        assert_eq!(ring.next_record().unwrap(), Some(&b"two"[..]));
        assert_eq!(ring.next_record().unwrap(), Some(&b"three"[..]));
        assert_eq!(ring.next_record().unwrap(), None);
    }

    #[test]
    fn a_length_that_makes_no_sense_ends_the_reading() {
        if !is_possible() {
            return;
        }
        let mut kernel = KernelSide::new();
        let mut ring = kernel.ring();
        let position = kernel.write(b"one", 0);
        kernel.header(position, WINDOW, 0);
        assert_eq!(ring.next_record().unwrap(), None);
        assert!(Ring::new(kernel.file.try_clone().unwrap().into(), 100).is_err());
    }
}
