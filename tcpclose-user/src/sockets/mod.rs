//! A scan of the host's TCP sockets in every network namespace, without a program in the kernel: which
//! sockets are stuck in a teardown state, which processes hold them, and how many sockets are in every state.
//!
//! [`netns`] finds the namespaces. [`diag`] requests the sockets of each from the kernel; where that is not
//! possible [`table`] reads them from `/proc`. A walk over all file descriptors ([`holder`]) finds their
//! owners.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    io,
    net::IpAddr,
    sync::Arc,
};

pub mod diag;
pub mod entry;
pub mod netns;
pub mod table;
pub mod time_wait;

pub use entry::{AgeRange, ListedSocket};
pub use time_wait::{Outgoing, TimeWait};

use crate::{
    attribute,
    event::{
        Attribution, Connection, Endpoint, Family, Lingering, LingeringKind, Process, Role, Shared, State,
        Time,
    },
    filter::Filter,
    host::ProgramInfo,
    kernel::clock::Clock,
    processes::{
        Processes,
        holder::{self, ProcfsHolder},
    },
};
use netns::Namespace;

/// The number of stuck sockets that are kept, about 300 bytes each. The rest is only counted.
const MAX_STUCK: usize = 262_144;

/// The number of sockets with descriptors that are kept to find their owners, about 60 bytes each. The rest
/// counts as having no owner.
const MAX_OWNED: usize = 1_048_576;

/// The number of holders of stuck sockets that are kept, 16 bytes each.
const MAX_HOLDERS: usize = 1_048_576;

/// The result of a scan.
#[derive(Debug)]
pub struct Scan {
    /// When the sockets were listed.
    pub at: Time,
    /// The sockets in a teardown state, ordered by the least time that each has been in it, longest first.
    pub stuck: Vec<Socket>,
    /// The number of sockets in each state by owner, most first.
    pub processes: Vec<Tally>,
    /// The sockets without an owner, by network namespace.
    pub namespaces: Vec<Unowned>,
    /// What could not be read.
    pub gaps: Gaps,
}

/// A socket in a teardown state.
#[derive(Clone, Debug)]
pub struct Socket {
    /// What the kernel reports of it.
    pub entry: ListedSocket,
    /// Inode number of its network namespace.
    pub netns: u32,
    /// Server if there is a listener for its local address, or if it has not been accepted yet; otherwise
    /// unknown.
    pub role: Option<Role>,
    /// The process that owns it, and how that is known.
    pub owner: Option<(Arc<ProcfsHolder>, Attribution)>,
    /// The processes that have it open, each with its descriptor. Empty if it was closed or never accepted;
    /// `None` if it is open and no holder was found.
    pub holders: Option<Vec<(Arc<ProcfsHolder>, u32)>>,
}

/// The number of sockets in each state that a process owns.
#[derive(Clone, Debug)]
pub struct Tally {
    /// The process.
    pub process: Arc<ProcfsHolder>,
    /// The counts. A socket that several processes have open counts for the oldest of them.
    pub states: Counts,
}

/// The sockets of a network namespace that have no owner.
#[derive(Clone, Debug)]
pub struct Unowned {
    /// Inode number of the namespace.
    pub netns: u32,
    /// The number in each state: closed by their process, not accepted yet, or of a process that could not be
    /// read.
    pub states: Counts,
    /// Those in `TIME_WAIT`, by destination.
    pub time_wait: TimeWait,
    /// The range of ports from which `connect()` chooses, first and last.
    pub ports: Option<(u16, u16)>,
}

/// Whatever a scan could not read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gaps {
    /// Processes whose descriptors may not be read.
    pub processes: usize,
    /// Namespaces that may not be entered, or where the kernel has no `sock_diag`: their sockets come without
    /// ages, bytes and cookies.
    pub tables: Vec<u32>,
    /// Namespaces whose sockets are not known, and why.
    pub namespaces: Vec<(u32, String)>,
    /// Stuck sockets beyond [`MAX_STUCK`].
    pub stuck: u64,
    /// Sockets with descriptors beyond [`MAX_OWNED`].
    pub owned: u64,
    /// Holders beyond [`MAX_HOLDERS`].
    pub holders: u64,
}

