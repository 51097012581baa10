//! Frames between unwinding and symbolizing.

use std::sync::Arc;

use crate::event::{Frame, Truncated};

/// A frame of a stack that was unwound here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum UnwoundFrame {
    /// Still to be symbolized. The innermost frame has the address of an instruction, all others a return
    /// address.
    Address(u64),
    /// Named by the program's language runtime.
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
