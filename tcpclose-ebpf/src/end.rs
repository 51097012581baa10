//! The end of a connection: its socket goes to CLOSE.

use aya_ebpf::EbpfContext;
use tcpclose_common::{
    record::{UNKNOWN_U32, UNKNOWN_U64, first_move, reset_after, role, tag},
    tcp::{is_teardown, sock_flag, state},
};

use crate::{
    acts,
    connection::{StackOf, acted, find_or_begin, forget, jiffies, step, teardown_over},
    emit,
    kernel::Object,
    listener,
    maps::global,
    sock::{self, Sock, TracepointRecord},
};

/// Records the end in the socket's entry, and writes the record.
#[inline(always)]
pub fn report(
    ctx: &impl EbpfContext,
    sock: Sock<impl Object>,
    from: u8,
    now: u64,
    cookie: u64,
    stack_of: StackOf,
    record: Option<&TracepointRecord<'_>>,
) {
    let Some(connection) = find_or_begin(sock.address, now) else {
        return;
    };
    let sk = sock.object;
    let (error, shutdown, linger) = sock::end(sk);
    // Plain numbers instead of options: LLVM's code reads the unset bytes of an option that is `None`, and
    // kernels before 6.3 refuse that.
    let flags = sock::flags(sk).unwrap_or(UNKNOWN_U64);
    let owned = sock::owned(sk) == Some(true);
    let has_no_socket = sock::socket(sk) == Some(0);
    step(connection, state::CLOSE, now);
    sock::endpoints(sk, record, &mut connection.endpoints);
    if is_teardown(from) {
        teardown_over(sock.address);
    }
    connection.ended = now;
    connection.cookie = if cookie != 0 { cookie } else { sock::cookie(sk) };
    connection.last_state = from;
    connection.error = error;
    connection.shutdown = shutdown;
    connection.linger = linger;
    connection.owned = u8::from(owned);
    connection.inode = sock::inode(sk);
    connection.no_fin_wait2 = u16::from(sock::has_no_fin_wait2(sk));
    connection.sock_flags = flags;
    connection.jiffies = jiffies();
    sock::sample(sk, connection.jiffies, &mut connection.at_end);
    if connection.first_move == first_move::NONE {
        // The end is the first move. If there was an earlier one before the trace, its time and the counters
        // at that time stay unknown.
        connection.moved = now;
        connection.at_move = connection.at_end;
    }
    // The application aborted: no error was set, the socket is not an orphan whose teardown has merely come
    // to its end, and either a process holds its lock or it never had a descriptor (a child in the queue of a
    // listener that closes). An orderly end from FIN_WAIT2 or a later state looks the same, but by then the
    // actor is known.
    let alive = flags != UNKNOWN_U64 && flags & sock_flag::DEAD == 0;
    let aborted = error == 0
        && alive
        && (owned || has_no_socket)
        && (from == state::ESTABLISHED
            || from == state::CLOSE_WAIT
            || from == state::SYN_SENT
            || from == state::SYN_RECV);
    let done = flags != UNKNOWN_U64 && flags & sock_flag::DONE != 0;
    // Our FIN was not acknowledged, so this is not an orderly end, and there was no error.
    let unanswered = (from == state::FIN_WAIT1 || from == state::LAST_ACK || from == state::CLOSING)
        && connection.at_end.unacknowledged != 0
        && connection.at_end.unacknowledged != UNKNOWN_U32;
    connection.reset_after = if connection.reset.ambiguous != 0 {
        reset_after::SOFTIRQ
    } else if error != 0 && error != i32::MIN || connection.reset.at != 0 {
        reset_after::NEVER
    } else if from == state::FIN_WAIT2 && !done {
        // Usually the small TIME_WAIT socket takes over here. But if the segment that acknowledged our FIN
        // brought data, tcp_rcv_state_process() aborts in the same way, and answers with a RST. So does
        // __tcp_close(), whose socket is an orphan by then, if the socket may not wait.
        if alive { reset_after::SYSCALL } else { reset_after::SOFTIRQ }
    } else if owned && unanswered
        || alive
            && (from == state::ESTABLISHED
                || from == state::CLOSE_WAIT
                || from == state::SYN_RECV
                || from == state::FIN_WAIT1)
    {
        reset_after::SYSCALL
    } else {
        reset_after::NEVER
    };
    // The verifier must not know the states from here on: it would examine the rest of the program once for
    // each.
    if aborted {
        acted(ctx, connection, stack_of);
    } else if stack_of == StackOf::Actor {
        // Not if the end was noticed late, because the current task may be another one then.
        acts::ended(ctx, connection, error);
    }
    if alive && has_no_socket && connection.role == role::SERVER {
        // It ended while it waited to be accepted. If a task acts, it may destroy the listener from outside.
        listener::name(connection);
    }
    connection.reported = 1;
    emit::connection(connection, tag::CLOSE);
    // The process that had it open during an inventory may have passed it on since. The next inventory shows
    // it.
    connection.holder.pid = 0;
    if global!(PARAMS.has_destroy) == 0 {
        forget(sock.address);
    }
}
