//! Acts of tasks on sockets. The first act of this side, and that of the task that opens a connection, are kept
//! in the socket's entry. Others are rare, and are reported as they happen.

use core::{arch::asm, mem::offset_of};

use aya_ebpf::EbpfContext;
use tcpclose_common::{
    record::{ConnectionRecord, RawTask, act as kind},
    tcp::{is_one_of, sock_flag, state},
};

use crate::{
    connection::{self, read_back},
    emit,
    end::{has_no_socket, is_alive},
    filter,
    kernel::Object,
    sock, stack, task,
};

/// What the current task does to a socket.
pub mod act {
    /// Nothing that counts.
    pub const NOTHING: u16 = 0;
    /// It is the first to act on this side.
    pub const FIRST: u16 = 1;
    /// It opens the connection.
    pub const OPEN: u16 = 2;
    /// This side acts again: it closes a socket that it has shut down.
    pub const AGAIN: u16 = 3;
    /// It destroys the socket from outside, as `ss -K` does.
    pub const DESTROY: u16 = 4;
}

/// The act of a side that begins its teardown with a FIN.
#[inline(always)]
pub fn of_fin(connection: &ConnectionRecord, sk: impl Object) -> u16 {
    // In softirq a child was shut down before it was established, and no task acts.
    if connection.actor.pid == 0 && sock::owned(sk) != Some(false) { act::FIRST } else { act::NOTHING }
}

/// The act in a change of a socket to the teardown state that it is already in. `__tcp_close()` sets the state
/// of a socket again that was shut down before (`tcp_close_state()`).
#[inline(always)]
pub fn of_repetition(connection: &ConnectionRecord, sk: impl Object) -> u16 {
    if sock::owned(sk) == Some(false) || connection.reported != 0 {
        act::NOTHING
    } else if connection.actor.pid == 0 {
        // Its earlier acts came before the trace.
        act::FIRST
    } else {
        act::AGAIN
    }
}

/// The act that ended `connection`, whose facts about its end are known.
#[inline(always)]
pub fn of_end(connection: &ConnectionRecord) -> u16 {
    // What was written is read back, so that the verifier does not know it: it would examine the rest of the
    // program once for each value.
    let (error, from) = (read_back(&connection.error), read_back(&connection.last_state));
    let owned = read_back(&connection.owned) != 0;
    let is_first = connection.actor.pid == 0;
    let alive = is_alive(connection);
    // The application aborted: no error was set, the socket is not an orphan whose teardown has merely come
    // to its end, and either a process holds its lock or it never had a descriptor (a child in the queue of a
    // listener that closes). An orderly end from FIN_WAIT2 or a later state looks the same, but by then the
    // actor is known.
    let aborted = error == 0
        && alive
        && (owned || has_no_socket(connection))
        && is_one_of(from, &[state::ESTABLISHED, state::CLOSE_WAIT, state::SYN_SENT, state::SYN_RECV]);
    if aborted {
        return if is_first { act::FIRST } else { act::NOTHING };
    }
    if !owned {
        return act::NOTHING;
    }
    if error == ECONNABORTED {
        return act::DESTROY;
    }
    // If a task acted on it before, this may be an abort by `close()` after a `shutdown()`: because there is
    // unread data, or because the socket may not wait in FIN_WAIT2. At an orderly end the FIN was received,
    // our own FIN was acknowledged, or no descriptor is left.
    let unanswered = is_one_of(from, &[state::FIN_WAIT1, state::LAST_ACK, state::CLOSING])
        && read_back(&connection.at_end.unacknowledged) != 0;
    let waits = from == state::FIN_WAIT2 && read_back(&connection.sock_flags) & sock_flag::DONE == 0;
    if error == 0 && alive && !is_first && (unanswered || waits) { act::AGAIN } else { act::NOTHING }
}

/// The value of `sk_err` of a socket that was destroyed from outside (`tcp_abort()`).
const ECONNABORTED: i32 = 103;

/// Records what the current task does, with its stacks, unless it belongs to no process. A program has one
/// call of this function: it is inlined, and most of the code that the verifier has to examine is in it.
#[inline(always)]
pub fn perform(ctx: &impl EbpfContext, connection: &mut ConnectionRecord, act: u16) {
    // The verifier must not know it, as in `of_end()`.
    connection.act = act;
    let act = read_back(&connection.act);
    if act == act::NOTHING || task::is_nobody() {
        return;
    }
    if act > act::OPEN {
        report(ctx, connection, act);
        return;
    }
    let entry = &raw mut *connection;
    // SAFETY: both members are valid, and the opener is followed by the actor.
    let task = unsafe { (&raw mut (*entry).opener).add(is_first(act)) };
    // SAFETY: as above. No two references to the entry exist at a time.
    unsafe {
        task::meet(&mut *task);
        let is_wanted = filter::wants(&*entry);
        stack::take(ctx, &mut *task, is_wanted);
    }
}

const _: () = assert!(
    offset_of!(ConnectionRecord, actor) == offset_of!(ConnectionRecord, opener) + size_of::<RawTask>()
);

/// 1 for [`act::FIRST`], and 0 for [`act::OPEN`]. In assembly, because the compiler would make two branches of
/// it.
#[inline(always)]
fn is_first(act: u16) -> usize {
    let mut index = u64::from(act);
    // SAFETY: an operation on a register.
    unsafe { asm!("{0} &= 1", inout(reg) index, options(pure, nomem, nostack)) };
    index as usize
}

/// Reports an act of the current task. It is written to the ring directly: kernels before 6.13 allow 512
/// bytes of stack for a program and the functions that it calls, of which this program uses most.
#[inline(always)]
fn report(ctx: &impl EbpfContext, connection: &mut ConnectionRecord, what: u16) {
    if !filter::wants(connection) {
        return;
    }
    let Some(mut entry) = emit::reserve_act() else { return };
    // SAFETY: memory of the ring, aligned and mapped. An `ActRecord` is made of integers, for which any bytes
    // are valid.
    let record = unsafe { &mut *entry.as_mut_ptr() };
    record.sock = connection.sock;
    record.born = connection.born;
    record.at = connection::now();
    record.kind = if what == act::AGAIN { kind::AGAIN } else { kind::DESTROYED };
    record.reserved = 0;
    record.task = RawTask::NONE;
    task::meet(&mut record.task);
    if what == act::AGAIN {
        stack::take(ctx, &mut record.task, true);
    }
    emit::submit_act(entry);
}
