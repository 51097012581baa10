//! From the ring buffer to the correlator: records are read, and decoded into the domain model.

mod abi;
pub mod decode;
pub mod life;
pub mod reader;
pub mod ring;
