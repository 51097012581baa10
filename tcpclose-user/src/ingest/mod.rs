//! From the ring buffer to the correlator: bytes are read, decoded, and, with `--record`, kept.

pub mod capture;
pub mod decode;
pub mod reader;
