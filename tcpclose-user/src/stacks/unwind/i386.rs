//! Stacks of i386 programs, which x86-64 kernels run. framehop unwinds the native architecture only, so the
//! same tables (`.eh_frame`) are evaluated here. These stacks have no recipes: each is copied.

use std::{collections::HashMap, sync::Arc};

use gimli::{
    BaseAddresses, CfaRule, EhFrame, EhFrameHdr, Encoding, EndianSlice, EvaluationResult, Expression, Format,
    LittleEndian, Location, Register, RegisterRule, UnwindContext, UnwindSection as _, UnwindTableRow, Value,
    X86,
};
use object::{Architecture, Object as _, ObjectSection as _, ReadCache, ReadRef};
use tcpclose_common::{record::StackCopy, stack::MAX_FRAMES};

use crate::{
    event::Truncated,
    processes::{
        Image,
        mappings::{Backing, FileIdentity, Mapping},
    },
    stacks::{
        elf::Segments,
        frame::UnwoundFrame,
        memory::{ProcessMemory, StackMemory},
    },
};

/// The number of files that are cached. When there are more, all are dropped and read again.
const MAX_FILES: usize = 64;

/// The largest size of a table, in bytes.
const MAX_TABLE: u64 = 16 << 20;

/// The largest vDSO, in bytes: it has two pages.
const MAX_VDSO: usize = 64 << 10;

/// The number of operations of an expression that are evaluated.
const MAX_OPERATIONS: u32 = 64;

const ENCODING: Encoding = Encoding { address_size: 4, format: Format::Dwarf32, version: 4 };

/// The number of general registers, which the tables number from 0.
///
/// System V Application Binary Interface, Intel386 Architecture Processor Supplement, table 2.14.
const GENERAL: u16 = 8;

/// Unwinds stacks of i386 programs, and caches the files that this needs.
#[derive(Default)]
pub(super) struct I386 {
    files: HashMap<FileIdentity, Option<Arc<I386Tables>>>,
    /// The kernel maps the same one into all i386 processes.
    vdso: Option<Arc<I386Tables>>,
}

/// The unwind tables of a file.
struct I386Tables {
    segments: Segments,
    frames: Vec<u8>,
    /// `.eh_frame_hdr`, an index of the frames.
    index: Vec<u8>,
    bases: BaseAddresses,
}

/// The registers in a frame; `None` are those that were not saved.
#[derive(Clone)]
struct I386Registers {
    ip: u32,
    general: [Option<u32>; GENERAL as usize],
}

impl I386 {
    /// Appends the frames of a copied stack, innermost first; `None` if this is no stack of an i386 program.
    ///
    /// The inner result is an error if the last of them is not the outermost.
    pub(super) fn walk(
        &mut self,
        copy: &StackCopy,
        stack: &StackMemory<'_>,
        image: &mut impl FnMut(&[u64]) -> Option<Arc<Image>>,
        frames: &mut Vec<UnwoundFrame>,
    ) -> Option<Result<(), Truncated>> {
        let low = |register: u64| u32::try_from(register).ok();
        let mut registers = I386Registers { ip: low(copy.ip)?, general: [None; GENERAL as usize] };
        registers.set(X86::ESP, Some(low(copy.sp)?));
        registers.set(X86::EBP, low(copy.fp));
        let mut mapped = image(&[copy.ip])?;
        let mut found = Some(self.tables(&mapped, copy.ip)?);
        loop {
            let address = registers.ip.into();
            let is_innermost = frames.is_empty();
            frames.push(if is_innermost { UnwoundFrame::Instruction } else { UnwoundFrame::Return }(address));
            if frames.len() >= MAX_FRAMES {
                return Some(Err(Truncated::FrameLimit));
            }
            // A return address may be the first one of another function.
            let address = u64::from(registers.ip) - u64::from(frames.len() > 1);
            let Some((tables, bias)) = found.take().or_else(|| self.tables(&mapped, address)) else {
                return Some(Err(Truncated::NoUnwindInformation));
            };
            registers = match tables.caller(address.wrapping_sub(bias), &registers, stack) {
                Ok(Some(caller)) => caller,
                Ok(None) => return Some(Ok(())),
                Err(why) => return Some(Err(why)),
            };
            let inside = u64::from(registers.ip).saturating_sub(1);
            if mapped.mapping(inside).is_none() {
                // The code may have been mapped since.
                match image(&[inside]).filter(|newer| newer.mapping(inside).is_some()) {
                    Some(newer) => mapped = newer,
                    None => return Some(Err(Truncated::NoCode)),
                }
            }
        }
    }

