//! `net:netif_receive_skb`: a packet was received. Attached only with `--ttl`, and only where the programs of
//! `ttl.rs` cannot be: it runs for every packet, although it reads only the flags of nearly all of them.
//!
//! The times to live of a connection's first packet and of a RST stay in `TTLS` until a hook on the socket
//! reads them.

use aya_ebpf::{
    macros::{btf_tracepoint, tracepoint},
    programs::{BtfTracePointContext, TracePointContext},
};

use crate::{maps::global, sock::TracepointRecord, ttl};

/// `TP_PROTO(struct sk_buff *skb)`.
#[btf_tracepoint(function = "netif_receive_skb")]
pub fn receive_skb(ctx: BtfTracePointContext) -> i32 {
    ttl::seen(ctx.arg::<u64>(0));
    0
}

#[tracepoint]
pub fn receive_skb_classic(ctx: TracePointContext) -> i32 {
    let record = TracepointRecord { ctx: &ctx, layout: global!(RECEIVE_SKB_RECORD) };
    if let Some(skb) = record.get::<u64>(record.layout.skbaddr) {
        ttl::seen(skb);
    }
    0
}
