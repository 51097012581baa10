//! `--debug`: writes the messages of the user half, of aya, and of the kernel half to the standard error.

use std::future;

use anyhow::Result;
use aya_log::EbpfLogger;
use log::{LevelFilter, Log, Metadata, Record};
use tokio::io::{Interest, unix::AsyncFd};

use crate::ingest::reader::poll;

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        eprintln!("tcpclose: {}: {}: {}", record.level(), record.target(), record.args());
    }

    fn flush(&self) {}
}

/// Shows messages from now on.
pub fn to_stderr() {
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(LevelFilter::Debug);
    }
}

/// The messages of the kernel half.
pub struct KernelLog(Option<AsyncFd<EbpfLogger<&'static dyn Log>>>);

impl KernelLog {
    /// The messages of this logger.
    ///
    /// # Errors
    /// The runtime cannot poll it.
    pub fn of(logger: EbpfLogger<&'static dyn Log>) -> Result<Self> {
        Ok(Self(Some(poll(logger, Interest::READABLE)?)))
    }

    /// No messages, without `--debug`.
    pub fn none() -> Self {
        Self(None)
    }

    /// Waits for messages and passes them on; without a logger it waits for ever. Safe to cancel.
    ///
    /// # Errors
    /// The logger cannot be polled any more.
    pub async fn print(&mut self) -> Result<()> {
        let Some(logger) = &mut self.0 else { return future::pending().await };
        let mut guard = logger.readable_mut().await?;
        guard.get_inner_mut().flush();
        guard.clear_ready();
        Ok(())
    }
}
