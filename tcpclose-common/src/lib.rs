//! What the two halves of tcpclose agree on: the records that travel through the ring buffer, the offsets and
//! parameters that travel the other way, and the kernel's own numbers that both sides name.
//!
//! Plain integers only, laid out without padding, so that the user half decodes without `unsafe`.
#![cfg_attr(not(feature = "user"), no_std)]

pub mod counters;
pub mod offsets;
pub mod params;
pub mod record;
pub mod stack;
pub mod tcp;
