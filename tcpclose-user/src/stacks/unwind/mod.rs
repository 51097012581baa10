//! Copies of stacks → frames. Most programs are built without frame pointers, but all carry tables for
//! exceptions (`.eh_frame`) that describe where each function keeps its return address. Code that a language
//! runtime compiled or interprets has neither: see [`runtimes`](super::runtimes).

mod binary;
mod calls;
mod code;
mod i386;
mod inputs;
mod interpreted;
mod process;
mod signal;

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use tcpclose_common::{
    interpreter::Interpreter,
    params::RegisterOffsets,
    recipe::Word,
    record::{CROWDED_STACK_BYTES, Interpreted, StackCopy},
    stack::MAX_FRAMES,
};

use self::{
    binary::Binaries,
    i386::I386,
    inputs::Inputs,
    interpreted::Spot,
    process::{Cursor, ProcessUnwinder},
};
use super::{
    frame::{UnwoundFrame, UnwoundStack},
    memory::StackMemory,
};
use crate::{event::Truncated, processes::Image};

/// Offsets of the registers in `struct pt_regs`. It begins like `user_regs_struct`, which `ptrace` uses; the
/// kernel itself converts between the two by offset.
///
/// <https://elixir.bootlin.com/linux/v6.12/source/arch/x86/kernel/ptrace.c> (`pt_regs_access()`)
/// <https://elixir.bootlin.com/linux/v6.12/source/arch/arm64/include/asm/ptrace.h> (`struct pt_regs`)
#[expect(clippy::cast_possible_truncation, reason = "the structures have some 300 bytes")]
pub const REGISTERS: RegisterOffsets = {
    use std::mem::offset_of;

    use libc::user_regs_struct as Shown;
    #[cfg(target_arch = "x86_64")]
    let registers = RegisterOffsets {
        ip: offset_of!(Shown, rip) as u16,
        sp: offset_of!(Shown, rsp) as u16,
        fp: offset_of!(Shown, rbp) as u16,
        lr: tcpclose_common::offsets::ABSENT,
        // The selector of the code segment: `__USER32_CS`, whatever the privilege bits.
        // https://elixir.bootlin.com/linux/v6.12/source/arch/x86/include/asm/segment.h
        mode: offset_of!(Shown, cs) as u16,
        mode_mask: 0xfff8,
        mode_compat: 0x20,
        argument: offset_of!(Shown, rbx) as u16,
    };
    #[cfg(target_arch = "aarch64")]
    let registers = RegisterOffsets {
        ip: offset_of!(Shown, pc) as u16,
        sp: offset_of!(Shown, sp) as u16,
        fp: (offset_of!(Shown, regs) + 29 * 8) as u16,
        lr: (offset_of!(Shown, regs) + 30 * 8) as u16,
        // `PSR_MODE32_BIT`:
        // https://elixir.bootlin.com/linux/v6.12/source/arch/arm64/include/uapi/asm/ptrace.h
        mode: offset_of!(Shown, pstate) as u16,
        mode_mask: 0x10,
        mode_compat: 0x10,
        // arm32 has no `socketcall` in the table that the kernel uses (EABI).
        argument: tcpclose_common::offsets::ABSENT,
    };
    registers
};

/// The number of processes whose tables are kept ready. When there are more, those of the least recently used
/// one are dropped.
const MAX_PROCESSES: usize = 64;

/// How long an incomplete stack is recognized before it is unwound again: the missing part may be available
/// by then.
const INCOMPLETE: Duration = Duration::from_secs(10);

/// Unwinds stacks, and caches what unwinding further stacks of the same processes and files needs.
#[derive(Default)]
pub struct Unwinder {
    processes: HashMap<(u32, u64), ProcessUnwinder>,
    binaries: Binaries,
    i386: I386,
    clock: u64,
}

/// The result of unwinding a copied stack.
#[derive(Debug)]
pub struct Unwound {
    /// Its frames.
    pub stack: UnwoundStack,
    /// The words from which they follow, in the order in which they were needed; empty if not all of them can
    /// be listed.
    pub words: Vec<Word>,
    /// How long they are valid; `None` if that is as long as the mappings stay the same.
    pub lifetime: Option<Duration>,
    /// An interpreter whose frames were not listed, because it was not described to the kernel half.
    pub unlisted: Option<Interpreter>,
}

