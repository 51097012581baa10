//! `sock:inet_sock_set_state`: a socket's state changes. It fires before `sk_state` is written, under the
//! socket's lock. It never fires for TIME_WAIT and request sockets. A socket in FIN_WAIT2 goes to CLOSE when
//! the small TIME_WAIT socket replaces it.

use aya_ebpf::{
    EbpfContext,
    helpers::{bpf_get_current_pid_tgid, generated::bpf_get_socket_cookie},
    macros::{btf_tracepoint, tracepoint},
    programs::{BtfTracePointContext, TracePointContext},
};
use aya_log_ebpf::debug;
use tcpclose_common::{
    record::{RawTask, first_move, role},
    tcp::{IPPROTO_TCP, state},
};

use crate::{
    acts,
    connection::{self, StackOf},
    end,
    kernel::{Object, Typed},
    listener,
    maps::{LAST_CHANGE, global},
    sock::{self, Sock, TracepointRecord},
    task, ttl,
};

/// `TP_PROTO(const struct sock *sk, const int oldstate, const int newstate)`.
///
/// The kernel does not run a program on a CPU where it is running already (`__bpf_trace_run()`, since 6.1). A
/// state change in a softirq that interrupts this program would be lost; its second copy,
/// [`set_state_nested`], handles it.
#[btf_tracepoint(function = "inet_sock_set_state")]
#[inline(always)]
pub fn set_state(ctx: BtfTracePointContext) -> i32 {
    if let Some((sock, old, new)) = change(&ctx) {
        if let Some(last) = LAST_CHANGE.get_ptr_mut(0) {
            // SAFETY: a valid, aligned map value of this CPU. Only `set_state` and its second copy use it.
            unsafe { *last = number(sock.address, new) };
        }
        changed(&ctx, sock, old, new, cookie(&ctx, new), None);
    }
    0
}

/// The second copy of [`set_state`], attached after it, which handles a state change if the kernel skipped
/// the first copy. If nothing else happened on this CPU in between, `LAST_CHANGE` shows that it was not
/// skipped; otherwise the entry shows whether it was. The entry cannot change in between, because the socket
/// is locked.
///
/// It has to be a separate program and must not call [`set_state`] by a tail call. Since 6.13 the kernel
/// keeps the stack of a tracing program once per CPU, and two runs do not share it only because the kernel
/// skips a program that is already running. A tail call bypasses that check, and would overwrite the stack of
/// the run that it interrupts.
#[btf_tracepoint(function = "inet_sock_set_state")]
#[inline(always)]
pub fn set_state_nested(ctx: BtfTracePointContext) -> i32 {
    let Some((sock, old, new)) = change(&ctx) else { return 0 };
    if let Some(last) = LAST_CHANGE.get_ptr_mut(0) {
        // SAFETY: as above. The note is cleared, so that it cannot be taken for a later change of a socket at
        // the same address, which the kernel may have skipped.
        unsafe {
            if *last == number(sock.address, new) {
                *last = 0;
                return 0;
            }
        }
    }
    let was_run = match connection::find(sock.address) {
        Some(connection) => connection::last_state(connection) == new,
        None => false,
    };
    if !was_run {
        changed(&ctx, sock, old, new, cookie(&ctx, new), None);
    }
    0
}

/// The socket, its old state and its new state; `None` if it is not a TCP socket.
#[inline(always)]
fn change(ctx: &BtfTracePointContext) -> Option<(Sock<Typed>, u8, u8)> {
    let tcp = Typed::tcp_sock(ctx.arg(0))?;
    let sock = Sock { address: tcp.address(), object: tcp };
    Some((sock, ctx.arg::<i32>(1) as u8, ctx.arg::<i32>(2) as u8))
}

/// A number that identifies a socket's change of state: the lowest bits of kernel addresses leave room for
/// the state.
#[inline(always)]
fn number(address: u64, new: u8) -> u64 {
    address | u64::from(new & 0xf)
}

/// The socket's cookie, if this kernel has the helper. It is requested once, at the end.
#[inline(always)]
fn cookie(ctx: &BtfTracePointContext, new: u8) -> u64 {
    if global!(PARAMS.has_cookie_helper) == 0 || new != state::CLOSE {
        return 0;
    }
    // The helper requires the pointer as it is in the context, without any arithmetic on it. SAFETY: the
    // loader has checked that this kernel has the helper for this kind of program.
    unsafe { bpf_get_socket_cookie(ctx.arg::<*mut core::ffi::c_void>(0)) }
}

