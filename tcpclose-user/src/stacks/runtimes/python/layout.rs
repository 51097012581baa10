//! The layout of CPython's threads, frames and code objects. From 3.13 on, the interpreter contains a table
//! with it. The structures of earlier versions do not change after their first release.

use std::ops::Range;

use tcpclose_common::interpreter::{ABSENT, IDENTITY_WORDS, Interpreter};

use crate::stacks::memory::ProcessMemory;

/// The number of interpreters, and of states of their threads, that are read to find out where threads keep
/// the address of their state.
const MAX_STATES: usize = 64;

/// Bytes of a thread's control block that are searched for the address of its state: glibc keeps the first 32
/// values of `pthread_setspecific()` there.
///
/// <https://sourceware.org/git/?p=glibc.git;a=blob;f=nptl/descr.h;hb=glibc-2.36> (`specific_1stblock`)
const CONTROL_BLOCK: Range<usize> = 0x100..0x900;

/// Kinds of frames from 3.12 on: those from this one on are not functions; they mark the place where a loop
/// of the interpreter began.
///
/// <https://github.com/python/cpython/blob/v3.12.0/Include/internal/pycore_frame.h> (`enum _frameowner`)
pub(super) const OWNED_BY_C_STACK: u64 = 3;

/// The symbols at which reading begins.
pub(super) struct PythonSymbols {
    pub(super) runtime: u64,
    pub(super) code_type: u64,
    pub(super) evaluate: Range<u64>,
    version: Version,
}

/// The source of the version.
enum Version {
    V3_9,
    V3_10,
    /// From 3.11 on it is in memory, at this address.
    At(u64),
}

impl PythonSymbols {
    /// Looks them up; `None` for any file but one that contains CPython 3.9 or later.
    pub(super) fn find(symbol: &dyn Fn(&str) -> Option<Range<u64>>) -> Option<Self> {
        let address = |name| symbol(name).map(|range| range.start);
        let runtime = address("_PyRuntime")?;
        let version = if let Some(version) = address("Py_Version") {
            Version::At(version)
        } else if symbol("PyModule_AddObjectRef").is_some() {
            Version::V3_10
        } else {
            // 3.8 has neither of the two functions.
            symbol("PyFrame_GetCode").map(|_| Version::V3_9)?
        };
        let evaluate = symbol("_PyEval_EvalFrameDefault")?;
        Some(Self { runtime, code_type: address("PyCode_Type")?, evaluate, version })
    }
}

/// The way in which frames are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FrameStorage {
    /// One for each call of `_PyEval_EvalFrameDefault()`, with the index of the instruction in units of so
    /// many bytes.
    Single(u64),
    /// Several for each; a mark shows the last one.
    Marked,
    /// Several for each, and another one on the stack.
    Entered,
}

/// The structure on the stack that belongs to a call of `_PyEval_EvalFrameDefault()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    /// The place, in the state of a thread, of the address of the innermost one.
    innermost: u64,
    /// The place, in each, of the address of the one of the call before it.
    pub(super) previous: u64,
    /// The place in it of the address of the innermost frame; `None` if that is in the state of the thread.
    frame: Option<u64>,
}

/// The way in which line numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LineTable {
    /// `co_lnotab`, up to 3.9.
    Increments,
    /// `co_linetable` of 3.10.
    Ranges,
    /// `co_linetable` from 3.11 on.
    Locations,
}

/// A range of offsets, which are multiples of 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Words {
    pub(super) start: u64,
    pub(super) end: u64,
}

/// Offsets in a code object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CodeLayout {
    pub(super) file: u64,
    /// The qualified name, which exists from 3.11 on.
    pub(super) name: u64,
    pub(super) line_table: u64,
    pub(super) first_line: u64,
    /// Words from the first line, or next to it, to the table of lines. Among them are the addresses of the
    /// names, of the file and of the table; up to 3.10 those of the instructions and constants; and from 3.12
    /// on `co_version`, a number that no two code objects share.
    pub(super) identity: Words,
    /// Whether the last is among them.
    pub(super) is_unique: bool,
    /// The instructions, from 3.11 on; before that, the address of an object with the instructions.
    pub(super) instructions: u64,
}

/// The layout of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PythonLayout {
    /// Of `interpreters.head` in the runtime; of `threads.head` and `next` in an interpreter.
    interpreters: u64,
    threads: u64,
    next_interpreter: u64,
    /// In the state of a thread.
    next_thread: u64,
    thread_id: u64,
    frame: u64,
    pub(super) call: Option<Call>,
    /// In a frame.
    frame_code: u64,
    instruction: u64,
    previous: u64,
    /// A byte; `None` if there is only one kind.
    kind: Option<u64>,
    pub(super) frames: FrameStorage,
    pub(super) lines: LineTable,
    pub(super) code: CodeLayout,
    /// Sizes of `PyASCIIObject` and of `PyCompactUnicodeObject`, which the characters follow.
    pub(super) ascii: u64,
    pub(super) compact: u64,
    /// The position, in the state of a string, of the three bits for the size of a character. The next bits
    /// are flags for compact and ASCII strings.
    pub(super) kind_shift: u32,
}

