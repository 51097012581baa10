//! Every map and global, and why it has its size. All are made when the programs are loaded, none grows.

use aya_ebpf::{
    Global,
    bindings::BPF_F_MMAPABLE,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use tcpclose_common::{
    counters::Counters,
    namespace::PidNamespace,
    offsets::{ABSENT, ArgumentOffsets, IteratorOffsets, NamespaceOffsets, RecordOffsets, StructOffsets},
    params::Params,
    record::{Address, ConnectionRecord, Interpreted, STACK_STEP, Signal, RawTask},
    stack::StackTrace,
    table::{Bucket, WAYS, buckets, overflow},
};

/// Where things are in this kernel.
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

/// Where programs on kernel functions find their arguments.
#[unsafe(no_mangle)]
pub static ARGUMENTS: Global<ArgumentOffsets> = Global::new(ArgumentOffsets::ABSENT);
/// How to see that a task reads a BPF iterator.
#[unsafe(no_mangle)]
pub static ITERATORS: Global<IteratorOffsets> = Global::new(IteratorOffsets::ABSENT);
/// Where processes have their ids in the pid namespace of tcpclose, if that is not the initial one.
#[unsafe(no_mangle)]
pub static NAMESPACE: Global<NamespaceOffsets> = Global::new(NamespaceOffsets::ABSENT);
/// Where `syscalls:sys_exit_accept` keeps the result.
#[unsafe(no_mangle)]
pub static ACCEPT_SYSCALL_RESULT: Global<u16> = Global::new(ABSENT);

/// What a new entry of the table is copied from: half a kilobyte is too much for the stack of a program.
static TEMPLATE: Global<ConnectionRecord> = Global::new(ConnectionRecord::NEW);

/// Address of [`ConnectionRecord::NEW`] in read-only data.
#[inline(always)]
pub fn template() -> *const ConnectionRecord {
    (&raw const TEMPLATE).cast()
}

/// Reads one member of a global made of offsets or parameters. Only that member is loaded, at a constant
/// place of a frozen map, so that the verifier knows its value and throws away what it makes unreachable.
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

/// Records on their way to the reader, 8 MiB: at 1,000 bytes a connection (both ends) and 100 ms between two
/// reads, room for 80,000 connections a second. When it is full, records are counted in `records_lost`.
#[map]
pub static RECORDS: RingBuf = RingBuf::with_byte_size(8 << 20, 0);

/// 1 while the reader of `RECORDS` sleeps, or is about to.
#[map]
pub static READER: Array<u32> = Array::with_max_entries(1, 0);

/// Its own address, once a program has needed it: see `Typed::address()`.
#[map]
pub static ANCHOR: Array<u64> = Array::with_max_entries(1, 0);

/// The state change that `set_state` worked on last on this CPU, until its second copy has seen it; 0 if
/// there is none.
#[map]
pub static LAST_CHANGE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Address of the `struct file_operations` of BPF iterators, which the inventory leaves here when it runs; 0
/// before.
#[map]
pub static ITERATOR: Array<u64> = Array::with_max_entries(1, 0);

/// The pid namespace of tcpclose, if that is not the initial one. The inventory writes it.
#[map]
pub static PID_NAMESPACE: Array<PidNamespace> = Array::with_max_entries(1, 0);

/// Notices of processes not seen before, which do wake the reader: a few bytes each, and a process is noticed
/// once.
#[map]
pub static PROCESSES: RingBuf = RingBuf::with_byte_size(64 << 10, 0);

/// The table of live sockets (see `table.rs`). `--connections` sets the number of buckets, of which the user
/// half maps those that exist into its memory.
#[map]
pub static BUCKETS: Array<Bucket> = Array::with_max_entries(buckets(CONNECTIONS), BPF_F_MMAPABLE);

/// Entries of the table.
#[map]
pub static ENTRIES: Array<ConnectionRecord> = Array::with_max_entries(buckets(CONNECTIONS) * WAYS, 0);

/// Live sockets whose bucket was full, by address. LRU: when it is full, the socket that was longest without
/// an event gives way, and the user half sees from the counters that it did. A quarter of the table's size.
#[map]
pub static OVERFLOW: LruHashMap<u64, ConnectionRecord> = LruHashMap::with_max_entries(overflow(CONNECTIONS), 0);

/// 1 once `OVERFLOW` has had an entry: before that, nobody needs to search it.
#[map]
pub static HAS_OVERFLOW: Array<u32> = Array::with_max_entries(1, 0);

/// Sockets that there is room for, if `--connections` does not say otherwise.
const CONNECTIONS: u32 = 65_536;

/// Stacks by the hash of their frames. A program has few places that open and close sockets, so each stack is
/// kept once; 8 MiB. When it is full, the one longest unused gives way.
#[map]
pub static STACKS: LruHashMap<u64, StackTrace> = LruHashMap::with_max_entries(8_192, 0);

/// Room to take a stack in, and to build the record of a RST without a connection: [`SLOTS`] a CPU, because a
/// program may be interrupted by another one on the same CPU.
#[map]
pub static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(SLOTS, 0);

/// Process context, softirq above it, and two more for kernels that let programs be preempted.
pub const SLOTS: u32 = 4;

/// One slot of `SCRATCH`.
#[repr(C)]
pub struct Scratch {
    /// 1 while a program works with it.
    pub busy: u64,
    pub stack: StackTrace,
    pub connection: ConnectionRecord,
    /// The part of a user stack that is compared with a recipe.
    pub window: [u64; STACK_STEP / 8],
    /// The frames of an interpreter.
    pub interpreted: Interpreted,
}

/// Processes that were noticed, and the address of their memory descriptor then. LRU: one that was forgotten
/// is noticed again.
#[map]
pub static NOTICED: LruHashMap<u32, u64> = LruHashMap::with_max_entries(16_384, 0);

/// The last signal that may have killed a process, by its id. LRU: of one that was forgotten the sender is
/// not known. The user half looks up those that did kill.
#[map]
pub static SIGNALS: LruHashMap<u32, Signal> = LruHashMap::with_max_entries(4_096, 0);

/// Process ids that `--pid` or `-- COMMAND` ask for. Not LRU: a process that is wanted must not be forgotten.
#[map]
pub static FOLLOWED: HashMap<u32, u8> = HashMap::with_max_entries(32_768, 0);

/// Listening sockets, by network namespace and port (see `listener.rs`). LRU: one that was forgotten costs
/// the word of who would have accepted a connection.
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
    /// 1 if it listens no more. What it had not accepted ends after that, and was to be its own.
    pub closed: u32,
}

