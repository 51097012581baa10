//! The current task: who it is and what it is doing.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::{
    cty::c_void,
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_task, bpf_get_current_uid_gid,
        generated::{bpf_get_current_comm, bpf_get_current_task_btf, bpf_task_pt_regs},
    },
};
use tcpclose_common::{
    offsets::ABSENT,
    record::{Header, Process, Task, VERSION, syscall, tag},
    tcp::task_flag,
};

use crate::{
    kernel::{Object, Typed, member},
    maps::{NOTICED, PROCESSES, SELF, count, global},
    registers,
};

/// Fills in who the current task is and what it is doing, and notifies the reader if its process is new.
#[inline(always)]
pub fn meet(task: &mut Task) {
    identify(task);
    notice(task);
}

/// Fills in who the current task is and what it is doing. The pid is written last: the accept hook does not hold the
/// socket's lock, and a program that copies the entry meanwhile finds no task or a complete one.
#[inline(always)]
pub fn identify(task: &mut Task) {
    let ids = bpf_get_current_pid_tgid();
    task.tid = ids as u32;
    task.uid = bpf_get_current_uid_gid() as u32;
    if global!(PARAMS.has_pt_regs_helper) != 0 && global!(STRUCTS.task_comm) != ABSENT {
        // SAFETY: the loader has checked that this kernel has both helpers.
        let (current, registers) = unsafe {
            let current = bpf_get_current_task_btf();
            (Typed::new(current), Typed::new(bpf_task_pt_regs(current) as *const c_void))
        };
        // As two words, which are two loads: a load of bytes is one for each.
        let comm: [u64; 2] = member(current, global!(STRUCTS.task_comm)).unwrap_or([0; 2]);
        let [first, second] = comm.map(u64::to_ne_bytes);
        task.comm[..8].copy_from_slice(&first);
        task.comm[8..].copy_from_slice(&second);
        doing(current, registers, task);
    } else {
        // SAFETY: the buffer is as long as we say. On failure the helper leaves it all zero.
        unsafe { bpf_get_current_comm(task.comm.as_mut_ptr().cast(), 16) };
        // SAFETY: the helper has no precondition.
        let current = unsafe { bpf_get_current_task() };
        doing(current, registers::of(current), task);
    }
    compiler_fence(Ordering::SeqCst);
    task.pid = (ids >> 32) as u32;
}

/// Fills in what the task `current` is doing. `registers` are those that it entered the kernel with.
#[inline(always)]
fn doing<O: Object>(current: O, registers: O, task: &mut Task) {
    task.flags = member(current, global!(STRUCTS.task_flags)).unwrap_or(0);
    task.exit_code = member(current, global!(STRUCTS.task_exit_code)).unwrap_or(0);
    // As a number: the verifier refuses to copy a pointer in halves, and copies of a `Task` are made of them.
    task.mm = current.follow(global!(STRUCTS.task_mm)).map_or(0, Object::address);
    task.syscall = syscall(registers);
}

/// The number of the system call, as [`Task::syscall`] keeps it; -1 if it cannot be read.
///
/// 32-bit programs have a table of system calls of their own. Their code runs in another mode of the processor, which the
/// registers show that were saved on the way into the kernel.
#[inline(always)]
fn syscall<O: Object>(registers: O) -> i32 {
    let number = member::<i64>(registers, global!(STRUCTS.pt_regs_syscall)).unwrap_or(-1) as i32;
    let mode = member::<u16>(registers, global!(PARAMS.registers.mode)).unwrap_or(0);
    if number == -1 || mode & global!(PARAMS.registers.mode_mask) != global!(PARAMS.registers.mode_compat) {
        return number;
    }
    let call = if number == SOCKETCALL {
        member::<u32>(registers, global!(PARAMS.registers.argument)).unwrap_or(0) & 0xff
    } else {
        0
    };
    number | syscall::COMPAT | (call << syscall::SOCKETCALL_SHIFT).cast_signed()
}

/// The number of `socketcall` in i386's table.
const SOCKETCALL: i32 = 102;

/// Whether the current task is a kernel thread, or tcpclose itself. The inventory holds each file while it reads it; if the
/// owner closes that file meanwhile, the socket is closed when the inventory releases it.
#[inline(always)]
pub fn is_nobody() -> bool {
    if let Some(own) = SELF.get_ptr(0) {
        // SAFETY: a valid map value.
        let own = unsafe { *own };
        if own != 0 && own == (bpf_get_current_pid_tgid() >> 32) as u32 {
            return true;
        }
    }
    let flags: u32 = if global!(PARAMS.has_pt_regs_helper) != 0 {
        // SAFETY: the loader has checked that this kernel has the helper.
        member(Typed::new(unsafe { bpf_get_current_task_btf() }), global!(STRUCTS.task_flags)).unwrap_or(0)
    } else {
        // SAFETY: the helper has no precondition.
        member(unsafe { bpf_get_current_task() }, global!(STRUCTS.task_flags)).unwrap_or(0)
    };
    flags & (task_flag::KTHREAD | task_flag::WQ_WORKER) != 0
}

/// The current program's name, which is that of its main thread; all zero if it cannot be read.
#[inline(always)]
pub fn program() -> [u8; 16] {
    // SAFETY: the helper has no precondition.
    let current = unsafe { bpf_get_current_task() };
    let leader: u64 = member(current, global!(STRUCTS.task_group_leader)).unwrap_or(0);
    member(leader, global!(STRUCTS.task_comm)).unwrap_or([0; 16])
}

/// Notifies the reader at once of a new process or program image, so that it can read `/proc` while the process lives.
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
        comm: program(),
    };
    // No flags: the kernel wakes the reader unless it is awake already.
    if PROCESSES.output::<Process>(&notice, 0).is_err() {
        count!(processes_lost);
        return;
    }
    // If this fails, the process is noticed again next time.
    let _ = NOTICED.insert(task.pid, task.mm, 0);
}
