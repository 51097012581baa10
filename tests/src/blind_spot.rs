//! The kernel's blind spot on this host: what happens while a thread of pid 1 is current.
//!
//! Some virtual machines are controlled by an agent that runs as pid 1 and whose threads the kernel runs no
//! BPF program for. If a softirq interrupts such a thread and ends a connection, no BPF program sees it.
//! Ftrace does, so this module records the events of pid 1's threads with an ftrace instance of its own. On a
//! host without such an agent it records nothing, and nothing is excused.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::unique_name;

/// The tracepoints that report the end of a connection.
const EVENTS: [&str; 4] =
    ["sock/inet_sock_set_state", "tcp/tcp_receive_reset", "tcp/tcp_send_reset", "tcp/tcp_destroy_sock"];

/// An end of a connection: its local and its remote address.
pub type EndAddresses = (SocketAddr, SocketAddr);

/// An ftrace instance that records the threads of pid 1; removed on drop.
#[derive(Debug)]
pub struct BlindSpot {
    mounted: PathBuf,
    instance: PathBuf,
}

/// What happened while a thread of pid 1 was current, in all network namespaces.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Hidden {
    /// Number of events.
    pub events: usize,
    /// The ends that an event was about.
    pub ends: BTreeSet<EndAddresses>,
    /// The RSTs sent, by source and destination.
    pub resets: Vec<EndAddresses>,
}

impl BlindSpot {
    /// Starts recording.
    pub fn watch() -> Result<Self> {
        let mounted = std::env::temp_dir().join(unique_name());
        fs::create_dir(&mounted)?;
        let nothing = None::<&str>;
        mount(Some("tracefs"), &mounted, Some("tracefs"), MsFlags::empty(), nothing)
            .context("mounting tracefs")?;
        let instance = mounted.join("instances").join(unique_name());
        let blind_spot = Self { mounted, instance };
        fs::create_dir(&blind_spot.instance).context("making an ftrace instance")?;
        let mut pids = String::new();
        for thread in fs::read_dir("/proc/1/task")? {
            pids.push_str(&thread?.file_name().to_string_lossy());
            pids.push(' ');
        }
        blind_spot.set("options/event-fork", "1")?;
        blind_spot.set("set_event_pid", &pids)?;
        for event in EVENTS {
            blind_spot.set(&format!("events/{event}/enable"), "1")?;
        }
        Ok(blind_spot)
    }

    /// What has been recorded so far.
    pub fn hidden(&self) -> Result<Hidden> {
        Ok(parse(&fs::read_to_string(self.instance.join("trace"))?))
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.instance.join(file);
        fs::write(&path, value).with_context(|| format!("writing {value} to {}", path.display()))
    }
}

impl Drop for BlindSpot {
    fn drop(&mut self) {
        for event in EVENTS {
            let _ = self.set(&format!("events/{event}/enable"), "0");
        }
        let _ = fs::remove_dir(&self.instance);
        let _ = umount2(&self.mounted, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.mounted);
    }
}

/// Parses the text of an ftrace buffer.
fn parse(trace: &str) -> Hidden {
    let mut hidden = Hidden::default();
    for line in trace.lines().filter(|line| !line.starts_with('#')) {
        hidden.events += 1;
        let Some(end) = end(line) else { continue };
        hidden.ends.insert(end);
        if line.contains("tcp_send_reset:") {
            hidden.resets.push(end);
        }
    }
    hidden
}

/// The end that an event is about. `tcp_send_reset` has its own format.
fn end(event: &str) -> Option<EndAddresses> {
    let value =
        |name: &str| event.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    if let (Some(source), Some(destination)) = (value("src"), value("dest")) {
        return Some((source.parse().ok()?, destination.parse().ok()?));
    }
    let address = |name: &str| value(name)?.parse::<IpAddr>().ok();
    let port = |name: &str| value(name)?.parse::<u16>().ok();
    Some(((address("saddr")?, port("sport")?).into(), (address("daddr")?, port("dport")?).into()))
}

#[cfg(test)]
mod tests {
    use super::{Hidden, parse};

    #[test]
    fn reads_a_trace() {
        let trace = "# tracer: nop\n\
            \x20 agent-70 [001] ..s2. 1321.932031: inet_sock_set_state: family=AF_INET protocol=IPPROTO_TCP \
            sport=10722 dport=40153 saddr=127.0.2.1 daddr=127.0.1.1 saddrv6=::ffff:127.0.2.1 \
            daddrv6=::ffff:127.0.1.1 oldstate=TCP_FIN_WAIT1 newstate=TCP_FIN_WAIT2\n\
            \x20 agent-70 [001] ..s2. 1321.932032: tcp_send_reset: skbaddr=00000000d8c4d5a2 \
            skaddr=0000000000000000 src=127.0.1.1:7 dest=127.0.2.1:10723 state=UNKNOWN reason=NO_SOCKET\n";
        let end = |local: &str, remote: &str| (local.parse().unwrap(), remote.parse().unwrap());
        let reset = end("127.0.1.1:7", "127.0.2.1:10723");
        let ends = [end("127.0.2.1:10722", "127.0.1.1:40153"), reset].into();
        assert_eq!(parse(trace), Hidden { events: 2, ends, resets: vec![reset] });
    }
}
