//! Reads one socket that may be stuck in a teardown state. The user half runs this program for each socket
//! that is due (`BPF_PROG_TEST_RUN`); it is attached to nothing. No other interface shows the current state
//! of a single socket in any network namespace, even of one without a descriptor.

use aya_ebpf::{
    helpers::generated::bpf_probe_read_kernel, macros::raw_tracepoint, programs::RawTracePointContext,
};
use tcpclose_common::{
    record::{ConnectionRecord, role, tag},
    tcp::is_teardown,
};

use crate::{
    connection, emit, listener,
    maps::{Slot, count},
    sock,
};

/// Arguments: the socket's address, and the number of the inventory pass that will report its holders.
#[raw_tracepoint]
pub fn inspect(ctx: RawTracePointContext) -> i32 {
    let sk = ctx.arg::<u64>(0);
    let pass = ctx.arg::<u64>(1);
    // The socket's lock is not held. The state is read before the entry, because at the end of a socket the
    // entry changes first.
    let state = sock::state(sk);
    let Some(entry) = connection::find(sk) else {
        // It has just been evicted or destroyed.
        connection::teardown_over(sk);
        return 0;
    };
    let entry = &raw mut *entry;
    let Some(slot) = Slot::take() else {
        count!(records_lost);
        return 0;
    };
    // A copy, because the socket lives on and its entry may change. SAFETY: the slot is ours, and both sides
    // are a whole `ConnectionRecord`, of which all members are integers. A program under the socket's lock
    // may change the entry during the copy.
    let connection = unsafe {
        let connection = &raw mut (*slot.get()).connection;
        bpf_probe_read_kernel(
            connection.cast(),
            size_of::<ConnectionRecord>() as u32,
            entry.cast_const().cast(),
        );
        &mut *connection
    };
    if connection.reported != 0 || connection.sock != sk {
        connection::teardown_over(sk);
        return 0;
    }
    let now = connection::now();
    let is_there = match state {
        Some(state) => is_teardown(state) && sock::has_ends(sk, &connection.endpoints) != Some(false),
        // The socket cannot be read, so its events are all that is known.
        None => true,
    };
    if !is_there {
        connection::missed(connection, now);
        connection::teardown_over(sk);
        connection::forget(sk);
        return 0;
    }
    connection.last_state = match state {
        Some(state) => state,
        None => connection::last_state(connection),
    };
    let (_, shutdown, _) = sock::end(sk);
    connection.shutdown = shutdown;
    connection.inode = sock::inode(sk);
    connection.cookie = sock::cookie(sk);
    connection.jiffies = connection::jiffies();
    sock::sample(sk, connection.jiffies, &mut connection.at_end);
    (connection.unsent, connection.probes) = sock::waiting(sk);
    if connection.role == role::SERVER && sock::socket(sk) == Some(0) && connection.actor.pid == 0 {
        listener::name(connection);
    }
    // SAFETY: a valid, aligned map value, which stays mapped until the program ends. `asked` is the only
    // member that is written here, and no other program writes it except when it replaces the whole entry.
    unsafe { (&raw mut (*entry).asked).write(pass as u16) };
    emit::connection(connection, tag::STUCK);
    0
}
