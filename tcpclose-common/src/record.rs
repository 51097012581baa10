//! The records that the programs write and the user half reads.
//!
//! A [`ConnectionRecord`] gathers a socket's facts while the socket lives. Copied as a whole, it is the body
//! of the record written when it ends ([`tag::CLOSE`]) or when a RST is sent or received ([`tag::RESET`]). A
//! fact that could not be read is [`UNKNOWN_U64`] or [`UNKNOWN_U32`], never 0.

use crate::interpreter::MAX_INTERPRETED;

/// The version of the layout, in every header. The reader refuses a record with another version.
pub const VERSION: u16 = 2;

/// A 64-bit fact that could not be read.
pub const UNKNOWN_U64: u64 = u64::MAX;
/// A 32-bit fact that could not be read.
pub const UNKNOWN_U32: u32 = u32::MAX;

/// Kinds of records.
pub mod tag {
    /// One end of a connection is over: a [`super::ConnectionRecord`].
    pub const CLOSE: u16 = 1;
    /// A RST was sent or received: a [`super::ConnectionRecord`] whose `reset` says which.
    pub const RESET: u16 = 2;
    /// A task that owns a socket which ended in softirq: an [`super::OwnerRecord`].
    pub const OWNER: u16 = 3;
    /// A process touched a socket for the first time: a [`super::ProcessRecord`], in the `PROCESSES` ring.
    pub const PROCESS: u16 = 4;
    /// A socket is still in a teardown state: a [`super::ConnectionRecord`] as it is now.
    pub const STUCK: u16 = 5;
    /// A copy of a user stack: a [`super::StackCopy`] followed by [`super::StackCopy::bytes`] bytes.
    pub const STACK: u16 = 6;
    /// A task acted on a socket after another act, or destroyed it from outside: a [`super::ActRecord`].
    pub const ACT: u16 = 7;
    /// The frames of an interpreter, ahead of the copy of the stack that they belong to: a
    /// [`super::Interpreted`].
    pub const INTERPRETED: u16 = 8;
}

/// Directions of a RST.
pub mod direction {
    /// There was none.
    pub const NONE: u8 = 0;
    /// This host sent it.
    pub const SENT: u8 = 1;
    /// This host received it, or aborted as if it had: `tcp_reset()` also runs for late data.
    pub const RECEIVED: u8 = 2;
}

/// Who opened a connection.
pub mod role {
    /// Older than the trace.
    pub const UNKNOWN: u8 = 0;
    /// It called `connect()`.
    pub const CLIENT: u8 = 1;
    /// A listener created it.
    pub const SERVER: u8 = 2;
}

/// How the holder of a connection was found. A holder is a task that neither opened the connection nor acted
/// on it.
pub mod holder {
    /// There is none.
    pub const NONE: u32 = 0;
    /// The inventory found the socket among its descriptors.
    pub const DESCRIPTOR: u32 = 1;
    /// It listens on the local port of the connection and had not accepted it.
    pub const LISTENER: u32 = 2;
}

/// The relation of an [`OwnerRecord`] to the socket.
pub mod relation {
    /// It closed the socket's descriptor.
    pub const CLOSED: u32 = 0;
    /// It has a descriptor of a socket that has ended.
    pub const OPEN: u32 = 1;
    /// It has a descriptor of a socket whose holders were asked for.
    pub const ASKED: u32 = 2;
}

/// Kinds of [`ActRecord`].
pub mod act {
    /// This side acted again: it closed a socket that it had shut down.
    pub const AGAIN: u32 = 0;
    /// The task destroyed the socket from outside, as `ss -K` does.
    pub const DESTROYED: u32 = 1;
}

/// Additions to the number of the system call in [`RawTask::syscall`].
pub mod syscall {
    /// The number is one of the table for 32-bit programs (i386, arm32). Numbers have 10 bits, and bit 30 is
    /// that of x32 programs (`__X32_SYSCALL_BIT`), which the kernel leaves in the number.
    pub const COMPAT: i32 = 1 << 28;
    /// The position of the first argument of i386's `socketcall`, which selects the actual call.
    pub const SOCKETCALL_SHIFT: u32 = 16;
}

