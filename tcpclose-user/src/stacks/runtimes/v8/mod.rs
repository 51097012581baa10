//! V8, the JavaScript engine of node. It needs no restart and no option: it exports variables that describe
//! its heap for debuggers, so that names, files and lines of functions can be read from the memory of the
//! process ([`layout`]).
//!
//! Its code keeps frame pointers, by which the unwinder follows it. What is done here is to name the frames:
//!
//! - The frame of an interpreted function has the function's bytecode, and the offset of the instruction in
//!   it, which has a line. All these frames are in one builtin, `InterpreterEntryTrampoline`.
//! - Compiled code is preceded by an object that leads to the function, or to the bytecode that it was
//!   compiled from ([`code`]). The line is not known. Functions that the compiler has inlined into another one
//!   have no frames.
//!
//! Bytecode has no reference to its function. The function object in the frame leads there, and the function
//! counts if it has the bytecode or the code of the frame. A name is therefore never that of another function,
//! even if the garbage collector has moved the object meanwhile; there is none then, unless the code is known
//! from another frame, or as that of a known script.
//!
//! A perf map also has names of compiled functions (`--perf-basic-prof`), but may have older ones for the
//! same addresses. Names are taken from it only where there are none here.

mod code;
mod function;
mod heap;
mod layout;
mod lines;

use std::{collections::HashMap, ops::Range, sync::Arc, time::Duration};

use self::{
    code::{CodeObjects, CompiledFrom},
    function::{Functions, ScriptFunction},
    heap::{HeapObject, V8Heap, small},
    layout::{V8Layout, V8Symbols},
};
use super::{BinarySymbols, CodeMapping, CodeOwner, Registers, Runtime, RuntimeBinary};
use crate::{
    event::Frame,
    stacks::memory::{ProcessMemory, StackMemory},
};

/// How long a stack of compiled functions is recognized by its return addresses. Code stays where it is while
/// its function is in use, and a function that is called often enough to be compiled is seldom dropped.
const LIFETIME: Duration = Duration::from_secs(10);

/// A stack with an interpreted function is not recognized. Programs make and drop functions that they call once.
/// The garbage collector may put another function in the places of one that was dropped, with all the same
/// words in its frame.
const NEVER: Duration = Duration::ZERO;

/// How long a stack is recognized in which a compiled function has no name: it may be found the next time.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How many frames are remembered. When there are more, all are dropped.
const MAX_NAMED: usize = 8_192;

/// Recognizes an executable or library that contains V8.
pub fn recognize(symbols: &dyn BinarySymbols) -> Option<Box<dyn RuntimeBinary>> {
    V8Symbols::find(symbols).map(|symbols| Box::new(V8Binary(Arc::new(symbols))) as _)
}

/// `node`, or a library that contains V8.
struct V8Binary(Arc<V8Symbols>);

impl RuntimeBinary for V8Binary {
    fn attach(&self, pid: u32, memory: ProcessMemory, bias: u64) -> Option<Box<dyn Runtime>> {
        let layout = match V8Layout::read(&memory, bias, &self.0) {
            Ok(layout) => layout,
            Err(missing) => {
                log::debug!(
                    "process {pid}: no names of JavaScript functions: V8 does not describe {missing}"
                );
                return None;
            }
        };
        Some(Box::new(V8 {
            memory,
            layout,
            is_there: self.0.first(bias),
            symbols: Arc::clone(&self.0),
            interpreters: Vec::new(),
            generated: Vec::new(),
            codes: CodeObjects::default(),
            functions: Functions::default(),
            named: HashMap::new(),
            lifetime: LIFETIME,
        }))
    }
}

/// A running V8.
struct V8 {
    memory: ProcessMemory,
    layout: V8Layout,
    symbols: Arc<V8Symbols>,
    /// An address that is readable until the process exits.
    is_there: u64,
    /// Where the interpreter is mapped: V8 also maps its builtins near the code that it generates.
    interpreters: Vec<Range<u64>>,
    /// Where generated code can be, in the order of addresses.
    generated: Vec<Range<u64>>,
    codes: CodeObjects,
    functions: Functions,
    /// The frames of compiled functions that were named, by their addresses, for when the process has exited.
    named: HashMap<u64, Arc<[Arc<Frame>]>>,
    /// How long the stack is recognized.
    lifetime: Duration,
}

