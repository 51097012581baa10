//! What this host's kernel shows to no BPF program.
//!
//! A virtual machine may be run by an agent of its host, as pid 1, whose threads the kernel keeps BPF programs away
//! from. What a softirq does while one of them is interrupted is then seen by no program; the kernel's own event ring
//! sees it, and is what tells of it here. On a host without such an agent nothing is ever forgiven for it: only
//! what lacks in the tool's output is compared with this.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{features::Feature, unique_name};

/// The events that end a connection.
const EVENTS: [&str; 4] =
    ["sock/inet_sock_set_state", "tcp/tcp_receive_reset", "tcp/tcp_send_reset", "tcp/tcp_destroy_sock"];

/// Listens to the kernel's event ring, in an instance of its own, while threads of pid 1 run.
#[derive(Debug)]
pub struct Blind {
    mounted: PathBuf,
    instance: PathBuf,
}

/// What happened while a thread of pid 1 ran.
#[derive(Debug)]
pub struct Seen {
    /// How much, in any namespace.
    pub events: usize,
    /// RSTs sent.
    pub resets: usize,
    /// The connections whose state changed, as local and remote end.
    pub connections: BTreeSet<(SocketAddr, SocketAddr)>,
}

/// Attempts something; once more, if it failed and something happened that no program can have seen.
pub fn excused(attempt: impl Fn() -> Result<()>) -> Result<()> {
    // Where there is no event ring to listen to, there is no excuse; nor where pid 1 is the tests' own.
    if Feature::OwnMachine.is_here() {
        return attempt();
    }
    let Ok(blind) = Blind::watch() else { return attempt() };
    let Err(error) = attempt() else { return Ok(()) };
    let seen = blind.seen()?;
    if seen.events == 0 {
        return Err(error);
    }
    println!("once more, since {seen:?} happened where the kernel may run no BPF program: {error:#}");
    attempt()
}

impl Blind {
    /// From now on.
    pub fn watch() -> Result<Self> {
        let mounted = std::env::temp_dir().join(unique_name());
        fs::create_dir(&mounted)?;
        let nothing = None::<&str>;
        mount(Some("tracefs"), &mounted, Some("tracefs"), MsFlags::empty(), nothing)
            .context("mounting tracefs")?;
        let instance = mounted.join("instances").join(unique_name());
        let blind = Self { mounted, instance };
        fs::create_dir(&blind.instance).context("making an instance of the event ring")?;
        let mut pids = String::new();
        for thread in fs::read_dir("/proc/1/task")? {
            pids.push_str(&thread?.file_name().to_string_lossy());
            pids.push(' ');
        }
        blind.set("options/event-fork", "1")?;
        blind.set("set_event_pid", &pids)?;
        for event in EVENTS {
            blind.set(&format!("events/{event}/enable"), "1")?;
        }
        Ok(blind)
    }

    /// What happened.
    pub fn seen(&self) -> Result<Seen> {
        let events = fs::read_to_string(self.instance.join("trace"))?;
        let events = events.lines().filter(|line| !line.starts_with('#'));
        let resets = events.clone().filter(|line| line.contains("tcp_send_reset:")).count();
        Ok(Seen { events: events.clone().count(), resets, connections: events.filter_map(ends).collect() })
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.instance.join(file);
        fs::write(&path, value).with_context(|| format!("writing {value} to {}", path.display()))
    }
}

impl Drop for Blind {
    fn drop(&mut self) {
        for event in EVENTS {
            let _ = self.set(&format!("events/{event}/enable"), "0");
        }
        let _ = fs::remove_dir(&self.instance);
        let _ = umount2(&self.mounted, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.mounted);
    }
}

/// Both ends of the connection that a line of the event ring is about.
fn ends(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    let value =
        |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let address = |name: &str| value(name)?.parse::<IpAddr>().ok();
    let port = |name: &str| value(name)?.parse::<u16>().ok();
    Some(((address("saddr")?, port("sport")?).into(), (address("daddr")?, port("dport")?).into()))
}

#[cfg(test)]
mod tests {
    use super::ends;

    #[test]
    fn reads_a_line() {
        let line = "  agent-70 [001] ..s2. 1321.932031: inet_sock_set_state: family=AF_INET \
                    protocol=IPPROTO_TCP sport=10722 dport=40153 saddr=127.0.2.1 daddr=127.0.1.1 \
                    saddrv6=::ffff:127.0.2.1 daddrv6=::ffff:127.0.1.1 oldstate=TCP_FIN_WAIT1 newstate=TCP_FIN_WAIT2";
        let expected = ("127.0.2.1:10722".parse().unwrap(), "127.0.1.1:40153".parse().unwrap());
        assert_eq!(ends(line), Some(expected));
        assert_eq!(ends("# tracer: nop"), None);
    }
}