/// The structures of 3.9, from which those of the next versions differ.
const V3_9: PythonLayout = PythonLayout {
    interpreters: 32,
    threads: 8,
    next_interpreter: 0,
    next_thread: 8,
    thread_id: 176,
    frame: 24,
    call: None,
    frame_code: 32,
    instruction: 104,
    previous: 24,
    kind: None,
    frames: FrameStorage::Single(1),
    lines: LineTable::Increments,
    code: CodeLayout {
        file: 104,
        name: 112,
        line_table: 120,
        first_line: 40,
        identity: Words { start: 40, end: 128 },
        is_unique: false,
        instructions: 48,
    },
    ascii: 48,
    compact: 72,
    kind_shift: 2,
};

const V3_10: PythonLayout = PythonLayout {
    call: Some(Call { innermost: 48, previous: 8, frame: None }),
    instruction: 96,
    frames: FrameStorage::Single(2),
    lines: LineTable::Ranges,
    ..V3_9
};

const V3_11: PythonLayout = PythonLayout {
    interpreters: 40,
    threads: 16,
    thread_id: 152,
    call: Some(Call { innermost: 56, previous: 16, frame: Some(8) }),
    frame_code: 32,
    instruction: 56,
    previous: 48,
    kind: Some(68),
    frames: FrameStorage::Marked,
    lines: LineTable::Locations,
    code: CodeLayout {
        file: 112,
        name: 128,
        line_table: 136,
        first_line: 72,
        identity: Words { start: 72, end: 144 },
        is_unique: false,
        instructions: 184,
    },
    ..V3_9
};

const V3_12: PythonLayout = PythonLayout {
    threads: 72,
    thread_id: 136,
    call: Some(Call { innermost: 56, previous: 8, frame: Some(0) }),
    frame_code: 0,
    previous: 8,
    kind: Some(70),
    frames: FrameStorage::Entered,
    code: CodeLayout {
        first_line: 68,
        identity: Words { start: 64, end: 144 },
        is_unique: true,
        instructions: 192,
        ..V3_11.code
    },
    ascii: 40,
    compact: 56,
    ..V3_11
};

/// Which word of the table of offsets is the size of the runtime.
const RUNTIME: u64 = 3;

/// Which words are the sizes of the other structures, ahead of the offsets in them.
#[derive(Clone, Copy)]
struct Structures {
    interpreter: u64,
    thread: u64,
    frame: u64,
    code: u64,
}

const V3_13: Structures = Structures { interpreter: 6, thread: 19, frame: 28, code: 34 };

const V3_14: Structures = Structures { interpreter: 6, thread: 22, frame: 31, code: 39 };

impl PythonLayout {
    /// The layout of the interpreter whose file has these symbols and is mapped with the load bias `bias`.
    ///
    /// # Errors
    /// The error says what is not known about it.
    pub(super) fn read(memory: &ProcessMemory, bias: u64, symbols: &PythonSymbols) -> Result<Self, String> {
        let address = match symbols.version {
            Version::V3_9 => return Ok(V3_9),
            Version::V3_10 => return Ok(V3_10),
            Version::At(address) => bias.wrapping_add(address),
        };
        let version = memory.u64(address).ok_or("its memory cannot be read")?;
        match version >> 16 {
            0x30b => Ok(V3_11),
            0x30c => Ok(V3_12),
            0x30d => Self::described(memory, bias.wrapping_add(symbols.runtime), version, V3_13),
            0x30e => Self::described(memory, bias.wrapping_add(symbols.runtime), version, V3_14),
            _ => Err(format!("version {:#x} is not known", version >> 16)),
        }
    }

    /// The layout according to the table at the beginning of the runtime: for each structure its size, and
    /// the offsets of some members.
    ///
    /// <https://github.com/python/cpython/blob/v3.13.0/Include/internal/pycore_runtime.h> (`_Py_DebugOffsets`)
    /// <https://github.com/python/cpython/blob/v3.14.0/Include/internal/pycore_debug_offsets.h>
    fn described(
        memory: &ProcessMemory,
        runtime: u64,
        version: u64,
        structures: Structures,
    ) -> Result<Self, String> {
        let word = |index: u64| memory.u64(runtime.wrapping_add(8 * index));
        if word(0) != Some(u64::from_ne_bytes(*b"xdebugpy")) || word(1) != Some(version) {
            return Err("it has no table of offsets".to_owned());
        }
        if word(2) != Some(0) {
            return Err("it is built without a global lock".to_owned());
        }
        let Structures { interpreter, thread, frame, code } = structures;
        let table = || {
            // No structure that is read has more bytes.
            let size = |structure| word(structure).filter(|size| *size < 1 << 24);
            let at =
                |structure, index| word(structure + index).filter(|offset| Some(*offset) < size(structure));
            let (first_line, line_table) = (at(code, 5)?, at(code, 4)?);
            Some(Self {
                interpreters: at(RUNTIME, 2)?,
                next_interpreter: at(interpreter, 2)?,
                threads: at(interpreter, 3)?,
                next_thread: at(thread, 2)?,
                frame: at(thread, 4)?,
                thread_id: at(thread, 5)?,
                call: None,
                previous: at(frame, 1)?,
                frame_code: at(frame, 2)?,
                instruction: at(frame, 3)?,
                kind: Some(at(frame, 5)?),
                code: CodeLayout {
                    file: at(code, 1)?,
                    name: at(code, 3)?,
                    line_table,
                    first_line,
                    identity: Words { start: first_line & !7, end: line_table + 8 },
                    is_unique: true,
                    instructions: at(code, 9)?,
                },
                ..V3_12
            })
        };
        let is_short = |layout: &Self| {
            let Words { start, end } = layout.code.identity;
            start < end && end - start <= 8 * IDENTITY_WORDS as u64
        };
        table().filter(is_short).ok_or_else(|| "its table of offsets cannot be read".to_owned())
    }

