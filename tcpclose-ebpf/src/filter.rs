//! The part of the user's filters that the kernel half can decide. It may let too much pass, but never too
//! little: the user half applies all filters again, with all that is known.

use tcpclose_common::{
    params::MAX_FILTER_VALUES,
    record::{Address, ConnectionRecord, UNKNOWN_U32},
};

use crate::maps::{FOLLOWED, global};

/// Whether the filters let this connection pass. The function is not inlined: it has several callers, and its
/// copies would make up half of the program and a fifth of the verifier's work.
#[inline(never)]
pub fn wants(connection: &ConnectionRecord) -> bool {
    let ends = &connection.endpoints;
    let local = u32::from(ends.local_port);
    let remote = u32::from(ends.remote_port);
    (global!(PARAMS.local_port_count) == 0 || local == 0 || has_local_port(ends.local_port))
        && (global!(PARAMS.remote_port_count) == 0 || remote == 0 || has_remote_port(ends.remote_port))
        && (global!(PARAMS.port_count) == 0
            || local == 0
            || remote == 0
            || has_port(ends.local_port)
            || has_port(ends.remote_port))
        && (global!(PARAMS.netns_count) == 0 || ends.netns == UNKNOWN_U32 || has_netns(ends.netns))
        && (global!(PARAMS.range_count) == 0 || in_range(&ends.local) || in_range(&ends.remote))
        && (global!(PARAMS.by_process) == 0 || is_followed(connection))
}

macro_rules! any_of {
    ($name:ident($value:ident: $type:ty), $count:ident, $values:ident) => {
        #[inline(always)]
        fn $name($value: $type) -> bool {
            let mut index = 0;
            while index < MAX_FILTER_VALUES {
                if index as u32 >= global!(PARAMS.$count) {
                    return false;
                }
                if global!(PARAMS.$values[index]) == $value {
                    return true;
                }
                index += 1;
            }
            false
        }
    };
}

any_of!(has_local_port(port: u16), local_port_count, local_ports);
any_of!(has_remote_port(port: u16), remote_port_count, remote_ports);
any_of!(has_port(port: u16), port_count, ports);
any_of!(has_netns(inum: u32), netns_count, netns);

#[inline(always)]
fn in_range(address: &Address) -> bool {
    // Two halves of 64 bits, so that a range takes two comparisons.
    let half = |high: u32, low: u32| u64::from(u32::from_be(high)) << 32 | u64::from(u32::from_be(low));
    let (high, low) = (half(address[0], address[1]), half(address[2], address[3]));
    let mut index = 0;
    while index < MAX_FILTER_VALUES {
        if index as u32 >= global!(PARAMS.range_count) {
            return false;
        }
        if high & global!(PARAMS.ranges[index].mask[0]) == global!(PARAMS.ranges[index].address[0])
            && low & global!(PARAMS.ranges[index].mask[1]) == global!(PARAMS.ranges[index].address[1])
        {
            return true;
        }
        index += 1;
    }
    false
}

/// Whether the process that opened or closed the connection is followed. A connection without either passes.
#[inline(always)]
fn is_followed(connection: &ConnectionRecord) -> bool {
    let (opener, actor) = (connection.opener.pid, connection.actor.pid);
    // The holder does not count, because it may not be the owner. The user half decides once the owner is
    // known.
    (opener == 0 && actor == 0)
        || (opener != 0 && FOLLOWED.get_ptr(opener).is_some())
        || (actor != 0 && FOLLOWED.get_ptr(actor).is_some())
}
