//! Descriptors passed from one process to another.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use anyhow::{Context, Result, bail};
use nix::{
    cmsg_space,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
};

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
