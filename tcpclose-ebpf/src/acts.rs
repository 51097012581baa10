//! What is done to a socket after this side has acted, or from outside. The first act of this side is in the socket's entry;
//! these are reported as they happen, because they are rare.

use aya_ebpf::EbpfContext;
use tcpclose_common::{
    record::{Act, Connection, Header, Task, VERSION, act, tag},
    tcp::{is_teardown, sock_flag, state},
};

use crate::{
    connection, emit, filter,
    kernel::Object,
    sock::{self, Sock},
    stack, task,
};

/// `sock` stays in `state`. `__tcp_close()` sets the state of a socket again that was shut down before: `tcp_close_state()`.
#[inline(always)]
pub fn repeated(ctx: &impl EbpfContext, sock: Sock<impl Object>, state: u8) {
    if is_teardown(state)
        && sock::owned(sock.object) != Some(false)
        && let Some(connection) = connection::find(sock.address)
        && connection.told == 0
    {
        note(ctx, connection, act::AGAIN);
    }
}

/// `connection` comes to its end without an error, and some task acted on it before. Its `close()` after a `shutdown()` may
/// have aborted it: it finds data that was never read, or the socket may not wait in FIN_WAIT2. At an end in order the FIN
/// was received, our own was acknowledged, or no descriptor is left.
#[inline(always)]
pub fn ended(ctx: &impl EbpfContext, connection: &mut Connection) {
    let (from, flags) = (connection.last_state, connection.sock_flags);
    let unanswered = (from == state::FIN_WAIT1 || from == state::LAST_ACK || from == state::CLOSING)
        && connection.at_end.unacknowledged != 0;
    let waits = from == state::FIN_WAIT2 && flags & sock_flag::DONE == 0;
    if connection.error == 0
        && connection.owned != 0
        && flags & sock_flag::DEAD == 0
        && connection.actor.pid != 0
        && (unanswered || waits)
    {
        note(ctx, connection, act::AGAIN);
    }
}

/// The current task destroys `connection`.
#[inline(always)]
pub fn destroyed(ctx: &impl EbpfContext, connection: &mut Connection) {
    if connection.owned != 0 {
        note(ctx, connection, act::DESTROYED);
    }
}

/// Reports what the current task does. A function of its own: it is called in three places, and runs for few sockets.
#[inline(never)]
fn note(ctx: &impl EbpfContext, connection: &mut Connection, kind: u32) {
    if task::is_nobody() || !filter::wants(connection) {
        return;
    }
    let mut act = Act {
        header: Header { tag: tag::ACT, version: VERSION, length: size_of::<Act>() as u32 },
        sock: connection.sock,
        born: connection.born,
        at: connection::now(),
        task: Task::NONE,
        kind,
        reserved: 0,
    };
    task::meet(&mut act.task);
    if kind == act::AGAIN {
        stack::take(ctx, &mut act.task, true);
        if connection.actor.pid == 0 {
            // What it did before was before the trace.
            connection.actor = act.task;
            return;
        }
    }
    emit::act(&act);
}
