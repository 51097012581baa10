//! The only writer of the `RECORDS` ring.

use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_RB_RING_SIZE};
use aya_ebpf::helpers::generated::bpf_probe_read_user;
use aya_ebpf::maps::ring_buf::RingBufEntry;
use tcpclose_common::record::{
    ActRecord, CROWDED_STACK_BYTES, ConnectionRecord, Header, Interpreted, OwnerRecord, STACK_STEP,
    StackCopy, VERSION, tag,
};

use crate::{
    filter,
    maps::{COUNTERS, READER, RECORDS, count, global},
};

/// Writes a connection as a record with this tag, unless the filters exclude it.
#[inline(always)]
pub fn connection(connection: &mut ConnectionRecord, tag: u16) {
    if !filter::wants(connection) {
        count!(filtered);
        return;
    }
    connection.header = Header { tag, version: VERSION, length: size_of::<ConnectionRecord>() as u32 };
    written(RECORDS.output::<ConnectionRecord>(&*connection, wake()));
}

/// Reserves room in the ring for an `ActRecord`, for [`submit_act`]; `None` if the ring is full.
#[inline(always)]
pub fn reserve_act() -> Option<RingBufEntry<ActRecord>> {
    let entry = RECORDS.reserve::<ActRecord>(0);
    if entry.is_none() {
        count!(records_lost);
    }
    entry
}

/// Writes that a task acted on a socket.
#[inline(always)]
pub fn submit_act(mut entry: RingBufEntry<ActRecord>) {
    let header = Header { tag: tag::ACT, version: VERSION, length: size_of::<ActRecord>() as u32 };
    // SAFETY: memory of the ring, aligned and mapped.
    unsafe { (&raw mut (*entry.as_mut_ptr()).header).write(header) };
    entry.submit(wake());
    count!(records_written);
}

/// Writes which task closed a socket that had ended before, or which one has a socket open.
#[inline(always)]
pub fn owner(owner: &OwnerRecord) {
    written(RECORDS.output::<OwnerRecord>(owner, wake()));
}

/// How full the ring is, bytes.
struct Usage {
    used: u64,
    size: u64,
}

impl Usage {
    #[inline(always)]
    fn now() -> Self {
        let size = RECORDS.query(u64::from(BPF_RB_RING_SIZE));
        Self { used: RECORDS.query(u64::from(BPF_RB_AVAIL_DATA)), size }
    }

    /// Whether stacks may be written: they get half of the ring, so that no stack costs an event.
    #[inline(always)]
    fn has_room_for_stacks(&self) -> bool {
        self.used <= self.size / 2
    }
}

/// Bits of a random key, which are all zero in one of 16.
const ONE_IN_16: u64 = 0xf << 32;

/// Writes `copy`, followed by the current task's memory from `copy.start` on. Returns `false` if the ring has
/// no room for stacks.
///
/// With recipes a copy is rare, and wakes the reader: until it has been unwound, every other event with the
/// same stack is followed by a copy too.
#[inline(always)]
pub fn stack(mut copy: StackCopy) -> bool {
    let usage = Usage::now();
    if !usage.has_room_for_stacks() {
        return false;
    }
    // A burst of events whose stacks are not known yet fills the ring with copies of the same stack. Most
    // stacks need no more than this. One in 16 of the others is copied whole, so that deep stacks become
    // known, too, and the burst of copies ends.
    let asked = global!(PARAMS.stack_bytes) as usize;
    let is_crowded = global!(PARAMS.recipes) != 0 && usage.used > usage.size / 8 && copy.key & ONE_IN_16 != 0;
    let most = if is_crowded && asked > CROWDED_STACK_BYTES { CROWDED_STACK_BYTES } else { asked };
    let length = size_of::<StackCopy>() + most;
    let Some(mut entry) = RECORDS.reserve_bytes(length, 0) else { return false };
    let room = entry.as_mut_ptr();
    let mut bytes = 0;
    while bytes < most {
        // SAFETY: the entry has room for the copy and `stack_bytes`, which is a multiple of the step; the
        // helper checks the address that it reads from itself.
        let failed = unsafe {
            let to = room.add(size_of::<StackCopy>() + bytes);
            bpf_probe_read_user(to.cast(), STACK_STEP as u32, (copy.start + bytes as u64) as *const _)
        };
        if failed != 0 {
            break;
        }
        bytes += STACK_STEP;
    }
    copy.header = Header { tag: tag::STACK, version: VERSION, length: length as u32 };
    copy.bytes = bytes as u32;
    // SAFETY: entries are aligned to 8 bytes, and this one has room.
    unsafe { room.cast::<StackCopy>().write(copy) };
    let force = u64::from(BPF_RB_FORCE_WAKEUP);
    entry.submit(if global!(PARAMS.recipes) != 0 { force } else { wake() });
    count!(records_written);
    true
}

/// Writes the frames of an interpreter, ahead of the copy of their stack. Returns `false` if the ring has no
/// room for them, and therefore none for the copy.
#[inline(always)]
pub fn interpreted(list: &Interpreted) -> bool {
    if !Usage::now().has_room_for_stacks() {
        return false;
    }
    RECORDS.output::<Interpreted>(list, u64::from(BPF_RB_NO_WAKEUP)).is_ok()
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
/// The reader sets `READER` before it sleeps. The next record clears it and wakes the reader, which then
/// waits a tenth of a second before it reads: a busy host wakes it ten times a second, and an idle one never.
/// In between, only a ring that is filled to a quarter wakes it. The ring's own rule (without flags, a record
/// wakes the reader if everything before it was read) would wake a reader that keeps up for every record,
/// which would be nearly all of the cost of tracing.
#[inline(always)]
fn wake() -> u64 {
    let force = u64::from(BPF_RB_FORCE_WAKEUP);
    if let Some(sleeps) = READER.get_ptr_mut(0) {
        // SAFETY: a valid, aligned map value. If two CPUs find it set, the reader is woken twice.
        unsafe {
            if *sleeps != 0 {
                *sleeps = 0;
                return force;
            }
        }
    }
    let wait = u64::from(BPF_RB_NO_WAKEUP);
    match COUNTERS.get_ptr(0) {
        // SAFETY: a valid map value of this CPU.
        Some(counters) if unsafe { (*counters).records_written } % QUERY_INTERVAL == 0 => {}
        _ => return wait,
    }
    let usage = Usage::now();
    if usage.used >= usage.size / 4 { force } else { wait }
}

/// The number of records of a CPU between two checks of how full the ring is, which cost two calls of a
/// helper. The ring has room for many times as many records.
const QUERY_INTERVAL: u64 = 64;
