//! Frames between unwinding and symbolizing.

use std::sync::Arc;

use crate::event::Frame;

/// A frame of a stack that was unwound here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum UnwoundFrame {
    /// Still to be symbolized. The innermost frame has the address of an instruction, all others a return address.
    Address(u64),
    /// Named by the program's language runtime.
    Named(Arc<Frame>),
}
