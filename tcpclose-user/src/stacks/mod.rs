//! From a stack as the kernel half takes it to frames with names.

pub mod store;
pub mod symbolize;
pub mod unwind;
