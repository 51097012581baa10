//! Copies of stacks → frames. Most programs are built without frame pointers, but all carry tables for exceptions
//! (`.eh_frame`) that tell where each function keeps the address it returns to. Code that a JVM compiled or interprets has
//! neither; the JVM's own structures tell (see [`hotspot`]).

mod hotspot;
mod program;

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use framehop::{
    CacheNative, FrameAddress, MayAllocateDuringUnwind, Module, UnwindRegsNative, Unwinder as _,
    UnwinderNative,
};
use tcpclose_common::{params::Registers, record::StackCopy, stack::MAX_FRAMES};

use self::{hotspot::Vm, program::Programs};
use crate::{
    attribute::{
        maps::{Backing, Mapping},
        process::Image,
    },
    event::Frame,
};

/// Where the kernel half finds the registers. `struct pt_regs` begins like what `ptrace` shows of it; the kernel itself
/// goes from the one to the other by the offset.
///
/// <https://elixir.bootlin.com/linux/v6.12/source/arch/x86/kernel/ptrace.c> (`pt_regs_access()`)
/// <https://elixir.bootlin.com/linux/v6.12/source/arch/arm64/include/asm/ptrace.h> (`struct pt_regs`)
#[expect(clippy::cast_possible_truncation, reason = "the structures have some 300 bytes")]
pub const REGISTERS: Registers = {
    use std::mem::offset_of;

    use libc::user_regs_struct as Shown;
    #[cfg(target_arch = "x86_64")]
    let registers = Registers {
        ip: offset_of!(Shown, rip) as u16,
        sp: offset_of!(Shown, rsp) as u16,
        fp: offset_of!(Shown, rbp) as u16,
        lr: tcpclose_common::offsets::ABSENT,
    };
    #[cfg(target_arch = "aarch64")]
    let registers = Registers {
        ip: offset_of!(Shown, pc) as u16,
        sp: offset_of!(Shown, sp) as u16,
        fp: (offset_of!(Shown, regs) + 29 * 8) as u16,
        lr: (offset_of!(Shown, regs) + 30 * 8) as u16,
    };
    registers
};

/// How many processes' tables are kept ready. Beyond it the one longest unused gives way.
const MAX_PROCESSES: usize = 64;

/// A frame of a stack that was followed here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// An address that is still to be named. Of the first call it is that of an instruction, of others that behind a call.
    Code(u64),
    /// One that the program's run time named.
    Named(Arc<Frame>),
}

/// Follows stacks, and keeps what it takes to follow the next.
#[derive(Default)]
pub struct Unwinder {
    processes: HashMap<(u32, u64), Process>,
    programs: Programs,
    clock: u64,
}

/// What is ready for one process.
struct Process {
    image: Arc<Image>,
    unwinder: UnwinderNative<Arc<[u8]>, MayAllocateDuringUnwind>,
    cache: CacheNative<MayAllocateDuringUnwind>,
    vm: Option<Vm>,
    used: u64,
}

/// Where the walk has got to.
struct Place {
    at: FrameAddress,
    registers: UnwindRegsNative,
}

impl Unwinder {
    /// The frames of a copied stack, innermost first. `image` finds what is known of the process, for addresses that it
    /// should have mapped.
    ///
    /// The walk ends at the stack's end, at the copy's, after [`MAX_FRAMES`], or at an address where no code is: never is a
    /// frame told that leads to none.
    pub fn unwind(
        &mut self,
        copy: &StackCopy,
        bytes: &[u8],
        image: impl FnMut(&[u64]) -> Option<Arc<Image>>,
    ) -> Vec<Call> {
        let mut calls = vec![Call::Code(copy.ip)];
        // The tables come from files that anybody may have made, and the walk goes by them.
        let walk = AssertUnwindSafe(|| self.walk(copy, bytes, image, &mut calls));
        if catch_unwind(walk).is_err() {
            log::debug!("following a stack of process {} panicked", copy.pid);
            self.processes.remove(&(copy.pid, copy.mm));
        }
        calls
    }

