//! Which members of which kernel structs the programs read, looked up in BTF.

use std::fmt;

use nix::unistd::{SysconfVar, sysconf};
use tcpclose_common::offsets::{ABSENT, StructOffsets};

use super::btf::{Absent, Btf};

/// Something that [`StructOffsets`] has a field for and this kernel's BTF has not, or not in a form the programs
/// can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The field of [`StructOffsets`] that stays [`ABSENT`].
    pub field: &'static str,
    /// What was looked for, such as `sock.sk_lock.owned`.
    pub path: &'static str,
    /// Why it cannot be used.
    pub why: Absent,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.why)
    }
}

/// A row of the table: field, path, size in bytes that the programs read.
pub(super) type Row = (&'static str, fn(&mut StructOffsets) -> &mut u16, &'static str, u64);

macro_rules! rows {
    ($($field:ident = $path:literal, $size:literal;)*) => {
        &[$((stringify!($field), |offsets| &mut offsets.$field, $path, $size)),*]
    };
}

pub(super) const MEMBERS: &[Row] = rows! {
    sk_family = "sock.__sk_common.skc_family", 2;
    sk_state = "sock.__sk_common.skc_state", 1;
    sk_rcv_saddr = "sock.__sk_common.skc_rcv_saddr", 4;
    sk_daddr = "sock.__sk_common.skc_daddr", 4;
    sk_v6_rcv_saddr = "sock.__sk_common.skc_v6_rcv_saddr", 16;
    sk_v6_daddr = "sock.__sk_common.skc_v6_daddr", 16;
    sk_num = "sock.__sk_common.skc_num", 2;
    sk_sport = "inet_sock.inet_sport", 2;
    sk_dport = "sock.__sk_common.skc_dport", 2;
    sk_net = "sock.__sk_common.skc_net.net", 8;
    sk_flags = "sock.__sk_common.skc_flags", 8;
    sk_cookie = "sock.__sk_common.skc_cookie", 8;
    sk_protocol = "sock.sk_protocol", 2;
    sk_err = "sock.sk_err", 4;
    sk_shutdown = "sock.sk_shutdown", 1;
    sk_lingertime = "sock.sk_lingertime", 8;
    sk_lock_owned = "sock.sk_lock.owned", 4;
    sk_socket = "sock.sk_socket", 8;
    // `struct sock` is the first member of `inet_sock`, that of `inet_connection_sock`, and that of `tcp_sock`:
    // https://elixir.bootlin.com/linux/v6.12/source/include/linux/tcp.h
    icsk_lrcvtime = "inet_connection_sock.icsk_ack.lrcvtime", 4;
    icsk_user_timeout = "inet_connection_sock.icsk_user_timeout", 4;
    tcp_lsndtime = "tcp_sock.lsndtime", 4;
    tcp_bytes_received = "tcp_sock.bytes_received", 8;
    tcp_bytes_sent = "tcp_sock.bytes_sent", 8;
    tcp_bytes_retrans = "tcp_sock.bytes_retrans", 8;
    tcp_total_retrans = "tcp_sock.total_retrans", 4;
    tcp_srtt_us = "tcp_sock.srtt_us", 4;
    tcp_rcv_nxt = "tcp_sock.rcv_nxt", 4;
    tcp_copied_seq = "tcp_sock.copied_seq", 4;
    tcp_write_seq = "tcp_sock.write_seq", 4;
    tcp_snd_una = "tcp_sock.snd_una", 4;
    tcp_linger2 = "tcp_sock.linger2", 4;
    net_inum = "net.ns.inum", 4;
    skb_head = "sk_buff.head", 8;
    skb_network_header = "sk_buff.network_header", 2;
    skb_transport_header = "sk_buff.transport_header", 2;
    skb_dev = "sk_buff.dev", 8;
    dev_net = "net_device.nd_net.net", 8;
    task_pid = "task_struct.pid", 4;
    task_tgid = "task_struct.tgid", 4;
    task_comm = "task_struct.comm", 16;
    task_cred = "task_struct.real_cred", 8;
    cred_uid = "cred.uid", 4;
    task_files = "task_struct.files", 8;
    files_fdt = "files_struct.fdt", 8;
    fdtable_fd = "fdtable.fd", 8;
    file_inode = "file.f_inode", 8;
    file_private = "file.private_data", 8;
    inode_mode = "inode.i_mode", 2;
    socket_sk = "socket.sk", 8;
    iter_task = "bpf_iter__task_file.task", 8;
    iter_fd = "bpf_iter__task_file.fd", 4;
    iter_file = "bpf_iter__task_file.file", 8;
    task_flags = "task_struct.flags", 4;
    task_exit_code = "task_struct.exit_code", 4;
    task_mm = "task_struct.mm", 8;
    task_stack = "task_struct.stack", 8;
};

