//! The members of kernel structs that the programs read, and their offsets according to BTF.

use std::fmt;

use nix::unistd::{SysconfVar, sysconf};
use tcpclose_common::offsets::{ABSENT, IteratorOffsets, NamespaceOffsets, StructOffsets};

use super::btf::{Absent, Btf};

/// A field of [`StructOffsets`] for which BTF has no member, or one that the programs cannot read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The field of [`StructOffsets`], which stays [`ABSENT`].
    pub field: &'static str,
    /// What was looked up, such as `sock.sk_lock.owned`.
    pub path: &'static str,
    /// Why it cannot be used.
    pub why: Absent,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.why)
    }
}

/// The type of a member, as far as it matters to the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// An integer of one byte.
    U8,
    /// An integer of two bytes.
    U16,
    /// An integer of four bytes, or an enum.
    U32,
    /// An integer of eight bytes.
    U64,
    /// A pointer.
    Pointer,
    /// An array of this many characters.
    Bytes(u8),
    /// A struct of this size in bytes, read as a whole, such as `kuid_t`.
    Struct(u8),
}

impl Shape {
    /// The size in bytes.
    pub fn size(self) -> u64 {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::U32 => 4,
            Self::U64 | Self::Pointer => 8,
            Self::Bytes(size) | Self::Struct(size) => size.into(),
        }
    }
}

/// A member that is looked up in BTF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The name of the struct and the names of the members on the way, such as `sock.sk_lock.owned`.
    pub path: &'static str,
    /// Its type.
    pub shape: Shape,
}

/// Every member that is looked up on any kernel. The fixtures' `members.c` is generated from this list.
pub fn members() -> impl Iterator<Item = Member> {
    let in_table = MEMBERS.iter().map(|row| row.member);
    in_table.chain([SOCKET, SOCKET_INODE]).chain(SYSCALL)
}

/// One row of the table of members.
struct MemberRow {
    /// The name of the field of [`StructOffsets`], and how to reach it.
    field: &'static str,
    slot: fn(&mut StructOffsets) -> &mut u16,
    member: Member,
}

macro_rules! rows {
    ($($field:ident = $path:literal, $shape:expr;)*) => {{
        #[allow(clippy::enum_glob_use, reason = "the rows are a table of shapes")]
        use Shape::*;
        &[$(MemberRow {
            field: stringify!($field),
            slot: |offsets| &mut offsets.$field,
            member: Member { path: $path, shape: $shape },
        }),*]
    }};
}

