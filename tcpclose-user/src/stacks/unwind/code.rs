//! The code of a process: from its memory while it runs, and after that from the files that it had mapped.

use std::os::unix::fs::FileExt as _;

use crate::{
    processes::{Image, mappings::Backing},
    stacks::memory::ProcessMemory,
};

/// Reads code of one process.
pub(super) struct ProcessCode {
    memory: Option<ProcessMemory>,
}

impl ProcessCode {
    /// The code of the process with this memory; `None` if it has exited.
    pub(super) fn of(memory: Option<ProcessMemory>) -> Self {
        Self { memory }
    }

    /// Fills the buffer with the code at an address; `None` if not all of it can be read.
    pub(super) fn read(&self, image: &Image, address: u64, buffer: &mut [u8]) -> Option<()> {
        let memory = self.memory.as_ref().and_then(|memory| memory.read(address, buffer));
        memory.or_else(|| from_file(image, address, buffer))
    }
}

/// The same from the file that is mapped there. Code is not relocated, so that it is as in memory.
fn from_file(image: &Image, address: u64, buffer: &mut [u8]) -> Option<()> {
    let mapping = image.mapping(address)?;
    let Backing::File { module: Some(module), .. } = &mapping.backing else { return None };
    let (offset, left) = (address - mapping.start, mapping.end - address);
    if left < buffer.len() as u64 {
        return None;
    }
    let file = module.open(image.pid, mapping.start, mapping.end)?;
    file.read_exact_at(buffer, mapping.offset.checked_add(offset)?).ok()
}
