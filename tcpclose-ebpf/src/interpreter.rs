//! Lists the frames of interpreters (`tcpclose_common::interpreter`) while the thread that they belong to is
//! the current one, and so cannot change them.

use core::arch::asm;

use aya_ebpf::{helpers::generated::bpf_probe_read_user, macros::map, maps::LruHashMap};
use tcpclose_common::{
    interpreter::{
        ABSENT, FRAME_WORDS, IDENTITY_WORDS, Interpreter, MAX_INTERPRETED, MAX_INTERPRETERS, MAX_PROGRAMS,
        SEED, mix,
    },
    record::{Header, Interpreted, InterpretedFrame, STACK_STEP, VERSION, tag},
};

use crate::{
    comm,
    current::with_current,
    emit,
    kernel::member,
    maps::{SCRATCH, Slot, global},
};

/// Interpreters by the address of the `mm_struct` of their process.
#[map]
pub static INTERPRETERS: LruHashMap<u64, Interpreter> = LruHashMap::with_max_entries(MAX_INTERPRETERS, 0);

/// The interpreter of the last program of a name.
#[map]
pub static PROGRAMS: LruHashMap<[u8; 16], Interpreter> = LruHashMap::with_max_entries(MAX_PROGRAMS, 0);

/// Expects the process `pid`, which is new and has the memory `mm` and a thread at `task`, to have the
/// interpreter of the last program of its name, until the user half has examined it: the process may end
/// before. If it has another one, the frames that are listed meanwhile have no meaning, and get no names.
///
/// It is a global function, for the reason that `recipe::recognized()` gives.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn expect(pid: u64, mm: u64, task: u64) -> u64 {
    let Some(known) = PROGRAMS.get_ptr(comm::program_of(task)) else { return 0 };
    // SAFETY: a map value, which stays readable until the program ends.
    let interpreter = Interpreter { pid: pid as u32, ..unsafe { *known } };
    // If this fails, the user half describes the process a moment later.
    let _ = INTERPRETERS.insert(mm, interpreter, 0);
    0
}

/// The number of bytes in the words that distinguish a code object from others.
const IDENTITY_BYTES: u32 = 8 * IDENTITY_WORDS as u32;

/// The largest number of bytes that are read of a frame: less than 16 words.
const MAX_BYTES: u32 = (8 * FRAME_WORDS as u32) | 7;

/// A hash of the interpreter's frames of the current thread, which belongs to process `pid` with the memory
/// `mm`; 0 if it has none, or if they cannot be read. With a `key`, they are also written to the ring, for
/// the copy that has this key.
///
/// It calls global functions, for the reason that `recipe::recognized()` does.
#[inline(always)]
pub fn interpreted(pid: u64, mm: u64, key: u64) -> u64 {
    match innermost(pid, mm) {
        0 => 0,
        frame => listed(mm, frame, key),
    }
}

/// The address of the innermost frame; 0 if the current thread has none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn innermost(pid: u64, mm: u64) -> u64 {
    let Some(interpreter) = INTERPRETERS.get_ptr(mm) else { return 0 };
    // SAFETY: a map value, which stays readable until the program ends. If the user half replaces it
    // meanwhile, the frames are not found, or the user half finds no meaning in them.
    let interpreter = unsafe { &*interpreter };
    if u64::from(interpreter.pid) != pid {
        return 0;
    }
    let Some(state) = state(interpreter) else { return 0 };
    let holder = if interpreter.call == ABSENT || interpreter.is_in_state != 0 {
        state
    } else {
        word(state, interpreter.call).unwrap_or(0)
    };
    word(holder, interpreter.frame).unwrap_or(0)
}

/// The address of the current thread's state.
#[inline(always)]
fn state(interpreter: &Interpreter) -> Option<u64> {
    let thread_pointer: u64 = with_current!(|current| member(current, global!(PARAMS.thread_pointer)))?;
    word(thread_pointer, interpreter.state).filter(|state| *state != 0)
}

/// The hash of the frames from `frame` on, of a process with the memory `mm`; 0 if they cannot be read. With
/// a `key` the list is written to the ring. It follows at most [`MAX_INTERPRETED`] frames, and reads at most
/// 120 bytes of each, and 88 bytes of its code object.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn listed(mm: u64, frame: u64, key: u64) -> u64 {
    let Some(interpreter) = INTERPRETERS.get_ptr(mm) else { return 0 };
    let Some(slot) = Slot::take() else { return 0 };
    // There is no reference into the slot, because `appended()` uses it, too. SAFETY: the first is a map value,
    // as in `innermost()`; the slot is ours, its members are plain integers.
    let list = unsafe {
        (*slot.get()).interpreter = *interpreter;
        &raw mut (*slot.get()).interpreted
    };
    let hash = walk(slot.number(), frame, list);
    if hash == 0 || key == 0 {
        return hash;
    }
    // SAFETY: as above.
    let (interpreter, list) = unsafe { (&(*slot.get()).interpreter, &mut *list) };
    list.header = Header { tag: tag::INTERPRETED, version: VERSION, length: size_of::<Interpreted>() as u32 };
    list.key = key;
    list.hash = hash;
    list.call = if interpreter.call == ABSENT {
        0
    } else {
        state(interpreter).and_then(|state| word(state, interpreter.call)).unwrap_or(0)
    };
    if emit::interpreted(list) { hash } else { 0 }
}

