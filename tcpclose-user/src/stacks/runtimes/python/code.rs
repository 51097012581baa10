//! Code objects → names, files and lines.

use std::collections::HashMap;

use tcpclose_common::interpreter::{IDENTITY_WORDS, SEED, mix};

use super::{
    layout::{FrameStorage, PythonLayout, Words},
    lines,
};
use crate::stacks::memory::ProcessMemory;

/// How many code objects are cached. When there are more, all are dropped and read again.
const MAX_CODE: usize = 4_096;

/// Bytes of a table of lines.
const MAX_TABLE: u64 = 64 << 10;

/// Characters of a name.
const MAX_NAME: u64 = 1_024;

/// A code object as it was at the event: its address, and a hash of the words that distinguish it from others
/// at the same address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct CodeKey {
    pub(super) address: u64,
    pub(super) identity: u64,
}

/// The cached facts of one code object.
struct Code {
    name: Option<String>,
    file: Option<String>,
    first_line: i32,
    table: Vec<u8>,
    /// Address of the first instruction; 0 if instructions are identified by their index.
    start: u64,
    /// Bytes of instructions.
    size: u64,
}

/// A function, and the place of a frame in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FunctionLocation {
    pub(super) symbol: String,
    pub(super) file: Option<String>,
    pub(super) line: Option<u32>,
}

/// The code objects of a process.
#[derive(Default)]
pub(super) struct Codes(HashMap<CodeKey, Option<Code>>);

impl Codes {
    /// Names the function of a frame. `None` if there is another code object by now, or if it cannot be read.
    pub(super) fn place(
        &mut self,
        (memory, layout, code_type): (&ProcessMemory, &PythonLayout, u64),
        key: CodeKey,
        instruction: u64,
    ) -> Option<FunctionLocation> {
        if self.0.len() >= MAX_CODE && !self.0.contains_key(&key) {
            self.0.clear();
        }
        let code = self.0.entry(key).or_insert_with(|| Code::read(memory, layout, code_type, key));
        let code = code.as_ref()?;
        let offset = code.offset(layout, instruction)?;
        let line = lines::line(layout.lines, &code.table, code.first_line, offset);
        Some(FunctionLocation { symbol: code.name.clone()?, file: code.file.clone(), line })
    }

    /// Drops entries of code objects that could not be read, so that they are read again.
    pub(super) fn forget_missing(&mut self) {
        self.0.retain(|_, code| code.is_some());
    }
}

impl Code {
    fn read(memory: &ProcessMemory, layout: &PythonLayout, code_type: u64, key: CodeKey) -> Option<Self> {
        let is_it = || {
            let the_type = memory.u64(key.address.checked_add(OBJECT_TYPE)?)?;
            let is_live = is_live(memory.u64(key.address)?);
            let is_same = the_type == code_type && identity(memory, layout, key.address)? == key.identity;
            (is_live && is_same).then_some(())
        };
        is_it()?;
        let word = |offset: u64| memory.u64(key.address.checked_add(offset)?);
        let (start, size) = match layout.frames {
            FrameStorage::Single(_) => {
                (0, memory.u64(word(layout.code.instructions)?.checked_add(OBJECT_SIZE)?)?)
            }
            FrameStorage::Marked | FrameStorage::Entered => {
                (key.address.checked_add(layout.code.instructions)?, word(OBJECT_SIZE)?.checked_mul(2)?)
            }
        };
        let code = Self {
            name: string(memory, layout, word(layout.code.name)?),
            file: string(memory, layout, word(layout.code.file)?),
            first_line: memory.u32(key.address.checked_add(layout.code.first_line)?)?.cast_signed(),
            table: bytes(memory, word(layout.code.line_table)?).unwrap_or_default(),
            start,
            size,
        };
        // It may have been replaced while it was read.
        memory.forget();
        is_it()?;
        // Programs make and drop code objects of such files one after the other, at the same addresses. If
        // only the content of the file's name distinguishes them, that may have changed.
        let is_made = code.file.as_deref().is_some_and(|file| file.starts_with('<') && !is_constant(file));
        (layout.code.is_unique || !is_made).then_some(code)
    }

