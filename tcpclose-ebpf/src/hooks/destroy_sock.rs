//! `tcp:tcp_destroy_sock`: the end of a socket's life, once for every TCP socket.

use aya_ebpf::{
    macros::{btf_tracepoint, tracepoint},
    programs::{BtfTracePointContext, TracePointContext},
};
use tcpclose_common::record::{Header, OwnerRecord, RawTask, VERSION, relation, tag};

use crate::{
    acts::{self, act},
    connection, emit, end,
    kernel::{Object, Typed},
    maps::global,
    sock::{Sock, TracepointRecord},
    task,
};

/// `TP_PROTO(struct sock *sk)`.
#[btf_tracepoint(function = "tcp_destroy_sock")]
pub fn destroy_sock(ctx: BtfTracePointContext) -> i32 {
    if let Some(tcp) = Typed::tcp_sock(ctx.arg(0)) {
        destroyed(Sock { address: tcp.address(), object: tcp });
    }
    0
}

#[tracepoint]
pub fn destroy_sock_classic(ctx: TracePointContext) -> i32 {
    let record = TracepointRecord { ctx: &ctx, layout: global!(DESTROY_SOCK_RECORD) };
    if let Some(sk) = record.get::<u64>(record.layout.skaddr) {
        destroyed(Sock { address: sk, object: sk });
    }
    0
}

#[inline(always)]
fn destroyed(sock: Sock<impl Object>) {
    let sk = sock.address;
    let Some(connection) = connection::find(sk) else {
        return;
    };
    if connection.reported == 0 && connection.steps != 0 {
        // The kernel skipped both programs on state changes, so the current time is taken for
        // that of the end. The task is noted without a stack: to take one would make half of this program,
        // for a rare case.
        let from = connection::last_state(connection);
        end::record(connection, sock, from, connection::now(), 0, None);
        if acts::of_end(connection) == act::FIRST && !task::is_nobody() {
            task::meet(&mut connection.actor);
        }
        end::report(connection);
    }
    // It ended in softirq while a descriptor was open. The task that closes the descriptor now is the owner,
    // which need not be the one that opened the socket: only the last close destroys a socket in CLOSE
    // (inet_csk_destroy_sock() under __tcp_close()).
    if connection.reported != 0 && connection.inode != 0 && connection.actor.pid == 0 && !task::is_nobody() {
        let mut owner = OwnerRecord {
            header: Header { tag: tag::OWNER, version: VERSION, length: size_of::<OwnerRecord>() as u32 },
            sock: sk,
            born: connection.born,
            task: RawTask::NONE,
            relation: relation::CLOSED,
            fd: 0,
        };
        task::meet(&mut owner.task);
        emit::owner(&owner);
    }
    connection::forget(sk);
}
