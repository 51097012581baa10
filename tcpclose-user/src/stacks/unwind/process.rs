//! A process: the unwind tables of all files that it has mapped, and its language runtimes.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use framehop::{
    CacheNative, FrameAddress, MayAllocateDuringUnwind, Module, UnwindRegsNative, Unwinder as _,
    UnwinderNative,
};
use tcpclose_common::{
    interpreter::Interpreter,
    record::{Interpreted, StackCopy},
};

use super::{
    binary::{Binaries, Binary},
    calls::Calls,
    code::ProcessCode,
    inputs::{Inputs, POISON, Read, UnwindStep},
    interpreted::{Spot, merge},
    signal::{self, Interrupted},
};
use crate::{
    event::Truncated,
    processes::{
        Image,
        mappings::{Backing, FileIdentity, Mapping},
    },
    stacks::{
        frame::UnwoundFrame,
        memory::{ProcessMemory, StackMemory},
        runtimes::{Caller, CodeMapping, CodeOwner, Registers, Runtime},
    },
};

/// How long after the description of an interpreter there may still be copies that were made before it.
const DESCRIBED_AFTER: Duration = Duration::from_secs(1);

/// Everything that is needed to unwind stacks of one process.
pub(super) struct ProcessUnwinder {
    image: Arc<Image>,
    tables: UnwinderNative<Arc<[u8]>, MayAllocateDuringUnwind>,
    /// The mappings of files that have tables, in the order of addresses.
    with_tables: Vec<Range<u64>>,
    cache: CacheNative<MayAllocateDuringUnwind>,
    /// The runtimes, each with the file in which it was recognized.
    runtimes: Vec<(FileIdentity, Box<dyn Runtime>)>,
    /// The memory that the runtimes and `calls` read.
    memory: Option<ProcessMemory>,
    calls: Calls,
    /// When a stack without a list of the interpreter's frames first showed that the kernel half lacks a
    /// description of the interpreter.
    described: Option<Instant>,
    /// When it was last used, by the [`Unwinder`](super::Unwinder)'s clock.
    pub(super) used: u64,
}

/// The caller of a frame, and what was read to find it.
type Attempt = (Result<Option<Cursor>, Truncated>, Vec<(u64, Option<u64>)>);

/// A frame, while a stack is being unwound.
#[derive(Clone)]
pub(super) struct Cursor {
    at: FrameAddress,
    registers: UnwindRegsNative,
    /// Whether a signal interrupted the function there.
    is_interrupted: bool,
}

impl ProcessUnwinder {
    /// A process with these mappings. `older` is the same program image before it mapped more.
    pub(super) fn new(image: Arc<Image>, older: Option<Self>, binaries: &mut Binaries) -> Self {
        let mut tables = UnwinderNative::new();
        let (mut runtimes, memory, described) =
            older.map_or_else(Default::default, |older| (older.runtimes, older.memory, older.described));
        let memory = memory.or_else(|| ProcessMemory::open(image.pid));
        let mut with_tables = Vec::new();
        let mut with_runtimes = Vec::new();
        for mapping in &image.mappings {
            let Backing::File { module: Some(module), .. } = &mapping.backing else { continue };
            let Some(binary) = binaries.get(&image, mapping) else { continue };
            let Some(bias) = binary.segments.bias(mapping) else { continue };
            let identity = module.identity();
            if !binary.runtimes.is_empty() && runtimes.iter().all(|(known, _)| *known != identity) {
                let attached = binary
                    .runtimes
                    .iter()
                    .filter_map(|program| program.attach(image.pid, memory.clone()?, bias));
                runtimes.extend(attached.map(|runtime| (identity, runtime)));
            }
            if !binary.runtimes.is_empty() {
                with_runtimes.push((identity, Arc::clone(&binary)));
            }
            let range = mapping.start..mapping.end;
            if binary.has_tables() {
                with_tables.push(range.clone());
            }
            tables.add_module(Module::new(path(mapping), range, bias, binary.sections.clone()));
        }
        for (identity, runtime) in &mut runtimes {
            let binary = with_runtimes.iter().find(|(it, _)| it == identity).map(|(_, binary)| &**binary);
            let mappings = image.mappings.iter();
            runtime.mapped(&mappings.map(|it| code_mapping(it, *identity, binary)).collect::<Vec<_>>());
        }
        let calls = Calls::of(ProcessCode::of(memory.clone()));
        let cache = CacheNative::new();
        Self { image, tables, with_tables, cache, runtimes, memory, calls, described, used: 0 }
    }