impl V8 {
    fn is_interpreter(&self, address: u64) -> bool {
        self.interpreters.iter().any(|range| range.contains(&address))
    }

    fn is_generated(&self, address: u64) -> bool {
        let index = self.generated.partition_point(|range| range.end <= address);
        self.generated.get(index).is_some_and(|range| range.contains(&address))
    }

    fn frame(&mut self, frame: &Registers, stack: &StackMemory<'_>) -> Option<Frame> {
        if self.is_interpreter(frame.inside) {
            return self.interpreted(frame, stack, None);
        }
        let Self { memory, layout, codes, functions, .. } = self;
        let heap = V8Heap { memory, layout };
        let code = codes.at(heap, frame.inside)?;
        let function = match code::source(heap, code) {
            CompiledFrom::Function(function) => function,
            CompiledFrom::Bytecode(_) => {
                // It need not be the same when the stack is recognized: a function may have many objects.
                let closure = frame.fp.checked_add_signed(layout.fp_function);
                functions.of_code(heap, code, closure.and_then(|address| stack.peek(address)))?
            }
            CompiledFrom::Unknown => return self.interpreted(frame, stack, Some(code)),
        };
        let ScriptFunction { symbol, file, .. } = functions.describe(heap, function)?;
        Some(Frame { symbol: Some(symbol), file, ..Frame::nameless(frame.pc) })
    }

    /// Names a frame of the interpreter, or of this copy of it that belongs to a single function.
    fn interpreted(
        &mut self,
        frame: &Registers,
        stack: &StackMemory<'_>,
        copy: Option<HeapObject>,
    ) -> Option<Frame> {
        let Self { memory, layout, functions, lifetime, .. } = self;
        let heap = V8Heap { memory, layout };
        let slot = |distance| stack.peek(frame.fp.checked_add_signed(distance)?);
        let bytecode = slot(layout.fp_bytecode).and_then(HeapObject::of);
        let bytecode = bytecode.filter(|it| heap.type_of(*it) == Some(layout.bytecode_type));
        // A copy can also be other code that is not compiled from bytecode.
        if copy.is_none() || bytecode.is_some() {
            *lifetime = NEVER;
        }
        let bytecode = bytecode?;
        let function = function::of_bytecode(heap, bytecode, slot(layout.fp_function)?)?;
        if copy.is_some_and(|copy| !function::is_interpreted_by(heap, function, copy)) {
            return None;
        }
        let described = functions.describe(heap, function)?;
        let table = function::positions(heap, bytecode);
        let line = if table.is_empty() {
            None
        } else {
            // It counts from the word that refers to the bytecode.
            let header = i32::try_from(layout.bytecode_data).ok()? - 1;
            let offset = slot(layout.fp_bytecode_offset).and_then(small);
            offset.and_then(|offset| {
                functions.line(heap, &described, (bytecode, &table), offset.checked_sub(header)?)
            })
        };
        let ScriptFunction { symbol, file, .. } = described;
        Some(Frame { symbol: Some(symbol), file, line, ..Frame::nameless(frame.pc) })
    }
}

impl Runtime for V8 {
    fn mapped(&mut self, code: &[CodeMapping]) {
        let interpreter = |mapping: &CodeMapping| {
            let CodeOwner::Own { bias } = mapping.owner else { return None };
            let builtin = self.symbols.interpreter.as_ref()?;
            let start = builtin.start.wrapping_add(bias).max(mapping.range.start);
            let end = builtin.end.wrapping_add(bias).min(mapping.range.end);
            (start < end).then_some(start..end)
        };
        self.interpreters = code.iter().filter_map(interpreter).collect();
        let generated = code.iter().filter(|mapping| mapping.owner == CodeOwner::Generated);
        self.generated = generated.map(|mapping| mapping.range.clone()).collect();
    }

    fn begin_stack(&mut self) {
        self.lifetime = LIFETIME;
    }

    fn lifetime(&self) -> Duration {
        self.lifetime
    }

