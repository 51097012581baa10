//! The registers that the current task entered the kernel with.

use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_task_pt_regs};

use crate::{kernel::member, maps::global};

/// Address of the registers that the entry code saved at the top of the kernel stack of `current`, the current task; 0
/// if it is not known.
#[inline(always)]
pub fn of(current: u64) -> u64 {
    if global!(PARAMS.has_pt_regs_helper) != 0 {
        // SAFETY: the loader has checked that this kernel has both helpers.
        return unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) } as u64;
    }
    let Some(bottom) = member::<u64>(current, global!(STRUCTS.task_stack)) else { return 0 };
    let (size, regs) = (global!(STRUCTS.thread_size), global!(STRUCTS.pt_regs_size));
    if size == u16::MAX || regs == u16::MAX {
        return 0;
    }
    bottom + u64::from(size) - u64::from(regs)
}
