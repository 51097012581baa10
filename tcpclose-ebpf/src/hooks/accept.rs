//! An application takes a connection out of the accept queue. No tracepoint tells of it; there are two ways to see it,
//! and `--accept-hook` chooses.

use aya_ebpf::{
    EbpfContext,
    helpers::bpf_get_current_task,
    macros::{fexit, tracepoint},
    programs::{FExitContext, TracePointContext},
};
use tcpclose_common::record::role;

use crate::{connection, kernel::member, maps::global, sock};

/// The return of `struct sock *inet_csk_accept(...)`. Costs nothing measurable, but not every kernel allows fexit.
///
/// The kernel does not run a program on a CPU where it is running already (`bpf_prog_get_recursion_context()`), and may let
/// another task go on in the middle of it. What that one accepts meanwhile, [`accept_nested`] sees.
#[fexit(function = "inet_csk_accept")]
pub fn accept(ctx: FExitContext) -> i32 {
    returned(&ctx);
    0
}

/// The same program once more. Whichever comes second finds that the opener is known.
#[fexit(function = "inet_csk_accept")]
pub fn accept_nested(ctx: FExitContext) -> i32 {
    returned(&ctx);
    0
}

/// The result lies behind the arguments, of which there were four up to 6.8 and are two from 6.10 on.
#[inline(always)]
fn returned(ctx: &FExitContext) {
    if let Some(sk) = member::<u64>(ctx.as_ptr() as u64, global!(ARGUMENTS.accept_result)) {
        accepted(ctx, sk);
    }
}

/// `syscalls:sys_exit_accept` and `syscalls:sys_exit_accept4`: the result is a descriptor. That any tracepoint on a system
/// call is active slows every system call of the host down a little. Accepts by `io_uring` are not seen.
#[tracepoint]
pub fn accept_syscall(ctx: TracePointContext) -> i32 {
    if let Some(fd) = member::<i64>(ctx.as_ptr() as u64, global!(ACCEPT_SYSCALL_RESULT)) {
        if fd >= 0 {
            if let Some(sk) = file(fd as u64).and_then(sock::of_file) {
                accepted(&ctx, sk);
            }
        }
    }
    0
}

/// The current task's file `fd`. Another thread may have closed and used the number again meanwhile: then the socket is
/// not one that waits for its acceptor, or it is, and was accepted by the same process.
#[inline(always)]
fn file(fd: u64) -> Option<u64> {
    // SAFETY: the helper has no precondition.
    let current = unsafe { bpf_get_current_task() };
    let files: u64 = member(current, global!(STRUCTS.task_files))?;
    let table: u64 = member(files, global!(STRUCTS.files_fdt))?;
    let descriptors: u64 = member(table, global!(STRUCTS.fdtable_fd))?;
    member(descriptors + fd * 8, 0)
}

#[inline(always)]
fn accepted(ctx: &impl EbpfContext, sk: u64) {
    if let Some(connection) = connection::find(sk) {
        if connection.role == role::SERVER && connection.opener.pid == 0 {
            connection::opened(ctx, connection);
        }
    }
}