/// The members whose offset is the field of [`StructOffsets`] as it is. The others are below.
const MEMBERS: &[MemberRow] = rows! {
    sk_family = "sock.__sk_common.skc_family", U16;
    sk_state = "sock.__sk_common.skc_state", U8;
    sk_rcv_saddr = "sock.__sk_common.skc_rcv_saddr", U32;
    sk_daddr = "sock.__sk_common.skc_daddr", U32;
    sk_v6_rcv_saddr = "sock.__sk_common.skc_v6_rcv_saddr", Struct(16);
    sk_v6_daddr = "sock.__sk_common.skc_v6_daddr", Struct(16);
    sk_num = "sock.__sk_common.skc_num", U16;
    sk_sport = "inet_sock.inet_sport", U16;
    sk_dport = "sock.__sk_common.skc_dport", U16;
    sk_net = "sock.__sk_common.skc_net.net", Pointer;
    sk_flags = "sock.__sk_common.skc_flags", U64;
    sk_cookie = "sock.__sk_common.skc_cookie", Struct(8);
    sk_protocol = "sock.sk_protocol", U16;
    sk_err = "sock.sk_err", U32;
    sk_shutdown = "sock.sk_shutdown", U8;
    sk_lingertime = "sock.sk_lingertime", U64;
    sk_lock_owned = "sock.sk_lock.owned", U32;
    sk_socket = "sock.sk_socket", Pointer;
    // `struct sock` is the first member of `inet_sock`, which is the first of `inet_connection_sock`, which
    // is the first of `tcp_sock`:
    // https://elixir.bootlin.com/linux/v6.12/source/include/linux/tcp.h
    icsk_lrcvtime = "inet_connection_sock.icsk_ack.lrcvtime", U32;
    icsk_user_timeout = "inet_connection_sock.icsk_user_timeout", U32;
    tcp_lsndtime = "tcp_sock.lsndtime", U32;
    tcp_bytes_received = "tcp_sock.bytes_received", U64;
    tcp_bytes_sent = "tcp_sock.bytes_sent", U64;
    tcp_bytes_retrans = "tcp_sock.bytes_retrans", U64;
    tcp_total_retrans = "tcp_sock.total_retrans", U32;
    tcp_srtt_us = "tcp_sock.srtt_us", U32;
    tcp_rcv_nxt = "tcp_sock.rcv_nxt", U32;
    tcp_copied_seq = "tcp_sock.copied_seq", U32;
    tcp_write_seq = "tcp_sock.write_seq", U32;
    tcp_snd_una = "tcp_sock.snd_una", U32;
    tcp_snd_nxt = "tcp_sock.snd_nxt", U32;
    icsk_probes_out = "inet_connection_sock.icsk_probes_out", U8;
    tcp_linger2 = "tcp_sock.linger2", U32;
    net_inum = "net.ns.inum", U32;
    skb_head = "sk_buff.head", Pointer;
    skb_network_header = "sk_buff.network_header", U16;
    skb_transport_header = "sk_buff.transport_header", U16;
    skb_dev = "sk_buff.dev", Pointer;
    dev_net = "net_device.nd_net.net", Pointer;
    task_pid = "task_struct.pid", U32;
    task_tgid = "task_struct.tgid", U32;
    task_group_leader = "task_struct.group_leader", Pointer;
    task_comm = "task_struct.comm", Bytes(16);
    task_cred = "task_struct.real_cred", Pointer;
    cred_uid = "cred.uid", Struct(4);
    task_files = "task_struct.files", Pointer;
    files_fdt = "files_struct.fdt", Pointer;
    fdtable_fd = "fdtable.fd", Pointer;
    file_inode = "file.f_inode", Pointer;
    file_private = "file.private_data", Pointer;
    inode_mode = "inode.i_mode", U16;
    socket_sk = "socket.sk", Pointer;
    iter_task = "bpf_iter__task_file.task", Pointer;
    iter_fd = "bpf_iter__task_file.fd", U32;
    iter_file = "bpf_iter__task_file.file", Pointer;
    task_flags = "task_struct.flags", U32;
    task_exit_code = "task_struct.exit_code", U32;
    task_mm = "task_struct.mm", Pointer;
    task_stack = "task_struct.stack", Pointer;
};

/// The members of `struct socket_alloc`: a socket, and the inode of its descriptors.
const SOCKET: Member = Member { path: "socket_alloc.socket", shape: Shape::Struct(128) };
const SOCKET_INODE: Member = Member { path: "socket_alloc.vfs_inode.i_ino", shape: Shape::U64 };

/// The number of the system call in the registers of a task: on x86-64, and on arm64.
const SYSCALL: [Member; 2] = [
    Member { path: "pt_regs.orig_ax", shape: Shape::U64 },
    Member { path: "pt_regs.syscallno", shape: Shape::U32 },
];

/// Looks up every field of [`StructOffsets`].
///
/// A field stays [`ABSENT`] if BTF has no member for it, or one of another size than the programs read. The
/// second result lists these fields with the reasons.
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

    for MemberRow { field, slot, member } in MEMBERS {
        put(field, slot(&mut offsets), member.path, offset(btf, *member));
    }
    put("socket_inode", &mut offsets.socket_inode, SOCKET_INODE.path, socket_inode(btf));
    put("thread_size", &mut offsets.thread_size, "union thread_union", thread_size(btf));
    put(
        "pt_regs_size",
        &mut offsets.pt_regs_size,
        "struct pt_regs",
        btf.size_of("pt_regs").ok_or(Absent::NoType),
    );
    // The `pt_regs` of other architectures has neither name.
    let [x86_64, arm64] = SYSCALL;
    let syscall = offset(btf, x86_64).or_else(|_| offset(btf, arm64));
    put("pt_regs_syscall", &mut offsets.pt_regs_syscall, "pt_regs.orig_ax or pt_regs.syscallno", syscall);
    (offsets, missing)
}

