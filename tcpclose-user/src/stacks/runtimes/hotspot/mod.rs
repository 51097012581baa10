//! HotSpot, the virtual machine of OpenJDK. It needs no restart and no agent: `libjvm.so` exports tables of
//! its own structures for debuggers. With these the code cache, the frames of compiled and interpreted
//! methods, and their names and lines can be read from the process's memory.
//!
//! <https://github.com/openjdk/jdk/blob/jdk-17-ga/src/hotspot/share/runtime/vmStructs.hpp>
//!
//! The machine continues to run while it is read. Inconsistent data is left out: the frame then has only its
//! address, and the stack ends if its caller is not known.

mod code;
mod layout;
mod method;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use self::{
    code::{Blob, CodeCache},
    layout::{HotspotLayout, HotspotSymbols},
    method::Methods,
};
use super::{BinarySymbols, Caller, Registers, Runtime, RuntimeBinary};
use crate::{
    event::Frame,
    stacks::memory::{ProcessMemory, StackMemory},
};

/// How long names are cached while the machine runs. The memory of an unloaded class is reused for others.
const CACHE_FOR: Duration = Duration::from_secs(1);

/// The number of names that are cached.
const MAX_NAMES: usize = 8_192;

/// The slots of an interpreted frame, in words from its frame pointer. They are the same on x86-64 and arm64,
/// from JDK 9 on.
///
/// <https://github.com/openjdk/jdk/blob/jdk-17-ga/src/hotspot/cpu/x86/frame_x86.hpp>
mod interpreted {
    pub(super) const CALLER_SP: i64 = -1;
    pub(super) const METHOD: i64 = -3;
    pub(super) const BYTECODE: i64 = -8;
}

/// Recognizes `libjvm.so`.
pub fn recognize(symbols: &dyn BinarySymbols) -> Option<Box<dyn RuntimeBinary>> {
    HotspotSymbols::find(&|name| symbols.dynamic(name).map(|range| range.start))
        .map(|symbols| Box::new(HotspotLibrary(symbols)) as _)
}

/// A `libjvm.so`.
struct HotspotLibrary(HotspotSymbols);

impl RuntimeBinary for HotspotLibrary {
    fn attach(&self, pid: u32, memory: ProcessMemory, bias: u64) -> Option<Box<dyn Runtime>> {
        Vm::open(pid, memory, bias, &self.0).map(|vm| Box::new(vm) as _)
    }
}

/// A running virtual machine.
struct Vm {
    memory: ProcessMemory,
    layout: HotspotLayout,
    code: CodeCache,
    methods: Methods,
    /// The pieces of code at addresses of frames.
    blobs: HashMap<u64, Blob>,
    /// The frames at one position: several where methods are inlined.
    named: HashMap<Position, Arc<[Arc<Frame>]>>,
    /// When the two were last emptied.
    since: Instant,
}

/// The position of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Position {
    pc: u64,
    /// Addresses of the method and of its bytecode if it is interpreted; otherwise 0.
    interpreted: (u64, u64),
}

impl Vm {
    /// `None` if it cannot be read, or is of a version whose structures are not known.
    fn open(pid: u32, memory: ProcessMemory, bias: u64, symbols: &HotspotSymbols) -> Option<Self> {
        let layout = match HotspotLayout::read(&memory, bias, symbols) {
            Ok(layout) => layout,
            Err(missing) => {
                log::debug!(
                    "process {pid}: no names of Java methods: its libjvm.so does not describe {missing}"
                );
                return None;
            }
        };
        let code = CodeCache::read(&memory, &layout)?;
        let methods = Methods::new(&layout);
        let (blobs, named) = (HashMap::new(), HashMap::new());
        Some(Self { memory, layout, code, methods, blobs, named, since: Instant::now() })
    }

    fn blob(&mut self, address: u64) -> Option<Blob> {
        let Self { memory, layout, code, blobs, .. } = self;
        if let Some(known) = blobs.get(&address) {
            return Some(known.clone());
        }
        if !code.is_committed(address) {
            // The code cache has grown since.
            *code = CodeCache::read(memory, layout)?;
        }
        let blob = code.blob(memory, layout, address)?;
        blobs.insert(address, blob.clone());
        Some(blob)
    }

    fn describe(&mut self, pc: u64, blob: &Blob, interpreted: (u64, u64)) -> Arc<[Arc<Frame>]> {
        let Self { memory, layout, methods, named, .. } = self;
        let key = Position { pc, interpreted };
        let frames = named.entry(key).or_insert_with(|| {
            let (memory, layout) = (&*memory, &*layout);
            let found = if blob.is_interpreter() {
                methods.interpreted(memory, layout, interpreted).into_iter().collect()
            } else if blob.is_method() {
                methods.compiled(memory, layout, blob, pc)
            } else {
                vec![method::MethodLocation {
                    symbol: Some(blob.name.to_string()),
                    ..method::MethodLocation::default()
                }]
            };
            let outermost = found.len().saturating_sub(1);
            let frame = |(index, place): (usize, method::MethodLocation)| {
                Arc::new(Frame {
                    symbol: place.symbol,
                    file: place.file,
                    line: place.line,
                    inlined: index < outermost,
                    ..Frame::nameless(pc)
                })
            };
            found.into_iter().enumerate().map(frame).collect()
        });
        Arc::clone(frames)
    }
}

impl Runtime for Vm {
    fn begin_stack(&mut self) {
        let is_old = self.since.elapsed() >= CACHE_FOR || self.named.len() >= MAX_NAMES;
        // Once the machine has exited, only cached names are available.
        if is_old && self.memory.is_there(self.layout.heaps) {
            self.named.clear();
            self.blobs.clear();
            self.since = Instant::now();
        }
    }

    fn owns(&self, address: u64) -> bool {
        self.code.has(address)
    }

    fn name(&mut self, frame: &Registers, stack: &StackMemory<'_>) -> Arc<[Arc<Frame>]> {
        let Some(blob) = self.blob(frame.inside) else { return Arc::new([]) };
        let slot = |words| slot(stack, frame.fp, words).unwrap_or(0);
        let interpreted = if blob.is_interpreter() {
            (slot(interpreted::METHOD), slot(interpreted::BYTECODE))
        } else {
            (0, 0)
        };
        self.describe(frame.pc, &blob, interpreted)
    }

    fn caller(&mut self, frame: &Registers, stack: &StackMemory<'_>) -> Caller {
        let caller = |blob: Blob| {
            if blob.is_interpreter() {
                let sp = slot(stack, frame.fp, interpreted::CALLER_SP)?;
                return Some(Caller::At { pc: slot(stack, frame.fp, 1)?, sp, fp: slot(stack, frame.fp, 0)? });
            }
            if blob.frame_words == 0 {
                // This is code such as the stub through which the machine calls Java, which keeps a frame
                // pointer.
                let sp = frame.fp.checked_add(16)?;
                return Some(Caller::At { pc: slot(stack, frame.fp, 1)?, sp, fp: slot(stack, frame.fp, 0)? });
            }
            let sp = frame.sp.checked_add(u64::from(blob.frame_words) * 8)?;
            Some(Caller::At { pc: slot(stack, sp, -1)?, sp, fp: slot(stack, sp, -2)? })
        };
        self.blob(frame.inside).and_then(caller).unwrap_or(Caller::Unknown)
    }
}

/// The word at this many words from an address.
fn slot(stack: &StackMemory<'_>, base: u64, words: i64) -> Option<u64> {
    stack.word(base.checked_add_signed(words * 8)?)
}