/// Follows the frames and lists them, whether or not the list is wanted, in the slot of `SCRATCH` with this
/// number, where `list` is. Returns the hash of the list.
#[inline(always)]
fn walk(slot: u64, innermost: u64, list: *mut Interpreted) -> u64 {
    // SAFETY: the slot belongs to the caller, its members are plain integers.
    unsafe { (*list).hash = SEED };
    let mut frame = innermost;
    let mut index = 0;
    while index < MAX_INTERPRETED {
        if frame == 0 {
            break;
        }
        frame = appended(slot, frame, index as u64);
        if frame == UNREADABLE {
            return 0;
        }
        index += 1;
    }
    // The number is read back, and so hidden from the verifier, which would examine the rest once for each
    // value. SAFETY: as above.
    let (hash, count) = unsafe {
        (*list).count = index as u32;
        (*list).is_cut = u32::from(frame != 0);
        ((*list).hash, (&raw const (*list).count).read_volatile())
    };
    if count == 0 { 0 } else { mix(hash, count.into()) }
}

/// The result of [`appended`] for a frame that cannot be read. No frame is at this address.
const UNREADABLE: u64 = u64::MAX;

/// Appends the frame at `frame` to the list in a slot of `SCRATCH`, where it gets this index, and adds it to
/// the list's hash. Returns the address of its caller's frame.
///
/// It is a global function, so that the verifier examines it once and not for each of [`MAX_INTERPRETED`]
/// frames.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn appended(slot: u64, frame: u64, index: u64) -> u64 {
    let Some(scratch) = SCRATCH.get_ptr_mut(slot as u32) else { return UNREADABLE };
    // SAFETY: the slot belongs to the program that called, its members are plain integers.
    let (interpreter, list, window) =
        unsafe { (&(*scratch).interpreter, &mut (*scratch).interpreted, &raw mut (*scratch).window) };
    // The verifier of older kernels derives bounds from a mask more reliably than from a comparison.
    let bytes = interpreter.bytes & MAX_BYTES;
    // SAFETY: the window has room, and the helper checks the address itself.
    if unsafe { bpf_probe_read_user(window.cast(), bytes, frame as *const _) } != 0 {
        return UNREADABLE;
    }
    // SAFETY: the window has more words than that.
    let at = |place: u32| unsafe { (*window)[place as usize & 15] };
    let code = at(interpreter.code) & Interpreter::CODE_MASK;
    let instruction = at(interpreter.instruction);
    let kind = at(interpreter.kind) & interpreter.kind_mask;
    let previous = at(interpreter.previous);
    let identity = identity(interpreter, code, window);
    list.hash = mix(mix(mix(mix(list.hash, code), identity), instruction), kind);
    list.frames[index as usize & (MAX_INTERPRETED - 1)] =
        InterpretedFrame { address: frame, code, instruction, kind, identity };
    previous
}

const _: () = assert!(MAX_INTERPRETED.is_power_of_two());

/// A hash of the words that distinguish a code object from others at the same address, where unused ones are
/// 0; 0 if they cannot be read. They overwrite the window.
#[inline(always)]
fn identity(interpreter: &Interpreter, code: u64, window: *mut [u64; STACK_STEP / 8]) -> u64 {
    let from = code.wrapping_add(u64::from(interpreter.identity));
    // SAFETY: the window has room, and the helper checks the address itself.
    if unsafe { bpf_probe_read_user(window.cast(), IDENTITY_BYTES, from as *const _) } != 0 {
        return 0;
    }
    let mut hash = SEED;
    let mut index = 0;
    while index < IDENTITY_WORDS {
        // SAFETY: the index is below the length of the window.
        hash =
            mix(hash, unsafe { (*window)[index] } & below(index as u64, interpreter.identity_words.into()));
        index += 1;
    }
    hash
}

/// All bits if `index` is below `count`, else none. In assembly, because a branch would double the paths of
/// each round.
#[inline(always)]
fn below(index: u64, count: u64) -> u64 {
    let mut mask = index;
    // SAFETY: operations on registers.
    unsafe {
        asm!("{0} -= {1}", "{0} s>>= 63", inout(reg) mask, in(reg) count, options(pure, nomem, nostack));
    }
    mask
}

/// The word at this many bytes from an address of the current process.
#[inline(always)]
fn word(address: u64, offset: u32) -> Option<u64> {
    let mut found = 0u64;
    let from = address.wrapping_add(u64::from(offset));
    // SAFETY: the helper checks the address itself.
    let failed = unsafe { bpf_probe_read_user((&raw mut found).cast(), 8, from as *const _) };
    if failed == 0 { Some(found) } else { None }
}