/// Looks up every field of [`IteratorOffsets`]. If one is missing, all are.
pub fn iterator_offsets(btf: &Btf<'_>) -> IteratorOffsets {
    let offset = |path, shape| u16::try_from(offset(btf, Member { path, shape }).ok()?).ok();
    let found = || {
        Some(IteratorOffsets {
            read: u16::try_from(libc::SYS_read).ok()?,
            // On x86-64, and on arm64, where the register itself holds the result after the call.
            argument: offset("pt_regs.di", Shape::U64).or_else(|| offset("pt_regs.orig_x0", Shape::U64))?,
            file_op: offset("file.f_op", Shape::Pointer)?,
        })
    };
    found().unwrap_or(IteratorOffsets::ABSENT)
}

/// Looks up every field of [`NamespaceOffsets`]. If one is missing, all are.
pub fn namespace_offsets(btf: &Btf<'_>) -> NamespaceOffsets {
    let offset = |path, shape| u16::try_from(offset(btf, Member { path, shape }).ok()?).ok();
    let found = || {
        Some(NamespaceOffsets {
            thread_pid: offset("task_struct.thread_pid", Shape::Pointer)?,
            pid_level: offset("pid.level", Shape::U32)?,
            // It has been an array of no elements since 6.5, and had one element before.
            pid_numbers: u16::try_from(btf.member("pid.numbers").ok()?.offset).ok()?,
        })
    };
    found().unwrap_or(NamespaceOffsets::ABSENT)
}

/// The offset of a member that has the expected size.
fn offset(btf: &Btf<'_>, member: Member) -> Result<u64, Absent> {
    let (place, expected) = (btf.member(member.path)?, member.shape.size());
    if place.size == expected { Ok(place.offset) } else { Err(Absent::Size { found: place.size, expected }) }
}

/// The offset of the inode number from the socket. Both are allocated together, and `SOCK_INODE()` goes from
/// one to the other: <https://elixir.bootlin.com/linux/v6.12/source/include/net/sock.h>
fn socket_inode(btf: &Btf<'_>) -> Result<u64, Absent> {
    let inode = offset(btf, SOCKET_INODE)?;
    let socket = btf.member(SOCKET.path)?.offset;
    inode.checked_sub(socket).ok_or(Absent::NoMember)
}

/// The size of a kernel stack. Most BTF does not describe `union thread_union`, because the kernel only
/// declares it. On x86 the interrupt stacks, which BTF describes, have the same size, `PAGE_SIZE << (2 +
/// KASAN_STACK_ORDER)`: <https://elixir.bootlin.com/linux/v6.12/source/arch/x86/include/asm/page_64_types.h>
fn thread_size(btf: &Btf<'_>) -> Result<u64, Absent> {
    let described = btf.size_of("thread_union").or_else(|| btf.size_of("irq_stack"));
    described.or_else(|| thread_size_of_arm64(btf)).ok_or(Absent::NoType)
}

