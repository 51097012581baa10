//! The TCP sockets of the host as they are now, in every network namespace, found without a program in the kernel: which
//! of them linger in the teardown, who holds them, and how many there are of every other kind.
//!
//! [`netns`] finds the namespaces; [`diag`] asks the kernel in each of them, or [`table`] reads its `/proc`; one walk over
//! all descriptors ([`attribute::holder`]) says whose they are.

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

pub use entry::{Age, Entry};
pub use time_wait::{Outgoing, TimeWait};

use crate::{
    attribute::{
        self,
        holder::{self, Holder},
        process::Processes,
    },
    event::{
        Attribution, Connection, Endpoint, Family, Lingering, LingeringKind, Process, Role, State, Time,
    },
    filter::Filter,
    host::Program,
    kernel::clock::Clock,
};
use netns::Namespace;

/// How many lingering sockets are told of, each taking some 300 bytes. Others are counted.
const MAX_LINGERING: usize = 262_144;

/// How many sockets are looked up among the descriptors, each taking some 60 bytes. Others count as without an owner.
const MAX_OWNED: usize = 1_048_576;

/// How many holders of lingering sockets are told of, all together, each taking 16 bytes.
const MAX_HOLDINGS: usize = 1_048_576;

/// What was found.
#[derive(Debug)]
pub struct Scan {
    /// When.
    pub at: Time,
    /// The sockets that linger, those that have surely been there longest first.
    pub lingering: Vec<Socket>,
    /// How many sockets of each state the processes own, most first.
    pub processes: Vec<Tally>,
    /// What is in each network namespace and has no owner.
    pub namespaces: Vec<Unowned>,
    /// What could not be looked at.
    pub gaps: Gaps,
}

/// A socket that lingers.
#[derive(Clone, Debug)]
pub struct Socket {
    /// What the kernel says of it.
    pub entry: Entry,
    /// Inode number of its network namespace.
    pub netns: u32,
    /// Server if somebody listens where it is, or it has not been accepted yet.
    pub role: Option<Role>,
    /// Whose it is, and how that is known.
    pub owner: Option<(Arc<Holder>, Attribution)>,
    /// Who has it open, with the descriptor: nobody if it has been closed or was never accepted; `None` if it should be
    /// somebody, and nobody was found.
    pub holders: Option<Vec<(Arc<Holder>, u32)>>,
}

/// How many sockets of each state a process owns.
#[derive(Clone, Debug)]
pub struct Tally {
    /// The process.
    pub process: Arc<Holder>,
    /// Its sockets. One that several processes have open is the oldest one's.
    pub states: Counts,
}

/// The sockets of a network namespace that have no owner.
#[derive(Clone, Debug)]
pub struct Unowned {
    /// Inode number of the namespace.
    pub netns: u32,
    /// How many in each state: closed by their process, not accepted yet, or of a process that could not be looked at.
    pub states: Counts,
    /// Those in `TIME_WAIT` in detail.
    pub time_wait: TimeWait,
    /// The ports that `connect()` chooses from, first and last.
    pub ports: Option<(u16, u16)>,
}

/// What could not be looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gaps {
    /// Processes whose descriptors may not be seen.
    pub processes: usize,
    /// Namespaces that may not be entered, or in which the kernel has no `sock_diag`: of these sockets neither age nor
    /// bytes nor cookies are known.
    pub tables: Vec<u32>,
    /// Namespaces of which nothing is known, and why.
    pub namespaces: Vec<(u32, String)>,
    /// Lingering sockets beyond those that are told of.
    pub lingering: u64,
    /// Sockets beyond those that were looked up among the descriptors.
    pub owned: u64,
    /// Holders beyond those that are told of.
    pub holdings: u64,
}

/// A number for each state, in the places that the kernel numbers: no state is 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts([u64; 13]);

impl Counts {
    fn add(&mut self, state: State) {
        self.0[state as usize] += 1;
    }

    /// Those that are not 0, in the kernel's order.
    pub fn iter(&self) -> impl Iterator<Item = (State, u64)> {
        let states = (1..=12).filter_map(State::from_kernel);
        states.map(|state| (state, self.0[state as usize])).filter(|(_, count)| *count > 0)
    }

    /// All together.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

impl Socket {
    /// What it waits for.
    pub fn kind(&self) -> LingeringKind {
        self.entry.kind()
    }

