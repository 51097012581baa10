//! What the kernel half counts, one set a CPU; the user half adds them up. Nothing is lost without being counted here.

macro_rules! counters {
    ($($(#[$doc:meta])* $field:ident),* $(,)?) => {
        /// Counters of one CPU.
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters { $($(#[$doc])* pub $field: u64),* }

        impl Counters {
            /// The sum of two sets, counter by counter.
            #[must_use]
            pub fn plus(&self, other: &Self) -> Self {
                Self { $($field: self.$field.wrapping_add(other.$field)),* }
            }
        }
    };
}

counters! {
    /// Records that found the ring buffer full.
    records_lost,
    /// Records written.
    records_written,
    /// Notices of a process not seen before that found their ring buffer full.
    processes_lost,
    /// Sockets that got an entry in `CONNECTIONS`.
    connections_added,
    /// Entries of `CONNECTIONS` deleted because their socket was destroyed. What was added, not removed and is no
    /// longer there was evicted.
    connections_removed,
    /// Sockets for which no entry could be made.
    connections_failed,
    /// Ends that no program was run for, found out later.
    ends_missed,
    /// Sockets in a state of the teardown that found no room in `TEARDOWNS`.
    teardowns_failed,
    /// Stacks that could not be kept.
    stacks_failed,
    /// Ends that the filters kept from being written.
    filtered,
}

// SAFETY: `repr(C)`, 64-bit integers only: no padding, and any bytes are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Counters {}