/// Who began the teardown of a connection.
pub mod first_move {
    /// Nothing yet.
    pub const NONE: u8 = 0;
    /// This host's application (FIN or abort).
    pub const LOCAL: u8 = 1;
    /// A packet of the peer (FIN or RST).
    pub const PEER: u8 = 2;
}

macro_rules! layout {
    ($(#[$meta:meta])* $name:ident ($size:expr) { $($(#[$doc:meta])* $field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[cfg_attr(feature = "user", derive(
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout
        ))]
        pub struct $name { $($(#[$doc])* pub $field: $type),* }

        const _: () = assert!(size_of::<$name>() == $size, "the layout changed: raise VERSION");
    };
}

layout! {
    /// What every record begins with.
    Header (8) {
        /// One of [`tag`].
        tag: u16,
        /// [`VERSION`].
        version: u16,
        /// Length of the whole record in bytes.
        length: u32,
    }
}

/// An IPv6 or IPv4-mapped address in network order: four words as they lie in memory, because the BPF target
/// copies single bytes one by one.
pub type Address = [u32; 4];

/// `address`, network order as it lies in memory, as IPv4-mapped (RFC 4291, 2.5.5.2).
#[inline]
pub const fn mapped(address: u32) -> Address {
    [0, 0, 0xffff_u32.to_be(), address]
}

layout! {
    /// Both ends of a connection, seen from this host.
    RawEndpoints (48) {
        /// This end.
        local: Address,
        /// The other end; all zero when unknown.
        remote: Address,
        /// `AF_INET` or `AF_INET6` as the socket has it; 0 when unknown.
        family: u16,
        /// Host order.
        local_port: u16,
        /// Host order.
        remote_port: u16,
        /// Always 0.
        reserved: u16,
        /// Inode number of the network namespace; [`UNKNOWN_U32`] if it could not be read.
        netns: u32,
        /// Always 0.
        reserved2: u32,
    }
}

layout! {
    /// A task that acted on a socket in its own context. `pid` 0 means that there was none.
    RawTask (64) {
        /// Process id in the initial namespace (the kernel's tgid).
        pid: u32,
        /// Thread id.
        tid: u32,
        /// Real user id in the initial namespace.
        uid: u32,
        /// `task_struct.flags`, or 0 when not readable.
        flags: u32,
        /// `task_struct.exit_code`; only meaningful with `PF_EXITING`.
        exit_code: i32,
        /// System call number, with what [`syscall`] adds to it, or -1 when not readable.
        syscall: i32,
        /// The thread's name, cut to 15 bytes, ended by a zero.
        comm: [u8; 16],
        /// Address of its `mm_struct`, which distinguishes one program image from the next; 0 once the task
        /// has released it.
        mm: u64,
        /// Key into `STACKS`, or that of a [`StackCopy`]; 0 when not taken or empty.
        user_stack: u64,
        /// Key of the kernel stack into `STACKS`; 0 when not taken or empty.
        kernel_stack: u64,
    }
}

layout! {
    /// The kernel's counters of a socket at one moment.
    RawSample (48) {
        /// Payload sent, each byte once.
        bytes_sent: u64,
        /// Payload received, each byte once.
        bytes_received: u64,
        /// Segments sent again.
        retransmits: u32,
        /// Smoothed round trip time, microseconds; 0 when never measured.
        rtt_us: u32,
        /// Bytes received that the application has not read.
        unread: u32,
        /// Bytes written that the peer has not acknowledged.
        unacknowledged: u32,
        /// Jiffies since data was last sent (`lsndtime`); meaningless if none was sent.
        sent_ago: u32,
        /// Jiffies since data was last received (`lrcvtime`); meaningless if none was received.
        received_ago: u32,
        /// `TCP_USER_TIMEOUT`, milliseconds; 0 when not set.
        user_timeout: u32,
        /// Sequence numbers received that the application has not consumed: `unread`, plus one for a FIN that
        /// it has not read. `ss` shows this as Recv-Q.
        untaken: u32,
    }
}

layout! {
    /// A RST.
    RawReset (24) {
        /// When, nanoseconds of `CLOCK_BOOTTIME`; 0 when there was none.
        at: u64,
        /// `enum sk_rst_reason` of the running kernel, or [`UNKNOWN_U32`].
        reason: u32,
        /// One of [`direction`].
        direction: u8,
        /// State of the socket when it happened; 0 without a socket.
        state: u8,
        /// 1 when it answers a packet, 0 when it was sent unprompted.
        answer: u8,
        /// 1 when it was received in a state in which `tcp_reset()` also runs for late data, without any RST.
        ambiguous: u8,
        /// Time to live of a RST that was received; 0 when not read.
        ttl: u8,
        /// Time to live of the peer's first packet; 0 when not read.
        handshake_ttl: u8,
        /// Always 0.
        reserved: [u8; 6],
    }
}

/// The number of state changes that are kept. The longest orderly life has 7; the rest is room for a
/// reconnect in SYN_RECV. In a longer life the last entry is overwritten.
pub const MAX_STEPS: usize = 10;

layout! {
    /// One end of a connection.
    ConnectionRecord (568) {
        /// Filled when it is written to the ring.
        header: Header,
        /// The socket's address, which identifies it while it lives. It is never shown.
        sock: u64,
        /// When it was first seen, nanoseconds of `CLOCK_BOOTTIME`; together with `sock`, this identifies the
        /// socket for good.
        born: u64,
        /// When it was established; 0 if never, or before the trace.
        established: u64,
        /// When the teardown began; 0 if it has not.
        moved: u64,
        /// When it reached CLOSE; 0 while it lives.
        ended: u64,
        /// `jiffies64` when it ended.
        jiffies: u64,
        /// Socket cookie, or 0.
        cookie: u64,
        /// Inode number of the socket, or 0 when it has no descriptor.
        inode: u64,
        /// Both ends.
        endpoints: RawEndpoints,
        /// The task that called `connect()`, or that accepted it.
        opener: RawTask,
        /// The task that acted first on this side: close, shutdown, exit, …
        actor: RawTask,
        /// The task that has it open, or would have accepted it; filled only if neither of the two above is
        /// known.
        holder: RawTask,
        /// Counters when the teardown began; all unknown before that.
        at_move: RawSample,
        /// Counters at the end.
        at_end: RawSample,
        /// The RST that ended it, or that this record reports.
        reset: RawReset,
        /// When each of `states` was entered.
        times: [u64; MAX_STEPS],
        /// The states, `steps` of them.
        states: [u8; MAX_STEPS],
        /// The number of `states` in use.
        steps: u8,
        /// One of [`role`].
        role: u8,
        /// One of [`first_move`].
        first_move: u8,
        /// State before CLOSE.
        last_state: u8,
        /// `sk_shutdown` at the end.
        shutdown: u8,
        /// 1 when a process held the socket's lock at the end.
        owned: u8,
        /// `sk_err` at the end, or [`i32::MIN`] when not readable.
        error: i32,
        /// 1 once its CLOSE record has been written.
        reported: u8,
        /// 1 when the inventory found it alive: it entered the first of `states` before the time in `times`.
        found: u8,
        /// Number of the inventory pass that will report this socket's holders; 0 if none was requested.
        asked: u16,
        /// `sk_flags` at the end, or [`UNKNOWN_U64`].
        sock_flags: u64,
        /// Time of `SO_LINGER` at the end, jiffies, or [`UNKNOWN_U64`].
        linger: u64,
        /// What the last program found the current task to do. It is for the kernel half alone.
        act: u16,
        /// 1 when `TCP_LINGER2` was negative at the end: the socket must not wait in FIN_WAIT2 after its
        /// `close()`.
        no_fin_wait2: u16,
        /// One of [`holder`].
        holder_kind: u32,
        /// Sequence numbers written and not sent yet, where a FIN counts as one; filled only for
        /// [`tag::STUCK`].
        unsent: u32,
        /// Probes of the peer's window that it has not answered (`icsk_probes_out`); filled only for
        /// [`tag::STUCK`].
        probes: u32,
    }
}

layout! {
    /// The task that closed, or has open, the descriptor of a socket that ended in softirq without a known
    /// owner, or that is stuck in a teardown state.
    OwnerRecord (96) {
        /// What every record begins with.
        header: Header,
        /// [`ConnectionRecord::sock`] of the socket.
        sock: u64,
        /// [`ConnectionRecord::born`] of the socket.
        born: u64,
        /// The task.
        task: RawTask,
        /// One of [`relation`].
        relation: u32,
        /// The descriptor, with [`relation::ASKED`].
        fd: u32,
    }
}

layout! {
    /// An act of a task on a socket: one after the first act of this side, or one from outside.
    ActRecord (104) {
        /// What every record begins with.
        header: Header,
        /// [`ConnectionRecord::sock`] of the socket.
        sock: u64,
        /// [`ConnectionRecord::born`] of the socket.
        born: u64,
        /// When, nanoseconds of `CLOCK_BOOTTIME`.
        at: u64,
        /// The task.
        task: RawTask,
        /// One of [`act`].
        kind: u32,
        /// Always 0.
        reserved: u32,
    }
}

layout! {
    /// A value of `SIGNALS`: the last signal that may have killed a process.
    Signal (40) {
        /// When it was sent, nanoseconds of `CLOCK_BOOTTIME`.
        at: u64,
        /// Its number.
        number: u32,
        /// Process id of the sender; 0 if the kernel sent it, or a kernel thread.
        pid: u32,
        /// Real user id of the sender.
        uid: u32,
        /// 1 if it was the kernel's OOM killer.
        oom: u32,
        /// Name of the sender's main thread, cut to 15 bytes, ended by a zero.
        comm: [u8; 16],
    }
}

layout! {
    /// A process that touches a socket for the first time in this trace, or the first time since its last
    /// `exec()`.
    ProcessRecord (40) {
        /// What every record begins with.
        header: Header,
        /// Process id in the initial namespace.
        pid: u32,
        /// Process id in the pid namespace of tcpclose; 0 if it has none there, and always where that is the
        /// initial one.
        local: u32,
        /// Address of its `mm_struct`; 0 if it has released it.
        mm: u64,
        /// Name of the main thread, cut to 15 bytes, ended by a zero; all zero when not readable.
        comm: [u8; 16],
    }
}

/// A stack is copied in steps of this many bytes, beginning at a multiple of it at or below the stack
/// pointer, so that no step crosses the end of a page.
pub const STACK_STEP: usize = 1024;

/// The largest copy of a stack, in bytes, when stacks are recognized by recipes and an eighth of the ring is
/// in use; but for one copy in 16.
pub const CROWDED_STACK_BYTES: usize = 6 << 10;

/// The largest copy of a stack, bytes.
pub const MAX_STACK_BYTES: u32 = 64 << 10;

layout! {
    /// A copy of the current task's user stack when it acted on a socket, to be unwound later. The bytes
    /// follow it.
    StackCopy (80) {
        /// What every record begins with; its length includes the bytes.
        header: Header,
        /// The value of [`RawTask::user_stack`] that refers to it.
        key: u64,
        /// Process id in the initial namespace.
        pid: u32,
        /// The number of bytes that could be read.
        bytes: u32,
        /// Address of its `mm_struct`.
        mm: u64,
        /// Address of the first byte.
        start: u64,
        /// Instruction pointer.
        ip: u64,
        /// Stack pointer.
        sp: u64,
        /// Frame pointer: `rbp`, `x29`.
        fp: u64,
        /// Link register (`x30`); 0 where there is none.
        lr: u64,
        /// `mm_struct.exec_vm`: how many pages of code are mapped; 0 when not readable.
        code_pages: u64,
    }
}

layout! {
    /// A frame of an interpreter.
    InterpretedFrame (40) {
        /// Its address.
        address: u64,
        /// Address of the code.
        code: u64,
        /// Address or index of the instruction.
        instruction: u64,
        /// The bits under `Interpreter::kind_mask` of the word with its kind.
        kind: u64,
        /// A hash of the words that distinguish the code object from others at the same address; 0 if they
        /// cannot be read.
        identity: u64,
    }
}

layout! {
    /// The frames of an interpreter that the current thread is in.
    Interpreted (2600) {
        /// What every record begins with.
        header: Header,
        /// [`StackCopy::key`] of the copy that follows.
        key: u64,
        /// A hash of the frames, which recipes compare; never 0.
        hash: u64,
        /// The number of `frames` in use.
        count: u32,
        /// 1 if there are more.
        is_cut: u32,
        /// Address of the structure that belongs to the innermost call of the interpreter's loop; 0 if there
        /// is none.
        call: u64,
        /// Innermost first.
        frames: [InterpretedFrame; MAX_INTERPRETED],
    }
}

impl RawTask {
    /// Nobody.
    pub const NONE: Self = Self {
        pid: 0,
        tid: 0,
        uid: 0,
        flags: 0,
        exit_code: 0,
        syscall: -1,
        comm: [0; 16],
        mm: 0,
        user_stack: 0,
        kernel_stack: 0,
    };
}

impl RawSample {
    /// Nothing readable.
    pub const UNKNOWN: Self = Self {
        bytes_sent: UNKNOWN_U64,
        bytes_received: UNKNOWN_U64,
        retransmits: UNKNOWN_U32,
        rtt_us: UNKNOWN_U32,
        unread: UNKNOWN_U32,
        unacknowledged: UNKNOWN_U32,
        sent_ago: UNKNOWN_U32,
        received_ago: UNKNOWN_U32,
        user_timeout: UNKNOWN_U32,
        untaken: UNKNOWN_U32,
    };
}

impl ConnectionRecord {
    /// A connection about which nothing is known yet. It becomes the `TEMPLATE` from which new entries are
    /// copied.
    #[expect(clippy::cast_possible_truncation, reason = "a record has a few hundred bytes")]
    pub const NEW: Self = Self {
        header: Header { tag: 0, version: VERSION, length: size_of::<Self>() as u32 },
        sock: 0,
        born: 0,
        established: 0,
        moved: 0,
        ended: 0,
        jiffies: 0,
        cookie: 0,
        inode: 0,
        endpoints: RawEndpoints {
            local: [0; 4],
            remote: [0; 4],
            family: 0,
            local_port: 0,
            remote_port: 0,
            reserved: 0,
            netns: UNKNOWN_U32,
            reserved2: 0,
        },
        opener: RawTask::NONE,
        actor: RawTask::NONE,
        holder: RawTask::NONE,
        at_move: RawSample::UNKNOWN,
        at_end: RawSample::UNKNOWN,
        reset: RawReset {
            at: 0,
            reason: UNKNOWN_U32,
            direction: direction::NONE,
            state: 0,
            answer: 0,
            ambiguous: 0,
            ttl: 0,
            handshake_ttl: 0,
            reserved: [0; 6],
        },
        times: [0; MAX_STEPS],
        states: [0; MAX_STEPS],
        steps: 0,
        role: role::UNKNOWN,
        first_move: first_move::NONE,
        last_state: 0,
        shutdown: 0,
        owned: 0,
        error: i32::MIN,
        reported: 0,
        found: 0,
        asked: 0,
        sock_flags: UNKNOWN_U64,
        linger: UNKNOWN_U64,
        act: 0,
        no_fin_wait2: 0,
        holder_kind: holder::NONE,
        unsent: UNKNOWN_U32,
        probes: UNKNOWN_U32,
    };
}

// SAFETY: `repr(C)`; zerocopy's `IntoBytes` has proved that there is no padding.
#[cfg(feature = "user")]
unsafe impl aya::Pod for ConnectionRecord {}

// SAFETY: as above.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Signal {}
