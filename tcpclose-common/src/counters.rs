//! The counters of the kernel half, one set for each CPU. The user half adds them up. Every loss is counted
//! here.

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
    /// Records lost because the ring buffer was full.
    records_lost,
    /// Records written.
    records_written,
    /// Notices of new processes lost because their ring buffer was full.
    processes_lost,
    /// Sockets that got an entry in `OVERFLOW`.
    overflow_added,
    /// Entries of `OVERFLOW` deleted because their socket was destroyed. An entry that was added, was not
    /// removed and is no longer there was evicted.
    overflow_removed,
    /// Sockets for which no entry could be made.
    connections_failed,
    /// Ends for which no program ran, detected later.
    ends_missed,
    /// Sockets of `OVERFLOW` in a teardown state that found no room in `TEARDOWNS`.
    teardowns_failed,
    /// Stacks that could not be stored.
    stacks_failed,
    /// Ends that the filters excluded.
    filtered,
    /// User stacks that a recipe matched.
    stacks_recognized,
    /// User stacks that were copied.
    stacks_copied,
}

// SAFETY: `repr(C)`, 64-bit integers only: no padding, and any bytes are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Counters {}
