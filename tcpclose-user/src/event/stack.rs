//! Stacks with named frames.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Shared;

/// Where something was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Stack {
    /// Innermost first; null if it was not taken, or if there was none.
    pub user: Option<Frames>,
    /// Innermost first; null if it was not taken, or if there was none.
    pub kernel: Option<Frames>,
}

/// The frames of a stack. Many events have the same ones.
pub type Frames = Shared<Vec<Frame>>;

/// One frame of a stack.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Frame {
    /// The address, as `0x…`.
    #[schemars(regex(pattern = "^0x[0-9a-f]+$"))]
    pub address: String,
    /// The function.
    pub symbol: Option<String>,
    /// The file it was loaded from.
    pub module: Option<String>,
    /// Offset from the start of the symbol or, without a symbol, of the module; null if there is neither.
    pub offset: Option<u64>,
    /// Source file.
    pub file: Option<String>,
    /// Line in it.
    pub line: Option<u32>,
    /// A function that the compiler merged into its caller, which is the next frame.
    pub inlined: bool,
    /// Why there are no further frames although this one has a caller; null in all other frames.
    #[serde(default)]
    pub truncated: Option<Truncated>,
}

impl Frame {
    /// A frame of which only the address is known.
    pub fn nameless(address: u64) -> Self {
        Self {
            address: format!("{address:#x}"),
            symbol: None,
            module: None,
            offset: None,
            file: None,
            line: None,
            inlined: false,
            truncated: None,
        }
    }
}

/// Why a stack ends before its outermost frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncated {
    /// The copy of the stack's memory ends here: see `--call-graph dwarf,SIZE`.
    CopyEnded,
    /// The caller cannot be found: the code has no unwind tables and keeps no frame pointer.
    NoUnwindInformation,
    /// The word at the place of the return address is not an address of code.
    NoCode,
    /// The language runtime that the code belongs to could not be read.
    RuntimeUnreadable,
    /// There are more frames than are reported.
    FrameLimit,
    /// There was no room in the ring buffer for a copy of the stack: too many unknown stacks arrived at once.
    NotCopied,
    /// The kernel followed frame pointers, and this program keeps none.
    NoFramePointer,
    /// The mappings of the process could not be read: it had ended, or this process may not.
    NoMappings,
}

impl fmt::Display for Truncated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CopyEnded => "the copy of the stack ends",
            Self::NoUnwindInformation => "no unwind information",
            Self::NoCode => "the return address is not in code",
            Self::RuntimeUnreadable => "the runtime cannot be read",
            Self::FrameLimit => "more frames than are reported",
            Self::NotCopied => "no room for a copy of the stack",
            Self::NoFramePointer => "no frame pointer",
            Self::NoMappings => "the mappings of the process are not known",
        })
    }
}