/// Times to live that were seen in packets, until a connection asks for them; filled with `--ttl` alone, and
/// only where fentry does not hand packets and sockets over together. LRU.
#[map]
pub static TTLS: LruHashMap<Tuple, Ttls> = LruHashMap::with_max_entries(16_384, 0);

/// A connection as its packets tell it. Without padding, since it is a key.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tuple {
    pub local: Address,
    pub remote: Address,
    pub local_port: u16,
    pub remote_port: u16,
    pub netns: u32,
}

/// Times to live; 0 is none seen.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ttls {
    pub handshake: u8,
    pub reset: u8,
    pub reserved: [u8; 6],
}

/// Sockets of `OVERFLOW` in a teardown state, and when they came into the first one, as in [`Bucket::since`].
/// Not LRU: those that are here longest are those that are wanted. As large as `OVERFLOW`; what finds no room
/// is counted in `teardowns_failed`.
#[map]
pub static TEARDOWNS: HashMap<u64, u64> = HashMap::with_max_entries(overflow(CONNECTIONS), 0);

/// The inventory pass that is to tell of the holders of sockets that `asked` for it ([`ConnectionRecord::asked`]).
#[map]
pub static ASKED: Array<u32> = Array::with_max_entries(1, 0);

/// See [`Counters`].
#[map]
pub static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(1, 0);

/// Adds one to a counter of this CPU.
macro_rules! count {
    ($counter:ident) => {
        if let Some(counters) = $crate::maps::COUNTERS.get_ptr_mut(0) {
            // SAFETY: a valid, aligned map value. A program that interrupts this one between load and store
            // could make it count one too few; atomics with a result are not in 5.10's BPF.
            unsafe { (*counters).$counter = (*counters).$counter.wrapping_add(1) };
        }
    };
}
pub(crate) use count;

/// A slot of `SCRATCH` that is ours until dropped.
pub struct Slot(*mut Scratch);

impl Slot {
    /// Takes a free slot; `None` if all are taken by programs that this one interrupted.
    #[inline(always)]
    pub fn take() -> Option<Self> {
        let mut index = 0;
        while index < SLOTS {
            let scratch = SCRATCH.get_ptr_mut(index)?;
            // SAFETY: a valid, aligned map value of this CPU. An interrupt between the test and the set runs
            // to its end and gives its slot back before this program goes on.
            unsafe {
                if (*scratch).busy == 0 {
                    (*scratch).busy = 1;
                    return Some(Self(scratch));
                }
            }
            index += 1;
        }
        None
    }

    pub fn get(&self) -> *mut Scratch {
        self.0
    }
}

impl Drop for Slot {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the pointer came from the map and the slot is ours.
        unsafe { (*self.0).busy = 0 };
    }
}
