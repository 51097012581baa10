//! All maps and globals, and the reasons for their sizes. They are created when the programs are loaded, and
//! none grows.

use core::{arch::asm, ptr};

use aya_ebpf::{
    Global,
    bindings::BPF_F_MMAPABLE,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use tcpclose_common::{
    counters::Counters,
    interpreter::Interpreter,
    namespace::PidNamespace,
    offsets::{ABSENT, ArgumentOffsets, IteratorOffsets, NamespaceOffsets, RecordOffsets, StructOffsets},
    params::Params,
    recipe::EdgeTarget,
    record::{Address, ConnectionRecord, Interpreted, RawTask, STACK_STEP, Signal},
    stack::StackTrace,
    table::{Bucket, WAYS, buckets, overflow},
};

/// The offsets of struct members in this kernel.
#[unsafe(no_mangle)]
pub static STRUCTS: Global<StructOffsets> = Global::new(StructOffsets::ABSENT);
/// What the user asked for.
#[unsafe(no_mangle)]
pub static PARAMS: Global<Params> = Global::new(Params::NONE);
/// Layout of `sock:inet_sock_set_state`, for the classic tracepoint.
#[unsafe(no_mangle)]
pub static SET_STATE_RECORD: Global<RecordOffsets> = Global::new(RecordOffsets::ABSENT);
/// Layout of `tcp:tcp_send_reset`.
#[unsafe(no_mangle)]
pub static SEND_RESET_RECORD: Global<RecordOffsets> = Global::new(RecordOffsets::ABSENT);
/// Layout of `tcp:tcp_receive_reset`.
#[unsafe(no_mangle)]
pub static RECEIVE_RESET_RECORD: Global<RecordOffsets> = Global::new(RecordOffsets::ABSENT);
/// Layout of `net:netif_receive_skb`.
#[unsafe(no_mangle)]
pub static RECEIVE_SKB_RECORD: Global<RecordOffsets> = Global::new(RecordOffsets::ABSENT);
/// Layout of `tcp:tcp_destroy_sock`.
#[unsafe(no_mangle)]
pub static DESTROY_SOCK_RECORD: Global<RecordOffsets> = Global::new(RecordOffsets::ABSENT);

/// Layout of `sched:sched_process_fork`.
#[unsafe(no_mangle)]
pub static FORK_RECORD: Global<RecordOffsets> = Global::new(RecordOffsets::ABSENT);

/// The places of the arguments of programs on kernel functions.
#[unsafe(no_mangle)]
pub static ARGUMENTS: Global<ArgumentOffsets> = Global::new(ArgumentOffsets::ABSENT);
/// What shows whether a task reads a BPF iterator.
#[unsafe(no_mangle)]
pub static ITERATORS: Global<IteratorOffsets> = Global::new(IteratorOffsets::ABSENT);
/// The places of process ids in the pid namespace of tcpclose, if that is not the initial one.
#[unsafe(no_mangle)]
pub static NAMESPACE: Global<NamespaceOffsets> = Global::new(NamespaceOffsets::ABSENT);
/// The place of the result in a record of `syscalls:sys_exit_accept`.
#[unsafe(no_mangle)]
pub static ACCEPT_SYSCALL_RESULT: Global<u16> = Global::new(ABSENT);

/// The template from which new entries of the table are copied: half a kilobyte is too much for the stack of
/// a program.
static TEMPLATE: Global<ConnectionRecord> = Global::new(ConnectionRecord::NEW);

/// Address of [`ConnectionRecord::NEW`] in read-only data.
#[inline(always)]
pub fn template() -> *const ConnectionRecord {
    (&raw const TEMPLATE).cast()
}

/// Reads one member of a global made of offsets or parameters. Only that member is loaded, from a constant
/// place in a frozen map, so that the verifier knows its value and removes the code that it makes
/// unreachable.
macro_rules! global {
    ($global:ident) => {
        $crate::maps::$global.load()
    };
    ($global:ident . $($member:tt)+) => {{
        let base = (&raw const $crate::maps::$global).cast::<$crate::maps::kind::$global>();
        // SAFETY: `Global<T>` is a transparent `MaybeUninit<T>` that is always initialised; volatile, because
        // the loader puts other values there than the compiler sees.
        unsafe { core::ptr::read_volatile(&raw const (*base).$($member)+) }
    }};
}
pub(crate) use global;

/// The types behind the globals, under the globals' names, for [`global!`].
pub mod kind {
    pub type STRUCTS = super::StructOffsets;
    pub type PARAMS = super::Params;
    pub type ARGUMENTS = super::ArgumentOffsets;
    pub type ITERATORS = super::IteratorOffsets;
    pub type NAMESPACE = super::NamespaceOffsets;
}

/// Records for the reader, 8 MiB: with 1,000 bytes for a connection (both ends) and 100 ms between two reads,
/// this is enough for 80,000 connections a second. When the ring is full, records are counted in
/// `records_lost`.
#[map]
pub static RECORDS: RingBuf = RingBuf::with_byte_size(8 << 20, 0);

/// 1 while the reader of `RECORDS` sleeps, or is about to.
#[map]
pub static READER: Array<u32> = Array::with_max_entries(1, 0);

/// Its own address, from the first time that a program needs it: see `Typed::address()`.
#[map]
pub static ANCHOR: Array<u64> = Array::with_max_entries(1, 0);

/// The last state change that `set_state` handled on this CPU, until `set_state_nested` has read it; 0 if there
/// is none.
#[map]
pub static LAST_CHANGE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Address of the `struct file_operations` of BPF iterators, which the inventory writes when it runs; 0
/// before that.
#[map]
pub static ITERATOR: Array<u64> = Array::with_max_entries(1, 0);

/// The pid namespace of tcpclose, if that is not the initial one. The inventory writes it.
#[map]
pub static PID_NAMESPACE: Array<PidNamespace> = Array::with_max_entries(1, 0);

/// Notices of processes that were not seen before. Each wakes the reader, takes a few bytes, and is written
/// once for a process.
#[map]
pub static PROCESSES: RingBuf = RingBuf::with_byte_size(64 << 10, 0);

/// The table of live sockets (see `table.rs`). `--connections` sets the number of buckets, of which the user
/// half maps those that exist into its memory.
#[map]
pub static BUCKETS: Array<Bucket> = Array::with_max_entries(buckets(CONNECTIONS), BPF_F_MMAPABLE);

/// Entries of the table.
#[map]
pub static ENTRIES: Array<ConnectionRecord> = Array::with_max_entries(buckets(CONNECTIONS) * WAYS, 0);

/// Live sockets whose bucket was full, by address. LRU: when it is full, the socket that has had no event for
/// longest is evicted, which the user half learns from the counters. It has a quarter of the table's size.
#[map]
pub static OVERFLOW: LruHashMap<u64, ConnectionRecord> =
    LruHashMap::with_max_entries(overflow(CONNECTIONS), 0);

/// 1 once `OVERFLOW` has had an entry. Before that, no program needs to search it.
#[map]
pub static HAS_OVERFLOW: Array<u32> = Array::with_max_entries(1, 0);

/// The default of `--connections`: the number of sockets that the table has room for.
const CONNECTIONS: u32 = 65_536;

/// Stacks by the hash of their frames. A program has few places that open and close sockets, so each stack is
/// kept once; 8 MiB. When it is full, the least recently used stack is evicted.
#[map]
pub static STACKS: LruHashMap<u64, StackTrace> = LruHashMap::with_max_entries(8_192, 0);

/// Memory in which stacks are taken, and records of RSTs without a connection are built: [`SLOTS`] for each
/// CPU, because another program may interrupt a program on the same CPU.
#[map]
pub static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(SLOTS, 0);

/// One for process context, one for a softirq that interrupts it, and two more for kernels on which programs
/// can be preempted.
pub const SLOTS: u32 = 4;

/// One slot of `SCRATCH`.
#[repr(C)]
pub struct Scratch {
    /// The number of programs that want it. The program that finds 1 uses it.
    pub claims: u64,
    /// Its number, while a program uses it.
    pub number: u64,
    pub stack: StackTrace,
    pub connection: ConnectionRecord,
    /// The part of a user stack that is compared with a recipe.
    pub window: [u64; STACK_STEP / 8],
    /// What is compared with recipes.
    pub comparison: Comparison,
    /// An interpreter, and its frames.
    pub interpreter: Interpreter,
    pub interpreted: Interpreted,
}

/// A comparison of the current task's user stack with recipes.
#[repr(C)]
pub struct Comparison {
    /// The recipe whose words are compared, and the edge that led to it.
    pub target: EdgeTarget,
    /// The stack pointer.
    pub sp: u64,
    /// Values of registers, by their [`source`](tcpclose_common::recipe::source).
    pub registers: [u64; REGISTERS],
    /// The address of the window into the stack.
    pub start: u64,
}

/// The number of places for values of registers.
pub const REGISTERS: usize = 8;

/// Processes that were noticed, with the address of their memory descriptor at that time. LRU: an evicted
/// process is noticed again.
#[map]
pub static NOTICED: LruHashMap<u32, u64> = LruHashMap::with_max_entries(16_384, 0);

/// The last signal that may have killed a process, by process id. LRU: if an entry was evicted, the sender is
/// not known. The user half looks up the signals that did kill.
#[map]
pub static SIGNALS: LruHashMap<u32, Signal> = LruHashMap::with_max_entries(4_096, 0);

/// The process ids of `--pid` or `-- COMMAND`. Not LRU: a process that is wanted must not be evicted.
#[map]
pub static FOLLOWED: HashMap<u32, u8> = HashMap::with_max_entries(32_768, 0);

/// Listening sockets, by network namespace and port (see `listener.rs`). LRU: if an entry was evicted,
/// connections that it has not accepted have no owner.
#[map]
pub static LISTENERS: LruHashMap<u64, Listener> = LruHashMap::with_max_entries(16_384, 0);

/// A value of `LISTENERS`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Listener {
    pub sock: u64,
    pub task: RawTask,
    /// 1 if several processes listen there (`SO_REUSEPORT`), so that none of them can be named.
    pub shared: u32,
    /// 1 if it no longer listens. The connections that it had not accepted end after that, and would have
    /// been its own.
    pub closed: u32,
}