/// A count for each state, indexed by the kernel's number of the state; no state has number 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts([u64; 13]);

impl Counts {
    fn add(&mut self, state: State) {
        self.0[state as usize] += 1;
    }

    /// The counts that are not 0, in the kernel's order of states.
    pub fn iter(&self) -> impl Iterator<Item = (State, u64)> {
        let states = (1..=12).filter_map(State::from_kernel);
        states.map(|state| (state, self.0[state as usize])).filter(|(_, count)| *count > 0)
    }

    /// The sum over all states.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

impl Socket {
    /// What keeps it in its state.
    pub fn kind(&self) -> LingeringKind {
        self.entry.kind()
    }

    /// Its `lingering` event; `at` is when it was listed.
    pub fn lingering(&self, at: Time, processes: &mut Processes) -> Lingering {
        let ListedSocket { state, local, remote, cookie, info, .. } = self.entry;
        let AgeRange { at_least, at_most } = self.entry.age();
        let holders = self.holders.as_ref().map(|holders| {
            let holder = |(holder, fd): &(Arc<ProcfsHolder>, u32)| crate::event::Holder {
                pid: Some(holder.pid),
                host_pid: holder.host_pid(),
                comm: holder.comm.clone(),
                fd: *fd,
            };
            holders.iter().map(holder).collect()
        });
        Lingering {
            time: at,
            seq: 0,
            connection: Connection {
                family: Some(if local.address.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }),
                local: Some(local),
                remote: Some(remote),
                netns: Some(self.netns),
                cookie,
                role: self.role,
                bytes_sent: info.map(|info| info.bytes_sent),
                bytes_received: self.entry.bytes_received(),
                retransmits: info.map(|info| info.retransmits),
                rtt_us: info.map(|info| info.rtt_us).filter(|rtt| *rtt != 0),
                // The kernel lists no further facts.
                ..Connection::default()
            },
            process: self.process(processes).map(Shared::from),
            state,
            since: None,
            for_ms: at_least.map(f64::from),
            for_ms_at_most: at_most.map(f64::from),
            unread_bytes: self.entry.unread_bytes().map(u64::from),
            unsent_bytes: self.entry.send_queue.map(|queue| queue.unsent_payload(state).into()),
            // The kernel does not list acts on the socket.
            trigger: None,
            signal: None,
            signal_from: None,
            stack: None,
            holders,
            opener: None,
            kind: self.kind(),
        }
    }

    fn process(&self, processes: &mut Processes) -> Option<Process> {
        let (holder, attribution) = self.owner.as_ref()?;
        Some(attribute::listed(holder, *attribution, ProgramInfo::of(processes, holder.pid, 0)))
    }
}

/// Scans all sockets once. Applies the filters of addresses, ports and namespaces, but not those of
/// processes.
pub fn scan(filter: &Filter) -> Scan {
    let mut collector = Collector::new(filter);
    for namespace in netns::all() {
        if filter.wants_netns(Some(namespace.inode)) {
            collector.list(&namespace);
        }
    }
    let at = Clock::now();
    collector.find_owners();
    collector.finish(at)
}

/// The sockets that are in a teardown state, without their owners, for the start of a trace. A namespace that
/// may not be entered is left out.
pub fn in_teardown() -> Vec<Socket> {
    let mut sockets = Vec::new();
    for namespace in netns::all() {
        let mut found = Vec::new();
        let dumped = namespace.inside(|| diag::dump_teardown(|entry| found.push(entry)));
        if let Err(error) = dumped.and_then(|dumped| dumped) {
            log::debug!("network namespace {}: {error}", namespace.inode);
            continue;
        }
        let room = MAX_STUCK.saturating_sub(sockets.len());
        sockets.extend(found.into_iter().take(room).map(|entry| Socket {
            netns: namespace.inode,
            role: (entry.kind() == LingeringKind::Unaccepted).then_some(Role::Server),
            owner: None,
            holders: (entry.inode == 0).then(Vec::new),
            entry,
        }));
    }
    sockets
}