    /// What the kernel half needs to list the frames of a thread; `None` if no thread's state was found at
    /// the expected place.
    pub(super) fn interpreter(&self, memory: &ProcessMemory, runtime: u64, pid: u32) -> Option<Interpreter> {
        let word = |offset: u64| u32::try_from(offset / 8).ok();
        let kind = self.kind.unwrap_or(self.previous);
        let in_call = self.call.and_then(|call| call.frame);
        let last = [self.frame_code, self.instruction, self.previous, kind].into_iter().max()?;
        Some(Interpreter {
            pid,
            state: self.state(memory, runtime)?,
            call: self.call.map_or(Some(ABSENT), |call| u32::try_from(call.innermost).ok())?,
            frame: u32::try_from(in_call.unwrap_or(self.frame)).ok()?,
            is_in_state: in_call.is_none().into(),
            bytes: 8 * (word(last)? + 1),
            code: word(self.frame_code)?,
            instruction: word(self.instruction)?,
            previous: word(self.previous)?,
            kind: word(kind)?,
            identity: u32::try_from(self.code.identity.start).ok()?,
            identity_words: word(self.code.identity.end.checked_sub(self.code.identity.start)?)?,
            kind_mask: self.kind.map_or(0, |offset| 0xff << (8 * (offset % 8))),
        })
    }

    /// The kind of a frame, from the word that the kernel half has read.
    pub(super) fn kind(&self, word: u64) -> u64 {
        self.kind.map_or(0, |offset| word >> (8 * (offset % 8)) & 0xff)
    }

    /// The place, relative to its thread pointer, where each thread keeps the address of its state. It is
    /// found by searching the threads' control blocks for the states that the interpreters list.
    fn state(&self, memory: &ProcessMemory, runtime: u64) -> Option<u32> {
        let mut found = vec![0_u32; CONTROL_BLOCK.end / 8];
        // Lists in the memory of another process may be endless.
        let mut states = 0;
        let mut interpreter = memory.u64(runtime.checked_add(self.interpreters)?)?;
        while interpreter != 0 && states < MAX_STATES {
            states += 1;
            let mut state = memory.u64(interpreter.checked_add(self.threads)?)?;
            while state != 0 && states < MAX_STATES {
                states += 1;
                let thread_pointer = memory.u64(state.checked_add(self.thread_id)?).unwrap_or(0);
                let block = memory.up_to(thread_pointer, CONTROL_BLOCK.end);
                let words: Vec<_> = block.as_chunks().0.iter().copied().map(u64::from_ne_bytes).collect();
                for (index, pair) in words.windows(2).enumerate() {
                    // A value is preceded by the number of times that its key was used.
                    if pair[1] == state && (1..1 << 32).contains(&pair[0]) {
                        found[index + 1] += 1;
                    }
                }
                state = memory.u64(state.checked_add(self.next_thread)?)?;
            }
            interpreter = memory.u64(interpreter.checked_add(self.next_interpreter)?)?;
        }
        let places = CONTROL_BLOCK.start / 8..found.len();
        let best = places
            .filter(|place| found[*place] != 0)
            .max_by_key(|place| (found[*place], found.len() - place))?;
        u32::try_from(8 * best).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write as _};

    use super::*;

    #[test]
    fn a_list_of_interpreters_that_has_no_end_is_left() {
        let path = std::env::temp_dir().join(format!("tcpclose-python-{}", std::process::id()));
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        // The runtime is at 0, and the only interpreter, which has no threads, is the next one of itself.
        let (interpreter, mut bytes) = (0x100_u64, [0; 0x200]);
        bytes[32..40].copy_from_slice(&interpreter.to_ne_bytes());
        bytes[0x100..0x108].copy_from_slice(&interpreter.to_ne_bytes());
        file.write_all(&bytes).unwrap();
        assert_eq!(V3_9.interpreter(&ProcessMemory::from(file), 0, 1), None);
    }
}
