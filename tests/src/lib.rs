//! What the black-box tests are made of. A test lays a [`bed::Bed`]: network namespaces of its own with a
//! real process ([`peer`]) at each end. It starts the real tool ([`tool`]) on it, has the processes act, and
//! compares the lines with what they did ([`expect`]), with the kernel's counters ([`snmp`]) and with the
//! contract ([`contract`]).
//!
//! `cargo xtask test` runs them: they need root, and the tool's binary in `TCPCLOSE_BIN`.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

pub mod bed;
pub mod blind_spot;
pub mod contract;
pub mod crowd;
pub mod decoy;
pub mod descriptors;
pub mod expect;
pub mod features;
pub mod groups;
pub mod netns;
pub mod packet;
pub mod peer;
pub mod program;
pub mod rerun;
pub mod scenario;
pub mod scratch;
pub mod snmp;
pub mod sockets;
pub mod tool;
pub mod window;

/// How long anything may take before a test gives up on it. Nothing is expected to take this long and nothing
/// is measured against it: it only keeps a broken test from hanging. An emulated processor is twenty times slower.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// By what to divide a number of connections: an emulated processor takes minutes for as many as a real one does in a
/// second. `TCPCLOSE_TESTS_FEWER` says it; 1 otherwise.
pub fn fewer() -> u16 {
    let said = std::env::var("TCPCLOSE_TESTS_FEWER").ok().and_then(|text| text.parse().ok());
    said.filter(|divisor| *divisor > 0).unwrap_or(1)
}

/// Returns what `attempt` returns once that is something, or fails with `what` when [`PATIENCE`] has run out.
pub fn until<T>(what: &str, mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = attempt()? {
            return Ok(found);
        }
        ensure!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain until {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A name that no other test has, in this process or in another.
pub(crate) fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("tcpclose-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
