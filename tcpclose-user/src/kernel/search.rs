//! A search of all descriptors of the host: a thread reads the file of a BPF iterator, whose program runs
//! once for each descriptor. With two million descriptors that takes seconds, during which the ring has to be
//! read.

use std::{
    fs::File,
    io::{self, ErrorKind, Read as _},
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use crate::pace;

/// A search that has started.
pub struct Search {
    result: Receiver<io::Result<Duration>>,
}

impl Search {
    /// Starts to read the file of an iterator, in a thread or, if none can be started, at once.
    pub(super) fn start(iterator: File) -> Self {
        let (done, result) = mpsc::channel();
        let search = Arc::new(move || {
            let before = pace::cpu_time();
            let result = run(&iterator).map(|()| pace::cpu_time().saturating_sub(before));
            // There is no receiver any more if the trace has ended.
            let _ = done.send(result);
        });
        let same = Arc::clone(&search);
        if thread::Builder::new().name("descriptors".to_owned()).spawn(move || same()).is_err() {
            search();
        }
        Self { result }
    }

    /// Waits until the search has ended, but no longer than `time`. Returns the CPU time that it has taken;
    /// `None` if it is still running.
    ///
    /// # Errors
    /// The kernel cannot continue it.
    pub fn wait(&self, time: Duration) -> Option<io::Result<Duration>> {
        match self.result.recv_timeout(time) {
            Ok(result) => Some(result),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(io::Error::other("its thread has panicked"))),
        }
    }
}

/// Runs an iterator, whose file has no content.
pub(super) fn run(mut iterator: &File) -> io::Result<()> {
    let mut nothing = [0; 64];
    loop {
        match iterator.read(&mut nothing) {
            Ok(0) => return Ok(()),
            // One call examines a million objects (`MAX_ITER_OBJECTS`, `kernel/bpf/bpf_iter.c`), and fails if
            // they yielded no content.
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::{fcntl::OFlag, unistd::pipe2};

    use super::*;

    /// Until its writer is closed, a pipe behaves like an iterator that has examined a million objects.
    #[test]
    fn a_read_without_content_is_not_the_end() {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
        let search = Search::start(File::from(reader));
        assert!(search.wait(Duration::from_millis(20)).is_none());
        drop(writer);
        let result = search.wait(Duration::from_mins(1)).expect("the writer is gone");
        assert!(result.is_ok(), "{result:?}");
    }

    #[test]
    fn a_failure_is_the_result() {
        let directory = File::open("/").unwrap();
        let result = Search::start(directory).wait(Duration::from_mins(1)).expect("it fails at once");
        assert_eq!(result.unwrap_err().kind(), ErrorKind::IsADirectory);
    }
}
