//! Reads the facts about a process as soon as the kernel half reports it for the first time.
//!
//! This runs in a thread of its own: a command such as curl exits a millisecond after it has closed its
//! socket, and the main loop may need longer than that to symbolize the stack of another one.

use std::{
    io,
    os::fd::AsFd as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use anyhow::Result;
use aya::maps::{MapData, RingBuf};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::{
    failure::Failure,
    ingest::{
        decode::{NewProcess, Record, decode},
        life::name,
    },
    processes::{self, Processes},
    sandbox,
    stacks::interpreters::{self, Interpreters},
};

/// Notices that could not be decoded.
static UNDECODABLE: AtomicU64 = AtomicU64::new(0);

/// How many notices could not be decoded so far.
pub fn undecodable() -> u64 {
    UNDECODABLE.load(Ordering::Relaxed)
}

/// Starts the thread. With `restrict`, it gives up the privileges that it does not need. It runs until this
/// process exits.
///
/// # Errors
/// The thread cannot be started.
pub fn start(
    mut ring: RingBuf<MapData>,
    processes: Arc<Mutex<Processes>>,
    interpreters: Option<interpreters::SharedInterpreters>,
    restrict: bool,
) -> Result<()> {
    let watch = move || {
        hurry();
        if restrict && let Err(error) = sandbox::enter() {
            log::warn!("a thread continues with all its privileges: {error:#}");
        }
        loop {
            let noticed = drain(&mut ring, &processes);
            if let Some(interpreters) = &interpreters {
                describe(&noticed, &processes, interpreters);
            }
            let mut wanted = [PollFd::new(ring.as_fd(), PollFlags::POLLIN)];
            match poll(&mut wanted, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => {
                    log::warn!("cannot wait for new processes any more: {}", io::Error::from(error));
                    return;
                }
            }
        }
    };
    let thread = thread::Builder::new().name("watch".to_owned()).spawn(watch);
    thread.map_err(|error| Failure::no_thread(&error))?;
    Ok(())
}

/// Raises the priority of this thread: it races against processes that exit, and needs a fraction of a
/// millisecond for each new one. Without the privilege (`CAP_SYS_NICE`) the priority stays, and the race is
/// lost more often.
fn hurry() {
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: the call reads one structure, which is valid; 0 is the calling thread.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &raw const priority) } != 0 {
        log::debug!("cannot raise a thread's priority: {}", io::Error::last_os_error());
    }
}

/// Returns the processes that were noticed and have an `mm_struct`.
fn drain(ring: &mut RingBuf<MapData>, processes: &Mutex<Processes>) -> Vec<(u32, u64)> {
    let mut noticed = Vec::new();
    while let Some(item) = ring.next() {
        match decode(&item) {
            Ok(Record::Process(NewProcess { pid, local, mm, comm })) => {
                let named = Some(name(&comm)).filter(|name| !name.is_empty());
                processes::lock(processes).notice_as(pid, local, mm, named);
                if mm != 0 {
                    noticed.push((pid, mm));
                }
            }
            Ok(_) | Err(_) => {
                UNDECODABLE.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    noticed
}

/// Describes interpreters of processes that were noticed, before these close a socket. It comes after all
/// have been noticed, because others may be about to exit.
fn describe(noticed: &[(u32, u64)], processes: &Mutex<Processes>, interpreters: &Mutex<Interpreters>) {
    for &(pid, mm) in noticed {
        let Some(image) = processes::lock(processes).image(pid, mm) else { continue };
        if let Err(error) = interpreters::lock(interpreters).noticed((pid, mm), &image) {
            log::debug!("{error:#}; another attempt follows with the first stack of process {pid}");
        }
    }
}