    pub(super) fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Called before each stack.
    pub(super) fn begin_stack(&mut self) {
        for (_, runtime) in &mut self.runtimes {
            runtime.begin_stack();
        }
    }

    /// Called after each stack: its memory is read anew for the next one.
    pub(super) fn end_stack(&self) {
        if let Some(memory) = &self.memory {
            memory.forget();
        }
    }

    /// Appends the frame at the cursor; several where a runtime names several.
    pub(super) fn name(
        &mut self,
        cursor: &Cursor,
        stack: &StackMemory<'_>,
        inputs: &mut Inputs,
        frames: &mut Vec<UnwoundFrame>,
    ) {
        let registers = cursor.registers();
        let mut named = None;
        if let Some(runtime) = self.owner(cursor) {
            named = Some(runtime.name(&registers, stack)).filter(|named| !named.is_empty());
            inputs.expire_after(runtime.lifetime());
            inputs.named(registers.fp, &found(&stack.take_reads()));
        }
        match named {
            Some(named) => frames.extend(named.iter().cloned().map(UnwoundFrame::Named)),
            None if cursor.at.is_return_address() => frames.push(UnwoundFrame::Return(registers.pc)),
            None => frames.push(UnwoundFrame::Instruction(registers.pc)),
        }
    }

    /// Puts the frames of an interpreter in place of the calls of its loop. Returns the interpreter if there
    /// is no list of its frames.
    pub(super) fn interpreted(
        &mut self,
        list: Option<&Interpreted>,
        stack: &StackMemory<'_>,
        spots: &[Spot],
        inputs: &mut Inputs,
        frames: &mut Vec<UnwoundFrame>,
    ) -> Option<Interpreter> {
        let runtime = |(_, runtime): &mut (_, Box<dyn Runtime>)| runtime.interpreter().is_some();
        let (_, runtime) = self.runtimes.iter_mut().find_map(|it| runtime(it).then_some(it))?;
        if let Some(list) = list {
            let runs = runtime.interpreted(list, stack);
            merge(runs, spots, |address| runtime.is_loop(address), frames);
            inputs.interpreter(list.hash);
        } else if self.described.get_or_insert_with(Instant::now).elapsed() < DESCRIBED_AFTER {
            // The next stack of this kind has a list, unless the thread runs no function of the program.
            inputs.give_up();
        }
        inputs.expire_after(runtime.lifetime());
        if list.is_none() { runtime.interpreter() } else { None }
    }

    /// The caller of the frame at the cursor; `None` if it is the outermost.
    ///
    /// # Errors
    /// It is not known.
    pub(super) fn caller(
        &mut self,
        cursor: &Cursor,
        stack: &StackMemory<'_>,
        inputs: &mut Inputs,
    ) -> Result<Option<Cursor>, Truncated> {
        let (mut found_caller, reads) = self.attempt(cursor, stack);
        let (other_caller, other_reads) = self.attempt(&cursor.poisoned(&self.image), stack);
        // If the tables of a file do not cover an address, framehop takes a frame pointer of 0 for the end of
        // the stack. Without tables for it, the register may contain anything.
        if let (Ok(None), Ok(Some(_)) | Err(_)) = (&found_caller, &other_caller)
            && self.has_tables(cursor.address())
        {
            found_caller = Err(Truncated::NoUnwindInformation);
        }
        let (step, other) = (step(&found_caller), step(&other_caller));
        inputs.step(cursor.registers().fp, (step, &found(&reads)), (other, &found(&other_reads)));
        found_caller.map_err(|why| {
            let failed = reads.iter().find(|(_, word)| word.is_none());
            if failed.is_some_and(|(address, _)| stack.is_above(*address)) {
                Truncated::CopyEnded
            } else {
                why
            }
        })
    }

