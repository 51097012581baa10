//! The library of the black-box tests. A test creates a [`bed::Bed`]: network namespaces of its own with a
//! real process ([`peer`]) at each end. It starts the real tool ([`tool`]) on it, makes the processes act,
//! and compares the lines with what they did ([`expect`]), with the kernel's counters ([`snmp`]) and with the
//! contract ([`contract`]).
//!
//! `cargo xtask test` runs the tests: they need root, and the path of the tool's binary in `TCPCLOSE_BIN`.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

pub mod bed;
pub mod blind_spot;
pub mod chromium;
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
pub mod servers;
pub mod snmp;
pub mod sockets;
pub mod tool;
pub mod window;

/// The timeout of every wait. Nothing is expected to take this long, and no result depends on it: it only
/// keeps a broken test from hanging. An emulated processor is twenty times slower than a real one.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// The divisor for numbers of connections, from `TCPCLOSE_TESTS_FEWER`; 1 by default. An emulated processor
/// takes minutes for as many as a real one handles in a second.
pub fn fewer() -> u16 {
    let divisor = std::env::var("TCPCLOSE_TESTS_FEWER").ok().and_then(|text| text.parse().ok());
    divisor.filter(|number| *number > 0).unwrap_or(1)
}

/// Repeats `attempt` until it returns a value, or fails with `what` after [`PATIENCE`].
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

/// A name that is unique among all tests, in this process and in others.
pub(crate) fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("tcpclose-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
