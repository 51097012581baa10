//! `sock:inet_sock_set_state`: a socket's state changes. It fires before `sk_state` is written, under the
//! socket's lock. It never fires for TIME_WAIT and request sockets. A socket in FIN_WAIT2 goes to CLOSE when
//! the small TIME_WAIT socket replaces it.

use aya_ebpf::{
    EbpfContext,
    cty::c_void,
    helpers::{bpf_get_current_pid_tgid, generated::bpf_get_socket_cookie},
    macros::{btf_tracepoint, map, tracepoint},
    maps::ProgramArray,
    programs::{BtfTracePointContext, TracePointContext},
};
use aya_log_ebpf::debug;
use tcpclose_common::{
    record::{ConnectionRecord, RawTask, first_move, role},
    tcp::{IPPROTO_TCP, is_one_of, is_teardown, state},
};

use crate::{
    acts::{self, act},
    connection::{self, read_back},
    end,
    kernel::{Object, Typed},
    listener,
    maps::{LAST_CHANGE, count, global},
    sock::{self, Sock, TracepointRecord},
    task, ttl,
};

/// `TP_PROTO(const struct sock *sk, const int oldstate, const int newstate)`.
///
/// The kernel does not run a program on a CPU where it is running already (`__bpf_trace_run()`, since 6.1). A
/// state change in a softirq that interrupts this program would be lost; [`set_state_nested`] handles it. Both
/// leave the work to [`change_state`], so that the verifier examines it once.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn set_state(ctx: BtfTracePointContext) -> i32 {
    if let Some(last) = LAST_CHANGE.get_ptr_mut(0) {
        // SAFETY: a valid, aligned map value of this CPU. Only this program and `set_state_nested` use it.
        unsafe { *last = number(address(&ctx), new_state(&ctx)) };
    }
    call_change_state(&ctx)
}

/// Is attached after [`set_state`], and handles a state change if the kernel skipped that program. If nothing
/// else happened on this CPU in between, `LAST_CHANGE` shows that it was not skipped; otherwise the entry
/// shows whether it was. The entry cannot change in between, because the socket is locked.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn set_state_nested(ctx: BtfTracePointContext) -> i32 {
    let (address, new) = (address(&ctx), new_state(&ctx));
    if let Some(last) = LAST_CHANGE.get_ptr_mut(0) {
        // SAFETY: as above. The note is cleared, so that it cannot be taken for a later change of a socket at
        // the same address, which the kernel may have skipped.
        unsafe {
            if *last == number(address, new) {
                *last = 0;
                return 0;
            }
        }
    }
    let was_run = match connection::find(address) {
        Some(connection) => connection::last_state(connection) == new,
        None => false,
    };
    if was_run { 0 } else { call_change_state(&ctx) }
}

/// Handles a state change. It is attached to nothing, and is called by [`set_state`] and [`set_state_nested`],
/// which the kernel's check for running programs does not see: one run may interrupt another on the same CPU.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn change_state(ctx: BtfTracePointContext) -> i32 {
    without_private_stack(&ctx);
    // `None` if it is not a TCP socket.
    if let Some(tcp) = Typed::tcp_sock(ctx.arg(0)) {
        let (old, new) = (ctx.arg::<i32>(1) as u8, new_state(&ctx));
        let sock = Sock { address: tcp.address(), object: tcp };
        changed(&ctx, sock, old, new, cookie(&ctx, new), None);
    }
    0
}

/// The programs that others call: [`change_state`]. The loader fills it in before it attaches anything.
#[map]
pub static CALLED: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// Continues with [`change_state`], and does not return if that program is there.
#[inline(always)]
fn call_change_state(ctx: &BtfTracePointContext) -> i32 {
    // SAFETY: a program for the same tracepoint.
    unsafe { CALLED.tail_call(ctx, 0) };
    count!(records_lost);
    0
}