    fn owns(&self, address: u64) -> bool {
        self.is_interpreter(address) || self.is_generated(address)
    }

    fn name(&mut self, frame: &Registers, stack: &StackMemory<'_>) -> Arc<[Arc<Frame>]> {
        let named: Arc<[_]> = self.frame(frame, stack).into_iter().map(Arc::new).collect();
        if self.is_interpreter(frame.inside) {
            return named;
        }
        if named.is_empty() {
            self.lifetime = self.lifetime.min(RETRY_AFTER);
            let has_exited = !self.memory.is_there(self.is_there);
            return self.named.get(&frame.pc).filter(|_| has_exited).cloned().unwrap_or(named);
        }
        if self.named.len() >= MAX_NAMED {
            self.named.clear();
        }
        self.named.insert(frame.pc, Arc::clone(&named));
        named
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt as _};

    use super::*;

    /// The heap and the frames of node, and the variables of its V8: see `fixtures/README.md`.
    const RECORDED: [(&str, &[u8], &str); 2] = [
        (
            "20.20",
            include_bytes!("../../../../fixtures/v8/20.20.memory"),
            include_str!("../../../../fixtures/v8/20.20.variables"),
        ),
        (
            "24.21",
            include_bytes!("../../../../fixtures/v8/24.21.memory"),
            include_str!("../../../../fixtures/v8/24.21.variables"),
        ),
    ];

    /// Where the heap is, and the interpreter. The variables begin at 0.
    const HEAP: u64 = 0x1000;
    const INTERPRETER: Range<u64> = 0x800..0x880;

    /// Frames that were recorded: a function that reads a byte, which an anonymous one calls, which an
    /// optimized one calls, which one that is compiled without optimization calls, which the script calls.
    const EXPECTED: [Option<(&str, Option<u32>)>; 5] = [
        Some(("readByte", Some(4))),
        Some(("<anonymous:21>", Some(22))),
        Some(("optimized", None)),
        Some(("baseline", None)),
        Some(("<anonymous:1>", Some(21))),
    ];

    struct Symbols(Vec<(String, Range<u64>)>);

    impl BinarySymbols for Symbols {
        fn dynamic(&self, _: &str) -> Option<Range<u64>> {
            None
        }

        fn dynamic_with(&self, prefix: &str) -> Vec<(String, Range<u64>)> {
            self.0.iter().filter(|(name, _)| name.starts_with(prefix)).cloned().collect()
        }

        fn local(&self, name: &str) -> Option<Range<u64>> {
            (name == "Builtins_InterpreterEntryTrampoline").then_some(INTERPRETER)
        }
    }

    /// A process with recorded memory.
    struct RecordedProcess {
        heap: Vec<u8>,
        /// Addresses of instructions and frame pointers.
        frames: Vec<(u64, u64)>,
        variables: &'static str,
    }

    impl RecordedProcess {
        fn new(recorded: &'static [u8], variables: &'static str) -> Self {
            let (heap, frames) = recorded[1..].split_last_chunk::<80>().unwrap();
            let words: Vec<_> = frames.as_chunks().0.iter().copied().map(u64::from_le_bytes).collect();
            let frames = words.as_chunks().0.iter().map(|[pc, fp]| (*pc, *fp)).collect();
            Self { heap: heap.to_vec(), frames, variables }
        }

        /// The runtime, its memory, and the file with that, in which offsets are addresses.
        fn runtime(&self) -> (Box<dyn Runtime>, ProcessMemory, File) {
            let path = std::env::temp_dir().join(format!(
                "tcpclose-v8-{}-{:?}",
                std::process::id(),
                std::thread::current().id()
            ));
            let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            file.write_all_at(&self.heap, HEAP).unwrap();
            // Pages are read as a whole.
            file.set_len(HEAP + self.heap.len().next_multiple_of(0x1000) as u64).unwrap();
            let mut symbols = Vec::new();
            for (address, line) in (0_u64..).step_by(8).zip(self.variables.lines()) {
                let (name, value) = line.split_once(' ').unwrap();
                file.write_all_at(&value.parse::<i32>().unwrap().to_ne_bytes(), address).unwrap();
                symbols.push((format!("v8dbg_{name}"), address..address + 4));
            }
            let binary = recognize(&Symbols(symbols)).unwrap();
            let memory = ProcessMemory::from(file.try_clone().unwrap());
            let mut runtime = binary.attach(1, memory.clone(), 0).unwrap();
            let generated = HEAP..HEAP + self.heap.len() as u64;
            runtime.mapped(&[
                CodeMapping { range: 0x400..HEAP, owner: CodeOwner::Own { bias: 0 } },
                CodeMapping { range: generated, owner: CodeOwner::Generated },
            ]);
            (runtime, memory, file)
        }