    /// The caller of the frame at the cursor, and what was read to find it.
    fn attempt(&mut self, cursor: &Cursor, stack: &StackMemory<'_>) -> Attempt {
        let registers = cursor.registers();
        let by_runtime = self.owner(cursor).map_or(Caller::ByTables, |it| it.caller(&registers, stack));
        let caller = match by_runtime {
            Caller::At { pc, sp, fp } => Ok(self.cursor(pc, sp, fp)),
            Caller::ByTables if self.has_tables(cursor.address()) => self.by_tables(cursor, stack),
            Caller::ByTables => self.by_frame_pointer(cursor, stack),
            Caller::Unknown => Err(Truncated::RuntimeUnreadable),
        };
        (caller, stack.take_reads())
    }

    /// If the cursor is at the trampoline of a signal handler: its frame, and the code that the signal
    /// interrupted.
    pub(super) fn interrupted(
        &self,
        cursor: &Cursor,
        stack: &StackMemory<'_>,
    ) -> Option<(UnwoundFrame, Cursor)> {
        let Registers { pc: trampoline, sp, .. } = cursor.registers();
        // Every other return address follows a call. This is asked before the tables are: where they do not
        // cover the trampoline, framehop follows the frame pointer, which may contain anything.
        if !cursor.at.is_return_address() || self.calls.has(&self.image, trampoline) {
            return None;
        }
        if !signal::is_trampoline(self.calls.code(), &self.image, trampoline) {
            return None;
        }
        let Interrupted { pc, sp, fp, lr } = signal::interrupted(stack, sp)?;
        let interrupted = Cursor {
            at: FrameAddress::from_instruction_pointer(pc),
            registers: registers(&self.image, pc, sp, fp, lr),
            is_interrupted: true,
        };
        Some((UnwoundFrame::Named(signal::frame(trampoline)), interrupted))
    }

    fn by_tables(&mut self, cursor: &Cursor, stack: &StackMemory<'_>) -> Result<Option<Cursor>, Truncated> {
        let Cursor { at, mut registers, .. } = cursor.clone();
        let mut read = |address| stack.word(address).ok_or(());
        match self.tables.unwind_frame(at, &mut registers, &mut self.cache, &mut read) {
            Ok(Some(caller)) => {
                let at = FrameAddress::from_return_address(caller);
                Ok(at.map(|at| Cursor { at, registers, is_interrupted: false }))
            }
            Ok(None) => Ok(None),
            Err(_) => Err(Truncated::NoUnwindInformation),
        }
    }

    /// The caller of a frame in code without unwind tables, such as code that was compiled at run time. A
    /// return address counts only if it follows a call, because the words may be anything.
    fn by_frame_pointer(
        &mut self,
        cursor: &Cursor,
        stack: &StackMemory<'_>,
    ) -> Result<Option<Cursor>, Truncated> {
        let Registers { sp, fp, .. } = cursor.registers();
        if cursor.is_interrupted {
            // It may be at its first instruction, where the frame pointer is still its caller's.
            return Err(Truncated::NoUnwindInformation);
        }
        // A function that makes a system call and nothing else keeps no frame pointer.
        if !cursor.at.is_return_address()
            && let Some(pc) = stack.word(sp).filter(|pc| self.calls.has(&self.image, *pc))
        {
            return Ok(self.cursor(pc, sp.wrapping_add(8), fp));
        }
        if fp == 0 {
            return Ok(None);
        }
        let caller = || {
            let (caller_fp, pc) = (stack.word(fp)?, stack.word(fp.checked_add(8)?)?);
            (fp >= sp && self.calls.has(&self.image, pc)).then(|| self.cursor(pc, fp + 16, caller_fp))?
        };
        caller().map(Some).ok_or(Truncated::NoUnwindInformation)
    }

    fn cursor(&self, pc: u64, sp: u64, fp: u64) -> Option<Cursor> {
        let at = FrameAddress::from_return_address(pc)?;
        Some(Cursor { at, registers: registers(&self.image, pc, sp, fp, pc), is_interrupted: false })
    }

    /// Whether the file that is mapped at an address has unwind tables.
    fn has_tables(&self, address: u64) -> bool {
        let index = self.with_tables.partition_point(|range| range.end <= address);
        self.with_tables.get(index).is_some_and(|range| range.contains(&address))
    }

