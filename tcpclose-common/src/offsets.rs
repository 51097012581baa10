//! Offsets in the running kernel: the user half finds them in BTF and in tracefs, and hands them to the
//! programs as read-only globals before they are loaded.
//!
//! Every offset that was not found is [`ABSENT`]. The programs test for it first, and because the globals are
//! frozen before loading, the verifier removes the unreachable branch.

/// The offset of something this kernel does not have, or that could not be found.
pub const ABSENT: u16 = u16::MAX;

macro_rules! offsets {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $field:ident),* $(,)? }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name { $($(#[$doc])* pub $field: u16),* }

        impl $name {
            /// Nothing found yet: every offset is [`ABSENT`].
            pub const ABSENT: Self = Self { $($field: ABSENT),* };

            /// Every offset with its name, in order.
            pub fn named(&self) -> [(&'static str, u16); [$(stringify!($field)),*].len()] {
                [$((stringify!($field), self.$field)),*]
            }
        }

        // SAFETY: `repr(C)` and all fields are `u16`, so there is no padding and any bytes are valid.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name {}
    };
}

offsets! {
    /// Offsets of kernel struct members, in bytes, from the start of the struct that the program has a
    /// pointer to.
    ///
    /// `sk_*`, `icsk_*` and `tcp_*` all count from the start of `struct sock`, which is also the start of
    /// `struct inet_connection_sock` and `struct tcp_sock`.
    StructOffsets {
        /// `sock.__sk_common.skc_family`, u16.
        sk_family,
        /// `sock.__sk_common.skc_state`, u8.
        sk_state,
        /// `sock.__sk_common.skc_rcv_saddr`, the local IPv4 address, big-endian u32.
        sk_rcv_saddr,
        /// `sock.__sk_common.skc_daddr`, the remote IPv4 address, big-endian u32.
        sk_daddr,
        /// `sock.__sk_common.skc_v6_rcv_saddr`, 16 bytes.
        sk_v6_rcv_saddr,
        /// `sock.__sk_common.skc_v6_daddr`, 16 bytes.
        sk_v6_daddr,
        /// `sock.__sk_common.skc_num`, the local port, host order u16.
        sk_num,
        /// `inet_sock.inet_sport`, the local port, big-endian u16; cleared later than `skc_num`; not present
        /// in TIME_WAIT.
        sk_sport,
        /// `sock.__sk_common.skc_dport`, the remote port, big-endian u16.
        sk_dport,
        /// `sock.__sk_common.skc_net.net`, pointer to `struct net`.
        sk_net,
        /// `sock.__sk_common.skc_flags`, unsigned long of `SOCK_*` bits (`enum sock_flags`).
        sk_flags,
        /// `sock.__sk_common.skc_cookie`, s64; 0 until it is requested for the first time.
        sk_cookie,
        /// `sock.sk_protocol`, u16 (5.6 and later).
        sk_protocol,
        /// `sock.sk_err`, int.
        sk_err,
        /// `sock.sk_shutdown`, u8 of `RCV_SHUTDOWN` and `SEND_SHUTDOWN`.
        sk_shutdown,
        /// `sock.sk_lingertime`, unsigned long, jiffies.
        sk_lingertime,
        /// `sock.sk_lock.owned`, int; inside anonymous members from 7.1 on.
        sk_lock_owned,
        /// `sock.sk_socket`, pointer to `struct socket`; null for a socket not yet accepted or already
        /// orphaned.
        sk_socket,
        /// From a `struct socket` to the inode number of its `struct socket_alloc`, unsigned long.
        socket_inode,
        /// `inet_connection_sock.icsk_ack.lrcvtime`, u32, jiffies of the last data received.
        icsk_lrcvtime,
        /// `inet_connection_sock.icsk_user_timeout`, u32, milliseconds.
        icsk_user_timeout,
        /// `tcp_sock.lsndtime`, u32, jiffies of the last data sent.
        tcp_lsndtime,
        /// `tcp_sock.bytes_received`, u64; counts a FIN as one.
        tcp_bytes_received,
        /// `tcp_sock.bytes_sent`, u64; counts every retransmission again.
        tcp_bytes_sent,
        /// `tcp_sock.bytes_retrans`, u64.
        tcp_bytes_retrans,
        /// `tcp_sock.total_retrans`, u32, segments.
        tcp_total_retrans,
        /// `tcp_sock.srtt_us`, u32, microseconds shifted left by 3.
        tcp_srtt_us,
        /// `tcp_sock.rcv_nxt`, u32.
        tcp_rcv_nxt,
        /// `tcp_sock.copied_seq`, u32; `rcv_nxt - copied_seq` is what the application has not read yet.
        tcp_copied_seq,
        /// `tcp_sock.write_seq`, u32.
        tcp_write_seq,
        /// `tcp_sock.snd_una`, u32.
        tcp_snd_una,
        /// `tcp_sock.snd_nxt`, u32; `write_seq - snd_nxt` is what has not been sent yet.
        tcp_snd_nxt,
        /// `inet_connection_sock.icsk_probes_out`, u8: window probes, or keepalive probes, since the last
        /// answer.
        icsk_probes_out,
        /// `tcp_sock.linger2`, int, jiffies; negative if there is to be no FIN_WAIT2.
        tcp_linger2,
        /// From a `struct net` to its inode number (`net.ns.inum`), unsigned int.
        net_inum,
        /// `sk_buff.head`, pointer.
        skb_head,
        /// `sk_buff.network_header`, u16, from `head`.
        skb_network_header,
        /// `sk_buff.transport_header`, u16, from `head`.
        skb_transport_header,
        /// `sk_buff.dev`, pointer to `struct net_device`.
        skb_dev,
        /// `net_device.nd_net.net`, pointer to `struct net`.
        dev_net,
        /// `task_struct.pid`, the thread id, int.
        task_pid,
        /// `task_struct.tgid`, the process id, int.
        task_tgid,
        /// `task_struct.group_leader`, pointer to the main thread.
        task_group_leader,
        /// `task_struct.comm`, 16 bytes.
        task_comm,
        /// `task_struct.real_cred`, pointer to `struct cred`.
        task_cred,
        /// `cred.uid`, unsigned int.
        cred_uid,
        /// `task_struct.files`, pointer to `struct files_struct`.
        task_files,
        /// `files_struct.fdt`, pointer to `struct fdtable`.
        files_fdt,
        /// `fdtable.fd`, pointer to the first of the pointers to `struct file`.
        fdtable_fd,
        /// `file.f_inode`, pointer.
        file_inode,
        /// `file.private_data`, pointer; a `struct socket` if the inode is a socket's.
        file_private,
        /// `inode.i_mode`, u16.
        inode_mode,
        /// `socket.sk`, pointer.
        socket_sk,
        /// `bpf_iter__task_file.task`, pointer: the context of the iterator's program.
        iter_task,
        /// `bpf_iter__task_file.fd`, u32: the descriptor.
        iter_fd,
        /// `bpf_iter__task_file.file`, pointer.
        iter_file,
        /// `task_struct.flags`, unsigned int of `PF_*`.
        task_flags,
        /// `task_struct.exit_code`, int.
        task_exit_code,
        /// `task_struct.mm`, pointer; null for kernel threads, and once an exiting task has released its
        /// memory.
        task_mm,
        /// `task_struct.stack`, pointer to the lowest byte of the kernel stack.
        task_stack,
        /// `sizeof(union thread_union)`: the size of a kernel stack.
        thread_size,
        /// `sizeof(struct pt_regs)`: the structure at the top of a task's kernel stack during a system call.
        pt_regs_size,
        /// The system call number in `struct pt_regs`: `orig_ax` on x86-64, `syscallno` on arm64.
        pt_regs_syscall,
    }
}

offsets! {
    /// Where a program on a kernel function finds arguments and results, in bytes from the start of its
    /// context.
    ArgumentOffsets {
        /// Result of `inet_csk_accept()`: the accepted `struct sock`.
        accept_result,
        /// `tcp_reset(sk)`.
        reset_sk,
        /// `tcp_reset(skb)`: the packet with the RST; not an argument before 5.15.
        reset_skb,
        /// `tcp_finish_connect(sk)`: the socket that connects.
        connect_sk,
        /// `tcp_finish_connect(skb)`: the SYN-ACK, or null.
        connect_skb,
        /// `tcp_child_process(child)`: the socket that a listener has just created.
        child_sk,
        /// `tcp_child_process(skb)`: the packet that completed the handshake.
        child_skb,
    }
}

offsets! {
    /// Where a classic tracepoint's record keeps its fields, from tracefs' `format` file. Two shapes exist
    /// for addresses: separate members, or a `sockaddr` for each end (`tcp_send_reset` from 6.10 on).
    RecordOffsets {
        /// The socket's address in the kernel, u64; may be 0 in `tcp_send_reset`.
        skaddr,
        /// The packet's address in the kernel, u64; may be 0.
        skbaddr,
        /// `inet_sock_set_state` only: int.
        oldstate,
        /// `inet_sock_set_state` only: int.
        newstate,
        /// `inet_sock_set_state` only: u16, `IPPROTO_*`.
        protocol,
        /// `tcp_send_reset` only: `enum sk_rst_reason`.
        reason,
        /// Local port, host order u16.
        sport,
        /// Remote port, host order u16.
        dport,
        /// Address family, u16.
        family,
        /// Local IPv6 address, 16 bytes; IPv4-mapped for an IPv4 socket.
        saddr_v6,
        /// Remote IPv6 address, 16 bytes.
        daddr_v6,
        /// Local end as a `sockaddr_in` or `sockaddr_in6`.
        local_sockaddr,
        /// Remote end, in the same form.
        remote_sockaddr,
        /// `sched_process_fork` only: the new task's thread id, int.
        child_pid,
        /// Always [`ABSENT`]: makes the size a multiple of 8.
        reserved,
        /// Always [`ABSENT`].
        reserved2,
    }
}

offsets! {
    /// What shows whether the current task reads a BPF iterator.
    IteratorOffsets {
        /// Number of the system call `read`.
        read,
        /// The place in a task's registers of the first argument of its system call.
        argument,
        /// `file.f_op`, a pointer.
        file_op,
    }
}

offsets! {
    /// Where the kernel keeps a process's ids in each pid namespace. All are [`ABSENT`] where tcpclose runs
    /// in the initial pid namespace, so that nothing is looked up there.
    NamespaceOffsets {
        /// `task_struct.thread_pid`, a pointer to a `struct pid`.
        thread_pid,
        /// `pid.level`, u32: the depth of the pid namespace that the process was created in.
        pid_level,
        /// `pid.numbers`, an array of `struct upid` with one element for each level.
        pid_numbers,
    }
}

// Programs keep a copy on their stack. LLVM copies whole words, and kernels before 6.3 refuse to read stack
// bytes that were never written, such as those after the last member.
const _: () = assert!(size_of::<RecordOffsets>().is_multiple_of(8));