        /// The names of all frames.
        fn named(&self) -> Vec<Option<Frame>> {
            self.named_by(&mut *self.runtime().0)
        }

        fn named_by(&self, runtime: &mut dyn Runtime) -> Vec<Option<Frame>> {
            let stack = StackMemory::new(HEAP, &self.heap);
            runtime.begin_stack();
            let name = |(pc, fp): &(u64, u64)| {
                assert!(runtime.owns(pc - 1));
                let frame = Registers { pc: *pc, inside: pc - 1, sp: fp.wrapping_sub(40), fp: *fp };
                runtime.name(&frame, &stack).first().map(|frame| (**frame).clone())
            };
            self.frames.iter().map(name).collect()
        }

        fn word(&self, address: u64) -> u64 {
            let at = usize::try_from(address - HEAP).unwrap();
            u64::from_ne_bytes(self.heap[at..at + 8].try_into().unwrap())
        }

        fn put(&mut self, address: u64, word: u64) {
            let at = usize::try_from(address - HEAP).unwrap();
            self.heap[at..at + 8].copy_from_slice(&word.to_ne_bytes());
        }

        /// The function object of a frame.
        fn closure(&self, frame: usize) -> u64 {
            self.word(self.frames[frame].1 - 16)
        }
    }

    fn places(named: &[Option<Frame>]) -> Vec<Option<(&str, Option<u32>)>> {
        named.iter().map(|frame| frame.as_ref().map(|it| (it.symbol.as_deref().unwrap(), it.line))).collect()
    }

    #[test]
    fn frames_of_each_kind() {
        for (version, memory, variables) in RECORDED {
            let named = RecordedProcess::new(memory, variables).named();
            assert_eq!(places(&named), EXPECTED, "{version}");
            assert!(named.iter().flatten().all(|frame| frame.file.as_deref() == Some("/tmp/app.js")));
        }
    }

    #[test]
    fn a_function_object_that_was_moved_is_followed() {
        for (version, memory, variables) in RECORDED {
            let mut recorded = RecordedProcess::new(memory, variables);
            for frame in [0, 1, 3, 4] {
                let closure = recorded.closure(frame) & !1;
                let moved = HEAP + recorded.heap.len().next_multiple_of(8) as u64;
                recorded.heap.resize(usize::try_from(moved - HEAP).unwrap() + 64, 0);
                for offset in (0..64).step_by(8) {
                    let word = recorded.word(closure + offset);
                    recorded.put(moved + offset, word);
                    recorded.put(closure + offset, if offset == 0 { moved } else { 0 });
                }
            }
            assert_eq!(places(&recorded.named()), EXPECTED, "{version}");
        }
    }

    #[test]
    fn a_function_object_in_the_place_of_another_gives_no_name() {
        for (version, memory, variables) in RECORDED {
            let mut recorded = RecordedProcess::new(memory, variables);
            let other = recorded.closure(0);
            for frame in [3, 4] {
                recorded.put(recorded.frames[frame].1 - 16, other);
            }
            // The script has a list with the compiled function.
            let mut expected = EXPECTED;
            expected[4] = None;
            assert_eq!(places(&recorded.named()), expected, "{version}");
            for frame in [0, 1, 3] {
                let mut recorded = RecordedProcess::new(memory, variables);
                // No other frame leads to the script.
                recorded.frames = vec![recorded.frames[frame]];
                recorded.put(recorded.frames[0].1 - 16, other | 2);
                let expected = vec![EXPECTED[frame]];
                assert_eq!(places(&recorded.named()), [None], "{version}: a weak reference");
                let another = RecordedProcess::new(memory, variables).closure(usize::from(frame == 0));
                recorded.put(recorded.frames[0].1 - 16, another);
                assert_eq!(places(&recorded.named()), [None], "{version}: another function");
                recorded
                    .put(recorded.frames[0].1 - 16, RecordedProcess::new(memory, variables).closure(frame));
                assert_eq!(places(&recorded.named()), expected);
                // The bytecode of another function, which the closure does not lead to.
                if frame != 3 {
                    let bytecode = recorded.word(RecordedProcess::new(memory, variables).frames[4].1 - 32);
                    recorded.put(recorded.frames[0].1 - 32, bytecode);
                    assert_eq!(places(&recorded.named()), [None], "{version}: other bytecode");
                }
            }
        }
    }

