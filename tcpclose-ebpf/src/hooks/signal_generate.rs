//! `signal:signal_generate` and `oom:mark_victim`: the sender of the signal that ends a process.
//!
//! Both are raw tracepoints, whose arguments are plain numbers. As typed ones they would mislead the
//! verifier: the pointer to the signal's information may be 0 or 1, which have a meaning.

use aya_ebpf::{
    helpers::{bpf_get_current_pid_tgid, bpf_get_current_uid_gid},
    macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use tcpclose_common::record::Signal;

use crate::{
    comm, connection,
    kernel::{member, read},
    maps::{SIGNALS, global},
    task,
};

/// `SEND_SIG_NOINFO` and `SEND_SIG_PRIV` of `include/linux/sched/signal.h`: the signal was sent by a process,
/// or by the kernel.
const NOINFO: u64 = 0;
const PRIV: u64 = 1;

/// The offset of `si_code` in `struct kernel_siginfo`, which is part of the user ABI on x86-64 and arm64.
const SI_CODE: u64 = 8;

/// `SI_USER`, `SI_QUEUE` and `SI_TKILL`: from `kill()`, `sigqueue()` and `tgkill()`.
const BY_PROCESS: [i32; 3] = [0, -1, -6];

/// `TRACE_SIGNAL_DELIVERED` and `TRACE_SIGNAL_LOSE_INFO`. With other results the signal was ignored, or was
/// pending already.
const DELIVERED: [u32; 2] = [0, 4];

const SIGKILL: u32 = 9;

/// How long a handler may run after a signal, nanoseconds.
const SENT_ON: u64 = 10_000_000_000;

/// Signals that do not end a process: SIGCHLD, SIGCONT, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH.
const HARMLESS: u64 = 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 22 | 1 << 23 | 1 << 28;

/// `TP_PROTO(int sig, struct kernel_siginfo *info, struct task_struct *task, int group, int result)`.
#[raw_tracepoint]
pub fn signal_generate(ctx: RawTracePointContext) -> i32 {
    let number = ctx.arg::<u64>(0) as u32;
    let result = ctx.arg::<u64>(4) as u32;
    if number > 63 || HARMLESS >> number & 1 != 0 || result != DELIVERED[0] && result != DELIVERED[1] {
        return 0;
    }
    let Some(victim) = member::<u32>(ctx.arg::<u64>(2), global!(STRUCTS.task_tgid)) else { return 0 };
    let info = ctx.arg::<u64>(1);
    let by_process = match info {
        NOINFO => true,
        PRIV => false,
        // Signals from faults, timers and terminals have other codes. The kernel sends them, whichever task
        // runs.
        info => match read::<i32>(info + SI_CODE) {
            Some(code) => code == BY_PROCESS[0] || code == BY_PROCESS[1] || code == BY_PROCESS[2],
            None => false,
        },
    };
    let mut signal = Signal { at: connection::now(), number, pid: 0, uid: 0, oom: 0, comm: [0; 16] };
    if by_process && !task::is_nobody() {
        signal.pid = (bpf_get_current_pid_tgid() >> 32) as u32;
        signal.uid = bpf_get_current_uid_gid() as u32;
        signal.comm = comm::program();
    }
    if signal.pid == victim && is_sent_on(victim, &signal) {
        return 0;
    }
    // Without room, the sender is not known.
    let _ = SIGNALS.insert(victim, &signal, 0);
    0
}

/// Whether a process sends itself a signal that another one has just sent it: the handler has cleaned up, and
/// ends the process by the same signal. php-fpm does that, and shells. Then the other process has killed it.
fn is_sent_on(victim: u32, signal: &Signal) -> bool {
    // SAFETY: an entry may be overwritten meanwhile, with another signal to the same process.
    let Some(earlier) = (unsafe { SIGNALS.get(&victim) }) else { return false };
    earlier.number == signal.number && earlier.pid != victim && signal.at.saturating_sub(earlier.at) < SENT_ON
}

/// `TP_PROTO(int pid)`, from 6.9 on `TP_PROTO(struct task_struct *task, uid_t uid)`: a pointer into the
/// kernel has its upper half set. `__oom_kill_process()` has sent the signal already.
#[raw_tracepoint]
pub fn mark_victim(ctx: RawTracePointContext) -> i32 {
    let victim = ctx.arg::<u64>(0);
    let pid = if victim >> 32 == 0 {
        victim as u32
    } else {
        let Some(pid) = member::<u32>(victim, global!(STRUCTS.task_tgid)) else { return 0 };
        pid
    };
    let signal = Signal { at: connection::now(), number: SIGKILL, pid: 0, uid: 0, oom: 1, comm: [0; 16] };
    let _ = SIGNALS.insert(pid, &signal, 0);
    0
}