/// A socket that has descriptors.
struct Owned {
    state: State,
    /// Index of its namespace in `namespaces`.
    namespace: usize,
    /// Index in `stuck`.
    stuck: Option<u32>,
    /// Whether it passed the filter. A listener is always kept, because of the sockets in its accept queue.
    passed: bool,
    owner: Option<Arc<ProcfsHolder>>,
}

/// A scan in progress.
struct Collector<'a> {
    filter: &'a Filter,
    stuck: Vec<Socket>,
    by_inode: HashMap<u64, Owned>,
    namespaces: Vec<Unowned>,
    /// Addresses and inodes, by namespace and port.
    listeners: HashMap<(u32, u16), Vec<(IpAddr, u64)>>,
    gaps: Gaps,
}

impl<'a> Collector<'a> {
    fn new(filter: &'a Filter) -> Self {
        Self {
            filter,
            stuck: Vec::new(),
            by_inode: HashMap::new(),
            namespaces: Vec::new(),
            listeners: HashMap::new(),
            gaps: Gaps::default(),
        }
    }

    /// Adds the sockets of a namespace.
    fn list(&mut self, namespace: &Namespace) {
        let netns = namespace.inode;
        let unowned =
            Unowned { netns, states: Counts::default(), time_wait: TimeWait::default(), ports: None };
        self.namespaces.push(unowned);
        let dumped = namespace.inside(|| {
            self.here().ports = netns::port_range();
            diag::dump(|entry| self.add(netns, entry))
        });
        let error = match dumped.and_then(|dumped| dumped) {
            Ok(()) => return,
            // The namespace has ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => error,
        };
        self.forget(netns);
        let read = namespace.pid.map(|pid| table::read(pid, |entry| self.add(netns, entry)));
        match read {
            Some(Ok(())) => self.gaps.tables.push(netns),
            _ => self.gaps.namespaces.push((netns, error.to_string())),
        }
    }

    /// The namespace that is being listed.
    fn here(&mut self) -> &mut Unowned {
        self.namespaces.last_mut().expect("list() has pushed one")
    }

    /// Drops the sockets of an incomplete dump.
    fn forget(&mut self, netns: u32) {
        let here = self.namespaces.len() - 1;
        self.stuck.retain(|socket| socket.netns != netns);
        self.by_inode.retain(|_, owned| owned.namespace != here);
        self.listeners.retain(|(of, _), _| *of != netns);
        (self.here().states, self.here().time_wait) = Default::default();
    }

    fn add(&mut self, netns: u32, entry: ListedSocket) {
        if entry.state == State::Listen {
            let at = (entry.local.address, entry.inode);
            self.listeners.entry((netns, entry.local.port)).or_default().push(at);
        }
        let passed = self.filter.wants_ends(Some(entry.local), Some(entry.remote));
        if !passed && entry.state != State::Listen {
            return;
        }
        if entry.state == State::TimeWait {
            let range = self.here().ports;
            let incoming = self.listener(netns, entry.local).is_some()
                || range.is_some_and(|(first, last)| !(first..=last).contains(&entry.local.port));
            self.here().time_wait.add(&entry, incoming);
        }
        let (state, inode) = (entry.state, entry.inode);
        let stuck = if entry.is_in_teardown() { self.add_stuck(netns, entry) } else { None };
        if inode == 0 {
            self.here().states.add(state);
        } else if self.by_inode.len() < MAX_OWNED {
            let namespace = self.namespaces.len() - 1;
            self.by_inode.insert(inode, Owned { state, namespace, stuck, passed, owner: None });
        } else {
            self.gaps.owned += 1;
            self.here().states.add(state);
        }
    }