    /// The tables of the i386 code that is mapped at an address, and the difference between addresses in
    /// memory and in the tables.
    fn tables(&mut self, image: &Image, address: u64) -> Option<(Arc<I386Tables>, u64)> {
        let mapping = image.mapping(address)?;
        let tables = match &mapping.backing {
            Backing::File { module: Some(module), .. } => {
                let identity = module.identity();
                if self.files.len() >= MAX_FILES && !self.files.contains_key(&identity) {
                    self.files.clear();
                }
                let read = || {
                    let file = module.open(image.pid, mapping.start, mapping.end)?;
                    I386Tables::read(&ReadCache::new(file)).map(Arc::new)
                };
                self.files.entry(identity).or_insert_with(read).clone()?
            }
            Backing::Vdso => {
                if self.vdso.is_none() {
                    self.vdso = I386Tables::of_vdso(image.pid, mapping).map(Arc::new);
                }
                self.vdso.clone()?
            }
            Backing::File { module: None, .. } | Backing::Anonymous => return None,
        };
        let bias = tables.segments.bias(mapping)?;
        Some((tables, bias))
    }
}

impl I386Tables {
    fn of_vdso(pid: u32, mapping: &Mapping) -> Option<Self> {
        let size = usize::try_from(mapping.end.checked_sub(mapping.start)?).ok()?;
        Self::read(&*ProcessMemory::open(pid)?.up_to(mapping.start, size.min(MAX_VDSO)))
    }

    /// `None` if this is no file with i386 code, or if it has no tables.
    fn read<'data>(data: impl ReadRef<'data>) -> Option<Self> {
        let is_i386 = |file: &object::File<'data, _>| file.architecture() == Architecture::I386;
        let file = object::File::parse(data).ok().filter(is_i386)?;
        let section = |name| {
            let section = file.section_by_name(name).filter(|section| section.size() <= MAX_TABLE)?;
            Some((section.address(), section.data().ok()?.to_owned()))
        };
        let start = |name| file.section_by_name(name).map_or(0, |section| section.address());
        let (frames_at, frames) = section(".eh_frame")?;
        let (index_at, index) = section(".eh_frame_hdr").unwrap_or_default();
        let bases = BaseAddresses::default()
            .set_eh_frame(frames_at)
            .set_eh_frame_hdr(index_at)
            .set_text(start(".text"))
            .set_got(start(".got"));
        Some(Self { segments: Segments::read(&file), frames, index, bases })
    }

    /// The registers of the caller; `None` if there is none. `address` is that in the tables.
    fn caller(
        &self,
        address: u64,
        registers: &I386Registers,
        stack: &StackMemory<'_>,
    ) -> Result<Option<I386Registers>, Truncated> {
        let mut frames = EhFrame::new(&self.frames, LittleEndian);
        frames.set_address_size(ENCODING.address_size);
        let mut context = UnwindContext::new();
        let row = self.row(&frames, address, &mut context).ok_or(Truncated::NoUnwindInformation)?;
        let word = |address: u32| {
            let why = if stack.is_above(address.into()) {
                Truncated::CopyEnded
            } else {
                Truncated::NoUnwindInformation
            };
            stack.word_32(address.into()).ok_or(why)
        };
        // The canonical frame address: the stack pointer before the call.
        let cfa = match row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => {
                let base = registers.get(*register).ok_or(Truncated::NoUnwindInformation)?;
                base.wrapping_add(low(*offset))
            }
            CfaRule::Expression(expression) => evaluate(expression.get(&frames), None, registers, word)?,
        };
        // Each caller's frame is further up.
        if registers.get(X86::ESP).is_none_or(|sp| cfa <= sp) {
            return Err(Truncated::NoUnwindInformation);
        }
        let saved = |register| match row.register(register) {
            None | Some(RegisterRule::SameValue) => Ok(registers.get(register)),
            Some(RegisterRule::Undefined) => Ok(None),
            Some(RegisterRule::Offset(offset)) => word(cfa.wrapping_add(low(offset))).map(Some),
            Some(RegisterRule::ValOffset(offset)) => Ok(Some(cfa.wrapping_add(low(offset)))),
            Some(RegisterRule::Register(other)) => Ok(registers.get(other)),
            Some(RegisterRule::Expression(expression)) => {
                word(evaluate(expression.get(&frames), Some(cfa), registers, word)?).map(Some)
            }
            Some(RegisterRule::ValExpression(expression)) => {
                evaluate(expression.get(&frames), Some(cfa), registers, word).map(Some)
            }
            Some(_) => Err(Truncated::NoUnwindInformation),
        };
        if row.register(X86::RA) == Some(RegisterRule::Undefined) {
            return Ok(None);
        }
        let ip = saved(X86::RA)?.ok_or(Truncated::NoUnwindInformation)?;
        let mut caller = I386Registers { ip, general: [None; GENERAL as usize] };
        for register in (0..GENERAL).map(Register) {
            caller.set(register, saved(register)?);
        }
        caller.set(X86::ESP, Some(cfa));
        Ok(Some(caller))
    }

    /// The rules for an address. There are none for what a signal handler returns to, as on other platforms.
    fn row<'context>(
        &self,
        frames: &EhFrame<EndianSlice<'_, LittleEndian>>,
        address: u64,
        context: &'context mut UnwindContext<usize>,
    ) -> Option<&'context UnwindTableRow<usize>> {
        let (bases, find) = (&self.bases, EhFrame::cie_from_offset);
        let function = match EhFrameHdr::new(&self.index, LittleEndian).parse(bases, ENCODING.address_size) {
            Ok(index) => index.table()?.fde_for_address(frames, bases, address, find),
            Err(_) => frames.fde_for_address(bases, address, find),
        };
        let function = function.ok().filter(|function| !function.is_signal_trampoline())?;
        function.unwind_info_for_address(frames, bases, context, address).ok()
    }
}

