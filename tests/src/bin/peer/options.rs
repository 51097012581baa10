//! Reading and setting socket options.

use std::{net::TcpStream, os::fd::AsRawFd};

use anyhow::Result;
use nix::{
    errno::Errno,
    libc,
    sys::socket::{setsockopt, sockopt},
};

use crate::{Peer, Words};

impl Peer {
    /// Executes an order about socket options.
    pub(crate) fn obey_about_options(&mut self, verb: &str, mut words: Words) -> Result<String> {
        match verb {
            // A connection becomes a socket only when data arrives, or after this many seconds.
            "defer-accept" => set_tcp_option(self.listener()?, libc::TCP_DEFER_ACCEPT, words.next()?)?,
            "accept-fast" => set_tcp_option(self.listener()?, libc::TCP_FASTOPEN, words.next()?)?,
            "cookie" => return Ok(format!("cookie={}", cookie(self.socket()?)?)),
            "next-sequence" => return Ok(format!("sequence={}", next_sequence(self.socket()?)?)),
            "linger0" => linger(self.socket()?, 0)?,
            "linger" => linger(self.socket()?, words.next()?)?,
            // The lifetime of orphaned sockets in FIN_WAIT2 (tcp(7)), in seconds.
            "fin-wait2" => set_tcp_option(self.socket()?, libc::TCP_LINGER2, words.next()?)?,
            "repair" => set_tcp_option(self.socket()?, libc::TCP_REPAIR, 1)?,
            "keepalive" => self.keep_alive(&mut words)?,
            "user-timeout" => setsockopt(self.socket()?, sockopt::TcpUserTimeout, &words.next()?)?,
            _ => return self.obey_about_kin(verb, words),
        }
        Ok(String::new())
    }

    /// Enables keepalive: the idle time, the interval in seconds, and the number of probes.
    fn keep_alive(&self, words: &mut Words) -> Result<()> {
        let socket = self.socket()?;
        setsockopt(socket, sockopt::TcpKeepIdle, &words.next()?)?;
        setsockopt(socket, sockopt::TcpKeepInterval, &words.next()?)?;
        setsockopt(socket, sockopt::TcpKeepCount, &words.next()?)?;
        Ok(setsockopt(socket, sockopt::KeepAlive, &true)?)
    }
}

/// Makes `close()` wait this many seconds for the peer; 0 makes it reset the connection at once.
pub(crate) fn linger(socket: &TcpStream, seconds: libc::c_int) -> Result<()> {
    Ok(setsockopt(socket, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: seconds })?)
}

/// Sets a numeric option of the TCP level.
fn set_tcp_option(socket: &impl AsRawFd, option: libc::c_int, value: libc::c_int) -> Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&value))?;
    // SAFETY: the kernel reads as many bytes as the number has.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, (&raw const value).cast(), length)
    };
    Errno::result(result)?;
    Ok(())
}

/// The kernel's cookie of this socket. The kernel assigns it when it is first requested.
fn cookie(socket: &TcpStream) -> Result<u64> {
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of_val(&cookie))?;
    // SAFETY: the kernel writes at most `length` bytes, all of them into `cookie`.
    let result = unsafe {
        let value = (&raw mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_COOKIE, value, &raw mut length)
    };
    Errno::result(result)?;
    Ok(cookie)
}

/// The sequence number of the next byte that this socket would send, read as programs that migrate
/// connections do (`TCP_REPAIR`, tcp(7)).
fn next_sequence(socket: &TcpStream) -> Result<u32> {
    const TCP_SEND_QUEUE: i32 = 2;
    const TCP_REPAIR_OFF_NO_WP: i32 = -1;
    set_tcp_option(socket, libc::TCP_REPAIR, 1)?;
    set_tcp_option(socket, libc::TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)?;
    let mut sequence = 0_u32;
    let mut length = libc::socklen_t::try_from(size_of_val(&sequence))?;
    // SAFETY: the kernel writes at most `length` bytes, all of them into `sequence`.
    let result = unsafe {
        let value = (&raw mut sequence).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ, value, &raw mut length)
    };
    Errno::result(result)?;
    set_tcp_option(socket, libc::TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)?;
    Ok(sequence)
}
