//! Frames of interpreters. The functions of a Python program have no frames of their own on the stack: the
//! interpreter keeps them in the heap, where they change as soon as the program goes on. The kernel half
//! therefore lists them at the event. Where they are follows from a description of the interpreter, which the
//! user half gives for each process.

/// Frames that are listed of one stack, innermost first. The rest are left out.
pub const MAX_INTERPRETED: usize = 64;

/// Words that are read of a frame, from its start.
pub const FRAME_WORDS: usize = 15;

/// Words by which a code object is told from others at the same address.
pub const IDENTITY_WORDS: usize = 11;

/// Processes whose interpreter is described. The one that was longest without an event gives way.
pub const MAX_INTERPRETERS: u32 = 1_024;

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
    /// The word that tells the kind of the frame.
    pub kind: u32,
    /// Bytes from the start of a code object to the words by which it is told from others at the same
    /// address.
    pub identity: u32,
    /// How many these are, at most [`IDENTITY_WORDS`].
    pub identity_words: u32,
    /// Which bits tell the kind of the frame.
    pub kind_mask: u64,
}

/// [`Interpreter::call`] of an interpreter whose calls have no structures.
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

/// What a hash of frames begins with.
pub const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

// SAFETY: `repr(C)`, integers only, and every member is naturally aligned without padding.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Interpreter {}

const _: () = assert!(size_of::<Interpreter>() == 56);
