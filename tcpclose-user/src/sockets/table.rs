//! Reads the TCP sockets of a network namespace from `/proc/PID/net/tcp` and `tcp6` of a process in it. It is
//! used for namespaces that may not be entered, and on kernels without `sock_diag`; these files contain fewer
//! facts.

use procfs::{ProcError, ProcResult, net::TcpNetEntry, process::Process};

use super::{diag::endpoint, entry::ListedSocket};
use crate::event::State;

/// Calls `each` for every TCP socket, listeners first.
///
/// # Errors
/// The process has ended, or this user may not read it.
pub fn read(pid: u32, mut each: impl FnMut(ListedSocket)) -> ProcResult<()> {
    let process = Process::new(i32::try_from(pid).map_err(|_| ProcError::NotFound(None))?)?;
    let mut sockets = process.tcp()?;
    match process.tcp6() {
        Ok(more) => sockets.extend(more),
        // A kernel without IPv6.
        Err(ProcError::NotFound(_)) => {}
        Err(error) => return Err(error),
    }
    let (listeners, others): (Vec<_>, Vec<_>) =
        sockets.iter().filter_map(entry).partition(|entry| entry.state == State::Listen);
    listeners.into_iter().chain(others).for_each(&mut each);
    Ok(())
}

fn entry(socket: &TcpNetEntry) -> Option<ListedSocket> {
    let state = State::from_kernel(socket.state.to_u8())?;
    Some(ListedSocket {
        state,
        local: endpoint(socket.local_address),
        remote: endpoint(socket.remote_address),
        inode: socket.inode,
        recv_queue: socket.rx_queue,
        send_queue: None,
        is_remnant: socket.inode == 0 && matches!(state, State::TimeWait | State::FinWait2),
        cookie: None,
        info: None,
    })
}
