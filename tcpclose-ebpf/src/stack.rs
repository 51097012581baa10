//! Takes stacks and keeps each distinct one once.

use aya_ebpf::{EbpfContext, bindings::BPF_F_USER_STACK, helpers::generated::bpf_get_stack};
use tcpclose_common::stack::{MAX_FRAMES, Stack};

use crate::maps::{STACKS, Slot, count};

/// The current task's user stack, as a key into `STACKS`; 0 if there is none.
#[inline(always)]
pub fn user(ctx: &impl EbpfContext) -> u64 {
    take(ctx, u64::from(BPF_F_USER_STACK))
}

/// The kernel stack that led here, likewise.
#[inline(always)]
pub fn kernel(ctx: &impl EbpfContext) -> u64 {
    take(ctx, 0)
}

#[inline(always)]
fn take(ctx: &impl EbpfContext, flags: u64) -> u64 {
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
        // No memory of its own (an exiting task, a kernel thread), or an unwinder that found nothing.
        return 0;
    }
    let count = (bytes as u64) / 8;
    stack.count = count;
    let key = hash(stack, count);
    if STACKS.get_ptr(key).is_some() {
        return key;
    }
    // Two CPUs may keep the same stack at once: the values are the same, so any order will do.
    if STACKS.insert(key, &*stack, 0).is_err() {
        count!(stacks_failed);
        return 0;
    }
    key
}

/// A 64-bit hash of the first `count` frames, never 0. Multiplication by an odd constant and a fold after each frame:
/// two different stacks share a key about once in 2^64 pairs.
#[inline(always)]
fn hash(stack: &Stack, count: u64) -> u64 {
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
