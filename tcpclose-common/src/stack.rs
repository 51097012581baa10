//! Stacks. Each is stored once in the `STACKS` map; records refer to it by the hash of its frames.

/// The number of frames that a stack can have: the kernel's own default limit
/// (`kernel.perf_event_max_stack`). Deeper stacks keep their innermost 127 frames.
pub const MAX_FRAMES: usize = 127;

/// A value of the `STACKS` map.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct StackTrace {
    /// The number of `frames` in use.
    pub count: u64,
    /// Return addresses, innermost first.
    pub frames: [u64; MAX_FRAMES],
}

// SAFETY: `repr(C)`, 64-bit integers only: no padding, and any bytes are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for StackTrace {}