impl I386Registers {
    fn get(&self, register: Register) -> Option<u32> {
        self.general.get(usize::from(register.0)).copied().flatten()
    }

    fn set(&mut self, register: Register, value: Option<u32>) {
        if let Some(room) = self.general.get_mut(usize::from(register.0)) {
            *room = value;
        }
    }
}

/// The address that an expression yields, with an initial value on its stack. The tables of a function that
/// aligns its stack, such as `main()`, have some.
fn evaluate(
    expression: gimli::Result<Expression<EndianSlice<'_, LittleEndian>>>,
    initial: Option<u32>,
    registers: &I386Registers,
    word: impl Fn(u32) -> Result<u32, Truncated>,
) -> Result<u32, Truncated> {
    let failed = |_| Truncated::NoUnwindInformation;
    let mut evaluation = expression.map_err(failed)?.evaluation(ENCODING);
    if let Some(initial) = initial {
        evaluation.set_initial_value(initial.into());
    }
    evaluation.set_max_iterations(MAX_OPERATIONS);
    let mut result = evaluation.evaluate().map_err(failed)?;
    loop {
        let value = match result {
            EvaluationResult::Complete => break,
            EvaluationResult::RequiresRegister { register, .. } => {
                registers.get(register).ok_or(Truncated::NoUnwindInformation)?
            }
            EvaluationResult::RequiresMemory { address, size: 4, .. } => {
                word(u32::try_from(address).map_err(|_| Truncated::NoUnwindInformation)?)?
            }
            _ => return Err(Truncated::NoUnwindInformation),
        };
        let value = Value::Generic(value.into());
        result = match result {
            EvaluationResult::RequiresRegister { .. } => evaluation.resume_with_register(value),
            _ => evaluation.resume_with_memory(value),
        }
        .map_err(failed)?;
    }
    match evaluation.as_result() {
        [piece] => match piece.location {
            Location::Address { address } => Ok(low(address.cast_signed())),
            _ => Err(Truncated::NoUnwindInformation),
        },
        _ => Err(Truncated::NoUnwindInformation),
    }
}

/// Addresses and offsets wrap at 32 bits.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "they wrap")]
fn low(number: i64) -> u32 {
    number as u32
}