    #[test]
    fn a_frame_of_another_kind_has_no_name() {
        for (version, memory, variables) in RECORDED {
            let mut recorded = RecordedProcess::new(memory, variables);
            let (pc, fp) = recorded.frames[0];
            // An address that the compiled function has not, and a frame pointer that leads nowhere.
            recorded.frames =
                vec![(recorded.frames[2].0 + 0x2000, fp), (pc, 8), (pc, u64::MAX), (HEAP + 9, fp)];
            recorded.heap.resize(0x4000, 0);
            assert_eq!(places(&recorded.named()), [None; 4], "{version}");
        }
    }

    #[test]
    fn a_process_that_has_exited_has_the_names_of_compiled_functions() {
        let (_, memory, variables) = RECORDED[0];
        let mut recorded = RecordedProcess::new(memory, variables);
        recorded.frames.drain(..2);
        recorded.frames.pop();
        let compiled = &EXPECTED[2..4];
        let (mut runtime, memory, file) = recorded.runtime();
        assert_eq!(places(&recorded.named_by(&mut *runtime)), compiled);
        assert_eq!(runtime.lifetime(), LIFETIME);
        // The heap is not readable any more, but the variables are.
        file.set_len(HEAP).unwrap();
        memory.forget();
        assert_eq!(places(&recorded.named_by(&mut *runtime)), [None; 2]);
        assert_eq!(runtime.lifetime(), RETRY_AFTER);
        file.set_len(0).unwrap();
        assert_eq!(places(&recorded.named_by(&mut *runtime)), compiled);
    }

    /// Another function may have the same words in its frame later.
    #[test]
    fn interpreted_functions_are_named_each_time() {
        let (_, memory, variables) = RECORDED[0];
        let recorded = RecordedProcess::new(memory, variables);
        let (mut runtime, memory, file) = recorded.runtime();
        assert_eq!(places(&recorded.named_by(&mut *runtime)), EXPECTED);
        assert!(runtime.lifetime().is_zero());
        file.set_len(0).unwrap();
        memory.forget();
        assert_eq!(places(&recorded.named_by(&mut *runtime)), [None, None, EXPECTED[2], EXPECTED[3], None]);
    }

    /// The frames of a stack need hundreds of words, and each read is a system call.
    #[test]
    fn each_page_is_read_once_for_a_stack() {
        for (version, memory, variables) in RECORDED {
            let recorded = RecordedProcess::new(memory, variables);
            let (mut runtime, memory, _file) = recorded.runtime();
            for _ in 0..2 {
                memory.forget();
                let before = memory.reads();
                assert_eq!(places(&recorded.named_by(&mut *runtime)), EXPECTED, "{version}");
                let (reads, pages) = (memory.reads() - before, recorded.heap.len().div_ceil(0x1000));
                assert!(reads <= pages, "{version}: {reads} reads of {pages} pages");
            }
        }
    }

    /// Whatever a word of the memory is, reading ends.
    #[test]
    fn any_word_may_be_wrong() {
        for (_, memory, variables) in RECORDED {
            let recorded = RecordedProcess::new(memory, variables);
            for address in (HEAP..HEAP + recorded.heap.len() as u64 - 8).step_by(24) {
                for wrong in [u64::MAX, recorded.word(address) ^ 8] {
                    let mut recorded = RecordedProcess::new(memory, variables);
                    recorded.put(address, wrong);
                    recorded.named();
                }
            }
        }
    }
}
