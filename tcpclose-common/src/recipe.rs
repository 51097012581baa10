//! Recipes, by which the kernel half recognizes stacks that the user half has unwound before.
//!
//! The frames of a stack follow from the registers and from the words that unwinding reads, and from nothing
//! else as long as the mappings stay the same. A recipe lists these words in the order in which they were
//! needed. If all of them agree, the stack is the same one.
//!
//! The recipes of one program image that start at the same instruction form a tree. As long as the words of
//! two stacks are equal, the stacks are unwound alike, so their recipes list the same places up to the first
//! word that differs. From that word, an edge leads from one recipe to the other. A stack is therefore
//! compared in one pass, however many recipes there are.

/// The number of words that a recipe can have. A stack that needs more is copied each time.
pub const MAX_WORDS: usize = 128;

/// The number of recipes that there can be. When all are in use, the user half drops those of the program
/// that has had no hit for longest.
pub const MAX_RECIPES: u32 = 4_096;

/// The number of bits in the index of a recipe.
pub const PLACE_BITS: u32 = MAX_RECIPES.ilog2();

/// A bit that is set in the key of every stack that a recipe leads to.
pub const KEY_BIT: u64 = 1 << 63;

/// The number of edges: one to each recipe, either from the recipe that it branches off from or from the root
/// of a tree.
pub const MAX_EDGES: u32 = MAX_RECIPES;

/// The place of a word, and how it is compared.
pub mod source {
    /// In memory, `offset` bytes from the stack pointer.
    pub const MEMORY: u32 = 0;
    /// In memory, and an address in the same stack, whose distance from the stack pointer is compared.
    pub const STACK_ADDRESS: u32 = 1;
    /// The frame pointer, as an address in the same stack.
    pub const FRAME_POINTER: u32 = 2;
    /// The frame pointer, compared as it is.
    pub const FRAME_POINTER_VALUE: u32 = 3;
    /// The link register.
    pub const LINK_REGISTER: u32 = 4;
    /// The hash of the interpreter's frames, always the last word
    /// ([`Interpreted::hash`](crate::record::Interpreted::hash)).
    pub const INTERPRETER: u32 = 5;
}

/// One word of a recipe.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Word {
    /// The word, or its distance from the stack pointer.
    pub expected: u64,
    /// Bytes from the stack pointer, if it is in memory.
    pub offset: i32,
    /// One of [`source`].
    pub source: u32,
}

/// A value of the map `RECIPES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// Unique to each recipe; 0 while the recipe is being replaced. A program reads it after the words, so
    /// that it notices if the words are those of two recipes.
    pub serial: u64,
    /// Key of the stack in the user half.
    pub stack: u64,
    /// `CLOCK_MONOTONIC` from which on the stack has to be unwound again; 0 for never.
    pub until: u64,
    /// The number of `words` in use.
    pub count: u64,
    /// In the order in which unwinding needs them.
    pub words: [Word; MAX_WORDS],
}

impl Recipe {
    /// None.
    pub const NONE: Self = Self {
        serial: 0,
        stack: 0,
        until: 0,
        count: 0,
        words: [Word { expected: 0, offset: 0, source: source::MEMORY }; MAX_WORDS],
    };
}

/// A key of the map `RECIPE_EDGES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Edge {
    /// Serial number of a recipe, or the address of an `mm_struct`, which is higher than any.
    pub from: u64,
    /// Index of the word that differs, or the instruction pointer.
    pub at: u64,
    /// The word as it is compared, or [`image`].
    pub word: u64,
}

/// Distinguishes program images that have the same `mm_struct`, by the process and by the number of pages of
/// code that it has mapped.
#[inline]
pub const fn image(pid: u32, code_pages: u64) -> u64 {
    (pid as u64) << 32 | code_pages & 0xffff_ffff
}

/// A value of the map `RECIPE_EDGES`: the recipe that the edge leads to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EdgeTarget {
    /// Its serial number.
    pub serial: u64,
    /// Its index in `RECIPES`.
    pub index: u64,
}

// SAFETY: `repr(C)`, integers only, and every member is naturally aligned without padding.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Word {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Recipe {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Edge {}
// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for EdgeTarget {}
