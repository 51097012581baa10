//! Language runtimes, for code without unwind tables and symbols in a file, because it was compiled or
//! interpreted at run time.
//!
//! To support another runtime, add a directory that implements [`RuntimeBinary`] and [`Runtime`], and a line
//! to [`RUNTIMES`]. The unwinder asks each runtime of a process about each frame:
//!
//! - A runtime whose code has no unwind tables, such as HotSpot or V8, owns the frames in its code, names
//!   them and, unless the code keeps frame pointers, as V8's does, finds their callers.
//! - An interpreter in C, such as CPython, owns no frames: its loop has unwind tables. The kernel half lists
//!   the frames of the program that the loop runs, and the runtime decides which of the loop's frames they
//!   replace.

pub mod hotspot;
pub mod python;
pub mod v8;

use std::{ops::Range, sync::Arc, time::Duration};

use memchr::memmem;
use object::{Endianness, Object as _, ObjectSection as _, ReadRef, elf::Sym64, pod};
use tcpclose_common::{interpreter::Interpreter, record::Interpreted};

use super::memory::{ProcessMemory, StackMemory};
use crate::event::Frame;

/// All supported runtimes.
const RUNTIMES: &[Recognize] = &[hotspot::recognize, python::recognize, v8::recognize];

/// Recognizes a runtime by the symbols of an executable or library.
type Recognize = fn(&dyn BinarySymbols) -> Option<Box<dyn RuntimeBinary>>;

/// The symbols of an executable or library, with their addresses in the file. Each look-up goes through all of
/// them.
pub trait BinarySymbols {
    /// A dynamic symbol.
    fn dynamic(&self, name: &str) -> Option<Range<u64>>;

    /// The dynamic symbols whose names begin so.
    fn dynamic_with(&self, prefix: &str) -> Vec<(String, Range<u64>)>;

    /// A symbol of the table that stripped files lack.
    fn local(&self, name: &str) -> Option<Range<u64>>;
}

/// Code that a process has mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodeMapping {
    /// Its addresses.
    pub range: Range<u64>,
    /// What it belongs to.
    pub owner: CodeOwner,
}

/// What mapped code belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeOwner {
    /// The file in which the runtime was recognized, with this load bias.
    Own {
        /// The difference between an address in memory and the one in the file.
        bias: u64,
    },
    /// Another file.
    Other,
    /// No file: it was generated.
    Generated,
}

/// An executable or library that contains a runtime.
pub trait RuntimeBinary: Send {
    /// Attaches to the runtime in process `pid`, where the file is mapped with the load bias `bias`. `None`
    /// if it cannot be read, has not been initialized yet, or is a version that is not supported.
    fn attach(&self, pid: u32, memory: ProcessMemory, bias: u64) -> Option<Box<dyn Runtime>>;
}

/// A runtime in a process.
///
/// The process continues to run while it is read, and may be malicious. Return nothing rather than
/// inconsistent data, read a bounded amount, and never panic.
///
/// Frames must depend on nothing but the registers, the words read through `stack`, and memory of the process
/// that does not change while they are live, so that a stack that is found again need not be unwound again.
pub trait Runtime {
    /// Called at first, and whenever the process has mapped other code, with all of it in the order of
    /// addresses.
    fn mapped(&mut self, _code: &[CodeMapping]) {}

    /// Called before each stack.
    fn begin_stack(&mut self) {}

    /// Whether the frame at this address is the runtime's. It is called for every frame, so it must be cheap.
    fn owns(&self, address: u64) -> bool;

    /// Names a frame that the runtime owns: several frames, innermost first, where functions are inlined or
    /// where an interpreter runs several. If it returns none, the symbolizer names the frame.
    ///
    /// Words of the stack are to be read at addresses that follow from the frame pointer, or always at the
    /// same distance from the stack pointer. A word from which the name does not follow, because others
    /// identify the function and it only leads there, may be looked at with [`StackMemory::peek`], and so may any
    /// word of a stack that is to be unwound each time.
    fn name(&mut self, _frame: &Registers, _stack: &StackMemory<'_>) -> Arc<[Arc<Frame>]> {
        Arc::new([])
    }

    /// How long a stack with frames of this runtime is recognized by the words that were read of it, before
    /// it is unwound again: the memory of code or of a method that is no longer live may be reused. Zero if it
    /// is to be unwound each time.
    fn lifetime(&self) -> Duration {
        Duration::from_secs(1)
    }

    /// Finds the caller of a frame that the runtime owns.
    ///
    /// It is called a second time with another frame pointer, to see whether the result depends on it, so its
    /// only side effects may be on caches.
    fn caller(&mut self, _frame: &Registers, _stack: &StackMemory<'_>) -> Caller {
        Caller::ByTables
    }

