//! The names of tasks and programs (`task_struct.comm`).

use crate::{
    current,
    kernel::{Object, member},
    maps::global,
};

/// The current program's name, which is that of its main thread; all zero if it cannot be read.
#[inline(always)]
pub fn program() -> [u8; 16] {
    program_of(current::address())
}

/// The name of the program that the task at this address belongs to.
#[inline(always)]
pub fn program_of(task: u64) -> [u8; 16] {
    let leader: u64 = member(task, global!(STRUCTS.task_group_leader)).unwrap_or(0);
    of(leader).unwrap_or(NAMELESS)
}

/// A name that is not known.
const NAMELESS: [u8; 16] = [0; 16];

/// The name of a task, read as two words, because single bytes would take a load each.
#[inline(always)]
pub fn of(task: impl Object) -> Option<[u8; 16]> {
    let words: [u64; 2] = member(task, global!(STRUCTS.task_comm))?;
    let mut comm = NAMELESS;
    for (to, word) in comm.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    Some(comm)
}
