//! Ring buffers → bytes. Wakes up as seldom as the contract allows.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::maps::{Array, MapData, RingBuf};
use bytes::{Bytes, BytesMut};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, sleep_until},
};

use crate::kernel::handle::KernelHalf;

/// How long records may gather before they are read. The contract promises them within a quarter of a second, and the
/// correlator may hold one back for a second read.
pub const GATHER: Duration = Duration::from_millis(100);

/// How many bytes one batch takes out of the ring at most: little enough to stay in a cache until it is decoded.
const MAX_BATCH: usize = 128 << 10;

/// Registers something that owns a descriptor with the runtime.
///
/// # Errors
/// It is of a kind that cannot be polled, such as a file.
pub fn poll<T: AsFd + AsRawFd>(owner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: what is registered here (rings, aya's logger, an `OwnedFd`) owns one descriptor, gives the same one each
    // time it is asked, and keeps it open until it is dropped, which takes it out of the runtime first.
    unsafe { AsyncFd::register_with_interest(owner, interest) }.map_err(|error| error.into_parts().1)
}

/// A ring buffer to wait for.
pub struct Ring(AsyncFd<RingBuf<MapData>>);

impl Ring {
    /// Takes the map `name` out of the kernel half. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// There is no such ring buffer, or it cannot be mapped.
    pub fn new(kernel: &mut KernelHalf, name: &str) -> Result<Self> {
        let ring = kernel.take_map(name)?;
        poll(ring, Interest::READABLE)
            .map(Self)
            .with_context(|| format!("cannot wait for the ring buffer {name}"))
    }

    /// Waits until the kernel says that there is something to read.
    ///
    /// # Errors
    /// The descriptor cannot be polled any more.
    pub async fn readable(&mut self) -> Result<()> {
        let mut guard = self.0.readable_mut().await?;
        guard.clear_ready();
        Ok(())
    }

    /// Takes the next records out, in order; none when the ring is empty. They share one buffer.
    pub fn batch(&mut self) -> Vec<Bytes> {
        let ring = self.0.get_mut();
        // The last record may reach over the end; it makes the buffer grow once.
        let mut buffer = BytesMut::with_capacity(MAX_BATCH);
        let mut ends = Vec::new();
        while buffer.len() < MAX_BATCH {
            let Some(item) = ring.next() else { break };
            buffer.extend_from_slice(&item);
            ends.push(buffer.len());
        }
        let all = buffer.freeze();
        let starts = std::iter::once(0).chain(ends.iter().copied());
        starts.zip(ends.iter().copied()).map(|(start, end)| all.slice(start..end)).collect()
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// The ring of records, read a batch at a time.
///
/// The reader tells the kernel half that it is about to sleep, and the next record wakes it. It then pauses while records
/// gather without waking it; a second wake-up within the pause means that the ring is filling up. It sleeps once a read
/// has found nothing.
pub struct Records {
    ring: Ring,
    /// Set by the reader when it is about to sleep, cleared by the kernel half when it wakes it.
    wakeup_requested: Array<MapData, u32>,
    /// When to read, once the ring is known to hold something.
    due: Option<Instant>,
    /// Whether the first wake-up of this pause has come.
    woken: bool,
}

impl Records {
    /// Takes the maps that it needs out of the kernel half. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// Those of [`Ring::new`].
    pub fn new(kernel: &mut KernelHalf) -> Result<Self> {
        let wakeup_requested = kernel.take_map("READER")?;
        let ring = Ring::new(kernel, "RECORDS")?;
        let mut records = Self { ring, wakeup_requested, due: None, woken: false };
        records.request_wakeup()?;
        Ok(records)
    }

    /// Requests a wake-up at the next record. Call it before the ring is read, not after: a record that arrives between
    /// the last read and this call would wake nobody.
    ///
    /// # Errors
    /// The kernel refuses to change the map.
    pub fn request_wakeup(&mut self) -> Result<()> {
        self.wakeup_requested.set(0, 1, 0).context("cannot request a wake-up from the kernel half")
    }

    /// Waits until there is a batch worth reading. Safe to cancel: a pause that has begun continues with the next call.
    ///
    /// # Errors
    /// Those of [`Ring::readable`].
    pub async fn ready(&mut self) -> Result<()> {
        loop {
            let Some(due) = self.due else {
                self.ring.readable().await?;
                self.due = Some(Instant::now() + GATHER);
                self.woken = true;
                continue;
            };
            tokio::select! {
                () = sleep_until(due) => break,
                result = self.ring.readable() => result?,
            }
            if self.woken {
                break;
            }
            self.woken = true;
        }
        self.due = None;
        self.woken = false;
        Ok(())
    }

    /// Reads again after a pause even if the kernel stays silent, because something is held back.
    pub fn read_again_soon(&mut self) {
        self.due.get_or_insert_with(|| Instant::now() + GATHER);
    }

    /// The next records, as [`Ring::batch`] returns them. A batch that is not empty is followed by one more read.
    ///
    /// Its records may have arrived after the wake-up was requested. Their wake-up is then spent without effect: when the
    /// ring is polled, it says that there is nothing to read (`ringbuf_map_poll_kern()` in `kernel/bpf/ringbuf.c`), and
    /// nothing else would wake the reader.
    pub fn batch(&mut self) -> Vec<Bytes> {
        let batch = self.ring.batch();
        if !batch.is_empty() {
            self.read_again_soon();
        }
        batch
    }
}
