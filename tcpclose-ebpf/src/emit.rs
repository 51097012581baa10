//! The only writer of the `RECORDS` ring.

use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_RB_RING_SIZE};
use tcpclose_common::record::{Connection, Header, Owner, VERSION};

use crate::{
    filter,
    maps::{READER, RECORDS, count},
};

/// Writes a connection under `tag`, unless the filters keep it out.
#[inline(always)]
pub fn connection(connection: &mut Connection, tag: u16) {
    if !filter::wants(connection) {
        count!(filtered);
        return;
    }
    connection.header = Header { tag, version: VERSION, length: size_of::<Connection>() as u32 };
    written(RECORDS.output::<Connection>(&*connection, wake(size_of::<Connection>())));
}

/// Writes who closed a socket that had ended before, or has one open.
#[inline(always)]
pub fn owner(owner: &Owner) {
    written(RECORDS.output::<Owner>(owner, wake(size_of::<Owner>())));
}

#[inline(always)]
fn written(result: Result<(), i32>) {
    if result.is_ok() {
        count!(records_written);
    } else {
        count!(records_lost);
    }
}

/// Whether to wake the reader for the record that is being written.
///
/// It says in `READER` that it is about to sleep; the next record wakes it, and takes the word back. It then lets a tenth
/// of a second go by before it reads, so that a busy host wakes it ten times a second and an idle one never. In between
/// only a record that brings the ring to a quarter full wakes it. The ring's own rule (no flags: wake whenever all before
/// was read) would wake a reader that keeps up for every record, and that is nearly all that tracing costs.
#[inline(always)]
fn wake(length: usize) -> u64 {
    let force = u64::from(BPF_RB_FORCE_WAKEUP);
    if let Some(sleeps) = READER.get_ptr_mut(0) {
        // SAFETY: a valid, aligned map value. Two CPUs may both find it set; then the reader is woken twice.
        unsafe {
            if *sleeps != 0 {
                *sleeps = 0;
                return force;
            }
        }
    }
    let quarter = RECORDS.query(u64::from(BPF_RB_RING_SIZE)) / 4;
    let used = RECORDS.query(u64::from(BPF_RB_AVAIL_DATA));
    // Other CPUs write too, so the step over the line is looked for within a few records.
    if used >= quarter && used < quarter + 4 * length as u64 { force } else { u64::from(BPF_RB_NO_WAKEUP) }
}