/// Looks up everything in [`StructOffsets`].
///
/// Never fails: what is not there, or has another shape than the programs expect, is [`ABSENT`] in the first result
/// and in the second with the reason.
pub fn struct_offsets(btf: &Btf<'_>) -> (StructOffsets, Vec<Missing>) {
    let mut offsets = StructOffsets::ABSENT;
    let mut missing = Vec::new();
    let mut put = |field, slot: &mut u16, path, value: Result<u64, Absent>| {
        let value = value.and_then(|bytes| match u16::try_from(bytes) {
            Ok(fits) if fits != ABSENT => Ok(fits),
            _ => Err(Absent::TooFar(bytes)),
        });
        match value {
            Ok(value) => *slot = value,
            Err(why) => missing.push(Missing { field, path, why }),
        }
    };

    for &(field, slot, path, size) in MEMBERS {
        put(field, slot(&mut offsets), path, sized(btf, path, size));
    }
    put("socket_inode", &mut offsets.socket_inode, "socket_alloc.vfs_inode.i_ino", socket_inode(btf));
    put("thread_size", &mut offsets.thread_size, "union thread_union", thread_size(btf));
    put(
        "pt_regs_size",
        &mut offsets.pt_regs_size,
        "struct pt_regs",
        btf.size_of("pt_regs").ok_or(Absent::NoType),
    );
    // x86-64 and arm64; there is no other kernel with either name in its `pt_regs`.
    let syscall = sized(btf, "pt_regs.orig_ax", 8).or_else(|_| sized(btf, "pt_regs.syscallno", 4));
    put("pt_regs_syscall", &mut offsets.pt_regs_syscall, "pt_regs.orig_ax or pt_regs.syscallno", syscall);
    (offsets, missing)
}

fn sized(btf: &Btf<'_>, path: &str, expected: u64) -> Result<u64, Absent> {
    let place = btf.member(path)?;
    if place.size == expected { Ok(place.offset) } else { Err(Absent::Size { found: place.size, expected }) }
}

/// A socket and its inode are allocated together, and `SOCK_INODE()` goes from one to the other:
/// <https://elixir.bootlin.com/linux/v6.12/source/include/net/sock.h>
fn socket_inode(btf: &Btf<'_>) -> Result<u64, Absent> {
    let inode = sized(btf, "socket_alloc.vfs_inode.i_ino", 8)?;
    let socket = btf.member("socket_alloc.socket")?.offset;
    inode.checked_sub(socket).ok_or(Absent::NoMember)
}

/// The kernel only ever declares `union thread_union`, so BTF mostly has no entry for it. x86 gives its interrupt
/// stacks the same size as its thread stacks, `PAGE_SIZE << (2 + KASAN_STACK_ORDER)`, and those are in BTF:
/// <https://elixir.bootlin.com/linux/v6.12/source/arch/x86/include/asm/page_64_types.h>
fn thread_size(btf: &Btf<'_>) -> Result<u64, Absent> {
    let described = btf.size_of("thread_union").or_else(|| btf.size_of("irq_stack"));
    described.or_else(|| thread_size_of_arm64(btf)).ok_or(Absent::NoType)
}

