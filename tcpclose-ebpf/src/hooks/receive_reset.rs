//! `tcp:tcp_receive_reset`: `tcp_reset()` runs, because a RST arrived, or because data arrived after this
//! host had closed.

use aya_ebpf::{
    macros::{btf_tracepoint, tracepoint},
    programs::{BtfTracePointContext, TracePointContext},
};
use tcpclose_common::{
    offsets::ABSENT,
    record::{UNKNOWN_U32, direction, tag},
    tcp::{shutdown, state},
};

use crate::{
    connection, emit,
    kernel::{Object, Typed},
    maps::global,
    sock::{self, Sock, TracepointRecord},
    ttl,
};

/// `TP_PROTO(struct sock *sk)`.
#[btf_tracepoint(function = "tcp_receive_reset")]
pub fn receive_reset(ctx: BtfTracePointContext) -> i32 {
    if let Some(tcp) = Typed::tcp_sock(ctx.arg(0)) {
        received(Sock { address: tcp.address(), object: tcp }, None);
    }
    0
}

#[tracepoint]
pub fn receive_reset_classic(ctx: TracePointContext) -> i32 {
    let record = TracepointRecord { ctx: &ctx, layout: global!(RECEIVE_RESET_RECORD) };
    if let Some(sk) = record.get::<u64>(record.layout.skaddr) {
        received(Sock { address: sk, object: sk }, Some(&record));
    }
    0
}

#[inline(always)]
fn received(sock: Sock<impl Object>, record: Option<&TracepointRecord<'_>>) {
    let now = connection::now();
    let sk = sock.object;
    let Some(connection) = connection::find_or_begin(sock.address, now) else {
        return;
    };
    // Without BTF the last state change shows it.
    let from = match sock::state(sk) {
        Some(state) => state,
        None => connection::last_state(connection),
    };
    let (_, shut, _) = sock::end(sk);
    let may_be_shut = global!(STRUCTS.sk_shutdown) == ABSENT || shut & shutdown::RECEIVE != 0;
    let reset = &mut connection.reset;
    reset.at = now;
    reset.reason = UNKNOWN_U32;
    reset.direction = direction::RECEIVED;
    reset.state = from;
    reset.answer = 0;
    // tcp_rcv_state_process() calls tcp_reset() in these states for data after RCV_SHUTDOWN, and then sends a
    // RST. The user half drops this record if a RST that was sent follows.
    reset.ambiguous = u8::from(
        may_be_shut
            && (from == state::FIN_WAIT1
                || from == state::FIN_WAIT2
                || from == state::CLOSE_WAIT
                || from == state::CLOSING
                || from == state::LAST_ACK),
    );
    connection.jiffies = connection::jiffies();
    connection.inode = sock::inode(sk);
    sock::endpoints(sk, record, &mut connection.endpoints);
    let seen = ttl::of(&connection.endpoints, true).reset;
    if seen != 0 {
        connection.reset.ttl = seen;
    }
    sock::sample(sk, connection.jiffies, &mut connection.at_end);
    emit::connection(connection, tag::RESET);
}
