//! The user half of tcpclose.

pub mod attribute;
pub mod cli;
pub mod commands;
pub mod correlate;
pub mod event;
pub mod failure;
pub mod filter;
pub mod host;
pub mod ingest;
pub mod judge;
pub mod kernel;
pub mod live;
pub mod pipeline;
pub mod sink;
pub mod sockets;
pub mod stacks;
pub mod stuck;
pub mod tcp;
