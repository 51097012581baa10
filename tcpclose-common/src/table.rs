//! The table of sockets, as both halves see it.

/// The number of sockets in one bucket.
pub const WAYS: u32 = 7;

/// A bucket of `BUCKETS`: the addresses of the sockets whose entries are in `ENTRIES` at
/// `index * WAYS + way`.
///
/// The addresses of a bucket lie in one cache line. The user half maps the buckets into its memory and looks
/// there for sockets that stay in a teardown state. Recording such a state therefore costs a store, and
/// reading it no system call.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// The number of programs that want to add a socket. The program that finds 1 may add its own.
    pub claims: u64,
    /// Addresses of sockets; 0 where there is none.
    pub addresses: [u64; WAYS as usize],
    /// When each entered its first teardown state, nanoseconds of `CLOCK_BOOTTIME`; 0 if it is in none,
    /// [`BEFORE_TRACE`] if it was in one before the trace.
    pub since: [u64; WAYS as usize],
    /// Always 0.
    pub reserved: u64,
}

/// The time of a teardown state that a socket was in before the trace.
pub const BEFORE_TRACE: u64 = 1;

const _: () = assert!(size_of::<Bucket>() == 128);

/// The number of buckets for `sockets` sockets.
#[must_use]
pub const fn buckets(sockets: u32) -> u32 {
    sockets.div_ceil(WAYS)
}

/// The number of entries of `OVERFLOW`, beside a table for `sockets` sockets. With one socket for each entry
/// of the table, one in seven finds its bucket full.
#[must_use]
pub const fn overflow(sockets: u32) -> u32 {
    let quarter = sockets / 4;
    if quarter < MIN_OVERFLOW { MIN_OVERFLOW } else { quarter }
}

/// An LRU map with fewer entries evicts some although it has room.
const MIN_OVERFLOW: u32 = 128;
