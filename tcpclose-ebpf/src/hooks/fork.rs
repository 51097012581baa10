//! `sched:sched_process_fork`: children of a followed process are followed. Attached only with `-- COMMAND`.

use aya_ebpf::{
    helpers::bpf_get_current_pid_tgid,
    macros::{btf_tracepoint, tracepoint},
    programs::{BtfTracePointContext, TracePointContext},
};

use crate::{
    kernel::member,
    maps::{FOLLOWED, global},
    sock::TracepointRecord,
};

/// `TP_PROTO(struct task_struct *parent, struct task_struct *child)`.
#[btf_tracepoint(function = "sched_process_fork")]
pub fn fork(ctx: BtfTracePointContext) -> i32 {
    if let Some(child) = member::<u32>(ctx.arg::<u64>(1), global!(STRUCTS.task_pid)) {
        forked(child);
    }
    0
}

#[tracepoint]
pub fn fork_classic(ctx: TracePointContext) -> i32 {
    let record = TracepointRecord { ctx: &ctx, layout: global!(FORK_RECORD) };
    if let Some(child) = record.get::<u32>(record.layout.child_pid) {
        forked(child);
    }
    0
}

/// `child` is a thread id. A new thread of an existing process gets an entry too, which is harmless: no
/// process can have this id while the thread lives.
#[inline(always)]
fn forked(child: u32) {
    let parent = (bpf_get_current_pid_tgid() >> 32) as u32;
    if FOLLOWED.get_ptr(parent).is_some() {
        let _ = FOLLOWED.insert(child, 1, 0);
    } else {
        // The id may have belonged to a followed process that has exited.
        let _ = FOLLOWED.remove(child);
    }
}
