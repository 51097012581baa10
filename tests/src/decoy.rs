//! A process that has the pid of another process, but in a different pid namespace.

use std::{
    fs::{self, File},
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sched::{CloneFlags, setns};

/// Number of attempts: another process may take the pid first.
const ATTEMPTS: usize = 20;

/// A shell that waits for input; killed on drop.
#[derive(Debug)]
pub struct Decoy(Child);

impl Decoy {
    /// Starts a decoy in the pid namespace of `neighbour`, with this pid there.
    pub fn start(neighbour: u32, pid: u32) -> Result<Self> {
        let namespace = File::open(format!("/proc/{neighbour}/ns/pid"))?;
        // `setns()` to a pid namespace does not move the caller; it affects only the later children of this
        // thread.
        thread::scope(|scope| {
            let moved = scope.spawn(|| {
                setns(&namespace, CloneFlags::CLONE_NEWPID)?;
                (0..ATTEMPTS)
                    .find_map(|_| attempt(pid).transpose())
                    .unwrap_or_else(|| bail!("it has another number"))
            });
            moved.join().map_err(|_| anyhow!("the thread that starts a decoy panicked"))?
        })
    }
}

fn attempt(pid: u32) -> Result<Option<Decoy>> {
    let last = pid.checked_sub(1).context("pid 0 does not exist")?;
    let order = format!("echo {last} > /proc/sys/kernel/ns_last_pid");
    ensure!(Command::new("sh").args(["-c", &order]).status()?.success(), "`{order}` failed");
    let decoy = Decoy(Command::new("sh").stdin(Stdio::piped()).spawn()?);
    let status = fs::read_to_string(format!("/proc/{}/status", decoy.0.id()))?;
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).context("no NSpid")?;
    let has_it = numbers.split_whitespace().last() == Some(&pid.to_string());
    Ok(has_it.then_some(decoy))
}

impl Drop for Decoy {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
