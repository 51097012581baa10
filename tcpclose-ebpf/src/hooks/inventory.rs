//! `iter/task_file`: goes through every descriptor of every process, in all network namespaces at once. The
//! user half runs it at the start, to find sockets older than the trace, and when a socket ended in softirq
//! without a known owner. The program does not hold the locks of the sockets that it finds.

use aya_ebpf::cty::c_void;
use tcpclose_common::{
    record::{
        ConnectionRecord, Header, OwnerRecord, RawTask, VERSION, first_move, holder, relation, role, tag,
    },
    table::BEFORE_TRACE,
    tcp::{is_teardown, state},
};

use crate::{
    connection, emit, iterator,
    kernel::member,
    listener,
    maps::{ASKED, global},
    namespace, sock, task,
};

/// The context is a `struct bpf_iter__task_file`. The result 0 lets the iterator continue.
#[unsafe(link_section = "iter/task_file")]
#[unsafe(no_mangle)]
extern "C" fn inventory(ctx: *mut c_void) -> i32 {
    let ctx = ctx as u64;
    iterator::learn();
    if namespace::is_other() {
        namespace::learn();
    }
    if let Some(task) = member::<u64>(ctx, global!(STRUCTS.iter_task))
        && let Some(file) = member::<u64>(ctx, global!(STRUCTS.iter_file))
        && let Some(sk) = sock::of_file(file)
    {
        held(sk, task, member(ctx, global!(STRUCTS.iter_fd)).unwrap_or(u32::MAX));
    }
    0
}

/// Handles `sk`, which `task` has open as `fd`. The iterator holds the file, so the socket cannot be
/// destroyed meanwhile.
#[inline(always)]
fn held(sk: u64, task: u64, fd: u32) {
    let Some(state) = sock::state(sk) else { return };
    let mut holder = RawTask::NONE;
    describe(task, &mut holder);
    if namespace::is_other() {
        task::notice(&holder, || task);
    }
    if state == state::LISTEN {
        listener::opened(sk, &holder);
        return;
    }
    if let Some(entry) = connection::find(sk) {
        known(&raw mut *entry, sk, &holder, fd);
    } else if state != state::CLOSE {
        // A socket in CLOSE is not connected yet, or has ended before this pass.
        older(sk, state, &holder);
    }
}

/// Records that `holder` has the socket of `entry` open. The socket's lock is not held, so every write goes
/// through a raw pointer.
#[inline(always)]
fn known(entry: *mut ConnectionRecord, sk: u64, holder: &RawTask, fd: u32) {
    // SAFETY: a valid, aligned map value, which stays mapped until the program ends. All members are
    // integers. Programs under the socket's lock may change them at the same time, and nothing here relies on
    // two of them having been written together.
    let connection = unsafe { &*entry };
    if connection.reported != 0 && connection.actor.pid == 0 {
        still_open(connection, sk, holder);
    }
    if connection.asked != 0 && u32::from(connection.asked) == pass() {
        report(connection, sk, holder, relation::ASKED, fd);
    }
    let is_unowned = connection.actor.pid == 0 && connection.holder.pid == 0;
    let has_no_role = connection.role == role::UNKNOWN && connection.established == 0;
    if is_unowned {
        // SAFETY: as above; `connection` is not used any more. `holder` and `holder_kind` are the only
        // members that are written here. A program under the lock writes them when the connection ends: it
        // clears the pid, and it names the listener of a socket without a descriptor, which the iterator
        // cannot find.
        unsafe {
            (&raw mut (*entry).holder).write(*holder);
            (&raw mut (*entry).holder_kind).write(holder::DESCRIPTOR);
        }
    } else if has_no_role {
        // It is older than the trace, and the first pass found it before its listener.
        let role = side(listener::exists(connection));
        // SAFETY: as above; `connection` is not used any more. `role` is the only member that is written
        // here. A program under the lock writes it when a socket connects or is created, and this socket did
        // so before the trace.
        unsafe { (&raw mut (*entry).role).write(role) };
    }
}

