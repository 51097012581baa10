//! The subcommands of tcpclose, a file or directory for each, and modules that only `trace` uses.

pub mod child;
pub mod debug;
pub mod diagnose;
pub mod doctor;
pub mod explain;
pub mod list;
pub mod man;
pub mod output_pipe;
pub mod ready;
pub mod replay;
pub mod trace;
