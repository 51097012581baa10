//! What the user asked for, handed to the programs as read-only globals before loading.

use crate::offsets::ABSENT;

/// The number of values of one filter that the kernel half compares. If there are more, the user half alone
/// decides.
pub const MAX_FILTER_VALUES: usize = 8;

/// An address range: `address` under `mask`, IPv4 as IPv4-mapped.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Already masked, in network order, as two big-endian halves in host integers.
    pub address: [u64; 2],
    /// The mask, in the same form.
    pub mask: [u64; 2],
}

/// Places of registers in `struct pt_regs`, bytes; [`ABSENT`] where there is none.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisterOffsets {
    /// Instruction pointer.
    pub ip: u16,
    /// Stack pointer.
    pub sp: u16,
    /// Frame pointer.
    pub fp: u16,
    /// Link register.
    pub lr: u16,
    /// The register that shows whether a task entered the kernel from 32-bit code: `cs` on x86-64, `pstate`
    /// on arm64.
    pub mode: u16,
    /// Which of its lowest 16 bits show it.
    pub mode_mask: u16,
    /// Their value for 32-bit code.
    pub mode_compat: u16,
    /// First argument of a system call of 32-bit code.
    pub argument: u16,
}

impl RegisterOffsets {
    /// Nothing known.
    pub const ABSENT: Self = Self {
        ip: ABSENT,
        sp: ABSENT,
        fp: ABSENT,
        lr: ABSENT,
        mode: ABSENT,
        mode_mask: 0,
        // The mask is 0, so this value never matches.
        mode_compat: 1,
        argument: ABSENT,
    };
}

/// Read-only parameters. A count of 0 means that the filter was not given.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Take user stacks (0 or 1).
    pub user_stack: u32,
    /// Take kernel stacks (0 or 1).
    pub kernel_stack: u32,
    /// The kernel has `bpf_get_socket_cookie` for these programs (0 or 1).
    pub has_cookie_helper: u32,
    /// The kernel has `bpf_task_pt_regs` and `bpf_get_current_task_btf` for these programs (0 or 1).
    pub has_pt_regs_helper: u32,
    /// `tcp_send_reset` has a third argument, the reason (0 or 1).
    pub has_reset_reason: u32,
    /// Record times to live (0 or 1).
    pub ttl: u32,
    /// Record which sockets are in a teardown state, so that those that stay in it can be reported (0 or 1).
    pub stuck: u32,
    /// Report only connections of processes in `FOLLOWED` (0 or 1).
    pub by_process: u32,
    /// How many of `local_ports` count.
    pub local_port_count: u32,
    /// How many of `remote_ports` count.
    pub remote_port_count: u32,
    /// How many of `ports` count; these match at either end.
    pub port_count: u32,
    /// How many of `netns` count.
    pub netns_count: u32,
    /// How many of `ranges` count; these match at either end.
    pub range_count: u32,
    /// Host order.
    pub local_ports: [u16; MAX_FILTER_VALUES],
    /// Host order.
    pub remote_ports: [u16; MAX_FILTER_VALUES],
    /// Host order.
    pub ports: [u16; MAX_FILTER_VALUES],
    /// Inode numbers of network namespaces.
    pub netns: [u32; MAX_FILTER_VALUES],
    /// A program on `tcp_destroy_sock` removes entries, so that they stay until then (0 or 1).
    pub has_destroy: u32,
    /// Bytes of user stacks that are copied, a multiple of [`STACK_STEP`](crate::record::STACK_STEP); 0 to
    /// follow frame pointers instead.
    pub stack_bytes: u32,
    /// Buckets of the table of sockets.
    pub buckets: u32,
    /// Where a task's `struct pt_regs` has its user registers.
    pub registers: RegisterOffsets,
    /// Offset of `exec_vm`, unsigned long, in `struct mm_struct`: how many pages of code are mapped.
    pub code_pages: u16,
    /// Offset of the user thread pointer, unsigned long, in `struct task_struct`.
    pub thread_pointer: u16,
    /// Recognize stacks by recipes, and copy only those that have none (0 or 1).
    pub recipes: u32,
    /// Address ranges.
    pub ranges: [Range; MAX_FILTER_VALUES],
}

impl Params {
    /// No stacks, no filters, no optional helper.
    pub const NONE: Self = Self {
        user_stack: 0,
        kernel_stack: 0,
        has_cookie_helper: 0,
        has_pt_regs_helper: 0,
        has_reset_reason: 0,
        ttl: 0,
        stuck: 0,
        by_process: 0,
        local_port_count: 0,
        remote_port_count: 0,
        port_count: 0,
        netns_count: 0,
        range_count: 0,
        local_ports: [0; MAX_FILTER_VALUES],
        remote_ports: [0; MAX_FILTER_VALUES],
        ports: [0; MAX_FILTER_VALUES],
        netns: [0; MAX_FILTER_VALUES],
        has_destroy: 0,
        stack_bytes: 0,
        buckets: 0,
        registers: RegisterOffsets::ABSENT,
        code_pages: ABSENT,
        thread_pointer: ABSENT,
        recipes: 0,
        ranges: [Range { address: [0; 2], mask: [0; 2] }; MAX_FILTER_VALUES],
    };
}

// 16 * 4 + 3 * 16 + 32 + 16 + 8 = 168, then 8 * 32: every member is naturally aligned, so there is no padding
// if the size equals this sum.
const _: () = assert!(size_of::<Params>() == 168 + MAX_FILTER_VALUES * size_of::<Range>());

// SAFETY: `repr(C)`, integers only, and the assertion above shows that there is no padding.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Params {}