    /// The runtime that a frame belongs to.
    fn owner(&mut self, cursor: &Cursor) -> Option<&mut Box<dyn Runtime>> {
        let address = cursor.address();
        self.runtimes.iter_mut().map(|(_, runtime)| runtime).find(|runtime| runtime.owns(address))
    }
}

impl Cursor {
    /// The frame at which the task entered the kernel.
    pub(super) fn innermost(copy: &StackCopy, image: &Image) -> Self {
        Self {
            at: FrameAddress::from_instruction_pointer(copy.ip),
            registers: registers(image, copy.ip, copy.sp, copy.fp, copy.lr),
            is_interrupted: false,
        }
    }

    /// The same frame with a frame pointer that is not valid anywhere.
    fn poisoned(&self, image: &Image) -> Self {
        let Registers { pc, sp, .. } = self.registers();
        let registers = registers(image, pc, sp, POISON, link_register(&self.registers));
        Self { registers, ..self.clone() }
    }

    /// An address inside the instruction that the frame is at.
    pub(super) fn address(&self) -> u64 {
        self.at.address_for_lookup()
    }

    /// The frame as the one at `index` of the list.
    pub(super) fn spot(&self, index: usize) -> Spot {
        Spot { index, address: self.address(), sp: self.registers.sp() }
    }

    fn registers(&self) -> Registers {
        let (sp, fp) = (self.registers.sp(), frame_pointer(&self.registers));
        Registers { pc: self.at.address(), inside: self.address(), sp, fp }
    }
}

/// A mapping, as a runtime in the file with this identity sees it.
fn code_mapping(mapping: &Mapping, identity: FileIdentity, binary: Option<&Binary>) -> CodeMapping {
    let bias = || binary?.segments.bias(mapping);
    let owner = match &mapping.backing {
        Backing::Anonymous => CodeOwner::Generated,
        Backing::File { module: Some(module), .. } if module.identity() == identity => {
            bias().map_or(CodeOwner::Other, |bias| CodeOwner::Own { bias })
        }
        Backing::File { .. } | Backing::Vdso => CodeOwner::Other,
    };
    CodeMapping { range: mapping.start..mapping.end, owner }
}

fn path(mapping: &Mapping) -> String {
    match &mapping.backing {
        Backing::File { path, .. } => path.to_string_lossy().into_owned(),
        Backing::Vdso | Backing::Anonymous => String::new(),
    }
}

#[cfg(target_arch = "x86_64")]
fn registers(_image: &Image, ip: u64, sp: u64, fp: u64, _lr: u64) -> UnwindRegsNative {
    UnwindRegsNative::new(ip, sp, fp)
}

/// Programs may sign return addresses in the bits that no address of a process uses. The number of these bits
/// depends on the kernel; the last mapping, next to the stack, uses all others.
#[cfg(target_arch = "aarch64")]
fn registers(image: &Image, _ip: u64, sp: u64, fp: u64, lr: u64) -> UnwindRegsNative {
    let last = image.mappings.last().map_or(u64::MAX, |mapping| mapping.start);
    let unsigned = framehop::aarch64::PtrAuthMask::from_max_known_address(last);
    UnwindRegsNative::new_with_ptr_auth_mask(unsigned, lr, sp, fp)
}

/// Converts a caller for the inputs of a stack.
fn step(caller: &Result<Option<Cursor>, Truncated>) -> UnwindStep {
    match caller {
        Ok(Some(cursor)) => {
            let Registers { pc, sp, fp, .. } = cursor.registers();
            UnwindStep::Caller { pc, sp, fp }
        }
        Ok(None) => UnwindStep::Outermost,
        Err(_) => UnwindStep::Failed,
    }
}

/// The reads that succeeded.
fn found(reads: &[(u64, Option<u64>)]) -> Vec<Read> {
    reads.iter().filter_map(|(address, word)| Some((*address, (*word)?))).collect()
}

#[cfg(target_arch = "x86_64")]
fn link_register(_: &UnwindRegsNative) -> u64 {
    0
}

#[cfg(target_arch = "aarch64")]
fn link_register(registers: &UnwindRegsNative) -> u64 {
    registers.lr()
}

