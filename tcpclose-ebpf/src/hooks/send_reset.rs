//! `tcp:tcp_send_reset`: this host sends a RST. If it does so unprompted, there is no packet, and the
//! tracepoint follows the RST; if it answers a packet, the tracepoint precedes the RST. From 6.10 on it is
//! also called without a socket, and for one in TIME_WAIT.

use aya_ebpf::{
    cty::c_void,
    helpers::generated::bpf_probe_read_kernel,
    macros::{btf_tracepoint, tracepoint},
    programs::{BtfTracePointContext, TracePointContext},
};
use tcpclose_common::{
    record::{ConnectionRecord, UNKNOWN_U32, direction, tag},
    tcp::state,
};

use crate::{
    connection, emit,
    kernel::{Object, Typed},
    listener,
    maps::{Slot, count, global, template},
    packet,
    sock::{self, Sock, TracepointRecord},
};

/// `TP_PROTO(const struct sock *sk, const struct sk_buff *skb__nullable)`, from 6.10 on also
/// `const enum sk_rst_reason reason`.
#[btf_tracepoint(function = "tcp_send_reset")]
pub fn send_reset(ctx: BtfTracePointContext) -> i32 {
    let reason = if global!(PARAMS.has_reset_reason) != 0 { ctx.arg::<u32>(2) } else { UNKNOWN_U32 };
    let (pointer, skb) = (ctx.arg::<u64>(0), ctx.arg::<u64>(1));
    let (address, tcp) = if pointer == 0 {
        (0, None)
    } else {
        (Typed::new(pointer as *const c_void).address(), Typed::tcp_sock(pointer))
    };
    match tcp {
        Some(tcp) => sent(Sock { address, object: tcp }, skb, reason, None),
        // There is no socket, or a small one, for a request or for TIME_WAIT.
        None => sent(Sock { address, object: address }, skb, reason, None),
    }
    0
}

#[tracepoint]
pub fn send_reset_classic(ctx: TracePointContext) -> i32 {
    let record = TracepointRecord { ctx: &ctx, layout: global!(SEND_RESET_RECORD) };
    let layout = record.layout;
    let sk = record.get::<u64>(layout.skaddr).unwrap_or(0);
    let skb = record.get::<u64>(layout.skbaddr).unwrap_or(0);
    let reason = record.get::<u32>(layout.reason).unwrap_or(UNKNOWN_U32);
    sent(Sock { address: sk, object: sk }, skb, reason, Some(&record));
    0
}

#[inline(always)]
fn sent(sock: Sock<impl Object>, skb: u64, reason: u32, record: Option<&TracepointRecord<'_>>) {
    let now = connection::now();
    let sk = sock.address;
    // 0 if there is none, or if it cannot be read.
    let state = if sk == 0 { 0 } else { sock::state(sock.object).unwrap_or(0) };
    let full = sk != 0 && state != state::TIME_WAIT && state != state::NEW_SYN_RECV && state != state::LISTEN;
    if let (true, Some(connection)) = (full, connection::find(sk)) {
        // Without BTF the last state change shows it.
        let state = if state == 0 { connection::last_state(connection) } else { state };
        report(connection, sock, skb, state, reason, now, record);
        return;
    }
    // There is no connection, so the record is built in a slot of `SCRATCH`.
    let Some(slot) = Slot::take() else {
        count!(records_lost);
        return;
    };
    // SAFETY: the slot is ours, and both sides are a whole `ConnectionRecord`.
    let connection = unsafe {
        let connection = &raw mut (*slot.get()).connection;
        bpf_probe_read_kernel(connection.cast(), size_of::<ConnectionRecord>() as u32, template().cast());
        &mut *connection
    };
    connection.sock = sk;
    connection.born = now;
    report(connection, sock, skb, state, reason, now, record);
}

#[inline(always)]
fn report(
    connection: &mut ConnectionRecord,
    sock: Sock<impl Object>,
    skb: u64,
    state: u8,
    reason: u32,
    now: u64,
    record: Option<&TracepointRecord<'_>>,
) {
    let reset = &mut connection.reset;
    reset.at = now;
    reset.reason = reason;
    reset.direction = direction::SENT;
    // The state before the abort says more than CLOSE.
    reset.state = if state == state::CLOSE && connection.ended != 0 { connection.last_state } else { state };
    reset.answer = u8::from(skb != 0);
    if connection.ended == 0 {
        if sock.address != 0 || skb == 0 {
            sock::endpoints(sock.object, record, &mut connection.endpoints);
        }
        if connection.endpoints.remote_port == 0 {
            packet::endpoints(skb, &mut connection.endpoints);
        }
        if connection.endpoints.remote_port == 0 {
            sock::endpoints(0_u64, record, &mut connection.endpoints);
        }
        connection.jiffies = connection::jiffies();
        if connection.established != 0 {
            sock::sample(sock.object, connection.jiffies, &mut connection.at_end);
        }
    }
    if state == state::LISTEN {
        listener::name(connection);
    }
    emit::connection(connection, tag::RESET);
}