/// Never attached. Whether the kernel accepts this program shows whether [`cookie`] may use the helper.
/// Trying it with [`set_state`] instead would take as long as loading all programs on a kernel that refuses
/// it (before 5.12).
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn read_cookie(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the helper has no precondition; the verifier refuses it where the kernel lacks it.
    unsafe { bpf_get_socket_cookie(ctx.arg::<*mut core::ffi::c_void>(0)) as i32 }
}

#[tracepoint]
#[inline(always)]
pub fn set_state_classic(ctx: TracePointContext) -> i32 {
    let record = TracepointRecord { ctx: &ctx, layout: global!(SET_STATE_RECORD) };
    let layout = record.layout;
    let Some(protocol) = record.get::<u16>(layout.protocol) else { return 0 };
    let Some(sk) = record.get::<u64>(layout.skaddr) else { return 0 };
    let Some(old) = record.get::<i32>(layout.oldstate) else { return 0 };
    let Some(new) = record.get::<i32>(layout.newstate) else { return 0 };
    if protocol == IPPROTO_TCP {
        let sock = Sock { address: sk, object: sk };
        changed(&ctx, sock, old as u8, new as u8, 0, Some(&record));
    }
    0
}

#[inline(always)]
fn changed(
    ctx: &impl EbpfContext,
    sock: Sock<impl Object>,
    old: u8,
    new: u8,
    cookie: u64,
    record: Option<&TracepointRecord<'_>>,
) {
    // The socket's address is not printed, because the verifier forbids splitting a pointer into bytes.
    debug!(ctx, "{} -> {} while process {} runs", old, new, bpf_get_current_pid_tgid() >> 32);
    let sk = sock.address;
    // A listening socket is not a connection.
    if old == new {
        acts::repeated(ctx, sock, new);
        return;
    }
    if new == state::LISTEN {
        // This runs in the context of listen(), as SYN_SENT does in that of connect(). No stack is taken,
        // because no connection was opened.
        let mut task = RawTask::NONE;
        task::meet(&mut task);
        listener::opened(sk, &task);
        return;
    }
    if old == state::LISTEN && new == state::CLOSE {
        listener::closed(sk);
        return;
    }
    let now = connection::now();
    if new == state::CLOSE {
        end::report(ctx, sock, old, now, cookie, StackOf::Actor, record);
        return;
    }
    let born = old == state::CLOSE || old == state::LISTEN;
    let found = if born { connection::begin(sk, now) } else { connection::find_or_begin(sk, now) };
    let Some(connection) = found else {
        return;
    };
    connection::step(connection, new, now);
    // The endpoints are read at once, also of a socket that is older than the trace: filters and later
    // inspections need them.
    sock::endpoints(sock.object, record, &mut connection.endpoints);
    match new {
        state::SYN_SENT => {
            // This always runs in the context of the task that connects: tcp_v4_connect(), tcp_v6_connect().
            connection.role = role::CLIENT;
            // Additional MPTCP subflows are connected by a kernel worker, which belongs to no process.
            if !task::is_nobody() {
                connection::opened(ctx, connection);
            }
        }
        state::SYN_RECV => {
            if old == state::LISTEN {
                connection.role = role::SERVER;
            }
        }
        state::ESTABLISHED => {
            connection.established = now;
            let seen = ttl::of(&connection.endpoints, true).handshake;
            if seen != 0 {
                connection.reset.handshake_ttl = seen;
            }
        }
        state::FIN_WAIT1 | state::LAST_ACK => {
            connection::moved(connection, sock.object, first_move::LOCAL, now);
            if new == state::FIN_WAIT1 {
                connection::teardown_began(connection, sk, now);
            }
            // This runs in softirq only if a child was shut down before it was established, in which case no
            // task acted.
            if sock::owned(sock.object) != Some(false) {
                connection::acted(ctx, connection, StackOf::Actor);
            }
        }
        state::CLOSE_WAIT => {
            connection::moved(connection, sock.object, first_move::PEER, now);
            connection::teardown_began(connection, sk, now);
        }
        _ => {}
    }
}
