//! Return addresses follow calls. If nothing else shows what a word of the stack is, this distinguishes
//! return addresses from other numbers. Go has one that follows no call: every goroutine seems to have been
//! called by `runtime.goexit`, from behind its first instruction.

use std::{cell::RefCell, collections::HashMap};

use super::code::ProcessCode;
use crate::processes::Image;

/// The number of addresses that are remembered. When there are more, all are forgotten and read again.
const MAX_KNOWN: usize = 4_096;

/// Longest call instruction, in bytes: `call [base + index * scale + disp32]` on x86-64.
const LONGEST: usize = 7;

/// Bytes by which `runtime.goexit` is recognized, and of the NOP among them.
const GOEXIT: usize = if cfg!(target_arch = "x86_64") { 7 } else { 8 };
const NOP: u64 = if cfg!(target_arch = "x86_64") { 1 } else { 4 };

/// The calls in the code of one process.
pub(super) struct Calls {
    code: ProcessCode,
    known: RefCell<HashMap<u64, bool>>,
}

impl Calls {
    /// The calls in this code.
    pub(super) fn of(code: ProcessCode) -> Self {
        Self { code, known: RefCell::default() }
    }

    /// The code.
    pub(super) fn code(&self) -> &ProcessCode {
        &self.code
    }

    /// Whether there is a call just before this address, or whether it is that of Go's `runtime.goexit`.
    /// `false` if the code there cannot be read.
    pub(super) fn has(&self, image: &Image, address: u64) -> bool {
        let mut known = self.known.borrow_mut();
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        *known.entry(address).or_insert_with(|| {
            let mut code = [0; LONGEST];
            let start = address.checked_sub(LONGEST as u64);
            let is_behind = start.and_then(|start| self.code.read(image, start, &mut code)).is_some();
            is_behind && ends_with_call(code) || self.is_in_goexit(image, address)
        })
    }

    /// Whether `runtime.goexit` continues at this address, behind the NOP with which it begins.
    fn is_in_goexit(&self, image: &Image, address: u64) -> bool {
        let mut code = [0; GOEXIT];
        let start = address.checked_sub(NOP);
        start.and_then(|start| self.code.read(image, start, &mut code)).is_some() && is_goexit(code)
    }
}

/// Whether these bytes may end with a call: `E8` with a displacement of four bytes, or `FF /2` with any
/// operand.
///
/// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CALL, and table 2-2 for the
/// lengths.
#[cfg(target_arch = "x86_64")]
fn ends_with_call(code: [u8; LONGEST]) -> bool {
    let [.., opcode, _, _, _, _] = code;
    // Bytes of the instruction from its opcode on.
    let indirect = |length: usize| {
        let [0xff, operand, rest @ ..] = &code[LONGEST - length..] else { return false };
        let (mode, is_call, register) = (operand >> 6, operand >> 3 & 7 == 2, operand & 7);
        let has_index = mode != 3 && register == 4;
        let base = rest.first().map_or(0, |index| index & 7);
        let displacement = match mode {
            0 if register == 5 || has_index && base == 5 => 4,
            1 => 1,
            2 => 4,
            _ => 0,
        };
        is_call && length == 2 + usize::from(has_index) + displacement
    };
    opcode == 0xe8 || (2..=LONGEST).any(indirect)
}

/// Whether these bytes are the beginning of `runtime.goexit`, a NOP of one byte first.
///
/// <https://go.googlesource.com/go/+/refs/tags/go1.19/src/runtime/asm_amd64.s>: NOP, a call, NOP.
#[cfg(target_arch = "x86_64")]
fn is_goexit(code: [u8; GOEXIT]) -> bool {
    matches!(code, [0x90, 0xe8, _, _, _, _, 0x90])
}

/// <https://go.googlesource.com/go/+/refs/tags/go1.19/src/runtime/asm_arm64.s>: MOVD R0, R0, then BL.
#[cfg(target_arch = "aarch64")]
fn is_goexit(code: [u8; GOEXIT]) -> bool {
    matches!(code, [0xe0, 0x03, 0x00, 0xaa, _, _, _, 0x94..=0x97])
}

