//! The identity of the current task, and what it is doing.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_get_current_uid_gid, generated::bpf_get_current_comm};
use tcpclose_common::{
    record::{Header, ProcessRecord, RawTask, VERSION, syscall, tag},
    tcp::task_flag,
};

use crate::{
    comm,
    current::{self, Current, with_current},
    interpreter, iterator,
    kernel::{Object, member},
    maps::{NOTICED, PROCESSES, count, global},
    namespace,
};

/// Fills in the identity of the current task and what it is doing, and notifies the reader if its process is
/// new.
#[inline(always)]
pub fn meet(task: &mut RawTask) {
    identify(task);
    notice(task, current::address);
}

/// Fills in the identity of the current task and what it is doing. The pid is written last: the accept hook
/// does not hold the socket's lock, and a program that copies the entry meanwhile finds no task or a complete
/// one.
#[inline(always)]
pub fn identify(task: &mut RawTask) {
    let ids = bpf_get_current_pid_tgid();
    task.tid = ids as u32;
    task.uid = bpf_get_current_uid_gid() as u32;
    with_current!(|current| doing(current, task));
    compiler_fence(Ordering::SeqCst);
    task.pid = (ids >> 32) as u32;
}

/// Fills in the name of the task `current`, and what it is doing.
#[inline(always)]
fn doing(current: impl Current, task: &mut RawTask) {
    if let Some(comm) = comm::of(current) {
        task.comm = comm;
    } else {
        // SAFETY: the buffer is as long as we say. On failure the helper leaves it all zero.
        unsafe { bpf_get_current_comm(task.comm.as_mut_ptr().cast(), 16) };
    }
    task.flags = member(current, global!(STRUCTS.task_flags)).unwrap_or(0);
    task.exit_code = member(current, global!(STRUCTS.task_exit_code)).unwrap_or(0);
    // The address is taken as a number: a `RawTask` is copied in halves of words, and the verifier refuses
    // that for a pointer.
    task.mm = current.follow(global!(STRUCTS.task_mm)).map_or(0, Object::address);
    task.syscall = syscall(current.registers());
}

/// The number of the system call, as [`RawTask::syscall`] keeps it; -1 if it cannot be read.
///
/// 32-bit programs have a table of system calls of their own. Their code runs in another mode of the
/// processor, which shows in the registers that were saved on entry to the kernel.
#[inline(always)]
fn syscall<O: Object>(registers: O) -> i32 {
    let number = syscall_number(registers);
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

/// The number in the registers; -1 if it cannot be read. arm64 has 32 bits for it, of which the verifier does
/// not permit to read more. x86-64 has 64, and the low half is first.
#[inline(always)]
fn syscall_number<O: Object>(registers: O) -> i32 {
    member(registers, global!(STRUCTS.pt_regs_syscall)).unwrap_or(-1)
}

/// The number of `socketcall` in i386's table.
const SOCKETCALL: i32 = 102;

/// Whether the current task cannot have closed a socket itself: it is a kernel thread, or reads a BPF
/// iterator.
#[inline(always)]
pub fn is_nobody() -> bool {
    with_current!(|current| is_none(current))
}

#[inline(always)]
fn is_none(current: impl Current) -> bool {
    let flags: u32 = member(current, global!(STRUCTS.task_flags)).unwrap_or(0);
    let call = syscall_number(current.registers());
    flags & (task_flag::KTHREAD | task_flag::WQ_WORKER) != 0
        || call == i32::from(global!(ITERATORS.read)) && iterator::is_read()
}

/// Notifies the reader at once of a new process or program image, so that it can read `/proc` while the
/// process lives. `address` yields the address of the `struct task_struct`.
#[inline(always)]
pub fn notice(task: &RawTask, address: impl FnOnce() -> u64) {
    // If it is about to exit, there is little left to read, but the name of its program is in the notice, and
    // in another pid namespace its id there.
    if let Some(known) = NOTICED.get_ptr(task.pid) {
        // SAFETY: a valid map value.
        if unsafe { *known } == task.mm || task.mm == 0 {
            return;
        }
    }
    let address = address();
    // Without memory there is no interpreter in it.
    if task.mm != 0 && global!(PARAMS.recipes) != 0 {
        interpreter::expect(task.pid.into(), task.mm, address);
    }
    let notice = ProcessRecord {
        header: Header { tag: tag::PROCESS, version: VERSION, length: size_of::<ProcessRecord>() as u32 },
        pid: task.pid,
        local: if namespace::is_other() { namespace::local(address) } else { 0 },
        mm: task.mm,
        comm: comm::program_of(address),
    };
    // Without flags, the kernel wakes the reader unless it is awake.
    if PROCESSES.output::<ProcessRecord>(&notice, 0).is_err() {
        count!(processes_lost);
        return;
    }
    // If this fails, the process is noticed again next time.
    let _ = NOTICED.insert(task.pid, task.mm, 0);
}