#[cfg(target_arch = "x86_64")]
fn frame_pointer(registers: &UnwindRegsNative) -> u64 {
    registers.bp()
}

#[cfg(target_arch = "aarch64")]
fn frame_pointer(registers: &UnwindRegsNative) -> u64 {
    registers.fp()
}

#[cfg(test)]
mod tests {
    use tcpclose_common::recipe::source;
    use zerocopy::FromZeros as _;

    use super::*;
    use crate::event::Frame;

    /// Owns 0x1000 to 0x2000.
    struct Fake(Vec<Caller>);

    impl Runtime for Fake {
        fn owns(&self, address: u64) -> bool {
            (0x1000..0x2000).contains(&address)
        }

        fn name(&mut self, frame: &Registers, _: &StackMemory<'_>) -> Arc<[Arc<Frame>]> {
            let named = |symbol: &str| {
                Arc::new(Frame { symbol: Some(symbol.to_owned()), ..Frame::nameless(frame.pc) })
            };
            // An address that it owns but knows nothing about.
            if frame.inside < 0x1100 { Arc::new([]) } else { Arc::new([named("inner"), named("outer")]) }
        }

        fn caller(&mut self, frame: &Registers, stack: &StackMemory<'_>) -> Caller {
            assert_eq!(stack.word(0x9000), Some(7));
            if frame.fp == POISON { Caller::Unknown } else { self.0.pop().unwrap_or(Caller::Unknown) }
        }
    }

    fn cursor(address: u64) -> Cursor {
        let mut copy = StackCopy::new_zeroed();
        (copy.ip, copy.sp) = (address, 0x9000);
        Cursor::innermost(&copy, &Image::default())
    }

    #[test]
    fn a_runtime_names_its_frames_and_finds_their_callers() {
        let mut process = ProcessUnwinder::new(Arc::default(), None, &mut Binaries::default());
        let at = |pc| Caller::At { pc, sp: 0x9100, fp: 0x9200 };
        let metadata = std::fs::metadata("/proc/self/exe").unwrap();
        let identity = FileIdentity::of(&metadata).unwrap();
        let runtime = Fake(vec![Caller::Unknown, Caller::ByTables, at(0), at(0x5001)]);
        process.runtimes.push((identity, Box::new(runtime)));
        let bytes = 7u64.to_ne_bytes();
        let stack = StackMemory::new(0x9000, &bytes);

        let (mut frames, mut inputs) = (Vec::new(), Inputs::new(0x9000));
        for address in [0x1200, 0x1000, 0x5000] {
            process.name(&cursor(address), &stack, &mut inputs, &mut frames);
        }
        let symbol = |frame: &UnwoundFrame| match frame {
            UnwoundFrame::Named(frame) => frame.symbol.clone().unwrap(),
            UnwoundFrame::Instruction(address) | UnwoundFrame::Return(address) => format!("{address:x}"),
        };
        assert_eq!(frames.iter().map(symbol).collect::<Vec<_>>(), ["inner", "outer", "1000", "5000"]);

        assert_eq!(inputs.finish(), None, "it has read nothing");

        let mut caller = || {
            let mut inputs = Inputs::new(0x9000);
            let caller = process.caller(&cursor(0x1200), &stack, &mut inputs);
            (caller.map(|it| it.map(|it| it.registers())), inputs)
        };
        let (found, inputs) = caller();
        let expected = Registers { pc: 0x5001, inside: 0x5000, sp: 0x9100, fp: 0x9200 };
        assert_eq!(found, Ok(Some(expected)));
        let (words, _) = inputs.finish().unwrap();
        let sources: Vec<_> = words.iter().map(|word| (word.source, word.offset)).collect();
        assert_eq!(sources, [(source::FRAME_POINTER, 0), (source::MEMORY, 0)]);
        assert_eq!(words[1].expected, 7);
        assert_eq!(caller().0, Ok(None), "a return address of 0");
        assert_eq!(
            caller().0,
            Ok(None),
            "no tables at this address, and a frame pointer of 0 ends the stack"
        );
        assert_eq!(caller().0, Err(Truncated::RuntimeUnreadable), "the runtime does not know");
    }
}
