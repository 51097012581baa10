//! An application takes a connection out of the accept queue. There is no tracepoint for that.
//! `--accept-hook` chooses between two other ways to see it. Neither holds the socket's lock.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::{
    EbpfContext,
    macros::{fexit, tracepoint},
    programs::{FExitContext, TracePointContext},
};
use tcpclose_common::record::{RawTask, role};

use crate::{connection, current, filter, kernel::member, maps::global, sock, stack, task};

/// The return of `struct sock *inet_csk_accept(...)`. Its cost is too small to be measured, but not every
/// kernel allows fexit.
///
/// The kernel does not run a program on a CPU where it is running already
/// (`bpf_prog_get_recursion_context()`), and may switch to another task while the program runs. In that case
/// [`accept_nested`] records what that task accepts.
#[fexit(function = "inet_csk_accept")]
pub fn accept(ctx: FExitContext) -> i32 {
    returned(&ctx);
    0
}

/// The second copy of [`accept`]. The one that runs second finds that the opener is known.
#[fexit(function = "inet_csk_accept")]
pub fn accept_nested(ctx: FExitContext) -> i32 {
    returned(&ctx);
    0
}

/// The result follows the arguments: four up to 6.8, two from 6.10 on.
#[inline(always)]
fn returned(ctx: &FExitContext) {
    if let Some(sk) = member::<u64>(ctx.as_ptr() as u64, global!(ARGUMENTS.accept_result)) {
        accepted(ctx, sk);
    }
}

/// `syscalls:sys_exit_accept` and `syscalls:sys_exit_accept4`: the result is a descriptor. An active
/// tracepoint on any system call slows down every system call of the host a little. Accepts by `io_uring` are
/// not seen.
#[tracepoint]
pub fn accept_syscall(ctx: TracePointContext) -> i32 {
    if let Some(fd) = member::<i64>(ctx.as_ptr() as u64, global!(ACCEPT_SYSCALL_RESULT))
        && fd >= 0
        // If the number belongs to another file by now, that file is not a socket that was just accepted, or
        // the same process has accepted it.
        && let Some(sk) = current::file(fd as u64).and_then(sock::of_file)
    {
        accepted(&ctx, sk);
    }
    0
}

/// Records the current task as the one that accepted `sk`. The socket's lock is not held, so every access to
/// the entry goes through a raw pointer.
#[inline(always)]
fn accepted(ctx: &impl EbpfContext, sk: u64) {
    let Some(entry) = connection::find(sk) else { return };
    let entry = &raw mut *entry;
    // SAFETY: a valid, aligned map value, which stays mapped until the program ends. Both members are
    // integers. A program under the socket's lock may write `role` at the same time; it wrote the same value
    // when the socket was created.
    let (role, opener) =
        unsafe { ((&raw const (*entry).role).read(), (&raw const (*entry).opener.pid).read()) };
    if role != role::SERVER || opener != 0 {
        return;
    }
    let mut task = RawTask::NONE;
    task::meet(&mut task);
    // SAFETY: as above. `opener` is the only member that is written here, and no other program writes that of
    // a server's socket; the two copies of this program for one accept() run one after the other. The pid is
    // written last, so that a program which copies the entry at the same time finds no task or a complete
    // one.
    let connection = unsafe {
        let opener = &raw mut (*entry).opener;
        opener.write(RawTask { pid: 0, ..task });
        compiler_fence(Ordering::SeqCst);
        (&raw mut (*opener).pid).write(task.pid);
        &*entry
    };
    let is_wanted = filter::wants(connection);
    stack::take(ctx, &mut task, is_wanted);
    // SAFETY: as above; `connection` is not used any more.
    unsafe {
        (&raw mut (*entry).opener.user_stack).write(task.user_stack);
        (&raw mut (*entry).opener.kernel_stack).write(task.kernel_stack);
    }
}
