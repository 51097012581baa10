//! Decides when the ring of records is read. The reader wakes up as seldom as the contract allows.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::maps::{Array, MapData};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, sleep_until},
};

use super::ring::Ring;
use crate::kernel::handle::KernelHalf;

/// How long records may gather before they are read. The contract promises them within a quarter of a second,
/// and the correlator may hold one back for a second read.
pub const GATHER: Duration = Duration::from_millis(100);

/// Registers something that owns a descriptor with the runtime.
///
/// # Errors
/// It is of a kind that cannot be polled, such as a file.
pub fn poll<T: AsFd + AsRawFd>(owner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: what is registered here (rings, aya's logger, an `OwnedFd`) owns one descriptor, returns the
    // same one each time, and keeps it open until it is dropped, which first removes it from the runtime.
    unsafe { AsyncFd::register_with_interest(owner, interest) }.map_err(|error| error.into_parts().1)
}

/// The ring of records.
///
/// Before it sleeps, the reader sets a flag for the kernel half, and the next record wakes it. It then pauses
/// while records gather without waking it; a second wake-up within the pause means that the ring is filling
/// up. It sleeps once a read has found nothing.
pub struct Records {
    ring: AsyncFd<Ring>,
    /// Set by the reader when it is about to sleep, cleared by the kernel half when it wakes it.
    wakeup_requested: Array<MapData, u32>,
    /// When to read, once the ring is known to hold something.
    due: Option<Instant>,
    /// Whether the first wake-up of this pause has come.
    woken: bool,
}

impl Records {
    /// Takes the maps that it needs from the kernel half. It must be called in a tokio runtime.
    ///
    /// # Errors
    /// There are no such maps, the ring cannot be mapped, or it cannot be waited for.
    pub fn new(kernel: &mut KernelHalf) -> Result<Self> {
        let wakeup_requested = kernel.take_map("READER")?;
        let ring = poll(kernel.take_map("RECORDS")?, Interest::READABLE)
            .context("cannot wait for the ring buffer of records")?;
        let mut records = Self { ring, wakeup_requested, due: None, woken: false };
        records.request_wakeup()?;
        Ok(records)
    }

    /// Requests a wake-up at the next record. Call it before the ring is read, not after: a record that
    /// arrives between the last read and this call would wake nobody.
    ///
    /// # Errors
    /// The kernel refuses to change the map.
    pub fn request_wakeup(&mut self) -> Result<()> {
        self.wakeup_requested.set(0, 1, 0).context("cannot request a wake-up from the kernel half")
    }

    /// Waits until there is a batch worth reading. Safe to cancel: a pause that has begun continues with the
    /// next call.
    ///
    /// # Errors
    /// The ring cannot be polled any more.
    pub async fn ready(&mut self) -> Result<()> {
        loop {
            let Some(due) = self.due else {
                readable(&mut self.ring).await?;
                self.due = Some(Instant::now() + GATHER);
                self.woken = true;
                continue;
            };
            tokio::select! {
                () = sleep_until(due) => break,
                result = readable(&mut self.ring) => result?,
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

    /// Causes another read after a pause, even without a wake-up, because something is held back.
    pub fn read_again_soon(&mut self) {
        self.due.get_or_insert_with(|| Instant::now() + GATHER);
    }

    /// The next record, in place. A read that found a record is followed by another read after a pause.
    ///
    /// The record may have arrived after the wake-up was requested. Its wake-up then has no effect: when the
    /// ring is polled, there is nothing left to read (`ringbuf_map_poll_kern()` in `kernel/bpf/ringbuf.c`),
    /// and no other record would wake the reader.
    ///
    /// # Errors
    /// A part of the ring cannot be mapped.
    pub fn next_record(&mut self) -> Result<Option<&[u8]>> {
        let record = self.ring.get_mut().next_record().context("cannot map the ring buffer of records")?;
        if record.is_some() {
            self.due.get_or_insert_with(|| Instant::now() + GATHER);
        }
        Ok(record)
    }
}

/// Waits until the kernel reports that there is something to read.
async fn readable(ring: &mut AsyncFd<Ring>) -> Result<()> {
    let mut guard = ring.readable_mut().await?;
    guard.clear_ready();
    Ok(())
}
