//! The end of a connection: its socket goes to CLOSE.

use tcpclose_common::{
    offsets::ABSENT,
    record::{ConnectionRecord, UNKNOWN_U64, first_move, role, tag},
    tcp::{is_teardown, sock_flag, state},
};

use crate::{
    connection::{forget, jiffies, read_back, step, teardown_over},
    emit,
    kernel::Object,
    listener,
    maps::global,
    sock::{self, Sock, TracepointRecord},
};

/// Records the end of a socket in its entry: it goes from the state `from` to CLOSE.
#[inline(always)]
pub fn record(
    connection: &mut ConnectionRecord,
    sock: Sock<impl Object>,
    from: u8,
    now: u64,
    cookie: u64,
    record: Option<&TracepointRecord<'_>>,
) {
    let sk = sock.object;
    step(connection, state::CLOSE, now);
    sock::endpoints(sk, record, &mut connection.endpoints);
    if is_teardown(from) {
        teardown_over(sock.address);
    }
    let (error, shutdown, linger) = sock::end(sk);
    connection.ended = now;
    connection.cookie = if cookie != 0 { cookie } else { sock::cookie(sk) };
    connection.last_state = from;
    connection.error = error;
    connection.shutdown = shutdown;
    connection.linger = linger;
    connection.owned = u8::from(sock::owned(sk) == Some(true));
    connection.inode = sock::inode(sk);
    connection.no_fin_wait2 = u16::from(sock::has_no_fin_wait2(sk));
    connection.sock_flags = sock::flags(sk).unwrap_or(UNKNOWN_U64);
    connection.jiffies = jiffies();
    sock::sample(sk, connection.jiffies, &mut connection.at_end);
    if connection.first_move == first_move::NONE {
        // The end is the first move. If there was an earlier one before the trace, its time and the counters
        // at that time stay unknown.
        connection.moved = now;
        connection.at_move = connection.at_end;
    }
    if is_alive(connection) && has_no_socket(connection) && connection.role == role::SERVER {
        // It ended while it waited to be accepted. If a task acts, it may destroy the listener from outside.
        listener::name(connection);
    }
}

/// Whether a connection that ended was no orphan: a descriptor refers to it, or it was not accepted yet. `false`
/// if its flags are not known, because all bits are set then.
#[inline(always)]
pub fn is_alive(connection: &ConnectionRecord) -> bool {
    read_back(&connection.sock_flags) & sock_flag::DEAD == 0
}

/// Whether a connection that ended had no `struct socket`, and so no descriptor: it was not accepted yet, or
/// is an orphan.
#[inline(always)]
pub fn has_no_socket(connection: &ConnectionRecord) -> bool {
    global!(STRUCTS.sk_socket) != ABSENT && read_back(&connection.inode) == 0
}

/// Writes the record of a connection whose end is recorded, with the task that acted.
#[inline(always)]
pub fn report(connection: &mut ConnectionRecord) {
    connection.reported = 1;
    emit::connection(connection, tag::CLOSE);
    // The process that had it open during an inventory may have passed it on since. The next inventory shows
    // it.
    connection.holder.pid = 0;
    if global!(PARAMS.has_destroy) == 0 {
        forget(connection.sock);
    }
}
