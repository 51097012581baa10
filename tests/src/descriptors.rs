//! Which processes have a descriptor: passing one to another process, and keeping them from all others.

use std::{
    cell::Cell,
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use anyhow::{Context, Result, bail};
use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
};

/// Keeps the descriptors that this thread opens from now on out of processes that other threads start. Such a
/// process has copies of this process's descriptors from fork until exec; if it is the last one that closes a
/// connection, the tool rightly reports it as the one that ended it.
///
/// A test calls it before it opens anything: the thread then has a descriptor table of its own, with the
/// standard streams only. Further calls of the same thread do nothing.
pub fn keep_to_this_thread() -> Result<()> {
    thread_local! { static DONE: Cell<bool> = const { Cell::new(false) } }
    if !DONE.replace(true) {
        // SAFETY: the call copies the descriptor table without the entries from 3 on, and closes nothing in
        // the table of the other threads. Nothing that this thread owns has a descriptor yet.
        let result =
            unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE) };
        Errno::result(result).map_err(io::Error::from)?;
    }
    Ok(())
}

/// Sends a copy of a descriptor over a unix socket.
pub fn send(channel: &impl AsRawFd, descriptor: &impl AsRawFd) -> Result<()> {
    let descriptors = [descriptor.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(channel.as_raw_fd(), &[IoSlice::new(b".")], &rights, MsgFlags::empty(), None)?;
    Ok(())
}

/// Receives a descriptor; `None` if the channel is closed.
pub fn receive(channel: &impl AsRawFd) -> Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = cmsg_space!([i32; 1]);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(channel.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    if message.bytes == 0 {
        return Ok(None);
    }
    match message.cmsgs()?.next().context("no descriptor came")? {
        ControlMessageOwned::ScmRights(descriptors) if descriptors.len() == 1 => {
            // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
            Ok(Some(unsafe { OwnedFd::from_raw_fd(descriptors[0]) }))
        }
        other => bail!("{other:?} came"),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::fs::MetadataExt as _,
        sync::mpsc,
        thread,
    };

    use super::*;

    /// The inode that a descriptor of the calling thread leads to.
    fn inode(descriptor: i32) -> Option<u64> {
        fs::metadata(format!("/proc/thread-self/fd/{descriptor}")).ok().map(|found| found.ino())
    }

    #[test]
    fn other_threads_do_not_have_what_this_one_opens() {
        let ((ask, asked), (answer, answered)) = (mpsc::channel(), mpsc::channel());
        let other = thread::spawn(move || asked.iter().try_for_each(|it| answer.send(inode(it))));
        let this = thread::spawn(move || {
            keep_to_this_thread().unwrap();
            let file = File::open("/proc/self/exe").unwrap();
            keep_to_this_thread().unwrap();
            let own = inode(file.as_raw_fd());
            assert_eq!(own, Some(file.metadata().unwrap().ino()));
            ask.send(file.as_raw_fd()).unwrap();
            assert_ne!(answered.recv().unwrap(), own);
        });
        this.join().unwrap();
        other.join().unwrap().unwrap();
    }
}
