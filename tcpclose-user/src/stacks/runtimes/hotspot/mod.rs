//! Frames of the virtual machine of `OpenJDK`. It needs no restart and no agent: `libjvm.so` exports tables of its own structures
//! for debuggers, and from these the code cache, the frames of compiled and interpreted methods, and their names and lines
//! can be read out of the process's memory.
//!
//! <https://github.com/openjdk/jdk/blob/jdk-17-ga/src/hotspot/share/runtime/vmStructs.hpp>
//!
//! The machine runs on while it is read. What does not fit together is left out: a frame then has its address and nothing
//! else, and the walk ends if its caller cannot be told.

mod code;
mod layout;
mod method;
mod target;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use framehop::FrameAddress;

use self::{
    code::{Blob, CodeCache},
    layout::Layout,
    method::Methods,
    target::Target,
};
use super::{Call, Memory};
use crate::event::Frame;

pub(super) use self::layout::Symbols;

/// How long names are remembered while the machine runs. A class that is unloaded leaves its memory to others.
const REMEMBER: Duration = Duration::from_secs(1);

/// How many are remembered meanwhile.
const MAX_NAMES: usize = 8_192;

/// Where an interpreted frame keeps things, in words from its frame pointer; the same on x86-64 and arm64, from JDK 9 on.
///
/// <https://github.com/openjdk/jdk/blob/jdk-17-ga/src/hotspot/cpu/x86/frame_x86.hpp>
mod interpreted {
    pub(super) const SENDER_SP: i64 = -1;
    pub(super) const METHOD: i64 = -3;
    pub(super) const BYTECODE: i64 = -8;
}

/// A running virtual machine.
pub(super) struct Vm {
    target: Target,
    layout: Layout,
    code: CodeCache,
    methods: Methods,
    /// What code there is at an address.
    blobs: HashMap<u64, Blob>,
    /// The frames that are at one address, where methods are inlined.
    named: HashMap<Position, Arc<[Arc<Frame>]>>,
    since: Instant,
}

/// Where a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Position {
    pc: u64,
    /// Addresses of the method and of its bytecode, where it is interpreted; else 0.
    interpreted: (u64, u64),
}

/// The caller of a frame.
pub(super) struct Sender {
    pub(super) pc: u64,
    pub(super) sp: u64,
    pub(super) fp: u64,
}

impl Vm {
    /// The one in process `pid`, whose `libjvm.so` is at `bias`. `None` if it cannot be read, or is of a version whose
    /// structures are not understood.
    pub(super) fn open(pid: u32, bias: u64, symbols: &Symbols) -> Option<Self> {
        let target = Target::open(pid)?;
        let layout = match Layout::read(&target, bias, symbols) {
            Ok(layout) => layout,
            Err(missing) => {
                log::debug!(
                    "process {pid}: no names of Java methods: its libjvm.so does not tell of {missing}"
                );
                return None;
            }
        };
        let code = CodeCache::read(&target, &layout)?;
        let methods = Methods::new(&layout);
        let (blobs, named) = (HashMap::new(), HashMap::new());
        Some(Self { target, layout, code, methods, blobs, named, since: Instant::now() })
    }

    /// To be called before each stack.
    pub(super) fn begin(&mut self) {
        let is_old = self.since.elapsed() >= REMEMBER || self.named.len() >= MAX_NAMES;
        // Of a machine that has ended, what is known is all that there will be.
        if is_old && self.target.u64(self.layout.heaps).is_some() {
            self.named.clear();
            self.blobs.clear();
            self.since = Instant::now();
        }
    }

    /// Whether code of this machine's making is at an address.
    pub(super) fn has(&self, address: u64) -> bool {
        self.code.has(address)
    }

    /// Names a frame of the machine's, and says where its caller is.
    pub(super) fn step(
        &mut self,
        at: FrameAddress,
        sp: u64,
        fp: u64,
        stack: &Memory<'_>,
        calls: &mut Vec<Call>,
    ) -> Option<Sender> {
        let pc = at.address();
        let Some(blob) = self.blob(at.address_for_lookup()) else {
            calls.push(Call::Code(pc));
            return None;
        };
        let word = |base: u64, words: i64| stack.word(base.checked_add_signed(words * 8)?);
        if blob.is_interpreter() {
            let method = word(fp, interpreted::METHOD).unwrap_or(0);
            let bytecode = word(fp, interpreted::BYTECODE).unwrap_or(0);
            self.name(pc, &blob, (method, bytecode), calls);
            let sender_sp = word(fp, interpreted::SENDER_SP)?;
            return Some(Sender { pc: word(fp, 1)?, sp: sender_sp, fp: word(fp, 0)? });
        }
        self.name(pc, &blob, (0, 0), calls);
        if blob.frame_words == 0 {
            // Such as the stub by which the machine calls Java: it keeps a frame pointer.
            return Some(Sender { pc: word(fp, 1)?, sp: fp.checked_add(16)?, fp: word(fp, 0)? });
        }
        let sender_sp = sp.checked_add(u64::from(blob.frame_words) * 8)?;
        Some(Sender { pc: word(sender_sp, -1)?, sp: sender_sp, fp: word(sender_sp, -2)? })
    }

    fn blob(&mut self, address: u64) -> Option<Blob> {
        let Self { target, layout, code, blobs, .. } = self;
        if let Some(known) = blobs.get(&address) {
            return Some(known.clone());
        }
        if !code.is_committed(address) {
            // It has grown since.
            *code = CodeCache::read(target, layout)?;
        }
        let blob = code.blob(target, layout, address)?;
        blobs.insert(address, blob.clone());
        Some(blob)
    }

    fn name(&mut self, pc: u64, blob: &Blob, interpreted: (u64, u64), calls: &mut Vec<Call>) {
        let Self { target, layout, methods, named, .. } = self;
        let key = Position { pc, interpreted };
        let frames = named.entry(key).or_insert_with(|| {
            let (target, layout) = (&*target, &*layout);
            let found = if blob.is_interpreter() {
                methods.interpreted(target, layout, interpreted).into_iter().collect()
            } else if blob.is_method() {
                methods.compiled(target, layout, blob, pc)
            } else {
                vec![method::Place { symbol: Some(blob.name.to_string()), ..method::Place::default() }]
            };
            let outermost = found.len().saturating_sub(1);
            let frame = |(index, place): (usize, method::Place)| {
                Arc::new(Frame {
                    address: format!("{pc:#x}"),
                    symbol: place.symbol,
                    module: None,
                    offset: None,
                    file: place.file,
                    line: place.line,
                    inlined: index < outermost,
                })
            };
            found.into_iter().enumerate().map(frame).collect()
        });
        if frames.is_empty() {
            calls.push(Call::Code(pc));
        }
        calls.extend(frames.iter().cloned().map(Call::Named));
    }
}