/// Times to live that were read from packets, until a hook on the socket needs them. Filled only with
/// `--ttl`, and only where fentry does not pass packets and sockets together. LRU.
#[map]
pub static TTLS: LruHashMap<Tuple, Ttls> = LruHashMap::with_max_entries(16_384, 0);

/// A connection as its packets identify it. It has no padding, because it is a key.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tuple {
    pub local: Address,
    pub remote: Address,
    pub local_port: u16,
    pub remote_port: u16,
    pub netns: u32,
}

/// Times to live; 0 if none was seen.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ttls {
    pub handshake: u8,
    pub reset: u8,
    pub reserved: [u8; 6],
}

/// Sockets of `OVERFLOW` in a teardown state, with the time when they entered the first one, as in
/// [`Bucket::since`]. Not LRU: the oldest entries are those that are wanted. The map is as large as
/// `OVERFLOW`; sockets that find no room are counted in `teardowns_failed`.
#[map]
pub static TEARDOWNS: HashMap<u64, u64> = HashMap::with_max_entries(overflow(CONNECTIONS), 0);

/// The number of the inventory pass that reports holders: those of the sockets whose
/// [`ConnectionRecord::asked`] is this number.
#[map]
pub static ASKED: Array<u32> = Array::with_max_entries(1, 0);

