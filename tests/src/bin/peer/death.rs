//! Cases in which a connection loses its process, or is closed by a task other than the one that opened it.

use std::{
    fs,
    os::fd::{AsRawFd, OwnedFd},
    sync::mpsc,
    thread,
};

use anyhow::{Result, anyhow, ensure};
use nix::{
    libc,
    sys::{
        prctl,
        signal::{self, SaFlags, SigAction, SigHandler, SigSet, Signal},
    },
    unistd::{ForkResult, fork, getpid, gettid, pause, pipe, read, write},
};

use crate::calls;

/// Dies of a signal that it raises itself.
pub(crate) fn raise(name: Signal) -> Result<()> {
    // Rust's runtime handles SIGSEGV, and a raised one has no faulting instruction to return to.
    // SAFETY: the default action is no handler.
    unsafe { signal::signal(name, SigHandler::SigDfl) }?;
    Ok(signal::raise(name)?)
}

/// Handles a signal as a program that cleans up first: by sending it to itself, with the default action.
pub(crate) fn send_on(name: Signal) -> Result<()> {
    extern "C" fn handler(number: libc::c_int) {
        // SAFETY: `raise()` may be called in a handler.
        unsafe { libc::raise(number) };
    }
    let action = SigAction::new(SigHandler::Handler(handler), SaFlags::SA_RESETHAND, SigSet::empty());
    // SAFETY: the handler calls nothing but `raise()`.
    unsafe { signal::sigaction(name, &action) }?;
    Ok(())
}

/// Dies of a signal in a thread that has its own name, when the main thread has exited.
pub(crate) fn die_in_thread(name: Signal) -> Result<()> {
    let main = format!("/proc/self/task/{}/stat", getpid());
    thread::Builder::new().name("peer-last".to_owned()).spawn(move || {
        while !fs::read_to_string(&main).is_ok_and(|stat| stat.contains(") Z ")) {
            thread::yield_now();
        }
        signal::kill(getpid(), name)
    })?;
    // SAFETY: the thread that is left uses nothing of this one.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    Ok(())
}

/// Closes the socket on a thread that has its own name.
pub(crate) fn close_on_thread(socket: OwnedFd) -> Result<String> {
    let closer = thread::Builder::new().name("peer-thread".to_owned()).spawn(|| {
        calls::peer_closes_socket_outer(socket)?;
        Ok(format!("tid={} name=peer-thread", gettid()))
    })?;
    closer.join().map_err(|_| anyhow!("the thread panicked"))?
}

/// Closes the socket while another thread waits in it for data. That thread holds the socket until data
/// arrives.
pub(crate) fn close_under_receive(socket: OwnedFd) -> Result<String> {
    let descriptor = socket.as_raw_fd();
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new().name("peer-reader".to_owned()).spawn(move || {
        sender.send(gettid())?;
        calls::peer_receives_outer(descriptor, &mut [0; 1000])?;
        anyhow::Ok(())
    })?;
    let reader = receiver.recv()?;
    let waits_in = format!("/proc/self/task/{reader}/syscall");
    while !fs::read_to_string(&waits_in)?.starts_with(&format!("{} ", libc::SYS_recvfrom)) {
        thread::yield_now();
    }
    calls::peer_closes_socket_outer(socket)?;
    Ok(format!("tid={reader} name=peer-reader"))
}

/// Closes the socket here first and then in a child, whose close is the final one. The child and its parent
/// continue to run, so that `/proc` can be read.
pub(crate) fn close_in_child(socket: OwnedFd) -> Result<String> {
    let (waiting, closing) = pipe()?;
    let (waiting_for_child, done) = pipe()?;
    // SAFETY: this process has one thread, so the child is not restricted to async-signal-safe functions.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(closing);
            let _ = prctl::set_pdeathsig(Signal::SIGKILL);
            // The read ends when the parent has closed its copies of everything.
            let closed = read(&waiting, &mut [0]).and_then(|_| calls::peer_closes_socket_outer(socket));
            let _ = write(&done, &[u8::from(closed.is_ok())]);
            loop {
                pause();
            }
        }
        ForkResult::Parent { child } => {
            drop((socket, closing, done));
            let mut closed = [0];
            read(&waiting_for_child, &mut closed)?;
            ensure!(closed == [1], "the child could not close");
            Ok(format!("child={child}"))
        }
    }
}
