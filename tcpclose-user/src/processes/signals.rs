//! The sender of the signal that ended a process.

use anyhow::Result;
use aya::maps::{HashMap, MapData};
use tcpclose_common::record::Signal;

use super::LocalPid;
use crate::{event::SignalFrom, ingest::life::name, kernel::handle::KernelHalf};

/// The kernel half's table of the last signal sent to each process that may have killed it.
pub struct Signals(HashMap<MapData, u32, Signal>);

impl Signals {
    /// Takes the map that it needs from the kernel half.
    ///
    /// # Errors
    /// The object has no such map.
    pub fn new(kernel: &mut KernelHalf) -> Result<Self> {
        Ok(Self(kernel.take_map("SIGNALS")?))
    }

    /// Who sent signal `number` to process `pid`, which died of it. `None` if that was not seen, or if no
    /// process sent it. `local_pid` returns the id that a process has in the pid namespace of tcpclose.
    pub fn from(&self, pid: u32, number: i32, local_pid: impl FnOnce(u32) -> LocalPid) -> Option<SignalFrom> {
        let signal = self.0.get(&pid, 0).ok()?;
        sender(&signal, number, local_pid(signal.pid))
    }
}

fn sender(signal: &Signal, number: i32, local: LocalPid) -> Option<SignalFrom> {
    if i64::from(signal.number) != i64::from(number) {
        return None;
    }
    if signal.oom != 0 {
        return Some(SignalFrom::Kernel { oom: true });
    }
    (signal.pid != 0).then(|| SignalFrom::Process {
        pid: local.of(signal.pid),
        host_pid: Some(signal.pid),
        comm: name(&signal.comm),
        uid: signal.uid,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_signal_counts_if_it_is_the_one() {
        let mut comm = [0; 16];
        comm[..4].copy_from_slice(b"bash");
        let by_bash = Signal { at: 1, number: 9, pid: 7, uid: 1000, oom: 0, comm };
        let expected =
            SignalFrom::Process { pid: Some(7), host_pid: Some(7), comm: "bash".to_owned(), uid: 1000 };
        assert_eq!(sender(&by_bash, 9, LocalPid::Same), Some(expected));
        assert_eq!(sender(&by_bash, 15, LocalPid::Same), None, "another signal killed it");
        let by_kernel = Signal { pid: 0, comm: [0; 16], ..by_bash };
        assert_eq!(sender(&by_kernel, 9, LocalPid::Same), None);
        let oom = Signal { oom: 1, ..by_kernel };
        assert_eq!(sender(&oom, 9, LocalPid::Same), Some(SignalFrom::Kernel { oom: true }));
    }
}