    /// Bytes of instructions before the one that a frame is at; `None` if the code object has no such
    /// instruction.
    fn offset(&self, layout: &PythonLayout, instruction: u64) -> Option<u64> {
        let offset = match layout.frames {
            // The other half of the word belongs to another member.
            FrameStorage::Single(unit) => (instruction & 0xffff_ffff).checked_mul(unit)?,
            FrameStorage::Marked | FrameStorage::Entered => instruction.checked_sub(self.start)?,
        };
        (offset < self.size && offset.is_multiple_of(2)).then_some(offset)
    }
}

/// Whether a name in angle brackets belongs to a single source.
fn is_constant(file: &str) -> bool {
    ["<string>", "<stdin>"].contains(&file) || file.starts_with("<frozen ")
}

/// The hash of the words that distinguish a code object from others, computed as in the kernel half.
fn identity(memory: &ProcessMemory, layout: &PythonLayout, address: u64) -> Option<u64> {
    let Words { start, end } = layout.code.identity;
    let mut bytes = [0; 8 * IDENTITY_WORDS];
    let counting = bytes.get_mut(..usize::try_from(end.checked_sub(start)?).ok()?)?;
    memory.read(address.checked_add(start)?, counting)?;
    Some(bytes.as_chunks().0.iter().copied().map(u64::from_ne_bytes).fold(SEED, mix))
}

/// Whether an object with this first word is still allocated. If it was freed, its strings may have been
/// replaced. The word is a number of references, of which 3.14 uses 32 bits and has flags in the upper 16. In
/// memory that is free it is the address of the next free memory, or 0.
fn is_live(references: u64) -> bool {
    let [count, between] = [references << 32, references << 16 >> 48];
    count != 0 && between == 0
}

/// Offset of the type in every object, and of the number of items in those that have some.
const OBJECT_TYPE: u64 = 8;
const OBJECT_SIZE: u64 = 16;

/// Offset of the length of a string, of its state, and of the data of a bytes object.
const STRING_LENGTH: u64 = 16;
const STRING_STATE: u64 = 32;
const BYTES_DATA: u64 = 32;

/// The text of a string object; `None` if it is not one of the common, compact kind.
fn string(memory: &ProcessMemory, layout: &PythonLayout, address: u64) -> Option<String> {
    let length = memory.u64(address.checked_add(STRING_LENGTH)?)?;
    let length = usize::try_from(length.min(MAX_NAME)).ok()?;
    let state = memory.u32(address.checked_add(STRING_STATE)?)? >> layout.kind_shift;
    let (width, is_compact, is_ascii) = (state & 7, state >> 3 & 1 == 1, state >> 4 & 1 == 1);
    if !is_compact || is_ascii && width != 1 {
        return None;
    }
    let data = address.checked_add(if is_ascii { layout.ascii } else { layout.compact })?;
    let mut text = vec![0; length.checked_mul(usize::try_from(width).ok()?)?];
    memory.read(data, &mut text)?;
    let character = |code: u32| char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER);
    Some(match width {
        1 => text.iter().map(|byte| char::from(*byte)).collect(),
        2 => text.as_chunks().0.iter().map(|unit| character(u16::from_ne_bytes(*unit).into())).collect(),
        4 => text.as_chunks().0.iter().map(|unit| character(u32::from_ne_bytes(*unit))).collect(),
        _ => return None,
    })
}

/// The content of a bytes object.
fn bytes(memory: &ProcessMemory, address: u64) -> Option<Vec<u8>> {
    let size = memory.u64(address.checked_add(OBJECT_SIZE)?)?;
    if size > MAX_TABLE {
        return None;
    }
    let mut content = vec![0; usize::try_from(size).ok()?];
    memory.read(address.checked_add(BYTES_DATA)?, &mut content)?;
    Some(content)
}
