//! The user half of tcpclose.
//!
//! An event travels one way through these modules, and none reaches back:
//!
//! 1. the kernel half (`tcpclose-ebpf`) gathers facts at its hooks and writes records to a ring buffer;
//! 2. [`loader`] has put it there: [`kernel`] found out what this kernel is like, [`hook`] lists what to attach,
//!    [`privilege`] says what is allowed;
//! 3. [`reader`] takes bytes out of the ring, as seldom as it may;
//! 4. [`decode`] makes [`tcpclose_common::record`]s of them;
//! 5. [`correlate`] puts what belongs together into endings;
//! 6. [`attribute`] finds out whose socket it was;
//! 7. [`symbolize`] names the frames of [`stacks`], which the kernel followed, or [`unwind`] from a copy;
//! 8. [`compose`] writes an [`event`], whose judgement is [`verdict`]'s;
//! 9. [`filter`] keeps out what was not asked for;
//! 10. [`sink`] writes text or JSON.
//!
//! Beside it, [`linger`] finds the sockets that stay where they should not, and has them told by 8 to 10. [`list`] goes
//! another way and shorter: [`sockets`] asks the kernel what there is now, without a program in it.
//!
//! [`trace`] is the loop around it; [`losses`] counts what could not be said, [`summary`] what was,
//! and [`capture`] keeps raw records for tests. [`doctor`] says what this kernel and these privileges give,
//! from the tables [`hook`] and [`fact`].

pub mod attribute;
pub mod capture;
pub mod cli;
pub mod clock;
pub mod command;
pub mod compose;
pub mod correlate;
pub mod debug;
pub mod decode;
pub mod doctor;
pub mod event;
pub mod explain;
pub mod fact;
pub mod failure;
pub mod filter;
pub mod hook;
pub mod kernel;
pub mod linger;
pub mod list;
pub mod loader;
pub mod losses;
pub mod privilege;
pub mod reader;
pub mod schema;
pub mod sink;
pub mod sockets;
pub mod stacks;
pub mod summary;
pub mod symbolize;
pub mod trace;
pub mod unwind;
pub mod verdict;