impl Unwinder {
    /// Unwinds a copied stack, to which the frames of an interpreter in `list` belong. `image` returns what
    /// is known of the process, with mappings that include the given addresses if the process has any there.
    ///
    /// The frames, innermost first, end where the stack or its copy does, after [`MAX_FRAMES`], or at an
    /// address without code: every frame that is reported has code at its address.
    pub fn unwind(
        &mut self,
        copy: &StackCopy,
        bytes: &[u8],
        list: Option<&Interpreted>,
        image: impl FnMut(&[u64]) -> Option<Arc<Image>>,
    ) -> Unwound {
        let (mut frames, mut inputs) = (Vec::new(), Inputs::new(copy.sp));
        let (mut spots, mut unlisted) = (Vec::new(), None);
        // The files with the tables may be malicious, and framehop does not guarantee that it never panics.
        let walk = AssertUnwindSafe(|| {
            let stack = StackMemory::new(copy.start, bytes);
            let end = self.walk(copy, &stack, image, &mut frames, &mut spots, &mut inputs);
            if let Some(process) = self.processes.get_mut(&(copy.pid, copy.mm)) {
                unlisted = process.interpreted(list, &stack, &spots, &mut inputs, &mut frames);
                process.end_stack();
            }
            end
        });
        let result = catch_unwind(walk);
        if result.is_err() {
            log::debug!("unwinding a stack of process {} panicked", copy.pid);
            self.processes.remove(&(copy.pid, copy.mm));
        }
        if frames.is_empty() {
            // The instruction pointer is certain even if nothing is known about the process.
            frames.push(UnwoundFrame::Instruction(copy.ip));
        }
        let is_done = result.is_ok();
        let mut truncated = result.unwrap_or(Err(Truncated::NoUnwindInformation)).err();
        if truncated.is_some() {
            inputs.expire_after(INCOMPLETE);
        }
        if truncated == Some(Truncated::CopyEnded) && bytes.len() <= CROWDED_STACK_BYTES {
            // The ring had no room for a longer copy, but may have for that of the next stack.
            inputs.give_up();
        }
        if frames.len() > MAX_FRAMES {
            frames.truncate(MAX_FRAMES);
            truncated = Some(Truncated::FrameLimit);
        }
        let (words, lifetime) = inputs.finish().filter(|_| is_done).unwrap_or_default();
        Unwound { stack: UnwoundStack { frames: frames.into(), truncated }, words, lifetime, unlisted }
    }

    fn walk(
        &mut self,
        copy: &StackCopy,
        stack: &StackMemory<'_>,
        mut image: impl FnMut(&[u64]) -> Option<Arc<Image>>,
        frames: &mut Vec<UnwoundFrame>,
        spots: &mut Vec<Spot>,
        inputs: &mut Inputs,
    ) -> Result<(), Truncated> {
        if let Some(end) = self.i386.walk(copy, stack, &mut image, frames) {
            inputs.give_up();
            return end;
        }
        let key = (copy.pid, copy.mm);
        let found = image(&[copy.ip]).ok_or(Truncated::NoMappings)?;
        if found.mappings.is_empty() {
            return Err(Truncated::NoMappings);
        }
        let mut process = self.process(key, found);
        let mut cursor = Cursor::innermost(copy, process.image());
        if cfg!(target_arch = "aarch64") {
            inputs.link_register(copy.lr);
        }
        process.begin_stack();
        loop {
            let index = frames.len();
            spots.push(cursor.spot(index));
            process.name(&cursor, stack, inputs, frames);
            if frames.len() >= MAX_FRAMES {
                return Err(Truncated::FrameLimit);
            }
            let caller = if let Some((frame, interrupted)) = process.interrupted(&cursor, stack) {
                // By its return address, it would get the name of the function in front of it.
                frames.truncate(index);
                frames.push(frame);
                // Closing in a signal handler is rare, so such stacks are copied each time.
                inputs.give_up();
                interrupted
            } else if let Some(caller) = process.caller(&cursor, stack, inputs)? {
                caller
            } else {
                return Ok(());
            };
            let address = caller.address();
            if process.image().mapping(address).is_none() {
                // The code may have been mapped since.
                let newer = image(&[address]).filter(|newer| newer.mapping(address).is_some());
                process = self.process(key, newer.ok_or(Truncated::NoCode)?);
            }
            cursor = caller;
        }
    }

