//! What the two halves of tcpclose share: the records in the ring buffers, the offsets and parameters that
//! are passed in the other direction, and constants of the kernel.
//!
//! Plain integers only, laid out without padding, so that the user half decodes without `unsafe`.
#![cfg_attr(not(feature = "user"), no_std)]

pub mod counters;
pub mod interpreter;
pub mod namespace;
pub mod offsets;
pub mod params;
pub mod recipe;
pub mod record;
pub mod stack;
pub mod table;
pub mod tcp;
