//! The entry of a socket in the table of sockets (`table.rs`), and how it changes while the socket lives.

use core::ptr;

use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_boot_ns};
use tcpclose_common::record::{ConnectionRecord, MAX_STEPS, first_move, tag};

use crate::{
    emit, filter,
    kernel::Object,
    maps::{count, global},
    sock, table,
};

/// Nanoseconds of `CLOCK_BOOTTIME`.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper has no precondition.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// `jiffies64`.
#[inline(always)]
pub fn jiffies() -> u64 {
    // SAFETY: the helper has no precondition.
    unsafe { bpf_jiffies64() }
}

/// The entry of `sk`.
///
/// The programs on state changes, RSTs, the destruction of a socket and times to live run under the socket's
/// lock, so that no two of them work on one entry at once. Three do not: the accept hook writes `opener`, the
/// inventory `holder`, `holder_kind` and `role`, and the inspection of a socket `asked`. A program under the
/// lock may read these members before or after such a write.
#[inline(always)]
pub fn find(sk: u64) -> Option<&'static mut ConnectionRecord> {
    // SAFETY: null or a valid, aligned map value; entries stay readable until the program ends. The members
    // that programs write without the lock are integers, and no program relies on their staying the same.
    unsafe { table::find(sk).as_mut() }
}

/// Begins a new entry for the address `sk`. The socket that was there before has ended: addresses are reused
/// within microseconds.
#[inline(always)]
pub fn begin(sk: u64, now: u64) -> Option<&'static mut ConnectionRecord> {
    if let Some(before) = find(sk)
        && before.reported == 0
        && before.steps != 0
    {
        missed(before, now);
    }
    born(table::add(sk, true), sk, now)
}

/// Adds the socket at `sk`, which is older than the trace, unless it has an entry. If the inventory and an
/// event both find that it has none, the second uses the entry that the first has made.
#[inline(always)]
pub fn add(sk: u64, now: u64) -> Option<&'static mut ConnectionRecord> {
    born(table::add(sk, false), sk, now)
}

#[inline(always)]
fn born(entry: *mut ConnectionRecord, sk: u64, now: u64) -> Option<&'static mut ConnectionRecord> {
    // SAFETY: as in `find()`.
    let connection = unsafe { entry.as_mut() }?;
    connection.sock = sk;
    connection.born = now;
    Some(connection)
}

/// Reports a socket that has ended although no program ran for its end. All that is known of the end is who
/// moved first.
#[inline(always)]
pub fn missed(connection: &mut ConnectionRecord, now: u64) {
    connection.ended = now;
    connection.last_state = 0;
    connection.inode = 0;
    connection.reported = 1;
    if filter::wants(connection) {
        count!(ends_missed);
        emit::connection(connection, tag::CLOSE);
    }
}

/// Records that the socket entered a teardown state, in which it may be stuck.
#[inline(always)]
pub fn teardown_began(connection: &ConnectionRecord, sk: u64, since: u64) {
    if global!(PARAMS.stuck) != 0 && filter::wants(connection) {
        table::teardown_began(sk, since);
    }
}

/// Records that it has left the teardown states.
#[inline(always)]
pub fn teardown_over(sk: u64) {
    if global!(PARAMS.stuck) != 0 {
        table::teardown_over(sk);
    }
}

/// The entry of `sk`, or a new one for a socket that is older than the trace (or was evicted).
#[inline(always)]
pub fn find_or_begin(sk: u64, now: u64) -> Option<&'static mut ConnectionRecord> {
    if let Some(connection) = find(sk) {
        return Some(connection);
    }
    match add(sk, now) {
        Some(connection) => Some(connection),
        None => find(sk),
    }
}

/// Removes the entry of `sk`.
#[inline(always)]
pub fn forget(sk: u64) {
    table::remove(sk);
}

/// Records that `state` was entered.
#[inline(always)]
pub fn step(connection: &mut ConnectionRecord, state: u8, now: u64) {
    let steps = usize::from(connection.steps);
    let index = if steps < MAX_STEPS { steps } else { MAX_STEPS - 1 };
    connection.states[index] = state;
    connection.times[index] = now;
    if steps < MAX_STEPS {
        connection.steps = (steps + 1) as u8;
    }
}

/// The state that was entered last; 0 if none was seen.
#[inline(always)]
pub fn last_state(connection: &ConnectionRecord) -> u8 {
    let last = usize::from(connection.steps).wrapping_sub(1);
    if last < MAX_STEPS { connection.states[last] } else { 0 }
}

/// Records the first move of the teardown, with the socket's counters at that time. Later moves change
/// nothing.
#[inline(always)]
pub fn moved(connection: &mut ConnectionRecord, sk: impl Object, by: u8, now: u64) {
    if connection.first_move != first_move::NONE {
        return;
    }
    connection.first_move = by;
    connection.moved = now;
    connection.jiffies = jiffies();
    sock::sample(sk, connection.jiffies, &mut connection.at_move);
}

/// The value of a member of an entry, as a number of which the verifier knows nothing.
#[inline(always)]
pub fn read_back<T: Copy>(member: &T) -> T {
    // SAFETY: a reference. Volatile, so that the compiler does not use what it knows was written.
    unsafe { ptr::read_volatile(member) }
}
