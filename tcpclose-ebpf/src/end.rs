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
    sock::{self, TracepointRecord, Sock},
};

/// Notes the end in the socket's entry, and writes the record.
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
    // Plain numbers, not options: what an option that is `None` leaves unset is read all the same by the code
    // that LLVM makes of it, and kernels before 6.3 refuse that.
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
        // The end is the first move. If there was another one before the trace, its time and what the
        // counters said then stay unknown.
        connection.moved = now;
        connection.at_move = connection.at_end;
    }
    // An abort of the application's own: no error was set, the socket is not an orphan that merely ran its
    // course, and either a process holds it or it never had a descriptor (a child in the queue of a listener
    // that closes). From FIN_WAIT2 and later states an orderly end looks the same, but there the actor is
    // known already.
    let alive = flags != UNKNOWN_U64 && flags & sock_flag::DEAD == 0;
    let aborted = error == 0
        && alive
        && (owned || has_no_socket)
        && (from == state::ESTABLISHED
            || from == state::CLOSE_WAIT
            || from == state::SYN_SENT
            || from == state::SYN_RECV);
    let done = flags != UNKNOWN_U64 && flags & sock_flag::DONE != 0;
    // Our FIN was not acknowledged, so that this is no orderly end, and no error made it one.
    let unanswered = (from == state::FIN_WAIT1 || from == state::LAST_ACK || from == state::CLOSING)
        && connection.at_end.unacknowledged != 0
        && connection.at_end.unacknowledged != UNKNOWN_U32;
    connection.reset_after = if connection.reset.ambiguous != 0 {
        reset_after::SOFTIRQ
    } else if error != 0 && error != i32::MIN || connection.reset.at != 0 {
        reset_after::NEVER
    } else if from == state::FIN_WAIT2 && !done {
        // Usually the small TIME_WAIT socket takes over here. But if the segment that acknowledged our FIN
        // brought data, tcp_rcv_state_process() aborts in just the same way, and answers with a RST; and so
        // does __tcp_close(), whose socket is an orphan by then, if it is not to wait.
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
    // From here on the verifier does not need to know the states any more: it would examine what follows once
    // for each.
    if aborted {
        acted(ctx, connection, stack_of);
    } else if stack_of == StackOf::Actor {
        // Not where the end was noticed late: then the current task may be another one.
        acts::ended(ctx, connection, error);
    }
    if alive && has_no_socket && connection.role == role::SERVER {
        // While it waited to be accepted. If somebody acts, that may be an outsider who destroys the
        // listener.
        listener::name(connection);
    }
    connection.reported = 1;
    emit::connection(connection, tag::CLOSE);
    // Whoever had it open during an inventory may have passed it on since; the next inventory finds out.
    connection.holder.pid = 0;
    if global!(PARAMS.has_destroy) == 0 {
        forget(sock.address);
    }
}
