//! Describes interpreters to the kernel half, which then lists their frames: see
//! [`tcpclose_common::interpreter`].
//!
//! A process is described as soon as it is noticed, if a file that it has mapped has the name of an
//! interpreter. Other processes, such as servers that embed an interpreter, are described when a stack shows
//! that they have one. Until then, the kernel half expects the interpreter of the last program of the same
//! name, so that even the first stack of a program that ends at once has its functions.

use std::{
    collections::HashMap,
    fs::File,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap as BpfHashMap, MapData};
use object::ReadCache;
use tcpclose_common::interpreter::Interpreter;

use super::{
    elf::Segments,
    memory::ProcessMemory,
    runtimes::{self, RuntimeBinary},
};
use crate::{
    kernel::handle::KernelHalf,
    processes::{
        Image,
        mappings::{Backing, FileIdentity, Mapping},
    },
};

/// The number of files that are cached. When there are more, all are dropped and read again.
const MAX_FILES: usize = 64;

/// The beginnings of the names of interpreters' files.
const NAMES: [&str; 2] = ["python", "libpython"];

/// The maps of the kernel half that describe interpreters, and the files that contain some.
pub struct Interpreters {
    /// By the address of their process's `mm_struct`.
    described: BpfHashMap<MapData, u64, Interpreter>,
    /// By the name of their program.
    programs: BpfHashMap<MapData, [u8; 16], Interpreter>,
    /// `None` for one that cannot be read.
    files: HashMap<FileIdentity, Option<Contents>>,
}

/// A file.
struct Contents {
    segments: Segments,
    runtimes: Vec<Box<dyn RuntimeBinary>>,
}

/// Interpreters that two threads describe.
pub type SharedInterpreters = Arc<Mutex<Interpreters>>;

/// Locks them, even if another thread has panicked while it held the lock: they are consistent between two
/// calls.
pub fn lock(interpreters: &Mutex<Interpreters>) -> MutexGuard<'_, Interpreters> {
    interpreters.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Interpreters {
    /// Takes the maps from the kernel half.
    ///
    /// # Errors
    /// The object lacks one.
    pub fn new(kernel: &mut KernelHalf) -> Result<Self> {
        Ok(Self {
            described: kernel.take_map("INTERPRETERS")?,
            programs: kernel.take_map("PROGRAMS")?,
            files: HashMap::new(),
        })
    }

    /// Makes the kernel half list the frames of the interpreter of process `pid`, with this `mm_struct`, and
    /// expect it of the next program of this name. The id is that in the initial pid namespace.
    ///
    /// # Errors
    /// The kernel refuses to change a map.
    pub fn describe(
        &mut self,
        (pid, mm): (u32, u64),
        program: Option<&str>,
        interpreter: Interpreter,
    ) -> Result<()> {
        // First, so that the next program's first stack has functions once a stack of this one has.
        if let Some(program) = program.and_then(comm) {
            self.programs
                .insert(program, interpreter, 0)
                .context("cannot describe the interpreter of a program to the kernel half")?;
        }
        self.described
            .insert(mm, Interpreter { pid, ..interpreter }, 0)
            .context("cannot describe an interpreter to the kernel half")
    }

    /// Describes the interpreter of a process, if the names of its files show that it has one.
    ///
    /// # Errors
    /// Those of [`Self::describe`].
    pub fn noticed(&mut self, process: (u32, u64), image: &Image) -> Result<()> {
        let found = image.mappings.iter().find_map(|mapping| self.interpreter(image, mapping));
        found.map_or(Ok(()), |interpreter| self.describe(process, image.comm.as_deref(), interpreter))
    }

    /// The interpreter in a mapped file.
    fn interpreter(&mut self, image: &Image, mapping: &Mapping) -> Option<Interpreter> {
        let Backing::File { path, module: Some(module), .. } = &mapping.backing else { return None };
        if !is_named_like_one(path) {
            return None;
        }
        let identity = module.identity();
        if self.files.len() >= MAX_FILES && !self.files.contains_key(&identity) {
            self.files.clear();
        }
        let read = || read(module.open(image.pid, mapping.start, mapping.end)?);
        let Contents { segments, runtimes } = self.files.entry(identity).or_insert_with(read).as_ref()?;
        let bias = segments.bias(mapping)?;
        runtimes.iter().find_map(|program| {
            program.attach(image.pid, ProcessMemory::open(image.pid)?, bias)?.interpreter()
        })
    }
}

/// A name as the kernel keeps it (`TASK_COMM_LEN`); `None` for one that has no room, because it is not the
/// kernel's own: bytes that are no UTF-8 have been replaced in it.
fn comm(name: &str) -> Option<[u8; 16]> {
    let mut comm = [0; 16];
    comm[..15].get_mut(..name.len())?.copy_from_slice(name.as_bytes());
    Some(comm)
}

fn is_named_like_one(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy());
    name.is_some_and(|name| NAMES.iter().any(|beginning| name.starts_with(beginning)))
}

fn read(file: File) -> Option<Contents> {
    let cache = ReadCache::new(file);
    let file = object::File::parse(&cache).ok().filter(object::Object::is_64)?;
    Some(Contents { segments: Segments::read(&file), runtimes: runtimes::of(&file) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_padded_as_the_kernel_pads_them() {
        assert_eq!(comm("python3"), Some(*b"python3\0\0\0\0\0\0\0\0\0"));
        assert_eq!(comm("a name of 15 ch"), Some(*b"a name of 15 ch\0"));
        assert_eq!(comm("a name of 16 cha"), None);
    }

    #[test]
    fn files_of_interpreters_are_known_by_name() {
        for path in ["/usr/bin/python3.11", "/opt/python", "/usr/lib/x86_64-linux-gnu/libpython3.13.so.1.0"] {
            assert!(is_named_like_one(Path::new(path)), "{path}");
        }
        for path in ["/usr/lib/python3/dist-packages/a.so", "/usr/bin/ipython", "/"] {
            assert!(!is_named_like_one(Path::new(path)), "{path}");
        }
    }
}
