//! Frames of signal handlers. A handler returns to a trampoline, code that makes the system call
//! `rt_sigreturn` and nothing else. Its stack pointer is the address of what the kernel has saved: the
//! registers of the code that the signal interrupted.

use std::sync::Arc;

use super::code::ProcessCode;
use crate::{event::Frame, processes::Image, stacks::memory::StackMemory};

/// The name by which gdb shows the frame. The trampoline has a name in few programs, and it is not the
/// function before it, to which a return address would belong.
const NAME: &str = "<signal handler called>";

/// `mov $15, %rax; syscall`, in the C library.
#[cfg(target_arch = "x86_64")]
const TRAMPOLINE: [u8; 9] = [0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05];

/// `mov x8, #139; svc #0`, in the vDSO.
#[cfg(target_arch = "aarch64")]
const TRAMPOLINE: [u8; 8] = [0x68, 0x11, 0x80, 0xd2, 0x01, 0, 0, 0xd4];

/// Offsets of saved registers from the stack pointer of the trampoline. It has removed the first member of
/// `struct rt_sigframe`, its own address; a `struct ucontext` follows.
///
/// <https://elixir.bootlin.com/linux/v6.12/source/arch/x86/include/asm/sigframe.h>
/// <https://elixir.bootlin.com/linux/v6.12/source/arch/x86/include/uapi/asm/sigcontext.h>
#[cfg(target_arch = "x86_64")]
mod offset {
    const CONTEXT: u64 = 40;
    pub(super) const FP: u64 = CONTEXT + 80;
    pub(super) const SP: u64 = CONTEXT + 120;
    pub(super) const PC: u64 = CONTEXT + 128;
}

/// The same: a `struct siginfo`, and then a `struct ucontext`.
///
/// <https://elixir.bootlin.com/linux/v6.12/source/arch/arm64/kernel/signal.c> (`struct rt_sigframe`)
/// <https://elixir.bootlin.com/linux/v6.12/source/arch/arm64/include/uapi/asm/ucontext.h>
#[cfg(target_arch = "aarch64")]
mod offset {
    const REGISTERS: u64 = 128 + 176 + 8;
    pub(super) const FP: u64 = REGISTERS + 29 * 8;
    pub(super) const LR: u64 = REGISTERS + 30 * 8;
    pub(super) const SP: u64 = REGISTERS + 31 * 8;
    pub(super) const PC: u64 = REGISTERS + 32 * 8;
}

/// The registers of interrupted code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Interrupted {
    /// The address of its next instruction.
    pub(super) pc: u64,
    pub(super) sp: u64,
    pub(super) fp: u64,
    /// The link register; 0 on platforms without one.
    pub(super) lr: u64,
}

/// Whether there is a trampoline at this address of a process.
pub(super) fn is_trampoline(code: &ProcessCode, image: &Image, address: u64) -> bool {
    let mut bytes = [0; TRAMPOLINE.len()];
    code.read(image, address, &mut bytes).is_some() && bytes == TRAMPOLINE
}

/// What the kernel has saved for the trampoline whose stack pointer is `sp`; `None` if it was not copied.
pub(super) fn interrupted(stack: &StackMemory<'_>, sp: u64) -> Option<Interrupted> {
    let word = |offset| stack.word(sp.checked_add(offset)?);
    #[cfg(target_arch = "x86_64")]
    let lr = 0;
    #[cfg(target_arch = "aarch64")]
    let lr = word(offset::LR)?;
    Some(Interrupted { pc: word(offset::PC)?, sp: word(offset::SP)?, fp: word(offset::FP)?, lr })
}

/// The frame of a trampoline.
pub(super) fn frame(address: u64) -> Arc<Frame> {
    Arc::new(Frame { symbol: Some(NAME.to_owned()), ..Frame::nameless(address) })
}
