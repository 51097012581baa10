//! The task that is running: who it is, what it is doing, and from where.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::{
    EbpfContext,
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_task, bpf_get_current_uid_gid,
        generated::{bpf_get_current_comm, bpf_get_current_task_btf, bpf_task_pt_regs},
    },
};
use tcpclose_common::{
    record::{Header, Process, Task, VERSION, tag},
    tcp::task_flag,
};

use crate::{
    kernel::member,
    maps::{NOTICED, PROCESSES, SELF, count, global},
    stack,
};

/// Takes the stacks that were asked for of the current task, which is `task`. `is_wanted` says whether they are worth a
/// copy.
#[inline(always)]
pub fn stacks(ctx: &impl EbpfContext, task: &mut Task, is_wanted: bool) {
    if global!(PARAMS.user_stack) != 0 {
        task.user_stack = if is_wanted { stack::user(ctx, task) } else { stack::followed(ctx) };
    }
    if global!(PARAMS.kernel_stack) != 0 {
        task.kernel_stack = stack::kernel(ctx);
    }
}

/// Writes who the current task is and what it is doing, and tells the reader if its process is new.
#[inline(always)]
pub fn meet(task: &mut Task) {
    identify(task);
    notice(task);
}

/// Writes who the current task is and what it is doing. The pid comes last: an acceptor is noted without the socket's lock,
/// and whoever copies the entry meanwhile, because the connection ends, finds either nobody or somebody whole.
#[inline(always)]
pub fn identify(task: &mut Task) {
    let ids = bpf_get_current_pid_tgid();
    task.tid = ids as u32;
    task.uid = bpf_get_current_uid_gid() as u32;
    // SAFETY: the buffer is as long as we say. On failure the helper leaves it all zero.
    unsafe { bpf_get_current_comm(task.comm.as_mut_ptr().cast(), 16) };
    // SAFETY: the helper has no precondition.
    let current = unsafe { bpf_get_current_task() };
    task.flags = member(current, global!(STRUCTS.task_flags)).unwrap_or(0);
    task.exit_code = member(current, global!(STRUCTS.task_exit_code)).unwrap_or(0);
    task.mm = member(current, global!(STRUCTS.task_mm)).unwrap_or(0);
    task.syscall = syscall(current);
    compiler_fence(Ordering::SeqCst);
    task.pid = (ids >> 32) as u32;
}

/// Whether the current task is nobody's: a thread of the kernel's own, or tcpclose. While the inventory looks at a file
/// it holds it, and if its owner closes it just then, the close happens when the inventory lets go.
#[inline(always)]
pub fn is_nobody() -> bool {
    if let Some(own) = SELF.get_ptr(0) {
        // SAFETY: a valid map value.
        let own = unsafe { *own };
        if own != 0 && own == (bpf_get_current_pid_tgid() >> 32) as u32 {
            return true;
        }
    }
    // SAFETY: the helper has no precondition.
    let current = unsafe { bpf_get_current_task() };
    let flags: u32 = member(current, global!(STRUCTS.task_flags)).unwrap_or(0);
    flags & (task_flag::KTHREAD | task_flag::WQ_WORKER) != 0
}

/// Number of the system call that the current task is in, -1 if that can not be read.
#[inline(always)]
fn syscall(current: u64) -> i32 {
    member::<i64>(registers(current), global!(STRUCTS.pt_regs_syscall)).unwrap_or(-1) as i32
}

/// Address of the registers that the entry code saved at the top of the current task's kernel stack, 0 if it is not
/// known.
#[inline(always)]
pub fn registers(current: u64) -> u64 {
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

/// Tells the reader at once of a process (or program image) that was not seen before, so that it can look it up in
/// `/proc` while it lives.
#[inline(always)]
fn notice(task: &Task) {
    if task.mm == 0 {
        return;
    }
    if let Some(known) = NOTICED.get_ptr(task.pid) {
        // SAFETY: a valid map value.
        if unsafe { *known } == task.mm {
            return;
        }
    }
    let notice = Process {
        header: Header { tag: tag::PROCESS, version: VERSION, length: size_of::<Process>() as u32 },
        pid: task.pid,
        reserved: 0,
        mm: task.mm,
    };
    // No flags: the kernel wakes the reader unless it is awake already.
    if PROCESSES.output::<Process>(&notice, 0).is_err() {
        count!(processes_lost);
        return;
    }
    // If this fails, the process is noticed again next time.
    let _ = NOTICED.insert(task.pid, task.mm, 0);
}
