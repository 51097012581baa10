//! The user half of tcpclose: turns the records of the kernel half into lines that report who ended a TCP
//! connection, how, why, and from which line of code.
//!
//! # The path of an event
//!
//! An event passes the modules in this order. [`pipeline`] passes the result of each to the next. [`live`]
//! feeds it from the kernel half while a trace runs; [`commands::replay`] feeds it from a recording.
//!
//! 1. [`kernel`] loads the programs of the kernel half, tells them where the running kernel keeps what they
//!    read, and owns them and their maps.
//! 2. [`ingest`] reads the ring buffer and decodes its bytes into the domain model, [`ingest::life`].
//! 3. [`correlate`] joins an end with the RSTs that belong to it and waits for facts that arrive late.
//! 4. [`attribute`] decides which process owns the socket.
//! 5. [`stacks`] reads or unwinds call stacks, and names their frames.
//! 6. [`judge`] concludes who ended the connection, how, and why.
//! 7. [`compose`] turns all of this into an [`event`], the model of the output.
//! 8. [`report`] lets through what the user asked for ([`filter`]; the kernel half has filtered before), and
//!    passes it on to the output, the summary, the [`metrics`] and the findings ([`diagnose`]).
//! 9. [`sink`] writes lines as text or JSON, counts for the summary, and reports what was lost. With the
//!    feature `otlp`, `otlp` is another sink, which sends them to a collector.
//!
//! Sockets that stay in a teardown state are found by [`stuck`] and join at step 4.
//!
//! Steps 4 and 5 look up on the [`host`] what a record does not contain: programs, holders of sockets, and
//! names of stack frames. [`processes`] is what is known about the processes of the host. A [`recording`]
//! keeps the records and the answers of the host.
//!
//! # Around it
//!
//! - [`cli`] is the command line, and [`commands`] has a module for each subcommand; [`commands::trace`] is
//!   the event loop of a trace.
//! - [`sockets`] asks the kernel for its TCP sockets without a program in the kernel, for `tcpclose list` and
//!   for sockets that are older than the trace.
//! - [`tcp`] has the terms of TCP that all modules share: states, endpoints, roles, directions.
//! - [`plain`] marks strings in which JSON has nothing to escape.
//! - [`sandbox`] is what a running trace forbids itself, and [`pace`] bounds its share of a CPU.
//! - [`failure`] is the form of an error that ends tcpclose: what failed, what was found, what was needed,
//!   what to try.
//!
//! No two modules use each other, directly or through others: `cargo xtask lint` checks it.
//!
//! `docs/architecture.md` follows one event from hook to line, and lists the decisions and the bounds.

#[cfg(test)]
mod allocations;
pub mod attribute;
pub mod cli;
pub mod commands;
pub mod compose;
pub mod correlate;
pub mod diagnose;
pub mod event;
pub mod failure;
pub mod filter;
pub mod host;
pub mod ingest;
pub mod judge;
pub mod kernel;
pub mod live;
pub mod metrics;
#[cfg(feature = "otlp")]
pub mod otlp;
pub mod pace;
pub mod pipeline;
mod plain;
pub mod processes;
pub mod recording;
pub mod report;
pub mod sandbox;
pub mod sink;
pub mod sockets;
pub mod stacks;
pub mod stuck;
pub mod tcp;