    /// Adds a socket in a teardown state. Returns its index in `stuck`, or `None` if there is no room.
    fn add_stuck(&mut self, netns: u32, entry: ListedSocket) -> Option<u32> {
        if self.stuck.len() >= MAX_STUCK {
            self.gaps.stuck += 1;
            return None;
        }
        let is_server =
            entry.kind() == LingeringKind::Unaccepted || self.listener(netns, entry.local).is_some();
        self.stuck.push(Socket {
            netns,
            role: is_server.then_some(Role::Server),
            owner: None,
            holders: (entry.inode == 0).then(Vec::new),
            entry,
        });
        u32::try_from(self.stuck.len() - 1).ok()
    }

    /// The inodes of the listeners for a local address: those on this exact address or, if there are none,
    /// those on any address.
    fn listener(&self, netns: u32, local: Endpoint) -> Option<Vec<u64>> {
        let there = self.listeners.get(&(netns, local.port))?;
        let those = |matches: &dyn Fn(&IpAddr) -> bool| -> Vec<u64> {
            there.iter().filter(|(address, _)| matches(address)).map(|(_, inode)| *inode).collect()
        };
        let exact = those(&|address| *address == local.address);
        let found = if exact.is_empty() { those(&IpAddr::is_unspecified) } else { exact };
        (!found.is_empty()).then_some(found)
    }

    /// Finds the owners of the sockets, and the holders of those that are stuck.
    fn find_owners(&mut self) {
        if self.by_inode.is_empty() {
            return;
        }
        let mut holders = 0;
        let Self { by_inode, stuck, gaps, .. } = self;
        gaps.processes = holder::walk(|process, fd, inode| {
            let Some(owned) = by_inode.get_mut(&inode) else { return };
            let Some(holder) = process.holder() else { return };
            holder.replace_if_older(owned.owner.get_or_insert_with(|| Arc::clone(holder)));
            let Some(socket) = owned.stuck.and_then(|index| stuck.get_mut(index as usize)) else {
                return;
            };
            if holders < MAX_HOLDERS {
                holders += 1;
                socket.holders.get_or_insert_default().push((Arc::clone(holder), fd));
            } else {
                gaps.holders += 1;
            }
        });
    }

    fn finish(mut self, at: Time) -> Scan {
        let mut tallies = BTreeMap::new();
        for owned in self.by_inode.values() {
            if let Some(index) = owned.stuck {
                let owner = owned.owner.as_ref();
                self.stuck[index as usize].owner =
                    owner.map(|owner| (Arc::clone(owner), Attribution::Procfs));
            }
            if !owned.passed {
                continue;
            }
            let counts = match &owned.owner {
                Some(owner) => {
                    let tally = || Tally { process: Arc::clone(owner), states: Counts::default() };
                    &mut tallies.entry(owner.pid).or_insert_with(tally).states
                }
                None => &mut self.namespaces[owned.namespace].states,
            };
            counts.add(owned.state);
        }
        for index in 0..self.stuck.len() {
            let socket = &self.stuck[index];
            if socket.kind() == LingeringKind::Unaccepted {
                self.stuck[index].owner = self.owner_of_listener(socket);
            }
        }
        let mut processes: Vec<_> = tallies.into_values().collect();
        processes.sort_by_key(|tally| (Reverse(tally.states.total()), tally.process.pid));
        // If the lower bounds are equal, the upper bounds decide, and no bound counts as the longest.
        self.stuck.sort_by_cached_key(|socket| {
            let AgeRange { at_least, at_most } = socket.entry.age();
            Reverse((at_least, at_most.unwrap_or(u32::MAX)))
        });
        Scan { at, stuck: self.stuck, processes, namespaces: self.namespaces, gaps: self.gaps }
    }

    /// The owner of the listener in whose accept queue a socket is. If several processes have listeners of
    /// their own on the same port (`SO_REUSEPORT`), the queue is not known.
    fn owner_of_listener(&self, socket: &Socket) -> Option<(Arc<ProcfsHolder>, Attribution)> {
        let inodes = self.listener(socket.netns, socket.entry.local)?;
        let mut owners = inodes.iter().map(|inode| self.by_inode.get(inode)?.owner.as_ref());
        let first = owners.next()??;
        let is_first = |owner: Option<&Arc<ProcfsHolder>>| owner.is_some_and(|owner| owner.pid == first.pid);
        owners.all(is_first).then(|| (Arc::clone(first), Attribution::Listener))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        net::{Ipv4Addr, TcpListener, TcpStream},
        os::fd::AsRawFd as _,
    };