/// `1 << MIN_THREAD_SHIFT`, which no type of arm64 has. Stacks are larger with KASAN, and where a page is larger than
/// this. It only matters before 5.15, where the programs have to find a task's registers themselves:
/// <https://elixir.bootlin.com/linux/v5.10/source/arch/arm64/include/asm/memory.h>
fn thread_size_of_arm64(btf: &Btf<'_>) -> Option<u64> {
    const SIZE: u64 = 1 << 14;
    let is_arm64 = btf.member("pt_regs.syscallno").is_ok();
    let has_kasan = btf.size_of("kasan_cache").is_some();
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten()?;
    (is_arm64 && !has_kasan && u64::try_from(page).is_ok_and(|page| page <= SIZE)).then_some(SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::FIXTURES;

    /// What the fixtures, in their order, must give. Checked against the whole BTF of each kernel as pahole 1.24 shows
    /// it (`pahole -E -C tcp_sock`), and for 6.18 also against what libbpf 1.1 put into relocations of the same
    /// members, running on it.
    const EXPECTED: [(&str, [u16; 6]); 60] = [
        //                    5.10  6.1   6.12  arm64 6.18  7.2
        ("sk_family", [16, 16, 16, 16, 16, 16]),
        ("sk_state", [18, 18, 18, 18, 18, 18]),
        ("sk_rcv_saddr", [4, 4, 4, 4, 4, 4]),
        ("sk_daddr", [0, 0, 0, 0, 0, 0]),
        ("sk_v6_rcv_saddr", [72, 72, 72, 72, 72, 72]),
        ("sk_v6_daddr", [56, 56, 56, 56, 56, 56]),
        ("sk_num", [14, 14, 14, 14, 14, 14]),
        ("sk_sport", [776, 804, 798, 798, 814, 830]),
        ("sk_dport", [12, 12, 12, 12, 12, 12]),
        ("sk_net", [48, 48, 48, 48, 48, 48]),
        ("sk_flags", [96, 96, 96, 96, 96, 96]),
        ("sk_cookie", [88, 88, 88, 88, 88, 88]),
        ("sk_protocol", [540, 516, 574, 574, 532, 540]),
        ("sk_err", [568, 544, 284, 284, 284, 284]),
        ("sk_shutdown", [626, 610, 571, 571, 575, 591]),
        ("sk_lingertime", [544, 520, 576, 576, 576, 592]),
        ("sk_lock_owned", [140, 156, 324, 324, 324, 320]),
        ("sk_socket", [640, 624, 288, 288, 288, 288]),
        ("socket_inode", [192, 192, 192, 192, 192, 192]),
        ("icsk_lrcvtime", [1248, 1264, 1264, 1264, 1264, 1296]),
        ("icsk_user_timeout", [1280, 1292, 1292, 1292, 1292, 1324]),
        ("tcp_lsndtime", [1472, 1480, 1644, 1644, 1584, 1676]),
        ("tcp_bytes_received", [1400, 1408, 1784, 1784, 1752, 1864]),
        ("tcp_bytes_sent", [1440, 1448, 1608, 1608, 1544, 1616]),
        ("tcp_bytes_retrans", [2088, 2096, 2208, 2208, 2192, 2296]),
        ("tcp_total_retrans", [2096, 2104, 2216, 2216, 2200, 2304]),
        ("tcp_srtt_us", [1624, 1632, 1728, 1728, 1680, 1784]),
        ("tcp_rcv_nxt", [1416, 1424, 1712, 1712, 1664, 1768]),
        ("tcp_copied_seq", [1420, 1428, 1472, 1472, 1464, 1504]),
        ("tcp_write_seq", [1804, 1812, 1636, 1636, 1576, 1668]),
        ("tcp_snd_una", [1460, 1468, 1720, 1720, 1672, 1776]),
        ("tcp_linger2", [2112, 2120, 2244, 2244, 2228, 2332]),
        ("net_inum", [136, 144, 136, 136, 176, 280]),
        ("skb_head", [192, 200, 200, 200, 192, 200]),
        ("skb_network_header", [180, 184, 184, 184, 180, 184]),
        ("skb_transport_header", [178, 182, 182, 182, 178, 182]),
        ("skb_dev", [16, 16, 16, 16, 16, 16]),
        ("dev_net", [1264, 1272, 280, 280, 264, 264]),
        ("task_pid", [2232, 2416, 2432, 1376, 1264, 2808]),
        ("task_tgid", [2236, 2420, 2436, 1380, 1268, 2812]),
        ("task_comm", [2736, 2976, 2976, 1920, 1752, 3344]),
        ("task_cred", [2712, 2952, 2952, 1896, 1728, 3320]),
        ("cred_uid", [8, 8, 8, 8, 8, 8]),
        ("task_files", [2808, 3048, 3048, 1992, 1824, 3416]),
        ("files_fdt", [32, 32, 32, 32, 32, 32]),
        ("fdtable_fd", [8, 8, 8, 8, 8, 8]),
        ("file_inode", [32, 32, 40, 40, 32, 32]),
        ("file_private", [200, 200, 32, 32, 24, 24]),
        ("inode_mode", [0, 0, 0, 0, 0, 0]),
        ("socket_sk", [24, 24, 24, 24, 24, 24]),
        ("iter_task", [8, 8, 8, 8, 8, 8]),
        ("iter_fd", [16, 16, 16, 16, 16, 16]),
        ("iter_file", [24, 24, 24, 24, 24, 24]),
        ("task_flags", [36, 44, 44, 44, 44, 44]),
        ("task_exit_code", [2136, 2312, 2332, 1276, 1164, 2708]),
        ("task_mm", [2056, 2272, 2304, 1248, 1136, 2680]),
        ("task_stack", [24, 32, 32, 32, 32, 32]),
        ("thread_size", [16384, 16384, 16384, 16384, 16384, 16384]),
        ("pt_regs_size", [168, 168, 168, 336, 168, 168]),
        ("pt_regs_syscall", [120, 120, 120, 280, 120, 120]),
    ];

    #[test]
    fn offsets_of_each_kernel() {
        for (column, (kernel, bytes)) in FIXTURES.into_iter().enumerate() {
            let (offsets, missing) = struct_offsets(&Btf::parse(bytes).unwrap());
            for ((field, found), (expected_field, expected)) in offsets.named().into_iter().zip(EXPECTED) {
                assert_eq!((field, found), (expected_field, expected[column]), "{kernel}");
            }
            assert_eq!(missing, [], "{kernel}");
        }
    }

    #[test]
    fn empty_btf_lacks_everything() {
        // A header and nothing else.
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&[0x9f, 0xeb, 1, 0, 24, 0, 0, 0]);
        let (offsets, missing) = struct_offsets(&Btf::parse(&bytes).unwrap());
        assert_eq!(offsets, StructOffsets::ABSENT);
        let mut fields: Vec<_> = missing.iter().map(|missing| missing.field).collect();
        let mut all = offsets.named().map(|(field, _)| field);
        fields.sort_unstable();
        all.sort_unstable();
        assert_eq!(fields, all);
    }

    #[test]
    fn other_sizes_are_missing() {
        let btf = Btf::parse(FIXTURES[4].1).unwrap();
        assert_eq!(sized(&btf, "sock.sk_err", 2), Err(Absent::Size { found: 4, expected: 2 }));
        assert_eq!(sized(&btf, "sock.sk_kern_sock", 1), Err(Absent::BitField));
    }
}