    /// The line that tells of it, `at` being when it was found.
    pub fn lingering(&self, at: Time, processes: &mut Processes) -> Lingering {
        let Entry { state, local, remote, cookie, info, .. } = self.entry;
        let Age { at_least, at_most } = self.entry.age();
        let holders = self.holders.as_ref().map(|holders| {
            let holder = |(holder, fd): &(Arc<Holder>, u32)| crate::event::Holder {
                pid: holder.pid,
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
                opened: None,
                age_ms: None,
                bytes_sent: info.map(|info| info.bytes_sent),
                bytes_received: self.entry.bytes_received(),
                retransmits: info.map(|info| info.retransmits),
                rtt_us: info.map(|info| info.rtt_us).filter(|rtt| *rtt != 0),
            },
            process: self.process(processes),
            state,
            since: None,
            for_ms: at_least.map(f64::from),
            for_ms_at_most: at_most.map(f64::from),
            unread_bytes: self.entry.unread_bytes().map(u64::from),
            holders,
            opener: None,
            kind: self.kind(),
        }
    }

    fn process(&self, processes: &mut Processes) -> Option<Process> {
        let (holder, attribution) = self.owner.as_ref()?;
        Some(attribute::listed(holder, *attribution, Program::of(processes, holder.pid, 0)))
    }
}

/// Looks at all sockets once, and keeps of them what `filter` wants as far as addresses, ports and namespaces go.
/// Processes are not filtered here.
pub fn scan(filter: &Filter) -> Scan {
    let mut collected = Collected::new(filter);
    for namespace in netns::all() {
        if filter.wants_netns(Some(namespace.inode)) {
            collected.look_into(&namespace);
        }
    }
    let at = Clock::now();
    collected.find_owners();
    collected.finish(at)
}

/// The sockets that linger, without their owners: what a trace that begins asks for. A namespace that may not be looked
/// into is left out.
pub fn lingering() -> Vec<Socket> {
    let mut sockets = Vec::new();
    for namespace in netns::all() {
        let mut found = Vec::new();
        let dumped = namespace.inside(|| diag::dump_lingering(|entry| found.push(entry)));
        if let Err(error) = dumped.and_then(|dumped| dumped) {
            log::debug!("network namespace {}: {error}", namespace.inode);
            continue;
        }
        let room = MAX_LINGERING.saturating_sub(sockets.len());
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

/// What is known of a socket that has descriptors.
struct Owned {
    state: State,
    /// Of its namespace, in `namespaces`.
    namespace: usize,
    /// Its place in `lingering`.
    lingering: Option<u32>,
    /// Whether it passed the filter. A listener is kept all the same, for those that wait in its queue.
    is_wanted: bool,
    owner: Option<Arc<Holder>>,
}

struct Collected<'a> {
    filter: &'a Filter,
    lingering: Vec<Socket>,
    by_inode: HashMap<u64, Owned>,
    namespaces: Vec<Unowned>,
    /// By namespace and port.
    listeners: HashMap<(u32, u16), Vec<(IpAddr, u64)>>,
    gaps: Gaps,
}

impl<'a> Collected<'a> {
    fn new(filter: &'a Filter) -> Self {
        Self {
            filter,
            lingering: Vec::new(),
            by_inode: HashMap::new(),
            namespaces: Vec::new(),
            listeners: HashMap::new(),
            gaps: Gaps::default(),
        }
    }

    fn look_into(&mut self, namespace: &Namespace) {
        let netns = namespace.inode;
        let unowned =
            Unowned { netns, states: Counts::default(), time_wait: TimeWait::default(), ports: None };
        self.namespaces.push(unowned);
        let asked = namespace.inside(|| {
            self.here().ports = netns::port_range();
            diag::dump(|entry| self.add(netns, entry))
        });
        let error = match asked.and_then(|dumped| dumped) {
            Ok(()) => return,
            // It has ended meanwhile.
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

    /// The namespace that is being looked into.
    fn here(&mut self) -> &mut Unowned {
        self.namespaces.last_mut().expect("look_into() has pushed one")
    }

    /// Drops what half a dump has told.
    fn forget(&mut self, netns: u32) {
        let here = self.namespaces.len() - 1;
        self.lingering.retain(|socket| socket.netns != netns);
        self.by_inode.retain(|_, owned| owned.namespace != here);
        self.listeners.retain(|(of, _), _| *of != netns);
        (self.here().states, self.here().time_wait) = Default::default();
    }

    fn add(&mut self, netns: u32, entry: Entry) {
        if entry.state == State::Listen {
            let at = (entry.local.address, entry.inode);
            self.listeners.entry((netns, entry.local.port)).or_default().push(at);
        }
        let is_wanted = self.filter.wants_ends(Some(entry.local), Some(entry.remote));
        if !is_wanted && entry.state != State::Listen {
            return;
        }
        if entry.state == State::TimeWait {
            let range = self.here().ports;
            let incoming = self.listener(netns, entry.local).is_some()
                || range.is_some_and(|(first, last)| !(first..=last).contains(&entry.local.port));
            self.here().time_wait.add(&entry, incoming);
        }
        let (state, inode) = (entry.state, entry.inode);
        let lingering = if entry.is_lingering() { self.linger(netns, entry) } else { None };
        if inode == 0 {
            self.here().states.add(state);
        } else if self.by_inode.len() < MAX_OWNED {
            let namespace = self.namespaces.len() - 1;
            self.by_inode.insert(inode, Owned { state, namespace, lingering, is_wanted, owner: None });
        } else {
            self.gaps.owned += 1;
            self.here().states.add(state);
        }
    }

    fn linger(&mut self, netns: u32, entry: Entry) -> Option<u32> {
        if self.lingering.len() >= MAX_LINGERING {
            self.gaps.lingering += 1;
            return None;
        }
        let accepted =
            entry.kind() != LingeringKind::Unaccepted && self.listener(netns, entry.local).is_none();
        self.lingering.push(Socket {
            netns,
            role: (!accepted).then_some(Role::Server),
            owner: None,
            holders: (entry.inode == 0).then(Vec::new),
            entry,
        });
        u32::try_from(self.lingering.len() - 1).ok()
    }

    /// The inodes of those who listen there: on that very address, or else on all.
    fn listener(&self, netns: u32, local: Endpoint) -> Option<Vec<u64>> {
        let there = self.listeners.get(&(netns, local.port))?;
        let on = |satisfies: &dyn Fn(&IpAddr) -> bool| -> Vec<u64> {
            there.iter().filter(|(address, _)| satisfies(address)).map(|(_, inode)| *inode).collect()
        };
        let exactly = on(&|address| *address == local.address);
        let found = if exactly.is_empty() { on(&IpAddr::is_unspecified) } else { exactly };
        (!found.is_empty()).then_some(found)
    }

    /// Looks for who has them open.
    fn find_owners(&mut self) {
        if self.by_inode.is_empty() {
            return;
        }
        let mut holdings = 0;
        let Self { by_inode, lingering, gaps, .. } = self;
        gaps.processes = holder::walk(|process, fd, inode| {
            let Some(owned) = by_inode.get_mut(&inode) else { return };
            let Some(holder) = process.holder() else { return };
            holder.replace_if_older(owned.owner.get_or_insert_with(|| Arc::clone(holder)));
            let Some(socket) = owned.lingering.and_then(|index| lingering.get_mut(index as usize)) else {
                return;
            };
            if holdings < MAX_HOLDINGS {
                holdings += 1;
                socket.holders.get_or_insert_default().push((Arc::clone(holder), fd));
            } else {
                gaps.holdings += 1;
            }
        });
    }

    fn finish(mut self, at: Time) -> Scan {
        let mut tallies = BTreeMap::new();
        for owned in self.by_inode.values() {
            if let Some(index) = owned.lingering {
                let owner = owned.owner.as_ref();
                self.lingering[index as usize].owner =
                    owner.map(|owner| (Arc::clone(owner), Attribution::Procfs));
            }
            if !owned.is_wanted {
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
        for index in 0..self.lingering.len() {
            let socket = &self.lingering[index];
            if socket.kind() == LingeringKind::Unaccepted {
                self.lingering[index].owner = self.who_listens(socket);
            }
        }
        let mut processes: Vec<_> = tallies.into_values().collect();
        processes.sort_by_key(|tally| (Reverse(tally.states.total()), tally.process.pid));
        // Of two that have surely been there equally long, the one that may have been longer; no bound is the longest.
        self.lingering.sort_by_cached_key(|socket| {
            let Age { at_least, at_most } = socket.entry.age();
            Reverse((at_least, at_most.unwrap_or(u32::MAX)))
        });
        Scan { at, lingering: self.lingering, processes, namespaces: self.namespaces, gaps: self.gaps }
    }

    /// Whose listener a socket waits at. Where several processes listen on the same port with sockets of their own
    /// (`SO_REUSEPORT`), it is not known in whose queue it is.
    fn who_listens(&self, socket: &Socket) -> Option<(Arc<Holder>, Attribution)> {
        let inodes = self.listener(socket.netns, socket.entry.local)?;
        let mut owners = inodes.iter().map(|inode| self.by_inode.get(inode)?.owner.as_ref());
        let first = owners.next()??;
        let is_it = |owner: Option<&Arc<Holder>>| owner.is_some_and(|owner| owner.pid == first.pid);
        owners.all(is_it).then(|| (Arc::clone(first), Attribution::Listener))
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
    fn our_own_socket_lingers() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(TcpStream::connect(("127.0.0.1", port)).unwrap());
        let (mut server, _) = listener.accept().unwrap();
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
        let scan = scan(&Filter::from(SocketArgs { local_port: vec![port], ..SocketArgs::default() }));
        let [socket] = &scan.lingering[..] else { panic!("{:?}", scan.lingering) };
        assert_eq!((socket.kind(), socket.role), (LingeringKind::Leaked, Some(Role::Server)));
        let line = socket.lingering(scan.at, &mut Processes::new());
        let process = line.process.unwrap();
        assert_eq!((process.pid, process.attribution), (std::process::id(), Attribution::Procfs));
        let fd = u32::try_from(server.as_raw_fd()).unwrap();
        assert_eq!(line.holders.unwrap().iter().map(|holder| holder.fd).collect::<Vec<_>>(), [fd]);
        let [tally] = &scan.processes[..] else { panic!("{:?}", scan.processes) };
        assert_eq!(tally.states.iter().collect::<Vec<_>>(), [(State::CloseWait, 1), (State::Listen, 1)]);
    }

    /// Nothing yet, of namespace 1.
    fn of_one_namespace(filter: &Filter) -> Collected<'_> {
        let mut all = Collected::new(filter);
        let (states, time_wait) = (Counts::default(), TimeWait::default());
        all.namespaces.push(Unowned { netns: 1, states, time_wait, ports: None });
        all
    }

    #[test]
    fn the_nearest_listener() {
        let filter = Filter::default();
        let mut all = of_one_namespace(&filter);
        let listener = |local, inode| Entry { local, ..entry::tests::entry(State::Listen, inode, 0) };
        all.add(1, listener(end([0, 0, 0, 0], 80), 10));
        all.add(1, listener(end([10, 0, 0, 1], 80), 11));
        assert_eq!(all.listener(1, end([10, 0, 0, 1], 80)), Some(vec![11]));
        assert_eq!(all.listener(1, end([10, 0, 0, 2], 80)), Some(vec![10]));
        assert_eq!(all.listener(2, end([10, 0, 0, 1], 80)), None);
        assert_eq!(all.listener(1, end([10, 0, 0, 1], 81)), None);
        // What half a dump has told goes with its namespace.
        all.forget(1);
        assert!(all.listener(1, end([10, 0, 0, 1], 80)).is_none() && all.by_inode.is_empty());
    }

    /// Two processes, each with a socket of its own on the same port: nobody knows in whose queue it is.
    #[test]
    fn no_guess_between_two_listeners() {
        let filter = Filter::default();
        let mut all = of_one_namespace(&filter);
        let waiting = Entry { local: end([10, 0, 0, 1], 80), ..entry::tests::entry(State::CloseWait, 0, 1) };
        let holder = |pid| Arc::new(Holder { pid, comm: "x".into(), uid: None, started: 0 });
        for (inode, pid, knows) in [(10, 5, true), (11, 5, true), (12, 6, false)] {
            all.add(
                1,
                Entry { local: end([0, 0, 0, 0], 80), ..entry::tests::entry(State::Listen, inode, 0) },
            );
            all.by_inode.get_mut(&inode).unwrap().owner = Some(holder(pid));
            all.lingering.clear();
            all.add(1, waiting.clone());
            let owner = all.who_listens(&all.lingering[0]);
            assert_eq!(owner.map(|(owner, _)| owner.pid), knows.then_some(5));
        }
    }
}