    fn walk(
        &mut self,
        copy: &StackCopy,
        bytes: &[u8],
        mut image: impl FnMut(&[u64]) -> Option<Arc<Image>>,
        calls: &mut Vec<Call>,
    ) {
        let key = (copy.pid, copy.mm);
        let Some(found) = image(&[copy.ip]) else { return };
        let mut process = self.process(key, found);
        let stack = Memory { start: copy.start, bytes };
        let mut place = Place {
            at: FrameAddress::from_instruction_pointer(copy.ip),
            registers: registers(&process.image, copy.ip, copy.sp, copy.fp, copy.lr),
        };
        if let Some(vm) = &mut process.vm {
            vm.begin();
        }
        while calls.len() < MAX_FRAMES {
            let Some(next) = process.step(&mut place, &stack, calls) else { return };
            let address = next.address_for_lookup();
            if process.image.mapping(address).is_none() {
                // It may have been mapped since.
                let Some(newer) = image(&[address]).filter(|newer| newer.mapping(address).is_some()) else {
                    return;
                };
                process = self.process(key, newer);
            }
            place.at = next;
            if !process.is_managed(next) {
                calls.push(Call::Code(next.address()));
            }
        }
    }

    fn process(&mut self, key: (u32, u64), image: Arc<Image>) -> &mut Process {
        self.clock += 1;
        let is_new = |process: &Process| !Arc::ptr_eq(&process.image, &image);
        if self.processes.get(&key).is_none_or(is_new) {
            let vm = self.processes.remove(&key).and_then(|process| process.vm);
            if self.processes.len() >= MAX_PROCESSES {
                let oldest =
                    self.processes.iter().min_by_key(|(_, process)| process.used).map(|(key, _)| *key);
                oldest.and_then(|oldest| self.processes.remove(&oldest));
            }
            let process = Process::new(image, vm, &mut self.programs);
            self.processes.insert(key, process);
        }
        let process = self.processes.get_mut(&key).expect("it is there, or was just put there");
        process.used = self.clock;
        process
    }
}

impl Process {
    fn new(image: Arc<Image>, mut vm: Option<Vm>, programs: &mut Programs) -> Self {
        let mut unwinder = UnwinderNative::new();
        for mapping in &image.mappings {
            let Some(program) = programs.of(&image, mapping) else { continue };
            let Some(bias) = program.bias(mapping) else { continue };
            if let (None, Some(symbols)) = (&vm, &program.hotspot) {
                vm = Vm::open(image.pid, bias, symbols);
            }
            unwinder.add_module(Module::new(
                path(mapping),
                mapping.start..mapping.end,
                bias,
                program.sections.clone(),
            ));
        }
        Self { image, unwinder, cache: CacheNative::new(), vm, used: 0 }
    }

    /// Whether code of the process's own JVM is there.
    fn is_managed(&self, at: FrameAddress) -> bool {
        self.vm.as_ref().is_some_and(|vm| vm.has(at.address_for_lookup()))
    }

    /// Goes from one frame to its caller's, of which it says the address. Frames of a JVM are named on the way.
    fn step(&mut self, place: &mut Place, stack: &Memory<'_>, calls: &mut Vec<Call>) -> Option<FrameAddress> {
        if self.is_managed(place.at)
            && let Some(vm) = &mut self.vm
        {
            let (sp, fp) = (place.registers.sp(), frame_pointer(&place.registers));
            let sender = vm.step(place.at, sp, fp, stack, calls)?;
            place.registers = registers(&self.image, sender.pc, sender.sp, sender.fp, sender.pc);
            return FrameAddress::from_return_address(sender.pc);
        }
        let mut read = |address| stack.word(address).ok_or(());
        let caller =
            self.unwinder.unwind_frame(place.at, &mut place.registers, &mut self.cache, &mut read).ok()??;
        FrameAddress::from_return_address(caller)
    }
}

/// The copied part of a stack.
struct Memory<'a> {
    start: u64,
    bytes: &'a [u8],
}

impl Memory<'_> {
    /// The word at an address; `None` if it was not copied.
    fn word(&self, address: u64) -> Option<u64> {
        let offset = usize::try_from(address.checked_sub(self.start)?).ok()?;
        let word = self.bytes.get(offset..offset.checked_add(8)?)?;
        Some(u64::from_ne_bytes(word.try_into().ok()?))
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

/// Programs may sign the addresses that they return to, in the bits that no address of a process uses. How many those are
/// depends on the kernel; what is mapped last, next to the stack, uses all others.
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
