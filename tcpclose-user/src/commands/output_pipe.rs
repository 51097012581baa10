//! Detects that the other end of a pipe on the standard output was closed, even while nothing is written.

use std::{
    future, io,
    os::fd::{AsFd as _, OwnedFd},
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::ingest::reader::poll;

/// The standard output; `None` if it is not a pipe, which cannot lose its reader.
pub struct OutputPipe(Option<AsyncFd<OwnedFd>>);

impl OutputPipe {
    /// Begins to watch. It must be called in a tokio runtime.
    pub fn watch() -> Self {
        // A file cannot be polled, and need not be.
        let stdout = io::stdout().as_fd().try_clone_to_owned();
        Self(stdout.and_then(|stdout| poll(stdout, Interest::ERROR)).ok())
    }

    /// Waits until the other end is closed. Safe to cancel.
    pub async fn closed(&self) {
        match &self.0 {
            Some(stdout) if stdout.ready(Interest::ERROR).await.is_ok() => {}
            _ => future::pending().await,
        }
    }
}
