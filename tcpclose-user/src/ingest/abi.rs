//! System calls of programs that do not use the native table: 32-bit programs on a 64-bit kernel (i386,
//! arm32), and x32.

use tcpclose_common::record::syscall::{COMPAT, SOCKETCALL_SHIFT};

/// The number in the native table of the system call that `number` stands for ([`RawTask::syscall`]). Only
/// calls that are relevant here are translated; others get a number that the native table does not have.
///
/// [`RawTask::syscall`]: tcpclose_common::record::RawTask::syscall
pub(super) fn native(number: i32) -> i64 {
    let known = if number & COMPAT != 0 {
        let call = (number & !COMPAT) >> SOCKETCALL_SHIFT;
        compat(number & 0x3ff, call)
    } else {
        x32(number)
    };
    known.unwrap_or(number.into())
}

/// <https://elixir.bootlin.com/linux/v6.12/source/arch/x86/entry/syscalls/syscall_32.tbl>
#[cfg(target_arch = "x86_64")]
fn compat(number: i32, call: i32) -> Option<i64> {
    Some(match number {
        4 => libc::SYS_write,
        6 => libc::SYS_close,
        11 => libc::SYS_execve,
        63 => libc::SYS_dup2,
        // socketcall(): include/uapi/linux/net.h.
        102 => match call {
            3 => libc::SYS_connect,
            9 | 11 => libc::SYS_sendto,
            13 => libc::SYS_shutdown,
            16 => libc::SYS_sendmsg,
            20 => libc::SYS_sendmmsg,
            _ => return None,
        },
        146 => libc::SYS_writev,
        330 => libc::SYS_dup3,
        345 => libc::SYS_sendmmsg,
        358 => libc::SYS_execveat,
        362 => libc::SYS_connect,
        369 => libc::SYS_sendto,
        370 => libc::SYS_sendmsg,
        373 => libc::SYS_shutdown,
        425 => libc::SYS_io_uring_setup,
        426 => libc::SYS_io_uring_enter,
        436 => libc::SYS_close_range,
        _ => return None,
    })
}

/// <https://elixir.bootlin.com/linux/v6.12/source/arch/arm/tools/syscall.tbl>
#[cfg(target_arch = "aarch64")]
fn compat(number: i32, _: i32) -> Option<i64> {
    Some(match number {
        4 => libc::SYS_write,
        6 => libc::SYS_close,
        11 => libc::SYS_execve,
        // dup2(), which the native table does not have.
        63 | 358 => libc::SYS_dup3,
        146 => libc::SYS_writev,
        283 => libc::SYS_connect,
        290 => libc::SYS_sendto,
        293 => libc::SYS_shutdown,
        296 => libc::SYS_sendmsg,
        374 => libc::SYS_sendmmsg,
        387 => libc::SYS_execveat,
        425 => libc::SYS_io_uring_setup,
        426 => libc::SYS_io_uring_enter,
        436 => libc::SYS_close_range,
        _ => return None,
    })
}

/// x32 programs use the native numbers with a bit of their own, and different ones for calls with pointers in
/// memory:
/// <https://elixir.bootlin.com/linux/v6.12/source/arch/x86/entry/syscalls/syscall_64.tbl>
fn x32(number: i32) -> Option<i64> {
    const X32: i32 = 1 << 30;
    if number < 0 || number & X32 == 0 {
        return None;
    }
    Some(match number & !X32 {
        516 => libc::SYS_writev,
        518 => libc::SYS_sendmsg,
        520 => libc::SYS_execve,
        538 => libc::SYS_sendmmsg,
        545 => libc::SYS_execveat,
        number => number.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn native_numbers_stay() {
        for number in [libc::SYS_close, libc::SYS_shutdown, libc::SYS_close_range] {
            assert_eq!(native(i32::try_from(number).expect("small")), number);
        }
        assert_eq!(native(-1), -1);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn numbers_of_i386_and_x32() {
        let socketcall = |call: i32| 102 + COMPAT + (call << SOCKETCALL_SHIFT);
        for (number, expected) in [
            (6 + COMPAT, libc::SYS_close),
            (373 + COMPAT, libc::SYS_shutdown),
            (63 + COMPAT, libc::SYS_dup2),
            (436 + COMPAT, libc::SYS_close_range),
            (11 + COMPAT, libc::SYS_execve),
            (socketcall(13), libc::SYS_shutdown),
            (socketcall(3), libc::SYS_connect),
            ((1 << 30) + 3, libc::SYS_close),
            ((1 << 30) + 520, libc::SYS_execve),
        ] {
            assert_eq!(native(number), expected, "{number:#x}");
        }
        // getpid() of i386 has the number of writev() in the native table.
        assert_ne!(native(20 + COMPAT), libc::SYS_writev);
    }
}
