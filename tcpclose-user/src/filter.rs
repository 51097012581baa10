//! The user's filters. The kernel half applies those that it can decide; all of them are applied again here,
//! to the finished event.

use std::net::IpAddr;

use ipnet::IpNet;
use tcpclose_common::params::{MAX_FILTER_VALUES, Params, Range};

use crate::{
    cli::{EventKind, FilterArgs, Netns, SocketArgs},
    event::{Cause, Connection, Endpoint, Event, LingeringKind, Process},
    kernel::privilege,
};

/// The filters of one trace or list.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    args: FilterArgs,
    /// Inode numbers of the network namespaces of `--netns`; empty for all.
    netns: Vec<u32>,
}

impl From<SocketArgs> for Filter {
    fn from(socket: SocketArgs) -> Self {
        Self::new(FilterArgs { socket, ..FilterArgs::default() })
    }
}

impl Filter {
    /// Makes a filter of the options.
    pub fn new(args: FilterArgs) -> Self {
        let asked = &args.socket.netns;
        let inode = |netns: &Netns| match netns {
            Netns::Host => None,
            // No socket is in namespace 0, so nothing passes if this process's own namespace is not known.
            Netns::Own => Some(privilege::own_netns().unwrap_or(0)),
            Netns::Inode(inode) => Some(*inode),
        };
        let netns =
            if asked.contains(&Netns::Host) { Vec::new() } else { asked.iter().filter_map(inode).collect() };
        Self { args, netns }
    }

    /// Whether the filters select network namespaces.
    pub fn is_about_namespaces(&self) -> bool {
        !self.netns.is_empty()
    }

    /// Processes of `--pid`, which the kernel half follows from the start.
    pub fn pids(&self) -> &[u32] {
        &self.args.socket.pid
    }

    /// Writes to `params` the filters that the kernel half applies. It has room for [`MAX_FILTER_VALUES`]
    /// values of each; a filter with more is applied by [`Self::wants`] alone.
    pub fn to_kernel(&self, params: &mut Params) {
        params.by_process = u32::from(!self.args.socket.pid.is_empty());
        params.port_count = fill(&mut params.ports, &self.args.socket.port);
        params.local_port_count = fill(&mut params.local_ports, &self.args.socket.local_port);
        params.remote_port_count = fill(&mut params.remote_ports, &self.args.socket.remote_port);
        params.netns_count = fill(&mut params.netns, &self.netns);
        let ranges: Vec<_> = self.args.socket.address.iter().map(range).collect();
        params.range_count = fill(&mut params.ranges, &ranges);
    }

    /// Whether an event passes the filters. Losses always do.
    pub fn wants(&self, event: &Event) -> bool {
        let (kind, why, connection, process) = match event {
            Event::Close(close) => {
                (EventKind::Close, self.wants_cause(close.cause), &close.connection, &close.process)
            }
            Event::Reset(reset) => {
                (EventKind::Reset, self.wants_cause(reset.cause), &reset.connection, &reset.process)
            }
            Event::Lingering(lingering) => (
                EventKind::Lingering,
                self.wants_kind(lingering.kind),
                &lingering.connection,
                &lingering.process,
            ),
            Event::Lost(_) | Event::Finding(_) => return true,
        };
        why && (self.args.event.is_empty() || self.args.event.contains(&kind))
            && self.wants_connection(connection)
            && self.wants_process(process.as_deref())
    }

    /// For lines that have a cause: `--cause`.
    fn wants_cause(&self, cause: Option<Cause>) -> bool {
        self.args.cause.is_empty() || cause.is_some_and(|cause| self.args.cause.contains(&cause))
    }

    /// For lines that have a kind: `--kind`.
    fn wants_kind(&self, kind: LingeringKind) -> bool {
        self.args.socket.kind.is_empty() || self.args.socket.kind.contains(&kind)
    }