    use super::*;
    use crate::cli::SocketArgs;

    fn end(address: [u8; 4], port: u16) -> Endpoint {
        Endpoint { address: Ipv4Addr::from(address).into(), port }
    }

    #[test]
    fn a_socket_of_this_process_is_stuck() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(TcpStream::connect(("127.0.0.1", port)).unwrap());
        let (mut server, _) = listener.accept().unwrap();
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
        let scan = scan(&Filter::from(SocketArgs { local_port: vec![port], ..SocketArgs::default() }));
        let [socket] = &scan.stuck[..] else { panic!("{:?}", scan.stuck) };
        assert_eq!((socket.kind(), socket.role), (LingeringKind::Leaked, Some(Role::Server)));
        let line = socket.lingering(scan.at, &mut Processes::new());
        let process = line.process.unwrap();
        assert_eq!((process.pid, process.attribution), (Some(std::process::id()), Attribution::Procfs));
        let fd = u32::try_from(server.as_raw_fd()).unwrap();
        assert_eq!(line.holders.unwrap().iter().map(|holder| holder.fd).collect::<Vec<_>>(), [fd]);
        let [tally] = &scan.processes[..] else { panic!("{:?}", scan.processes) };
        assert_eq!(tally.states.iter().collect::<Vec<_>>(), [(State::CloseWait, 1), (State::Listen, 1)]);
    }

    /// A scan that has just begun to list namespace 1.
    fn scan_of_one_namespace(filter: &Filter) -> Collector<'_> {
        let mut all = Collector::new(filter);
        let (states, time_wait) = (Counts::default(), TimeWait::default());
        all.namespaces.push(Unowned { netns: 1, states, time_wait, ports: None });
        all
    }

    #[test]
    fn the_nearest_listener() {
        let filter = Filter::default();
        let mut all = scan_of_one_namespace(&filter);
        let listener = |local, inode| ListedSocket { local, ..entry::tests::entry(State::Listen, inode, 0) };
        all.add(1, listener(end([0, 0, 0, 0], 80), 10));
        all.add(1, listener(end([10, 0, 0, 1], 80), 11));
        assert_eq!(all.listener(1, end([10, 0, 0, 1], 80)), Some(vec![11]));
        assert_eq!(all.listener(1, end([10, 0, 0, 2], 80)), Some(vec![10]));
        assert_eq!(all.listener(2, end([10, 0, 0, 1], 80)), None);
        assert_eq!(all.listener(1, end([10, 0, 0, 1], 81)), None);
        // The sockets of an incomplete dump are dropped.
        all.forget(1);
        assert!(all.listener(1, end([10, 0, 0, 1], 80)).is_none() && all.by_inode.is_empty());
    }

    /// With two processes that have listeners of their own on the same port, the queue is not known.
    #[test]
    fn no_guess_between_two_listeners() {
        let filter = Filter::default();
        let mut all = scan_of_one_namespace(&filter);
        let waiting =
            ListedSocket { local: end([10, 0, 0, 1], 80), ..entry::tests::entry(State::CloseWait, 0, 1) };
        let holder = |pid| Arc::new(ProcfsHolder { pid, comm: "x".into(), uid: None, started: 0 });
        for (inode, pid, knows) in [(10, 5, true), (11, 5, true), (12, 6, false)] {
            all.add(
                1,
                ListedSocket { local: end([0, 0, 0, 0], 80), ..entry::tests::entry(State::Listen, inode, 0) },
            );
            all.by_inode.get_mut(&inode).unwrap().owner = Some(holder(pid));
            all.stuck.clear();
            all.add(1, waiting.clone());
            let owner = all.owner_of_listener(&all.stuck[0]);
            assert_eq!(owner.map(|(owner, _)| owner.pid), knows.then_some(5));
        }
    }
}
