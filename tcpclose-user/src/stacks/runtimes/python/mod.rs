//! CPython 3.9 to 3.14. Its functions have no frames on the stack: a loop, `_PyEval_EvalFrameDefault()`, runs
//! them, and their frames are in the heap. The kernel half lists them at the event
//! ([`tcpclose_common::interpreter`]); here they are named, from the code objects in the memory of the
//! process, and replace the loop's frames on the stack.
//!
//! A frame gets a name only if its code object is still the same as at the event, judged by its address, its
//! type and a hash of some of its members ([`layout::CodeLayout::identity`]), and if it has the instruction
//! that the frame is at.

mod code;
mod layout;
mod lines;

use std::{
    mem,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use tcpclose_common::{
    interpreter::Interpreter,
    record::{Interpreted, InterpretedFrame},
};

use self::{
    code::{CodeKey, Codes, FunctionLocation},
    layout::{FrameStorage, OWNED_BY_C_STACK, PythonLayout, PythonSymbols},
};
use super::{At, BinarySymbols, Run, Runtime, RuntimeBinary};
use crate::{
    event::Frame,
    stacks::memory::{ProcessMemory, StackMemory},
};

/// How long after a failure to wait before reading again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How long a stack is recognized by the hash of its frames. Code objects are part of the hash, so the only
/// purpose of this is to look again for names that were missing.
const LIFETIME: Duration = Duration::from_secs(10);

/// Recognizes an executable or library that contains CPython.
pub fn recognize(symbols: &dyn BinarySymbols) -> Option<Box<dyn RuntimeBinary>> {
    PythonSymbols::find(&|name| symbols.dynamic(name)).map(|symbols| Box::new(PythonLibrary(symbols)) as _)
}

/// `libpython3.so`, or an interpreter that contains it.
struct PythonLibrary(PythonSymbols);

impl RuntimeBinary for PythonLibrary {
    fn attach(&self, pid: u32, memory: ProcessMemory, bias: u64) -> Option<Box<dyn Runtime>> {
        let layout = match PythonLayout::read(&memory, bias, &self.0) {
            Ok(layout) => layout,
            Err(why) => {
                log::debug!("process {pid}: no names of Python functions: {why}");
                return None;
            }
        };
        let runtime = bias.wrapping_add(self.0.runtime);
        let Some(interpreter) = layout.interpreter(&memory, runtime, pid) else {
            log::debug!("process {pid}: no names of Python functions: its threads cannot be read");
            return None;
        };
        let Range { start, end } = self.0.evaluate;
        Some(Box::new(Python {
            memory,
            layout,
            interpreter,
            code_type: bias.wrapping_add(self.0.code_type),
            evaluate: bias.wrapping_add(start)..bias.wrapping_add(end),
            codes: Codes::default(),
            retry_at: Instant::now() + RETRY_AFTER,
        }))
    }
}

/// A running interpreter.
struct Python {
    memory: ProcessMemory,
    layout: PythonLayout,
    interpreter: Interpreter,
    /// Address of the type of code objects.
    code_type: u64,
    /// The code of the loop.
    evaluate: Range<u64>,
    codes: Codes,
    retry_at: Instant,
}

impl Python {
    fn frame(&mut self, listed: &InterpretedFrame) -> Arc<Frame> {
        let key = CodeKey { address: listed.code, identity: listed.identity };
        let process = (&self.memory, &self.layout, self.code_type);
        let place = self.codes.place(process, key, listed.instruction);
        let (symbol, file, line) = match place {
            Some(FunctionLocation { symbol, file, line }) => (Some(symbol), file, line),
            None => (None, None, None),
        };
        let address = match self.layout.frames {
            FrameStorage::Single(_) => listed.code,
            FrameStorage::Marked | FrameStorage::Entered => listed.instruction,
        };
        Arc::new(Frame { symbol, file, line, ..Frame::nameless(address) })
    }
}

impl Runtime for Python {
    fn lifetime(&self) -> Duration {
        LIFETIME
    }

    fn owns(&self, _: u64) -> bool {
        // Its loop is C, which has unwind tables.
        false
    }

    fn interpreter(&self) -> Option<Interpreter> {
        Some(self.interpreter)
    }

    fn is_loop(&self, address: u64) -> bool {
        self.evaluate.contains(&address)
    }

    fn interpreted(&mut self, list: &Interpreted, stack: &StackMemory<'_>) -> Vec<Run> {
        if Instant::now() >= self.retry_at {
            self.codes.forget_missing();
            self.retry_at = Instant::now() + RETRY_AFTER;
        }
        let (mut runs, mut frames) = (Vec::new(), Vec::new());
        // The address of the call that runs the next frames.
        let mut call = list.call;
        for listed in list.frames.iter().take(usize::try_from(list.count).unwrap_or(usize::MAX)) {
            let kind = self.layout.kind(listed.kind);
            let is_entry = self.layout.frames == FrameStorage::Entered && kind >= OWNED_BY_C_STACK;
            if !is_entry {
                frames.push(self.frame(listed));
            }
            let is_last = match self.layout.frames {
                FrameStorage::Single(_) => true,
                FrameStorage::Marked => kind != 0,
                FrameStorage::Entered => is_entry,
            };
            if !is_last {
                continue;
            }
            let at = match self.layout.call {
                Some(layout) => {
                    let before = call.checked_add(layout.previous).and_then(|address| stack.word(address));
                    At::Stack(mem::replace(&mut call, before.unwrap_or(0)))
                }
                None if is_entry => At::Stack(listed.address),
                None if list.is_cut == 0 => At::NextLoop,
                // There is no way to see whether all calls of the loop are recognized.
                None => return runs,
            };
            runs.push(Run { at, frames: mem::take(&mut frames) });
        }
        if !frames.is_empty() {
            // There are more than were listed.
            let at = self.layout.call.map_or(At::NextLoop, |_| At::Stack(call));
            runs.push(Run { at, frames });
        }
        runs
    }
}
