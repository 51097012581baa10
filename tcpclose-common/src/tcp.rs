//! Constants of the kernel that both halves use.

/// TCP states, as `include/net/tcp_states.h` numbers them. They will not change: `tcp_set_state()` asserts at
/// build time that they equal `BPF_TCP_*` of the user ABI.
pub mod state {
    /// Data may flow both ways.
    pub const ESTABLISHED: u8 = 1;
    /// `connect()` sent its SYN.
    pub const SYN_SENT: u8 = 2;
    /// A SYN was received and answered.
    pub const SYN_RECV: u8 = 3;
    /// Our FIN was sent and not acknowledged.
    pub const FIN_WAIT1: u8 = 4;
    /// Our FIN was acknowledged; the peer's has not arrived.
    pub const FIN_WAIT2: u8 = 5;
    /// Both sides are done. `inet_sock_set_state` never reports it: a smaller socket takes over.
    pub const TIME_WAIT: u8 = 6;
    /// The socket has ended, or is not in use yet.
    pub const CLOSE: u8 = 7;
    /// The peer's FIN arrived; the application has not closed.
    pub const CLOSE_WAIT: u8 = 8;
    /// The application closed after the peer did.
    pub const LAST_ACK: u8 = 9;
    /// A listening socket.
    pub const LISTEN: u8 = 10;
    /// The FINs crossed.
    pub const CLOSING: u8 = 11;
    /// A connection request, which is not a full socket yet.
    pub const NEW_SYN_RECV: u8 = 12;
}

/// Whether a connection in `state` is being torn down, and may stay in it. TIME_WAIT does not count: it ends
/// by itself, and has no full socket.
#[inline]
pub const fn is_teardown(state: u8) -> bool {
    use state::{CLOSE_WAIT, CLOSING, FIN_WAIT1, FIN_WAIT2, LAST_ACK};
    is_one_of(state, &[FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING])
}

/// Whether `state` is one of `states`. It is one test of a bit: after a comparison with each of them, the
/// verifier would examine the rest of a program once for each.
#[inline]
pub const fn is_one_of(state: u8, states: &[u8]) -> bool {
    let mut bits = 0_u32;
    let mut index = 0;
    while index < states.len() {
        bits |= 1 << states[index];
        index += 1;
    }
    state < 32 && bits >> (state % 32) & 1 != 0
}

/// `IPPROTO_TCP`: `inet_sock_set_state` also fires for SCTP, DCCP and MPTCP, whose socks are laid out
/// differently.
pub const IPPROTO_TCP: u16 = 6;
/// `AF_INET`.
pub const AF_INET: u16 = 2;
/// `AF_INET6`.
pub const AF_INET6: u16 = 10;

/// Bits of `sock.sk_flags`, `enum sock_flags` in `include/net/sock.h`.
pub mod sock_flag {
    /// `SOCK_DEAD`: no descriptor refers to it any more.
    pub const DEAD: u64 = 1 << 0;
    /// `SOCK_DONE`: the peer's FIN was received.
    pub const DONE: u64 = 1 << 1;
    /// `SOCK_LINGER`: `SO_LINGER` is on.
    pub const LINGER: u64 = 1 << 4;
}

/// Bits of `sock.sk_shutdown`.
pub mod shutdown {
    /// `RCV_SHUTDOWN`: nothing will be read any more.
    pub const RECEIVE: u8 = 1;
    /// `SEND_SHUTDOWN`: nothing will be sent any more.
    pub const SEND: u8 = 2;
    /// Both, as `close()` and `SHUT_RDWR` leave it.
    pub const BOTH: u8 = RECEIVE | SEND;
}

/// Bits of `task_struct.flags`, `include/linux/sched.h`; equal in 5.10 to 7.1.
pub mod task_flag {
    /// `PF_EXITING`: in `do_exit()`.
    pub const EXITING: u32 = 0x4;
    /// `PF_IO_WORKER`: a worker of `io_uring`.
    pub const IO_WORKER: u32 = 0x10;
    /// `PF_WQ_WORKER`: a worker of a workqueue.
    pub const WQ_WORKER: u32 = 0x20;
    /// `PF_KTHREAD`: a kernel thread.
    pub const KTHREAD: u32 = 0x20_0000;
}
