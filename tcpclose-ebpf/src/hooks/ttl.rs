//! Times to live where fentry is available: three functions have both the socket and the packet as arguments,
//! so that no other packet has to be read. All three run under the socket's lock.

use aya_ebpf::{EbpfContext, macros::fentry, programs::FEntryContext};

use crate::{connection, kernel::member, maps::global, packet};

/// `void tcp_reset(struct sock *sk, struct sk_buff *skb)`, before the tracepoint inside it. The socket may be
/// older than the trace.
#[fentry(function = "tcp_reset")]
pub fn reset_ttl(ctx: FEntryContext) -> i32 {
    let skb = argument(&ctx, global!(ARGUMENTS.reset_skb));
    let sk = argument(&ctx, global!(ARGUMENTS.reset_sk));
    if sk == 0 {
        return 0;
    }
    if let Some(connection) = connection::find_or_begin(sk, connection::now()) {
        connection.reset.ttl = packet::ttl(skb);
    }
    0
}

/// `void tcp_finish_connect(struct sock *sk, struct sk_buff *skb)`: the SYN-ACK arrived.
#[fentry(function = "tcp_finish_connect")]
pub fn connect_ttl(ctx: FEntryContext) -> i32 {
    established(
        argument(&ctx, global!(ARGUMENTS.connect_sk)),
        argument(&ctx, global!(ARGUMENTS.connect_skb)),
    );
    0
}

/// `tcp_child_process(struct sock *parent, struct sock *child, struct sk_buff *skb)`: the last ACK of the
/// handshake arrived. With TCP Fast Open the SYN creates the child, and this function is not called.
#[fentry(function = "tcp_child_process")]
pub fn child_ttl(ctx: FEntryContext) -> i32 {
    established(argument(&ctx, global!(ARGUMENTS.child_sk)), argument(&ctx, global!(ARGUMENTS.child_skb)));
    0
}

#[inline(always)]
fn established(sk: u64, skb: u64) {
    if let Some(connection) = connection::find(sk) {
        connection.reset.handshake_ttl = packet::ttl(skb);
    }
}

/// An argument that is a pointer; 0 if the kernel passes a null pointer.
#[inline(always)]
fn argument(ctx: &FEntryContext, offset: u16) -> u64 {
    member(ctx.as_ptr() as u64, offset).unwrap_or(0)
}