/// Adds a socket that is older than the trace and that `holder` has open.
#[inline(always)]
fn older(sk: u64, state: u8, holder: &RawTask) {
    let now = connection::now();
    let Some(entry) = connection::add(sk, now) else { return };
    let entry = &raw mut *entry;
    let mut endpoints = ConnectionRecord::NEW.endpoints;
    sock::endpoints(sk, None, &mut endpoints);
    // SAFETY: a valid, aligned map value, which stays mapped until the program ends; all members are
    // integers. `found`, `holder`, `holder_kind`, `endpoints`, `role`, `first_move` and the first state are
    // written here. A program under the socket's lock that runs at the same time finds the entry and may
    // write these members too: the same ends, or a later state, which is kept.
    let connection = unsafe {
        (&raw mut (*entry).found).write(1);
        (&raw mut (*entry).holder).write(*holder);
        (&raw mut (*entry).holder_kind).write(holder::DESCRIPTOR);
        (&raw mut (*entry).endpoints).write(endpoints);
        if (&raw const (*entry).steps).read() == 0 {
            (&raw mut (*entry).states[0]).write(state);
            (&raw mut (*entry).times[0]).write(now);
            (&raw mut (*entry).steps).write(1);
        }
        // The state shows who moved first, but not when.
        match state {
            state::CLOSE_WAIT | state::LAST_ACK => (&raw mut (*entry).first_move).write(first_move::PEER),
            state::FIN_WAIT1 | state::FIN_WAIT2 => (&raw mut (*entry).first_move).write(first_move::LOCAL),
            _ => {}
        }
        &*entry
    };
    if is_teardown(state) {
        connection::teardown_began(connection, sk, BEFORE_TRACE);
    }
    if listener::exists(connection) {
        // SAFETY: as above; `connection` is not used any more.
        unsafe { (&raw mut (*entry).role).write(role::SERVER) };
    }
}

/// How long after an end the user half waits for other holders of the socket, nanoseconds.
const AWAITED: u64 = 1_000_000_000;

/// Handles a socket that ended in softirq and that `holder` has open. The first holder that is found after
/// the end is reported, however late that is. Soon after the end, a holder that was known before is reported
/// too, and so is the process that opened it.
#[inline(always)]
fn still_open(connection: &ConnectionRecord, sk: u64, holder: &RawTask) {
    let first = connection.holder.pid == 0;
    let awaited = connection::now().wrapping_sub(connection.ended) < AWAITED;
    let counts = holder.pid == connection.holder.pid || holder.pid == connection.opener.pid;
    if !(first || awaited && counts) {
        return;
    }
    report(connection, sk, holder, relation::OPEN, 0);
}

#[inline(always)]
fn report(connection: &ConnectionRecord, sk: u64, holder: &RawTask, relation: u32, fd: u32) {
    let header = Header { tag: tag::OWNER, version: VERSION, length: size_of::<OwnerRecord>() as u32 };
    emit::owner(&OwnerRecord { header, sock: sk, born: connection.born, task: *holder, relation, fd });
}

/// The number of the pass that reports holders.
#[inline(always)]
fn pass() -> u32 {
    match ASKED.get_ptr(0) {
        // SAFETY: a valid map value.
        Some(pass) => unsafe { *pass },
        None => 0,
    }
}

#[inline(always)]
fn side(listens: bool) -> u8 {
    if listens { role::SERVER } else { role::CLIENT }
}

/// Fills in what can be read of a task that does not run on this CPU.
#[inline(always)]
fn describe(task: u64, to: &mut RawTask) {
    to.pid = member(task, global!(STRUCTS.task_tgid)).unwrap_or(0);
    to.tid = member(task, global!(STRUCTS.task_pid)).unwrap_or(0);
    to.comm = member(task, global!(STRUCTS.task_comm)).unwrap_or([0; 16]);
    to.mm = member(task, global!(STRUCTS.task_mm)).unwrap_or(0);
    if let Some(cred) = member::<u64>(task, global!(STRUCTS.task_cred)) {
        to.uid = member(cred, global!(STRUCTS.cred_uid)).unwrap_or(0);
    }
}
