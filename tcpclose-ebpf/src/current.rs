//! The current task, and the registers that it entered the kernel with.

use aya_ebpf::{
    cty::c_void,
    helpers::{
        bpf_get_current_task,
        generated::{bpf_get_current_task_btf, bpf_task_pt_regs},
    },
};

use crate::{
    kernel::{Object, Typed, member},
    maps::global,
};

/// The current task.
pub trait Current: Object {
    /// The registers that were saved at the top of its kernel stack when it entered the kernel.
    fn registers(self) -> Self;
}

impl Current for Typed {
    #[inline(always)]
    fn registers(self) -> Self {
        // SAFETY: the pointer comes from `typed()`, and a kernel that has the helper for it has this one too.
        Self::new(unsafe { bpf_task_pt_regs(self.pointer().cast_mut().cast()) } as *const c_void)
    }
}

impl Current for u64 {
    /// 0 if they are not known.
    #[inline(always)]
    fn registers(self) -> Self {
        let Some(bottom) = member::<u64>(self, global!(STRUCTS.task_stack)) else { return 0 };
        let (size, regs) = (global!(STRUCTS.thread_size), global!(STRUCTS.pt_regs_size));
        if size == u16::MAX || regs == u16::MAX {
            return 0;
        }
        bottom + u64::from(size) - u64::from(regs)
    }
}

/// Evaluates an expression in which a name stands for the current task. Its type depends on the kernel.
macro_rules! with_current {
    (|$current:ident| $use:expr) => {
        if $crate::maps::global!(PARAMS.has_pt_regs_helper) != 0 {
            let $current = $crate::current::typed();
            $use
        } else {
            let $current = $crate::current::address();
            $use
        }
    };
}
pub(crate) use with_current;

/// The current task, on kernels with the helper for it. On other kernels the verifier removes this call.
#[inline(always)]
pub fn typed() -> Typed {
    // SAFETY: the loader has checked that this kernel has the helper.
    Typed::new(unsafe { bpf_get_current_task_btf() })
}

/// The current task's address.
#[inline(always)]
pub fn address() -> u64 {
    // SAFETY: the helper has no precondition.
    unsafe { bpf_get_current_task() }
}

/// The current task's file `descriptor`. Another thread may have closed the descriptor and reused the number
/// meanwhile. A number that is not a descriptor leads to another word of memory, or to nothing.
#[inline(always)]
pub fn file(descriptor: u64) -> Option<u64> {
    let files: u64 = member(address(), global!(STRUCTS.task_files))?;
    let table: u64 = member(files, global!(STRUCTS.files_fdt))?;
    let descriptors: u64 = member(table, global!(STRUCTS.fdtable_fd))?;
    member(descriptors + descriptor * 8, 0)
}
