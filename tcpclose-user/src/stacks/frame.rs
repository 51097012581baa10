//! Frames between unwinding and symbolizing.

use std::sync::Arc;

use crate::event::{Frame, Truncated};

/// A frame of a stack that was unwound here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum UnwoundFrame {
    /// Still to be symbolized: the address of the next instruction, in the innermost frame and in one that a
    /// signal interrupted.
    Instruction(u64),
    /// Still to be symbolized: the return address of a call.
    Return(u64),
    /// Named by the program's language runtime, or the frame of a signal handler.
    Named(Arc<Frame>),
}

/// A stack that was unwound here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UnwoundStack {
    /// Innermost first.
    pub frames: Arc<[UnwoundFrame]>,
    /// Why the last frame is not the outermost one; `None` if it is.
    pub truncated: Option<Truncated>,
}