    fn wants_connection(&self, connection: &Connection) -> bool {
        self.wants_netns(connection.netns) && self.wants_ends(connection.local, connection.remote)
    }

    /// Whether sockets in this network namespace pass.
    pub fn wants_netns(&self, netns: Option<u32>) -> bool {
        self.netns.is_empty() || netns.is_some_and(|netns| self.netns.contains(&netns))
    }

    /// Whether a socket with these ends passes.
    pub fn wants_ends(&self, local: Option<Endpoint>, remote: Option<Endpoint>) -> bool {
        let socket = &self.args.socket;
        let has = |wanted: &[u16], ends: &[Option<Endpoint>]| {
            wanted.is_empty() || ends.iter().flatten().any(|end| wanted.contains(&end.port))
        };
        has(&socket.port, &[local, remote])
            && has(&socket.local_port, &[local])
            && has(&socket.remote_port, &[remote])
            && (socket.address.is_empty()
                || [local, remote]
                    .iter()
                    .flatten()
                    .any(|end| socket.address.iter().any(|range| range.contains(&end.address))))
    }

    /// Whether any filter depends on the owner of a socket.
    pub fn is_about_processes(&self) -> bool {
        let SocketArgs { pid, comm, container, .. } = &self.args.socket;
        !(pid.is_empty() && comm.is_empty() && container.is_empty())
    }

    /// Whether sockets of this process pass or, with `None`, sockets without an owner.
    pub fn wants_process(&self, process: Option<&Process>) -> bool {
        (self.args.socket.pid.is_empty()
            || process.and_then(|process| process.pid).is_some_and(|pid| self.args.socket.pid.contains(&pid)))
            && (self.args.socket.comm.is_empty()
                || process.is_some_and(|process| {
                    let names = [Some(&process.comm), process.thread.as_ref()];
                    names.into_iter().flatten().any(|name| self.args.socket.comm.contains(name))
                }))
            && (self.args.socket.container.is_empty()
                || process.and_then(|process| process.container.as_ref()).is_some_and(|container| {
                    self.args.socket.container.iter().any(|wanted| container.starts_with(wanted.as_str()))
                }))
    }
}

/// Copies the values if there is room for all of them, and returns their number; otherwise 0.
fn fill<T: Copy>(room: &mut [T; MAX_FILTER_VALUES], values: &[T]) -> u32 {
    if values.len() > MAX_FILTER_VALUES {
        return 0;
    }
    room[..values.len()].copy_from_slice(values);
    u32::try_from(values.len()).unwrap_or(0)
}

/// The range in the form that the kernel half compares: IPv4 addresses are IPv4-mapped.
fn range(net: &IpNet) -> Range {
    let (address, bits) = match net.network() {
        IpAddr::V4(address) => (address.to_ipv6_mapped().to_bits(), 96 + u32::from(net.prefix_len())),
        IpAddr::V6(address) => (address.to_bits(), u32::from(net.prefix_len())),
    };
    let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
    Range { address: halves(address & mask), mask: halves(mask) }
}

