//! Acts on a socket after the first act of this side, or from outside. The first act of this side is kept in
//! the socket's entry. These acts are rare, and are reported as they happen.

use aya_ebpf::EbpfContext;
use tcpclose_common::{
    record::{ConnectionRecord, RawTask, act as kind},
    tcp::{is_teardown, sock_flag, state},
};

use crate::{
    connection::{self, StackOf},
    emit, filter,
    kernel::Object,
    sock::{self, Sock},
    stack, task,
};

/// Handles a change of `sock` to the `state` that it is already in. `__tcp_close()` sets the state of a
/// socket again that was shut down before (`tcp_close_state()`).
#[inline(always)]
pub fn repeated(ctx: &impl EbpfContext, sock: Sock<impl Object>, state: u8) {
    if is_teardown(state)
        && sock::owned(sock.object) != Some(false)
        && let Some(connection) = connection::find(sock.address)
        && connection.reported == 0
    {
        if connection.actor.pid == 0 {
            // Its earlier acts came before the trace.
            connection::acted(ctx, connection, StackOf::Actor);
        } else {
            note(ctx, connection, kind::AGAIN);
        }
    }
}

/// Handles the end of `connection`, with `error`. If the current task destroys it from outside, that is
/// reported. If a task acted on it before, the end may be an abort by `close()` after a `shutdown()`: because
/// there is unread data, or because the socket may not wait in FIN_WAIT2. At an orderly end the FIN was
/// received, our own FIN was acknowledged, or no descriptor is left.
#[inline(always)]
pub fn ended(ctx: &impl EbpfContext, connection: &mut ConnectionRecord, error: i32) {
    if connection.owned == 0 {
        return;
    }
    let (from, flags) = (connection.last_state, connection.sock_flags);
    let unanswered = (from == state::FIN_WAIT1 || from == state::LAST_ACK || from == state::CLOSING)
        && connection.at_end.unacknowledged != 0;
    let waits = from == state::FIN_WAIT2 && flags & sock_flag::DONE == 0;
    let again =
        error == 0 && flags & sock_flag::DEAD == 0 && connection.actor.pid != 0 && (unanswered || waits);
    // There is one call, because the function is inlined: a second call would double its code.
    if error == ECONNABORTED || again {
        note(ctx, connection, if again { kind::AGAIN } else { kind::DESTROYED });
    }
}

/// The value of `sk_err` of a socket that was destroyed from outside (`tcp_abort()`).
const ECONNABORTED: i32 = 103;

/// Reports an act of the current task. It is written to the ring directly: kernels before 6.13 allow 512
/// bytes of stack for a program and the functions that it calls, of which this program uses most.
#[inline(always)]
fn note(ctx: &impl EbpfContext, connection: &mut ConnectionRecord, what: u32) {
    if task::is_nobody() || !filter::wants(connection) {
        return;
    }
    let Some(mut entry) = emit::reserve_act() else { return };
    // SAFETY: memory of the ring, aligned and mapped. An `ActRecord` is made of integers, for which any bytes
    // are valid.
    let act = unsafe { &mut *entry.as_mut_ptr() };
    act.sock = connection.sock;
    act.born = connection.born;
    act.at = connection::now();
    act.kind = what;
    act.reserved = 0;
    act.task = RawTask::NONE;
    task::meet(&mut act.task);
    if what == kind::AGAIN {
        stack::take(ctx, &mut act.task, true);
    }
    emit::submit_act(entry);
}
