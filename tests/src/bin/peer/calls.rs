//! The calls that open and close a socket, each under two functions of recognisable names.
//!
//! Two, because the C library's wrapper of a system call sets up no frame: whoever walks frame pointers from
//! there misses the function that called the wrapper and finds the one above it. Tests look for the name that
//! ends in `_outer`.

use std::{
    hint::black_box,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
    ptr,
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{self, MsgFlags, Shutdown, SockFlag, SockaddrStorage},
    unistd,
};

/// `AF_UNSPEC`, and the length of an address of that family, in the types that `connect()` takes.
const UNSPECIFIED: libc::sa_family_t = 0;
const NOWHERE_LENGTH: libc::socklen_t = 16;

/// Defines a function and, around it, another that leaves a frame: what follows the call keeps it from being
/// a jump.
macro_rules! two_frames {
    ($(
        $(#[$doc:meta])*
        $outer:ident > $inner:ident($argument:ident: $what:ty $(, $more:ident: $kind:ty)*) -> $result:ty
            $body:block
    )*) => {$(
        $(#[$doc])*
        #[inline(never)]
        pub(crate) fn $outer($argument: $what $(, $more: $kind)*) -> $result {
            let result = $inner($argument $(, $more)*);
            black_box(&result);
            result
        }

        #[inline(never)]
        fn $inner($argument: $what $(, $more: $kind)*) -> $result $body
    )*};
}

two_frames! {
    /// `connect()`.
    peer_connects_socket_outer > peer_connects_socket(socket: &TcpStream, to: SocketAddr) -> nix::Result<()> {
        socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(to))
    }

    /// `sendto()` that connects as well, and sends the data with the SYN.
    peer_connects_fast_outer > peer_connects_fast(socket: &TcpStream, to: SocketAddr, data: &[u8]) -> nix::Result<usize> {
        let to = SockaddrStorage::from(to);
        socket::sendto(socket.as_raw_fd(), data, &to, MsgFlags::from_bits_retain(libc::MSG_FASTOPEN))
    }

    /// `accept4()`.
    peer_accepts_socket_outer > peer_accepts_socket(listener: &TcpListener) -> nix::Result<TcpStream> {
        let socket = socket::accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: the kernel has just made this descriptor and nothing else has it.
        Ok(unsafe { TcpStream::from_raw_fd(socket) })
    }

    /// `recvfrom()` of a descriptor that may be closed meanwhile. The C library's own wrapper would do in a
    /// process of many threads what nobody can walk through.
    peer_receives_outer > peer_receives(descriptor: RawFd, buffer: &mut [u8]) -> nix::Result<()> {
        let (start, length) = (buffer.as_mut_ptr(), buffer.len());
        let nobody = ptr::null_mut::<libc::c_void>();
        // SAFETY: the buffer is alive through the call and as long as said; no sender's address is asked for.
        let result = unsafe {
            libc::syscall(libc::SYS_recvfrom, descriptor, start, length, 0, nobody, nobody)
        };
        Errno::result(result).map(drop)
    }

    /// `close()`.
    peer_closes_socket_outer > peer_closes_socket(socket: OwnedFd) -> nix::Result<()> {
        unistd::close(socket)
    }

    /// `shutdown()`.
    peer_shuts_socket_outer > peer_shuts_socket(socket: &TcpStream, how: Shutdown) -> nix::Result<()> {
        socket::shutdown(socket.as_raw_fd(), how)
    }

    /// `connect()` to no address at all, which dissolves a connection.
    peer_disconnects_socket_outer > peer_disconnects_socket(socket: &TcpStream) -> nix::Result<()> {
        let descriptor = socket.as_raw_fd();
        let nowhere = libc::sockaddr { sa_family: UNSPECIFIED, sa_data: [0; 14] };
        // SAFETY: the address is alive through the call and as long as said.
        let result = unsafe { libc::connect(descriptor, &raw const nowhere, NOWHERE_LENGTH) };
        Errno::result(result).map(drop)
    }

    /// `dup2()` of standard error over the socket.
    peer_replaces_socket_outer > peer_replaces_socket(socket: OwnedFd) -> nix::Result<()> {
        let descriptor: RawFd = socket.into_raw_fd();
        // SAFETY: the number is this function's alone, and stays so: it belongs to a copy of standard error
        // afterwards.
        let result = unsafe { libc::dup2(libc::STDERR_FILENO, descriptor) };
        Errno::result(result).map(drop)
    }

    /// `close_range()` of a range that holds the socket alone.
    peer_closes_range_outer > peer_closes_range(socket: OwnedFd) -> nix::Result<()> {
        let descriptor: RawFd = socket.into_raw_fd();
        // SAFETY: the number is this function's alone, and the range holds no other.
        let result = unsafe { libc::syscall(libc::SYS_close_range, descriptor, descriptor, 0) };
        Errno::result(result).map(drop)
    }
}
