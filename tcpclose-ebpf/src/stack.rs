//! Takes stacks. Either the kernel follows frame pointers, and each distinct stack is stored once, or the
//! stack's memory is copied to the user half, which unwinds it with the exception tables of programs. A stack
//! that was unwound before is recognized and not copied again: see `recipe.rs`.

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_F_USER_STACK,
    helpers::{bpf_get_prandom_u32, generated::bpf_get_stack},
};
use tcpclose_common::{
    record::{Header, RawTask, STACK_STEP, StackCopy, VERSION, tag},
    stack::{MAX_FRAMES, StackTrace},
    tcp::task_flag,
};

use crate::{
    emit, interpreter,
    maps::{STACKS, Slot, count, global},
    recipe::{self, KernelEntry},
};

/// Takes the requested stacks of the current task, which is `task`. `is_wanted` says whether they are worth a
/// copy.
#[inline(always)]
pub fn take(ctx: &impl EbpfContext, task: &mut RawTask, is_wanted: bool) {
    if global!(PARAMS.user_stack) != 0 {
        task.user_stack = user(ctx, task, is_wanted);
    }
    if global!(PARAMS.kernel_stack) != 0 {
        task.kernel_stack = kernel(ctx);
    }
}

/// The current task's user stack, taken in the way that the user chose: as a key into `STACKS`, that of a
/// copy, or that of a stack that the user half knows; 0 if there is none.
///
/// With recipes, frame pointers are never followed here, because that omits the caller of a function that
/// keeps none, such as `close()`.
#[inline(always)]
fn user(ctx: &impl EbpfContext, task: &RawTask, is_wanted: bool) -> u64 {
    let has_recipes = global!(PARAMS.recipes) != 0;
    if global!(PARAMS.stack_bytes) != 0 && (is_wanted || has_recipes) {
        let key = whole(task, is_wanted);
        if key != 0 || has_recipes {
            return key;
        }
    }
    followed(ctx)
}

/// The key of the current task's user stack if the user half knows it already; otherwise that of a copy, if
/// one is wanted.
#[inline(always)]
fn whole(task: &RawTask, is_wanted: bool) -> u64 {
    // Kernel threads that work for a process use its memory, but have no stack in it.
    if task.mm == 0 || task.flags & (task_flag::KTHREAD | task_flag::IO_WORKER) != 0 {
        return 0;
    }
    let (pid, mm) = (u64::from(task.pid), task.mm);
    if global!(PARAMS.recipes) != 0 {
        let key = recipe::recognized(pid, mm);
        if key != 0 {
            count!(stacks_recognized);
            return key;
        }
    }
    if !is_wanted {
        return 0;
    }
    // SAFETY: the helper has no precondition.
    let random = || u64::from(unsafe { bpf_get_prandom_u32() });
    let key = random() << 32 | random() | 1;
    if global!(PARAMS.recipes) != 0 {
        // The frames are written ahead of the copy, so that the user half has both when it unwinds the stack.
        interpreter::interpreted(pid, mm, key);
    }
    copied(pid, mm, key)
}

/// The current task's user stack along its frame pointers, as a key into `STACKS`; 0 if there is none.
#[inline(always)]
fn followed(ctx: &impl EbpfContext) -> u64 {
    collect(ctx, u64::from(BPF_F_USER_STACK))
}

/// The current kernel stack, as a key into `STACKS`; 0 if there is none.
#[inline(always)]
fn kernel(ctx: &impl EbpfContext) -> u64 {
    collect(ctx, 0)
}

/// Sends a copy of the user stack of the current task, which belongs to process `pid` with the memory `mm`.
/// Returns `key` or, if the copy could not be sent, the key of the innermost frame or 0.
///
/// It is a global function, for the reason that [`recipe::recognized`] gives.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn copied(pid: u64, mm: u64, key: u64) -> u64 {
    let Some(entry) = KernelEntry::of_current(pid as u32, mm) else { return 0 };
    let copy = StackCopy {
        header: Header { tag: tag::STACK, version: VERSION, length: 0 },
        key,
        pid: entry.pid,
        bytes: 0,
        mm: entry.mm,
        start: entry.sp & !(STACK_STEP as u64 - 1),
        ip: entry.ip,
        sp: entry.sp,
        fp: entry.fp,
        lr: entry.lr,
        code_pages: entry.code_pages,
    };
    if !emit::stack(copy) {
        if global!(PARAMS.recipes) != 0 {
            return innermost(entry.ip);
        }
        count!(stacks_failed);
        return 0;
    }
    count!(stacks_copied);
    key
}

/// The key into `STACKS` of a stack of which only the innermost frame is known.
#[inline(always)]
fn innermost(ip: u64) -> u64 {
    let Some(slot) = Slot::take() else {
        count!(stacks_failed);
        return 0;
    };
    // SAFETY: the slot is ours, its stack is plain integers.
    let stack = unsafe { &mut (*slot.get()).stack };
    stack.frames[0] = ip;
    stored(stack, 1)
}

#[inline(always)]
fn collect(ctx: &impl EbpfContext, flags: u64) -> u64 {
    let Some(slot) = Slot::take() else {
        count!(stacks_failed);
        return 0;
    };
    // SAFETY: the slot is ours, its stack is plain integers.
    let stack = unsafe { &mut (*slot.get()).stack };
    // SAFETY: the buffer is as long as we say.
    let bytes = unsafe {
        bpf_get_stack(ctx.as_ptr(), stack.frames.as_mut_ptr().cast(), (MAX_FRAMES * 8) as u32, flags)
    };
    if bytes <= 0 {
        // The task has no memory (it is exiting, or a kernel thread), or the unwinder found nothing.
        return 0;
    }
    stored(stack, (bytes as u64) / 8)
}

/// Stores the first `count` frames in `STACKS`, and returns their key; 0 if that fails, which is counted.
#[inline(always)]
fn stored(stack: &mut StackTrace, count: u64) -> u64 {
    stack.count = count;
    let key = hash(stack, count);
    if STACKS.get_ptr(key).is_some() {
        return key;
    }
    // Two CPUs may store the same stack at once. The values are equal, so the order does not matter.
    if STACKS.insert(key, &*stack, 0).is_err() {
        count!(stacks_failed);
        return 0;
    }
    key
}

/// A 64-bit hash of the first `count` frames, never 0. Multiplication by an odd constant and a fold after
/// each frame: two different stacks share a key about once in 2^64 pairs.
#[inline(always)]
fn hash(stack: &StackTrace, count: u64) -> u64 {
    let mut hash = count ^ 0x9e37_79b9_7f4a_7c15;
    let mut index = 0;
    while index < MAX_FRAMES {
        if index as u64 >= count {
            break;
        }
        hash = (hash ^ stack.frames[index]).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^= hash >> 32;
        index += 1;
    }
    if hash == 0 { 1 } else { hash }
}