#[expect(clippy::cast_possible_truncation, reason = "the two halves of a number")]
fn halves(bits: u128) -> [u64; 2] {
    [(bits >> 64) as u64, bits as u64]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::examples;

    fn kernel(args: SocketArgs) -> Params {
        let mut params = Params::NONE;
        Filter::from(args).to_kernel(&mut params);
        params
    }

    #[test]
    fn filters_of_the_kernel_half() {
        let params = kernel(SocketArgs { port: vec![80, 443], pid: vec![1], ..SocketArgs::default() });
        assert_eq!((params.port_count, params.ports[0], params.ports[1], params.by_process), (2, 80, 443, 1));
        let ports: Vec<_> = (1..=9).collect();
        assert_eq!(kernel(SocketArgs { port: ports, ..SocketArgs::default() }).port_count, 0, "too many");
    }

    #[test]
    fn ranges_of_both_families() {
        let ten = range(&"10.1.2.3/8".parse().unwrap());
        assert_eq!(ten.mask, [u64::MAX, 0xffff_ffff_ff00_0000]);
        assert_eq!(ten.address, [0, 0x0000_ffff_0a00_0000]);
        let all = range(&"::/0".parse().unwrap());
        assert_eq!((all.mask, all.address), ([0, 0], [0, 0]));
        let one = range(&"fd00::1/128".parse().unwrap());
        assert_eq!((one.mask, one.address), ([u64::MAX, u64::MAX], [0xfd00_0000_0000_0000, 1]));
    }

    #[test]
    fn each_filter_keeps_others_out() {
        let event = examples::orderly();
        let Event::Close(close) = &event else { panic!("a close") };
        let process = close.process.clone().unwrap();
        let (local, remote) = (close.connection.local.unwrap(), close.connection.remote.unwrap());
        let none = FilterArgs::default;
        let sockets = |socket| FilterArgs { socket, ..none() };
        let any = SocketArgs::default;
        let pid = process.pid.unwrap();
        let cases: [(FilterArgs, FilterArgs); 8] = [
            (
                sockets(SocketArgs { pid: vec![pid], ..any() }),
                sockets(SocketArgs { pid: vec![pid + 1], ..any() }),
            ),
            (
                sockets(SocketArgs { comm: vec![process.comm.clone()], ..any() }),
                sockets(SocketArgs { comm: vec!["x".into()], ..any() }),
            ),
            (
                sockets(SocketArgs { port: vec![remote.port], ..any() }),
                sockets(SocketArgs { port: vec![1], ..any() }),
            ),
            (
                sockets(SocketArgs { local_port: vec![local.port], ..any() }),
                sockets(SocketArgs { local_port: vec![remote.port], ..any() }),
            ),
            (
                sockets(SocketArgs { remote_port: vec![remote.port], ..any() }),
                sockets(SocketArgs { remote_port: vec![local.port], ..any() }),
            ),
            (
                sockets(SocketArgs { address: vec![remote.address.into()], ..any() }),
                sockets(SocketArgs { address: vec!["198.18.0.0/15".parse().unwrap()], ..any() }),
            ),
            (
                FilterArgs { event: vec![EventKind::Close], ..none() },
                FilterArgs { event: vec![EventKind::Reset], ..none() },
            ),
            (none(), FilterArgs { cause: vec![Cause::UnreadData], ..none() }),
        ];
        for (lets_through, keeps_out) in cases {
            assert!(Filter::new(lets_through.clone()).wants(&event), "{lets_through:?}");
            assert!(!Filter::new(keeps_out.clone()).wants(&event), "{keeps_out:?}");
        }
    }

    #[test]
    fn lingering_sockets_are_filtered_too() {
        let event = examples::lingering();
        let Event::Lingering(lingering) = &event else { panic!("a lingering socket") };
        let pid = lingering.process.as_ref().unwrap().pid.unwrap();
        let of = |pid| Filter::from(SocketArgs { pid: vec![pid], ..SocketArgs::default() });
        assert!(of(pid).wants(&event));
        assert!(!of(pid + 1).wants(&event));
    }

    #[test]
    fn kinds_are_of_lingering_sockets_and_causes_of_ends() {
        let (end, event) = (examples::orderly(), examples::lingering());
        let Event::Lingering(lingering) = &event else { panic!("a lingering socket") };
        let of_kind = |kind| Filter::from(SocketArgs { kind: vec![kind], ..SocketArgs::default() });
        assert!(of_kind(lingering.kind).wants(&event));
        assert!(!of_kind(LingeringKind::Unaccepted).wants(&event));
        assert!(of_kind(LingeringKind::Unaccepted).wants(&end), "a close has no kind");
        let cause = FilterArgs { cause: vec![Cause::UnreadData], ..FilterArgs::default() };
        assert!(Filter::new(cause).wants(&event), "a lingering socket has no cause");
    }
}
