//! A process: the unwind tables of all that it has mapped, and its language runtimes.

use std::sync::Arc;

use framehop::{
    CacheNative, FrameAddress, MayAllocateDuringUnwind, Module, UnwindRegsNative, Unwinder as _,
    UnwinderNative,
};
use tcpclose_common::record::StackCopy;

use super::binary::Binaries;
use crate::{
    attribute::{
        mappings::{Backing, Identity, Mapping},
        process::Image,
    },
    stacks::{
        frame::UnwoundFrame,
        memory::{ProcessMemory, StackMemory},
        runtimes::{Caller, Registers, Runtime},
    },
};

/// What it takes to unwind stacks of one process.
pub(super) struct ProcessUnwinder {
    image: Arc<Image>,
    tables: UnwinderNative<Arc<[u8]>, MayAllocateDuringUnwind>,
    cache: CacheNative<MayAllocateDuringUnwind>,
    /// Each with the file that it was recognized in.
    runtimes: Vec<(Identity, Box<dyn Runtime>)>,
    /// When it was last used, by the [`Unwinder`](super::Unwinder)'s clock.
    pub(super) used: u64,
}

/// A frame, while a stack is being unwound.
#[derive(Clone)]
pub(super) struct Cursor {
    at: FrameAddress,
    registers: UnwindRegsNative,
}

impl ProcessUnwinder {
    /// A process with these mappings. `older` is what the same program image had before it mapped more.
    pub(super) fn new(image: Arc<Image>, older: Option<Self>, binaries: &mut Binaries) -> Self {
        let mut tables = UnwinderNative::new();
        let mut runtimes = older.map(|older| older.runtimes).unwrap_or_default();
        for mapping in &image.mappings {
            let Backing::File { module: Some(module), .. } = &mapping.backing else { continue };
            let Some(binary) = binaries.get(&image, mapping) else { continue };
            let Some(bias) = binary.segments.bias(mapping) else { continue };
            let identity = module.identity();
            if !binary.runtimes.is_empty() && runtimes.iter().all(|(known, _)| *known != identity) {
                let attached = binary
                    .runtimes
                    .iter()
                    .filter_map(|program| program.attach(image.pid, ProcessMemory::open(image.pid)?, bias));
                runtimes.extend(attached.map(|runtime| (identity, runtime)));
            }
            let range = mapping.start..mapping.end;
            tables.add_module(Module::new(path(mapping), range, bias, binary.sections.clone()));
        }
        Self { image, tables, cache: CacheNative::new(), runtimes, used: 0 }
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

    /// Appends the frame at the cursor; several where a runtime names several.
    pub(super) fn name(&mut self, cursor: &Cursor, stack: &StackMemory<'_>, frames: &mut Vec<UnwoundFrame>) {
        let named = self.owner(cursor).map(|runtime| runtime.name(&cursor.registers(), stack));
        match named.filter(|named| !named.is_empty()) {
            Some(named) => frames.extend(named.iter().cloned().map(UnwoundFrame::Named)),
            None => frames.push(UnwoundFrame::Address(cursor.at.address())),
        }
    }

    /// The caller of the frame at the cursor; `None` if it is the outermost, or its caller is not known.
    pub(super) fn caller(&mut self, cursor: &Cursor, stack: &StackMemory<'_>) -> Option<Cursor> {
        match self.owner(cursor).map_or(Caller::ByTables, |it| it.caller(&cursor.registers(), stack)) {
            Caller::At { pc, sp, fp } => Some(Cursor {
                at: FrameAddress::from_return_address(pc)?,
                registers: registers(&self.image, pc, sp, fp, pc),
            }),
            Caller::ByTables => {
                let Cursor { at, mut registers } = cursor.clone();
                let mut read = |address| stack.word(address).ok_or(());
                let caller =
                    self.tables.unwind_frame(at, &mut registers, &mut self.cache, &mut read).ok()??;
                Some(Cursor { at: FrameAddress::from_return_address(caller)?, registers })
            }
            Caller::Unknown => None,
        }
    }

    /// The runtime that a frame belongs to.
    fn owner(&mut self, cursor: &Cursor) -> Option<&mut Box<dyn Runtime>> {
        let address = cursor.address();
        self.runtimes.iter_mut().map(|(_, runtime)| runtime).find(|runtime| runtime.owns(address))
    }
}

impl Cursor {
    /// The frame that the kernel half saw.
    pub(super) fn innermost(copy: &StackCopy, image: &Image) -> Self {
        Self {
            at: FrameAddress::from_instruction_pointer(copy.ip),
            registers: registers(image, copy.ip, copy.sp, copy.fp, copy.lr),
        }
    }

    /// An address inside the instruction that the frame is at.
    pub(super) fn address(&self) -> u64 {
        self.at.address_for_lookup()
    }

    fn registers(&self) -> Registers {
        let (sp, fp) = (self.registers.sp(), frame_pointer(&self.registers));
        Registers { pc: self.at.address(), inside: self.address(), sp, fp }
    }
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

/// Programs may sign return addresses, in the bits that no address of a process uses. How many those are depends on the
/// kernel; what is mapped last, next to the stack, uses all others.
#[cfg(target_arch = "aarch64")]
fn registers(image: &Image, _ip: u64, sp: u64, fp: u64, lr: u64) -> UnwindRegsNative {
    let last = image.mappings.last().map_or(u64::MAX, |mapping| mapping.start);
    let unsigned = framehop::aarch64::PtrAuthMask::from_max_known_address(last);
    UnwindRegsNative::new_with_ptr_auth_mask(unsigned, lr, sp, fp)
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
                Arc::new(Frame {
                    address: format!("{:#x}", frame.pc),
                    symbol: Some(symbol.to_owned()),
                    module: None,
                    offset: None,
                    file: None,
                    line: None,
                    inlined: false,
                })
            };
            // An address that it owns but knows nothing of.
            if frame.inside < 0x1100 { Arc::new([]) } else { Arc::new([named("inner"), named("outer")]) }
        }

        fn caller(&mut self, _: &Registers, stack: &StackMemory<'_>) -> Caller {
            assert_eq!(stack.word(0x9000), Some(7));
            self.0.pop().unwrap_or(Caller::Unknown)
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
        let identity = Identity::of(&metadata).unwrap();
        let runtime = Fake(vec![Caller::Unknown, Caller::ByTables, at(0), at(0x5001)]);
        process.runtimes.push((identity, Box::new(runtime)));
        let bytes = 7u64.to_ne_bytes();
        let stack = StackMemory::new(0x9000, &bytes);

        let mut frames = Vec::new();
        for address in [0x1200, 0x1000, 0x5000] {
            process.name(&cursor(address), &stack, &mut frames);
        }
        let symbol = |frame: &UnwoundFrame| match frame {
            UnwoundFrame::Named(frame) => frame.symbol.clone().unwrap(),
            UnwoundFrame::Address(address) => format!("{address:x}"),
        };
        assert_eq!(frames.iter().map(symbol).collect::<Vec<_>>(), ["inner", "outer", "1000", "5000"]);

        let caller = process.caller(&cursor(0x1200), &stack).unwrap();
        let expected = Registers { pc: 0x5001, inside: 0x5000, sp: 0x9100, fp: 0x9200 };
        assert_eq!(caller.registers(), expected);
        assert!(process.caller(&cursor(0x1200), &stack).is_none(), "a return address of 0");
        assert!(process.caller(&cursor(0x1200), &stack).is_none(), "there are no tables at this address");
        assert!(process.caller(&cursor(0x1200), &stack).is_none(), "the runtime does not know");
    }
}
