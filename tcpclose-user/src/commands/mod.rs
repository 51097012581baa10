//! What `tcpclose` can be asked to do, a file or directory for each subcommand.

pub mod child;
pub mod debug;
pub mod doctor;
pub mod explain;
pub mod list;
pub mod replay;
pub mod trace;