    /// For an interpreter: what the kernel half needs to find its frames.
    fn interpreter(&self) -> Option<Interpreter> {
        None
    }

    /// Whether the address is in the interpreter's loop.
    fn is_loop(&self, _address: u64) -> bool {
        false
    }

    /// Names the frames that the kernel half has listed, in the order of the list.
    fn interpreted(&mut self, _list: &Interpreted, _stack: &StackMemory<'_>) -> Vec<Run> {
        Vec::new()
    }
}

/// Frames that one call of an interpreter's loop runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The place of that call.
    pub at: At,
    /// Innermost first.
    pub frames: Vec<Arc<Frame>>,
}

/// The place of a call of an interpreter's loop on the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// Its part of the stack has this address.
    Stack(u64),
    /// It is the next call, counted from the innermost frame. If there are several such runs, they belong to
    /// all calls of the loop.
    NextLoop,
}

/// The registers of a frame that unwinding needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// Instruction pointer of the innermost frame, return address in all others.
    pub pc: u64,
    /// An address inside the instruction that the frame is at: of a call, `pc` may be the first address of
    /// the next function.
    pub inside: u64,
    /// Stack pointer.
    pub sp: u64,
    /// Frame pointer.
    pub fp: u64,
}

/// The caller of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// It has these registers; `pc` is the return address.
    At {
        /// Return address.
        pc: u64,
        /// Stack pointer.
        sp: u64,
        /// Frame pointer.
        fp: u64,
    },
    /// The unwind tables of the file at the frame's address are to be used.
    ByTables,
    /// It is not known, and the stack ends here.
    Unknown,
}

/// The largest size of a table of symbols or of their names, bytes: those of a node with debug information have
/// 30 MB.
const MAX_TABLE: u64 = 64 << 20;

/// A table of symbols, and that of their names. Both are read whole: node has 300,000 symbols, and reading their
/// names one by one takes longer than a burst of connections.
struct SymbolTable<'data> {
    symbols: &'data [Sym64<Endianness>],
    names: &'data [u8],
    endian: Endianness,
}

impl<'data> SymbolTable<'data> {
    fn read(file: &object::File<'data, impl ReadRef<'data>>, symbols: &str, names: &str) -> Option<Self> {
        let table = |name| {
            let section = file.section_by_name(name).filter(|section| section.size() <= MAX_TABLE)?;
            section.data().ok()
        };
        let symbols = pod::slice_from_all_bytes(table(symbols)?).ok()?;
        Some(Self { symbols, names: table(names)?, endian: file.endianness() })
    }

    fn find(&self, name: &str) -> Option<Range<u64>> {
        // Names may be the ends of others.
        let ended = [name.as_bytes(), b"\0"].concat();
        let offsets: Vec<_> = memmem::find_iter(self.names, &ended).collect();
        let is_it = |symbol: &&Sym64<Endianness>| offsets.contains(&self.offset(symbol));
        range(self.symbols.iter().find(is_it)?, self.endian)
    }

    fn with(&self, prefix: &str) -> Vec<(String, Range<u64>)> {
        let named = self.symbols.iter().filter_map(|symbol| {
            let names = self.names.get(self.offset(symbol)..)?;
            if !names.starts_with(prefix.as_bytes()) {
                return None;
            }
            let name = names.split(|byte| *byte == 0).next()?;
            Some((String::from_utf8_lossy(name).into_owned(), range(symbol, self.endian)?))
        });
        named.collect()
    }

    fn offset(&self, symbol: &Sym64<Endianness>) -> usize {
        usize::try_from(symbol.st_name.get(self.endian)).unwrap_or(usize::MAX)
    }
}

fn range(symbol: &Sym64<Endianness>, endian: Endianness) -> Option<Range<u64>> {
    let address = symbol.st_value.get(endian);
    Some(address..address.checked_add(symbol.st_size.get(endian))?)
}

impl<'data, R: ReadRef<'data>> BinarySymbols for object::File<'data, R> {
    fn dynamic(&self, name: &str) -> Option<Range<u64>> {
        SymbolTable::read(self, ".dynsym", ".dynstr")?.find(name)
    }

    fn dynamic_with(&self, prefix: &str) -> Vec<(String, Range<u64>)> {
        SymbolTable::read(self, ".dynsym", ".dynstr").map_or_else(Vec::new, |table| table.with(prefix))
    }

    fn local(&self, name: &str) -> Option<Range<u64>> {
        SymbolTable::read(self, ".symtab", ".strtab")?.find(name)
    }
}

/// The runtimes that a file contains.
pub fn of<'data>(file: &object::File<'data, impl ReadRef<'data>>) -> Vec<Box<dyn RuntimeBinary>> {
    RUNTIMES.iter().filter_map(|recognize| recognize(file)).collect()
}
