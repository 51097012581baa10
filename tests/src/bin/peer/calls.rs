//! The system calls that open and close a socket, each inside two nested functions with recognisable names.
//!
//! Two are needed because the C library's wrapper of a system call sets up no frame: a frame-pointer walk
//! from there misses the function that called the wrapper, and finds the one above it. Tests look for the
//! name that ends in `_outer`.

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

/// Defines a function and an outer function around it that has a frame: the code after the call prevents a
/// tail call.
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

    /// `sendto()` with `MSG_FASTOPEN`, which connects and sends the data with the SYN.
    peer_connects_fast_outer >
    peer_connects_fast(socket: &TcpStream, to: SocketAddr, data: &[u8]) -> nix::Result<usize> {
        let to = SockaddrStorage::from(to);
        socket::sendto(socket.as_raw_fd(), data, &to, MsgFlags::from_bits_retain(libc::MSG_FASTOPEN))
    }

    /// `accept4()`.
    peer_accepts_socket_outer > peer_accepts_socket(listener: &TcpListener) -> nix::Result<TcpStream> {
        let socket = socket::accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
        Ok(unsafe { TcpStream::from_raw_fd(socket) })
    }

    /// `recvfrom()` on a descriptor that may be closed in the meantime. It is a raw system call, because in a
    /// multi-threaded process the C library's wrapper calls a function that cannot be unwound.
    peer_receives_outer > peer_receives(descriptor: RawFd, buffer: &mut [u8]) -> nix::Result<()> {
        let (start, length) = (buffer.as_mut_ptr(), buffer.len());
        let no_address = ptr::null_mut::<libc::c_void>();
        // SAFETY: the buffer is valid for the given length during the call, and no sender address is
        // requested.
        let result = unsafe {
            libc::syscall(libc::SYS_recvfrom, descriptor, start, length, 0, no_address, no_address)
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

    /// `connect()` with `AF_UNSPEC`, which dissolves a connection.
    peer_disconnects_socket_outer > peer_disconnects_socket(socket: &TcpStream) -> nix::Result<()> {
        let descriptor = socket.as_raw_fd();
        let unspecified = libc::sockaddr { sa_family: UNSPECIFIED, sa_data: [0; 14] };
        // SAFETY: the address is valid for the given length during the call.
        let result = unsafe { libc::connect(descriptor, &raw const unspecified, NOWHERE_LENGTH) };
        Errno::result(result).map(drop)
    }

    /// `dup2()` of standard error over the socket.
    peer_replaces_socket_outer > peer_replaces_socket(socket: OwnedFd) -> nix::Result<()> {
        let descriptor: RawFd = socket.into_raw_fd();
        // SAFETY: only this function has the descriptor, and afterwards its number belongs to a copy of
        // standard error.
        let result = unsafe { libc::dup2(libc::STDERR_FILENO, descriptor) };
        Errno::result(result).map(drop)
    }

    /// `close_range()` of a range that contains only the socket.
    peer_closes_range_outer > peer_closes_range(socket: OwnedFd) -> nix::Result<()> {
        let descriptor: RawFd = socket.into_raw_fd();
        // SAFETY: only this function has the descriptor, and the range contains no other.
        let result = unsafe { libc::syscall(libc::SYS_close_range, descriptor, descriptor, 0) };
        Errno::result(result).map(drop)
    }
}