    fn process(&mut self, key: (u32, u64), image: Arc<Image>) -> &mut ProcessUnwinder {
        self.clock += 1;
        let is_new = |process: &ProcessUnwinder| !Arc::ptr_eq(process.image(), &image);
        if self.processes.get(&key).is_none_or(is_new) {
            let older = self.processes.remove(&key);
            if self.processes.len() >= MAX_PROCESSES {
                let oldest =
                    self.processes.iter().min_by_key(|(_, process)| process.used).map(|(key, _)| *key);
                oldest.and_then(|oldest| self.processes.remove(&oldest));
            }
            let process = ProcessUnwinder::new(image, older, &mut self.binaries);
            self.processes.insert(key, process);
        }
        let process = self.processes.get_mut(&key).expect("it was there, or was just inserted");
        process.used = self.clock;
        process
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use std::{arch::asm, hint::black_box};

    use zerocopy::FromZeros as _;

    use super::*;
    use crate::{
        processes::Processes,
        stacks::{memory::ProcessMemory, symbolize::Symbolizer},
    };

    /// A copy of this thread's stack.
    struct Taken {
        copy: StackCopy,
        bytes: Vec<u8>,
    }

    #[inline(never)]
    fn innermost() -> Taken {
        let mut copy = StackCopy::new_zeroed();
        // SAFETY: it reads three registers and changes nothing.
        unsafe {
            asm!(
                "lea {ip}, [rip]", "mov {sp}, rsp", "mov {fp}, rbp",
                ip = out(reg) copy.ip, sp = out(reg) copy.sp, fp = out(reg) copy.fp,
                options(nomem, nostack, preserves_flags)
            );
        }
        (copy.pid, copy.mm, copy.start) = (std::process::id(), 1, copy.sp);
        let bytes = ProcessMemory::open(copy.pid).unwrap().up_to(copy.start, 16 << 10);
        Taken { copy, bytes }
    }

    #[inline(never)]
    fn middle() -> Taken {
        black_box(innermost())
    }

    #[inline(never)]
    fn outermost() -> Taken {
        black_box(middle())
    }

    /// The unwound functions, innermost first, up to this module's last.
    fn functions(taken: &Taken, frames: usize) -> Vec<String> {
        let image = Processes::new().image(taken.copy.pid, 1).unwrap();
        let unwound =
            Unwinder::default().unwind(&taken.copy, &taken.bytes, None, |_| Some(Arc::clone(&image)));
        let named = Symbolizer::new().unwound(Some(&image), &unwound.stack);
        let own = |symbol: String| symbol.rsplit_once("unwind::tests::").map(|(_, name)| name.to_owned());
        named
            .into_iter()
            .filter(|frame| !frame.inlined)
            .filter_map(|frame| own(frame.symbol?))
            .take(frames)
            .collect()
    }

    #[test]
    fn unwinds_this_process() {
        let taken = outermost();
        let expected = ["innermost", "middle", "outermost", "unwinds_this_process"];
        assert_eq!(functions(&taken, 4), expected);
        // A copy that ends early yields fewer frames, but never other frames.
        for length in (0..512).step_by(8) {
            let bytes = taken.bytes[..length].to_vec();
            let found = functions(&Taken { copy: taken.copy, bytes }, 4);
            assert_eq!(found, expected[..found.len()], "{length} bytes");
            assert!(!found.is_empty());
        }
    }

    /// A recipe for what a short copy shows would take the place of one for the whole stack.
    #[test]
    fn a_copy_that_was_cut_short_for_lack_of_room_is_not_recognized() {
        let Taken { copy, bytes } = outermost();
        let image = Processes::new().image(copy.pid, 1).unwrap();
        let unwind =
            |length| Unwinder::default().unwind(&copy, &bytes[..length], None, |_| Some(Arc::clone(&image)));
        let (cut, whole) = (unwind(256), unwind(bytes.len()));
        assert_eq!(cut.stack.truncated, Some(Truncated::CopyEnded));
        assert_eq!(cut.words, []);
        assert_eq!(whole.stack.truncated, None);
        assert_ne!(whole.words, []);
    }

    #[test]
    fn knows_nothing_of_other_processes() {
        let mut copy = StackCopy::new_zeroed();
        copy.ip = 0x1234;
        let empty = Arc::new(Image::default());
        for image in [None, Some(empty)] {
            let unwound = Unwinder::default().unwind(&copy, &[0; 64], None, |_| image.clone());
            assert_eq!(unwound.stack.frames[..], [UnwoundFrame::Instruction(0x1234)]);
            assert_eq!(unwound.stack.truncated, Some(Truncated::NoMappings));
            assert_eq!(unwound.words, []);
        }
    }
}