/// `1 << MIN_THREAD_SHIFT`, which occurs in no type of arm64. Stacks are larger with KASAN, and where pages
/// are larger than this. The size only matters before 5.15, where the programs have to find a task's
/// registers themselves: <https://elixir.bootlin.com/linux/v5.10/source/arch/arm64/include/asm/memory.h>
fn thread_size_of_arm64(btf: &Btf<'_>) -> Option<u64> {
    const SIZE: u64 = 1 << 14;
    let [_, syscall] = SYSCALL;
    let is_arm64 = btf.member(syscall.path).is_ok();
    let has_kasan = btf.size_of("kasan_cache").is_some();
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten()?;
    (is_arm64 && !has_kasan && u64::try_from(page).is_ok_and(|page| page <= SIZE)).then_some(SIZE)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::kernel::FIXTURES;

    /// The offsets in the fixtures, in their order. They were compared with what pahole 1.24 shows for the
    /// whole BTF of each kernel (`pahole -E -C tcp_sock`), and for 6.18 also with what libbpf 1.1, running on
    /// it, put into relocations of the same members.
    const EXPECTED: [(&str, [u16; 6]); 63] = [
        //                    5.10  6.1   6.12  arm64 6.18  7.2
        ("sk_family", [16, 16, 16, 16, 16, 16]),
        ("sk_state", [18, 18, 18, 18, 18, 18]),
        ("sk_rcv_saddr", [4, 4, 4, 4, 4, 4]),
        ("sk_daddr", [0, 0, 0, 0, 0, 0]),
        ("sk_v6_rcv_saddr", [72, 72, 72, 72, 72, 72]),
        ("sk_v6_daddr", [56, 56, 56, 56, 56, 56]),
        ("sk_num", [14, 14, 14, 14, 14, 14]),
        ("sk_sport", [776, 804, 806, 806, 814, 830]),
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
        ("icsk_lrcvtime", [1248, 1264, 1312, 1312, 1264, 1296]),
        ("icsk_user_timeout", [1280, 1292, 1340, 1340, 1292, 1324]),
        ("tcp_lsndtime", [1472, 1480, 1644, 1644, 1584, 1676]),
        ("tcp_bytes_received", [1400, 1408, 1784, 1784, 1752, 1864]),
        ("tcp_bytes_sent", [1440, 1448, 1608, 1608, 1544, 1616]),
        ("tcp_bytes_retrans", [2088, 2096, 2208, 2208, 2192, 2296]),
        ("tcp_total_retrans", [2096, 2104, 2216, 2216, 2200, 2304]),
        ("tcp_srtt_us", [1624, 1632, 1728, 1728, 1680, 1784]),
        ("tcp_rcv_nxt", [1416, 1424, 1712, 1712, 1664, 1768]),
        ("tcp_copied_seq", [1420, 1428, 1520, 1520, 1464, 1504]),
        ("tcp_write_seq", [1804, 1812, 1636, 1636, 1576, 1668]),
        ("tcp_snd_una", [1460, 1468, 1720, 1720, 1672, 1776]),
        ("tcp_snd_nxt", [1428, 1436, 1716, 1716, 1668, 1772]),
        ("icsk_probes_out", [1229, 1245, 1293, 1293, 1253, 1285]),
        ("tcp_linger2", [2112, 2120, 2244, 2244, 2228, 2332]),
        ("net_inum", [136, 144, 136, 136, 176, 280]),
        ("skb_head", [192, 200, 200, 200, 192, 200]),
        ("skb_network_header", [180, 184, 184, 184, 180, 184]),
        ("skb_transport_header", [178, 182, 182, 182, 178, 182]),
        ("skb_dev", [16, 16, 16, 16, 16, 16]),
        ("dev_net", [1264, 1272, 280, 280, 264, 264]),
        ("task_pid", [2232, 2416, 2432, 1376, 1264, 2808]),
        ("task_tgid", [2236, 2420, 2436, 1380, 1268, 2812]),
        ("task_group_leader", [2296, 2480, 2496, 1440, 1328, 2872]),
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
        // Only a header.
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
        let offset = |path, shape| offset(&btf, Member { path, shape });
        assert_eq!(offset("sock.sk_err", Shape::U16), Err(Absent::Size { found: 4, expected: 2 }));
        assert_eq!(offset("sock.sk_kern_sock", Shape::U8), Err(Absent::BitField));
    }

    /// A reduced BTF made from these members contains everything that is looked up.
    #[test]
    fn members_are_those_of_the_fixtures() {
        let types: Vec<_> = FIXTURES.iter().map(|(_, bytes)| Btf::parse(bytes).unwrap()).collect();
        for member in members() {
            // A kernel has one of the two names of the system call's number.
            let has = |btf: &&Btf<'_>| btf.member(member.path).is_ok();
            let found = types.iter().filter(has).count();
            let expected = match member.path {
                "pt_regs.orig_ax" => 5,
                "pt_regs.syscallno" => 1,
                _ => FIXTURES.len(),
            };
            assert_eq!(found, expected, "{}", member.path);
        }
        let paths: BTreeSet<_> = members().map(|member| member.path).collect();
        assert_eq!(paths.len(), members().count(), "a member is there twice");
    }
}
