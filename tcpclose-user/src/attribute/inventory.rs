//! Runs the kernel half's look at all descriptors (`hooks/inventory.rs` there). What it finds arrives in the table of
//! connections and as records in the ring.

use std::io;

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, RawTracePointRunOptions, TestRun as _,
    programs::{Iter, RawTracePoint},
};

use super::pace::Pace;
use crate::kernel::privilege;

/// Name of the program.
pub const PROGRAM: &str = "inventory";

/// Name of the program that looks at one socket.
pub const LOOK: &str = "look";

/// See the module.
pub struct Inventory {
    /// Also keeps the other programs attached.
    ebpf: Ebpf,
    works: bool,
    /// The iterator shows the processes of the pid namespace that it is read in.
    host_pids: bool,
    pace: Pace,
}

impl Inventory {
    /// Of the loaded object; `works` says whether the program could be loaded.
    pub fn new(ebpf: Ebpf, works: bool) -> Self {
        Self { ebpf, works, host_pids: privilege::in_initial_pid_namespace(), pace: Pace::default() }
    }

    /// Whether this kernel lets it run.
    pub fn works(&self) -> bool {
        self.works
    }

    /// Whether a look shows every process of the host.
    pub fn sees_all(&self) -> bool {
        self.works && self.host_pids
    }

    /// Notes every TCP socket that is open now. In two passes, because which side of a connection this is depends on
    /// whether there is a listener, and that may come later in the order of processes.
    pub fn take_stock(&mut self) {
        for _ in 0..2 {
            if self.works {
                self.pass();
            }
        }
    }

    /// Looks for the owners of sockets that ended without a known one. Says whether it did: not every time, if it takes
    /// long on this host.
    pub fn find_owners(&mut self) -> bool {
        let mut pace = self.pace;
        let looked = self.works && pace.look(|| self.pass()).is_some();
        self.pace = pace;
        looked
    }

    /// Has the kernel half look at the socket at `sk`, if it lingers still, and have the inventory tell of its holders in
    /// the pass `pass`. Says whether it could.
    pub fn look(&mut self, sk: u64, pass: u16) -> bool {
        let result = look(&self.ebpf, sk, pass);
        if let Err(error) = &result {
            log::warn!("cannot look at a socket: {error:#}");
        }
        result.is_ok()
    }

    /// Looks at all descriptors for the holders of what was looked at.
    pub fn tell_holders(&mut self) {
        if self.works {
            self.pass();
        }
    }

    fn pass(&mut self) {
        if let Err(error) = run(&mut self.ebpf) {
            log::warn!("cannot look at all descriptors, will not try again: {error:#}");
            self.works = false;
        }
    }
}

fn look(ebpf: &Ebpf, sk: u64, pass: u16) -> Result<()> {
    let program: &RawTracePoint = ebpf.program(LOOK).context("the object has no such program")?.try_into()?;
    let mut options = RawTracePointRunOptions::new();
    options.args[..2].copy_from_slice(&[sk, u64::from(pass)]);
    program.test_run(options)?;
    Ok(())
}

/// The program runs once a descriptor while its file is read, which has no content.
fn run(ebpf: &mut Ebpf) -> Result<()> {
    let program: &mut Iter =
        ebpf.program_mut(PROGRAM).context("the object has no such program")?.try_into()?;
    let link = program.attach().context("cannot attach the iterator")?;
    let mut file = program.take_link(link)?.into_file().context("cannot open the iterator")?;
    io::copy(&mut file, &mut io::sink()).context("cannot run the iterator")?;
    Ok(())
}