/// The counters of both halves' losses and of the kernel half's work ([`Counters`]).
#[map]
pub static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(1, 0);

/// Adds one to a counter of this CPU.
macro_rules! count {
    ($counter:ident) => {
        if let Some(counters) = $crate::maps::COUNTERS.get_ptr_mut(0) {
            // SAFETY: a valid, aligned map value. Atomic, because another program may interrupt this one.
            unsafe { $crate::maps::add_to(&raw mut (*counters).$counter, 1) };
        }
    };
}
pub(crate) use count;

/// Adds to a number that other programs add to as well. This is the only atomic instruction of kernels before
/// 5.12, and it has no result.
///
/// # Safety
/// `to` must point to a valid map value.
#[inline(always)]
pub unsafe fn add_to(to: *mut u64, value: u64) {
    // SAFETY: as the caller promises.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) to, in(reg) value, options(nostack)) };
}

/// A slot of `SCRATCH`, which belongs to this program until it is dropped.
pub struct Slot(*mut Scratch);

impl Slot {
    /// Takes a free slot; `None` if all are in use by programs that this one has interrupted.
    #[inline(always)]
    pub fn take() -> Option<Self> {
        let mut index = 0;
        while index < SLOTS {
            let scratch = SCRATCH.get_ptr_mut(index)?;
            // SAFETY: a valid, aligned map value of this CPU. A program that interrupts this one, or, on
            // kernels with preemptible tracepoints, that of another task, may come in between and may itself
            // be interrupted: whoever adds a claim later finds more than one.
            unsafe {
                let claims = &raw mut (*scratch).claims;
                add_to(claims, 1);
                if ptr::read_volatile(claims) == 1 {
                    ptr::write_volatile(&raw mut (*scratch).number, u64::from(index));
                    return Some(Self(scratch));
                }
                add_to(claims, u64::MAX);
            }
            index += 1;
        }
        None
    }

    pub fn get(&self) -> *mut Scratch {
        self.0
    }

    /// Its number. It is read from the slot, and so hidden from the verifier, which would examine the rest
    /// once for each number.
    #[inline(always)]
    pub fn number(&self) -> u64 {
        // SAFETY: the pointer came from the map and the slot is ours.
        unsafe { ptr::read_volatile(&raw const (*self.0).number) }
    }
}

impl Drop for Slot {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the pointer came from the map and the slot is ours.
        unsafe { add_to(&raw mut (*self.0).claims, u64::MAX) };
    }
}
