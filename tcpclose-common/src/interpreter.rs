//! Frames of interpreters. The functions of a Python program have no frames of their own on the stack: the
//! interpreter keeps them in the heap, where they change as soon as the program goes on. The kernel half
//! therefore lists them at the event. It finds them by a description of the interpreter, which the user half
//! provides for each process.

/// The number of frames of one stack that are listed, innermost first. The rest are left out.
pub const MAX_INTERPRETED: usize = 64;

/// The number of words that are read from the start of a frame.
pub const FRAME_WORDS: usize = 15;

/// The number of words that distinguish a code object from others at the same address.
pub const IDENTITY_WORDS: usize = 11;

/// The number of processes whose interpreter is described. When there are more, the one that has had no event
/// for longest is dropped.
pub const MAX_INTERPRETERS: u32 = 1_024;

/// The number of names of programs for which the interpreter is remembered. When there are more, the one that
/// has been absent for longest is dropped.
pub const MAX_PROGRAMS: u32 = 64;

/// A value of the map `INTERPRETERS`, whose key is the address of an `mm_struct`: where a thread finds its
/// frames.
///
/// A frame is a C structure, of which a few words count. Their places are indexes of words.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interpreter {
    /// Process id.
    pub pid: u32,
    /// Bytes from the thread pointer to the address of the thread's state.
    pub state: u32,
    /// Bytes from the start of that state to the address of a structure on the stack that belongs to the
    /// innermost call of the interpreter's loop; [`ABSENT`] if there is none.
    pub call: u32,
    /// Bytes to the address of the innermost frame: from the start of that structure or, if there is none or
    /// [`Self::is_in_state`], from the start of the state.
    pub frame: u32,
    /// Whether the state has the address of the innermost frame although there is such a structure (0 or 1).
    pub is_in_state: u32,
    /// How many bytes of a frame are read, at most `8 * FRAME_WORDS`.
    pub bytes: u32,
    /// The word with the address of the code.
    pub code: u32,
    /// The word with the address, or the index, of the instruction.
    pub instruction: u32,
    /// The word with the address of the caller's frame.
    pub previous: u32,
    /// The word with the kind of the frame.
    pub kind: u32,
    /// Bytes from the start of a code object to the words that distinguish it from others at the same
    /// address.
    pub identity: u32,
    /// The number of these words, at most [`IDENTITY_WORDS`].
    pub identity_words: u32,
    /// The bits of that word that hold the kind of the frame.
    pub kind_mask: u64,
}

/// The value of [`Interpreter::call`] for an interpreter whose calls have no structures.
pub const ABSENT: u32 = u32::MAX;

impl Interpreter {
    /// Which bits of [`Self::code`] belong to the address: Python tags some.
    pub const CODE_MASK: u64 = !7;
}

/// Mixes a word into a hash of frames.
#[inline]
pub const fn mix(hash: u64, word: u64) -> u64 {
    let hash = (hash ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ hash >> 32
}

/// The initial value of a hash of frames.
pub const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

// SAFETY: `repr(C)`, integers only, and every member is naturally aligned without padding.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Interpreter {}

const _: () = assert!(size_of::<Interpreter>() == 56);