/// Whether these bytes end with `BL` or `BLR`, the latter perhaps with an authenticated address.
///
/// Arm Architecture Reference Manual, C6.2: BL, BLR, BLRAA.
#[cfg(target_arch = "aarch64")]
fn ends_with_call(code: [u8; LONGEST]) -> bool {
    let [.., a, b, c, d] = code;
    let instruction = u32::from_le_bytes([a, b, c, d]);
    instruction >> 26 == 0b10_0101 || instruction & 0xfeff_f000 == 0xd63f_0000
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::{processes::Processes, stacks::memory::ProcessMemory};

    fn is_call(bytes: &[u8]) -> bool {
        let mut code = [0x90; LONGEST];
        code[LONGEST - bytes.len()..].copy_from_slice(bytes);
        ends_with_call(code)
    }

    #[test]
    fn recognizes_calls() {
        // As objdump shows them.
        for (bytes, text) in [
            (&[0xe8, 0x12, 0x34, 0x00, 0x00][..], "call 0x3412"),
            (&[0xff, 0xd0], "call rax"),
            (&[0x41, 0xff, 0xd4], "call r12"),
            (&[0xff, 0x10], "call [rax]"),
            (&[0xff, 0x50, 0x18], "call [rax+0x18]"),
            (&[0xff, 0x14, 0xc1], "call [rcx+rax*8]"),
            (&[0xff, 0x54, 0x24, 0x08], "call [rsp+0x8]"),
            (&[0xff, 0x15, 0x01, 0x02, 0x03, 0x04], "call [rip+0x4030201]"),
            (&[0xff, 0x93, 0x01, 0x02, 0x00, 0x00], "call [rbx+0x201]"),
            (&[0xff, 0x14, 0xc5, 0x01, 0x02, 0x00, 0x00], "call [rax*8+0x201]"),
        ] {
            assert!(is_call(bytes), "{text}");
        }
        for (bytes, text) in [
            (&[0x0f, 0x05][..], "syscall"),
            (&[0xff, 0xe0], "jmp rax"),
            (&[0xff, 0x25, 0x01, 0x02, 0x03, 0x04], "jmp [rip+0x4030201]"),
            (&[0xe9, 0x12, 0x34, 0x00, 0x00], "jmp 0x3412"),
            (&[0xff, 0x50, 0x18, 0x90], "call [rax+0x18]; nop"),
        ] {
            assert!(!is_call(bytes), "{text}");
        }
    }

    #[test]
    fn reads_the_code_of_a_process() {
        let calls = Calls::of(ProcessCode::of(ProcessMemory::open(std::process::id())));
        let has = |address| calls.has(&Image::default(), address);
        let here = return_address();
        assert!(has(here));
        assert!(!has(here + 1) || !has(here + 2), "not every address is behind a call");
        assert!(!has(0) && !has(7) && !has(u64::MAX));
    }

    /// As after the end of the process.
    #[test]
    fn reads_the_code_in_files() {
        let image = Processes::new().image(std::process::id(), 1).unwrap();
        let calls = Calls::of(ProcessCode::of(None));
        let here = return_address();
        assert!(calls.has(&image, here));
        assert!(!calls.has(&image, here + 1) || !calls.has(&image, here + 2));
        assert!(!Calls::of(ProcessCode::of(None)).has(&Image::default(), here), "without mappings");
        let end = image.mapping(here).unwrap().end;
        assert!(!calls.has(&image, end + 1), "not all of the bytes are mapped");
    }

    /// As objdump shows the function.
    #[test]
    fn goroutines_return_to_goexit() {
        static FUNCTION: [u8; 16] =
            [0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0x90, 0xe8, 0x9a, 0x25, 0, 0, 0x90, 0xcc];
        let calls = Calls::of(ProcessCode::of(ProcessMemory::open(std::process::id())));
        let address = FUNCTION.as_ptr() as u64;
        let is_there = |offset: &u64| calls.has(&Image::default(), address + offset);
        let found: Vec<u64> = (7..14).filter(is_there).collect();
        assert_eq!(found, [9], "behind the first instruction");
    }

    #[inline(never)]
    fn return_address() -> u64 {
        let bytes: u64;
        // SAFETY: it calls the next instruction and pops the return address from the stack.
        unsafe { std::arch::asm!("call 2f", "2: pop {}", out(reg) bytes) };
        bytes
    }
}
