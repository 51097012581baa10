//! From the ring buffer to the correlator: records are read, decoded into the domain model, and, with
//! `--record`, kept.

mod abi;
pub mod decode;
pub mod life;
pub mod reader;
pub mod ring;