/// Keeps the kernel from giving this program a private stack, which is one for each CPU: a run that
/// interrupts another one would overwrite it. Since 6.13 tracing programs have one unless they contain a tail
/// call (`check_max_stack_depth()` of `kernel/bpf/verifier.c`). This one is never executed, and the verifier
/// does not even examine it, because the number of buckets is a constant for it.
#[inline(always)]
fn without_private_stack(ctx: &BtfTracePointContext) {
    if global!(PARAMS.buckets) == 0 {
        call_change_state(ctx);
    }
}

/// The socket's address.
#[inline(always)]
fn address(ctx: &BtfTracePointContext) -> u64 {
    Typed::new(ctx.arg::<*const c_void>(0)).address()
}

/// The state that it enters.
#[inline(always)]
fn new_state(ctx: &BtfTracePointContext) -> u8 {
    ctx.arg::<i32>(2) as u8
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
    unsafe { bpf_get_socket_cookie(ctx.arg::<*mut c_void>(0)) }
}

/// Never attached. Whether the kernel accepts this program shows whether [`cookie`] may use the helper.
/// Trying it with [`set_state`] instead would take as long as loading all programs on a kernel that refuses
/// it (before 5.12).
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn read_cookie(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the helper has no precondition; the verifier refuses it where the kernel lacks it.
    unsafe { bpf_get_socket_cookie(ctx.arg::<*mut c_void>(0)) as i32 }
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
    if old == new && !is_teardown(new) {
        return;
    }
    // A listening socket is not a connection.
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
    let found = if is_one_of(old, &[state::CLOSE, state::LISTEN]) {
        connection::begin(sk, now)
    } else {
        connection::find_or_begin(sk, now)
    };
    let Some(connection) = found else { return };
    let act = if old == new {
        acts::of_repetition(connection, sock.object)
    } else if new == state::CLOSE {
        end::record(connection, sock, old, now, cookie, record);
        acts::of_end(connection)
    } else {
        entered(connection, sock, old, new, now, record)
    };
    acts::perform(ctx, connection, act);
    // The end, and not a later change of a socket whose end was recorded. The verifier does not know these
    // members.
    if read_back(&connection.ended) != 0 && read_back(&connection.reported) == 0 {
        end::report(connection);
    }
}

/// Records that a socket went from the state `old` to `new`, which is not CLOSE. Returns the act of the
/// current task.
#[inline(always)]
fn entered(
    connection: &mut ConnectionRecord,
    sock: Sock<impl Object>,
    old: u8,
    new: u8,
    now: u64,
    record: Option<&TracepointRecord<'_>>,
) -> u16 {
    connection::step(connection, new, now);
    // The endpoints are read at once, also of a socket that is older than the trace: filters and later
    // inspections need them.
    sock::endpoints(sock.object, record, &mut connection.endpoints);
    match new {
        state::SYN_SENT => {
            // This always runs in the context of the task that connects: tcp_v4_connect(), tcp_v6_connect().
            // Additional MPTCP subflows are connected by a kernel worker, which belongs to no process.
            connection.role = role::CLIENT;
            act::OPEN
        }
        state::SYN_RECV => {
            if old == state::LISTEN {
                connection.role = role::SERVER;
            }
            act::NOTHING
        }
        state::ESTABLISHED => {
            connection.established = now;
            let seen = ttl::of(&connection.endpoints, true).handshake;
            if seen != 0 {
                connection.reset.handshake_ttl = seen;
            }
            act::NOTHING
        }
        state::FIN_WAIT1 | state::LAST_ACK => {
            connection::moved(connection, sock.object, first_move::LOCAL, now);
            if new == state::FIN_WAIT1 {
                connection::teardown_began(connection, sock.address, now);
            }
            acts::of_fin(connection, sock.object)
        }
        state::CLOSE_WAIT => {
            connection::moved(connection, sock.object, first_move::PEER, now);
            connection::teardown_began(connection, sock.address, now);
            act::NOTHING
        }
        _ => act::NOTHING,
    }
}
