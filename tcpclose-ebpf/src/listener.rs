//! Listening sockets and their processes, which are the owners of connections that are never accepted.

use core::ptr;

use tcpclose_common::{
    offsets::ABSENT,
    record::{ConnectionRecord, RawTask, UNKNOWN_U32, holder},
};

use crate::{
    kernel::member,
    maps::{LISTENERS, Listener, global},
};

/// The key of the listener for connections to `port` in `netns`.
#[inline(always)]
fn key(netns: u32, port: u16) -> u64 {
    u64::from(netns) << 16 | u64::from(port)
}

#[inline(always)]
fn key_of(sk: u64) -> Option<u64> {
    let net: u64 = member(sk, global!(STRUCTS.sk_net))?;
    let netns: u32 = member(net, global!(STRUCTS.net_inum))?;
    // tcp_set_state() clears the first of the two copies before the tracepoint reports CLOSE.
    let port = match member::<u16>(sk, global!(STRUCTS.sk_num))? {
        0 => u16::from_be(member(sk, global!(STRUCTS.sk_sport))?),
        port => port,
    };
    if port == 0 || global!(STRUCTS.sk_num) == ABSENT { None } else { Some(key(netns, port)) }
}

/// Records that `task` listens on `sk`.
#[inline(always)]
pub fn opened(sk: u64, task: &RawTask) {
    let Some(key) = key_of(sk) else { return };
    let mut listener = Listener { sock: sk, task: *task, shared: 0, closed: 0 };
    if let Some(other) = LISTENERS.get_ptr(key) {
        // SAFETY: a valid map value.
        let other = unsafe { &*other };
        if other.closed == 0 {
            if other.sock == sk {
                return;
            }
            listener.shared = u32::from(other.shared != 0 || other.task.pid != task.pid);
        }
    }
    // Without room, connections that are never accepted by this listener have no owner.
    let _ = LISTENERS.insert(key, &listener, 0);
}

/// Records that `sk` no longer listens.
#[inline(always)]
pub fn closed(sk: u64) {
    let Some(key) = key_of(sk) else { return };
    if let Some(listener) = LISTENERS.get_ptr_mut(key) {
        // SAFETY: a valid, aligned map value, which stays mapped until the program ends. `closed` is the only
        // member that is written here, under the lock of `sk`; other programs replace the whole value.
        unsafe {
            if (&raw const (*listener).sock).read() == sk {
                (&raw mut (*listener).closed).write(1);
            }
        }
    }
}

/// Whether there is a listener for the local port of this connection.
#[inline(always)]
pub fn exists(connection: &ConnectionRecord) -> bool {
    let ends = &connection.endpoints;
    if ends.netns == UNKNOWN_U32 {
        return false;
    }
    match LISTENERS.get_ptr(key(ends.netns, ends.local_port)) {
        // SAFETY: a valid map value.
        Some(listener) => unsafe { (*listener).closed == 0 },
        None => false,
    }
}

/// Records the process that would have accepted this connection as its holder. Its listener may have just
/// been closed: the kernel closes a listener before the connections in its queue (`inet_csk_listen_stop()`).
#[inline(always)]
pub fn name(connection: &mut ConnectionRecord) {
    let ends = &connection.endpoints;
    if ends.netns == UNKNOWN_U32 {
        return;
    }
    if let Some(listener) = LISTENERS.get_ptr(key(ends.netns, ends.local_port)) {
        // SAFETY: a valid map value.
        if unsafe { (*listener).shared } == 0 {
            // An assignment would call a function that copies byte by byte, because the two might overlap.
            // SAFETY: two valid map values of different maps.
            unsafe { ptr::copy_nonoverlapping(&raw const (*listener).task, &raw mut connection.holder, 1) };
            connection.holder_kind = holder::LISTENER;
        }
    }
}
