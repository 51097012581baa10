//! Process ids in the pid namespace of tcpclose, which in a container is not the initial one.

use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use tcpclose_common::{namespace::PidNamespace, offsets::ABSENT};

use crate::{
    current,
    kernel::{member, read},
    maps::{PID_NAMESPACE, global},
};

/// Whether ids have to be translated. The verifier knows the value, and removes the code that depends on it.
#[inline(always)]
pub fn is_other() -> bool {
    global!(NAMESPACE.pid_numbers) != ABSENT
}

/// Records the pid namespace of the current task, which must be tcpclose.
#[inline(always)]
pub fn learn() {
    let Some(namespace) = PID_NAMESPACE.get_ptr_mut(0) else { return };
    // SAFETY: a valid map value. Only programs that tcpclose runs itself write it, and always with the same
    // value.
    if unsafe { (*namespace).address } != 0 {
        return;
    }
    let Some(pid) = struct_pid(current::address()) else { return };
    let Some(level) = member::<u32>(pid, global!(NAMESPACE.pid_level)) else { return };
    let Some([_, address]) = number(pid, level) else { return };
    let own = (bpf_get_current_pid_tgid() >> 32) as u32;
    // SAFETY: as above, and aligned.
    unsafe { *namespace = PidNamespace { address, level, own } };
}

/// The process id of `task` in the pid namespace of tcpclose; 0 if it has none there.
///
/// Not inlined, so that its buffers do not add to the stack of the programs that call it.
#[inline(never)]
pub fn local(task: u64) -> u32 {
    let Some(namespace) = PID_NAMESPACE.get_ptr(0) else { return 0 };
    // SAFETY: a valid map value.
    let PidNamespace { address, level, .. } = unsafe { *namespace };
    if address == 0 {
        return 0;
    }
    let Some(pid) = struct_pid(task) else { return 0 };
    // A process has an id in the namespace that it was created in, and in each one above it.
    let Some(depth) = member::<u32>(pid, global!(NAMESPACE.pid_level)) else { return 0 };
    if depth < level {
        return 0;
    }
    let Some(number) = number(pid, level) else { return 0 };
    if number[1] != address {
        return 0;
    }
    number[0] as u32
}

/// The `struct pid` of the process that `task` is a thread of.
#[inline(always)]
fn struct_pid(task: u64) -> Option<u64> {
    let leader: u64 = member(task, global!(STRUCTS.task_group_leader))?;
    member(leader, global!(NAMESPACE.thread_pid))
}

/// The `struct upid` at a level: the id in the lower half of the first word, and the address of the
/// namespace.
#[inline(always)]
fn number(pid: u64, level: u32) -> Option<[u64; 2]> {
    read(pid + u64::from(global!(NAMESPACE.pid_numbers)) + u64::from(level) * 16)
}
