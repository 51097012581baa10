//! What a socket can be told about itself, and asked.

use std::{net::TcpStream, os::fd::AsRawFd};

use anyhow::Result;
use nix::{
    errno::Errno,
    libc,
    sys::socket::{setsockopt, sockopt},
};

use crate::{Peer, Words};

impl Peer {
    /// Obeys an order that has to do with options of sockets.
    pub(crate) fn obey_about_options(&mut self, verb: &str, mut words: Words) -> Result<String> {
        match verb {
            // Connections become sockets only when data comes, or when so many seconds are over.
            "defer-accept" => set_tcp_option(self.listener()?, libc::TCP_DEFER_ACCEPT, words.next()?)?,
            "accept-fast" => set_tcp_option(self.listener()?, libc::TCP_FASTOPEN, words.next()?)?,
            "cookie" => return Ok(format!("cookie={}", cookie(self.socket()?)?)),
            "next-sequence" => return Ok(format!("sequence={}", next_sequence(self.socket()?)?)),
            "linger0" => linger(self.socket()?, 0)?,
            "linger" => linger(self.socket()?, words.next()?)?,
            // What tcp(7) calls the lifetime of orphaned sockets in FIN_WAIT2, in seconds.
            "fin-wait2" => set_tcp_option(self.socket()?, libc::TCP_LINGER2, words.next()?)?,
            "repair" => set_tcp_option(self.socket()?, libc::TCP_REPAIR, 1)?,
            "keepalive" => self.keep_alive(&mut words)?,
            "user-timeout" => setsockopt(self.socket()?, sockopt::TcpUserTimeout, &words.next()?)?,
            _ => return self.obey_about_kin(verb, words),
        }
        Ok(String::new())
    }

    /// Probes after so many idle seconds, so many seconds apart, so many of them.
    fn keep_alive(&self, words: &mut Words) -> Result<()> {
        let socket = self.socket()?;
        setsockopt(socket, sockopt::TcpKeepIdle, &words.next()?)?;
        setsockopt(socket, sockopt::TcpKeepInterval, &words.next()?)?;
        setsockopt(socket, sockopt::TcpKeepCount, &words.next()?)?;
        Ok(setsockopt(socket, sockopt::KeepAlive, &true)?)
    }
}

/// Has `close()` wait so many seconds for the peer, or not at all but reset the connection.
pub(crate) fn linger(socket: &TcpStream, seconds: libc::c_int) -> Result<()> {
    Ok(setsockopt(socket, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: seconds })?)
}

/// Sets an option of TCP's own that is a number.
fn set_tcp_option(socket: &impl AsRawFd, option: libc::c_int, value: libc::c_int) -> Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&value))?;
    // SAFETY: the kernel reads as many bytes of the number as it has.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, (&raw const value).cast(), length)
    };
    Errno::result(result)?;
    Ok(())
}

/// The kernel's number for this socket; asking for it is what gives it one.
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

/// The sequence number of what this socket would send next, as programs that move connections to other hosts read it
/// (`TCP_REPAIR`, tcp(7)).
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
