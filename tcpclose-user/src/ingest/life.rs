//! The domain model of an event: what the kernel half gathered about one end of a connection, with every fact
//! that could not be read as `None` and every tag as an enum. [`decode`](super::decode) makes it from a wire
//! record; no later stage sees the wire format.

use tcpclose_common::record::MAX_STEPS;

use crate::tcp::{Direction, Endpoint, Family, Role, State};

/// One end of a connection, from the first event that was seen of it to the moment its record was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Life {
    /// The socket.
    pub id: SocketId,
    /// Its addresses.
    pub endpoints: Endpoints,
    /// The kernel's socket cookie.
    pub cookie: Option<u64>,
    /// Who opened the connection.
    pub role: Option<Role>,
    /// When the handshake was completed, nanoseconds of `CLOCK_BOOTTIME`; `None` if never, or before the
    /// trace.
    pub established: Option<u64>,
    /// The states that it went through.
    pub path: Path,
    /// The state it was in when the record was written; for a socket that is over, the state before CLOSE.
    pub state: Option<State>,
    /// Inode number of the socket; `None` if it has no descriptor, or the number could not be read.
    pub inode: Option<u64>,
    /// The task that called `connect()`, or accepted the connection.
    pub opener: Option<Task>,
    /// The first task that acted on this side of the connection in its own context.
    pub actor: Option<Task>,
    /// A task with a claim to the socket, although it neither opened it nor acted on it.
    pub holder: Option<Claimant>,
    /// The first step of the teardown.
    pub first_move: Option<FirstMove>,
    /// The socket's counters when the record was written.
    pub sample: Sample,
    /// The send queue; `None` unless the socket was inspected.
    pub send_queue: Option<SendQueue>,
    /// A moment at which `jiffies64` and `CLOCK_BOOTTIME`, in nanoseconds, were both read.
    pub jiffies: Option<(u64, u64)>,
    /// How it ended; `None` while it lives.
    pub end: Option<SocketEnd>,
    /// The RST that ended it, if one did.
    pub reset: Option<Rst>,
}

/// A socket. The kernel reuses addresses within microseconds, so an address identifies a socket only together
/// with the time at which its life began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SocketId {
    /// Address of the `struct sock`; 0 for a RST that concerned no socket.
    pub address: u64,
    /// When the life was first seen, nanoseconds of `CLOCK_BOOTTIME`.
    pub born: u64,
}

/// Both ends of a connection, seen from this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// The protocol of the packets: a socket with IPv4-mapped addresses is IPv4.
    pub family: Option<Family>,
    /// This end.
    pub local: Option<Endpoint>,
    /// The other end.
    pub remote: Option<Endpoint>,
    /// Inode number of the network namespace.
    pub netns: Option<u32>,
}

/// The states of a connection, in the order in which it entered them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    steps: [(State, u64); MAX_STEPS],
    length: usize,
    /// The socket was already in the first state when the trace began; its time is when it was found there.
    pub began_before: bool,
}

/// A task that acted on a socket in its own context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// Process id in the initial pid namespace.
    pub pid: u32,
    /// Thread id; `None` where only the process is known.
    pub tid: Option<u32>,
    /// Real user id in the initial user namespace.
    pub uid: u32,
    /// The thread's name, up to 15 bytes, padded with zeros.
    pub comm: [u8; 16],
    /// Address of its `mm_struct`, which distinguishes one program image from the next; 0 once the task has
    /// released it.
    pub mm: u64,
    /// What it was doing.
    pub act: Activity,
    /// Key of its user stack; `None` if none was taken.
    pub user_stack: Option<u64>,
    /// Key of its kernel stack.
    pub kernel_stack: Option<u64>,
}

/// What a task was doing when it acted on a socket.
///
/// The state of the task takes precedence over the system call: a task that exits still shows the call in
/// which it slept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// It was exiting by itself.
    Exit,
    /// It was being ended by this signal.
    Signal(i32),
    /// It is a worker of `io_uring`.
    IoWorker,
    /// It was in this system call.
    Syscall(i64),
    /// The system call could not be read.
    Unknown,
}

/// What a task did to a socket after this side had acted for the first time, or from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaterAct {
    /// When, nanoseconds of `CLOCK_BOOTTIME`.
    pub at: u64,
    /// Who.
    pub task: Task,
    /// It destroyed the socket from outside, as `ss -K` does.
    pub destroyed: bool,
}

/// What waits to be sent on a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendQueue {
    /// Sequence numbers written and not sent yet; a FIN counts as one.
    pub unsent: u32,
    /// Sequence numbers sent and not acknowledged yet.
    pub in_flight: u32,
    /// Probes of the peer's window that it has not answered.
    pub probes: u32,
}

/// A task with a claim to a socket, and how it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claimant {
    /// It had the socket open at the last search of all descriptors.
    Descriptor(Task),
    /// It listens on the port by which the connection came in, and had not accepted it.
    Listener(Task),
}

/// The first step of the teardown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FirstMove {
    /// Which side made it; `None` if the end itself was the first thing that happened.
    pub by: Option<Side>,
    /// When, nanoseconds of `CLOCK_BOOTTIME`; `None` if that was before the trace.
    pub at: Option<u64>,
    /// The socket's counters then.
    pub sample: Sample,
}

/// One side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// An application of this host.
    Local,
    /// The peer.
    Peer,
}

/// The kernel's counters of a socket at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// Payload sent, bytes, each counted once.
    pub bytes_sent: Option<u64>,
    /// Payload received, bytes, each counted once.
    pub bytes_received: Option<u64>,
    /// Segments that were retransmitted.
    pub retransmits: Option<u32>,
    /// Smoothed round trip time, microseconds; `None` also if it was never measured.
    pub rtt_us: Option<u32>,
    /// Bytes received that the application has not read.
    pub unread: Option<u32>,
    /// Bytes written that the peer has not acknowledged.
    pub unacknowledged: Option<u32>,
    /// Jiffies since payload was last sent; `None` also if none ever was.
    pub sent_ago: Option<u32>,
    /// Jiffies since payload was last received; `None` also if none ever was.
    pub received_ago: Option<u32>,
    /// `TCP_USER_TIMEOUT`, milliseconds; `None` also if it is not set.
    pub user_timeout: Option<u32>,
    /// Sequence numbers received that the application has not consumed: `unread`, plus one for a FIN that it
    /// has not read. `ss` shows this as Recv-Q.
    pub recv_queue: Option<u32>,
}

/// How a socket came to CLOSE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "the kernel's flags are independent of each other")]
pub struct SocketEnd {
    /// When, nanoseconds of `CLOCK_BOOTTIME`.
    pub at: u64,
    /// `sk_err`: 0 if there was no error; `None` if it could not be read.
    pub error: Option<i32>,
    /// `sk_shutdown`: whether both directions had been shut down.
    pub shut_down: bool,
    /// Whether a process held the socket's lock.
    pub locked: bool,
    /// `SOCK_DEAD`: no descriptor referred to it any more. `None` if the flags could not be read.
    pub orphan: Option<bool>,
    /// `SO_LINGER` was on with a timeout of 0.
    pub linger_zero: bool,
    /// `TCP_LINGER2` was negative, so the socket was not to wait in FIN_WAIT2 after `close()`.
    pub no_fin_wait2: bool,
    /// Where the kernel may send a RST that belongs to this end, afterwards.
    pub reset_follows: Option<Follows>,
}

/// Where the kernel may send a RST after it has set a socket to CLOSE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follows {
    /// In the same system call: `__tcp_close()` and `tcp_disconnect()` change the state first.
    InSyscall,
    /// In the same softirq: `tcp_rcv_state_process()` found data for a connection that this side has closed.
    InSoftirq,
}

/// A RST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rst {
    /// When, nanoseconds of `CLOCK_BOOTTIME`.
    pub at: u64,
    /// Which way it went.
    pub direction: Direction,
    /// The number in `enum sk_rst_reason`; `None` on kernels that give none.
    pub reason: Option<u32>,
    /// State of the socket at that moment; `None` without a socket.
    pub state: Option<State>,
    /// It answered a packet; otherwise the kernel sent it unprompted.
    pub answer: bool,
    /// It was received in a state in which `tcp_reset()` also runs for late data, without any RST from the
    /// peer.
    pub ambiguous: bool,
    /// TTL of a RST that was received.
    pub ttl: Option<u8>,
    /// TTL of the peer's first packet.
    pub handshake_ttl: Option<u8>,
}

impl SendQueue {
    /// Whether the peer's receive window is closed and the peer responds. Everything that was sent is
    /// acknowledged, so only the window can hold the rest back, and each probe was answered, except perhaps
    /// the last one, which may be on its way.
    pub fn is_shut_out(&self) -> bool {
        self.unsent > 0 && self.in_flight == 0 && self.probes <= 1
    }

    /// Payload that was not sent yet, on a socket in `state`. A FIN is the last thing in the queue.
    pub fn unsent_payload(&self, state: State) -> u32 {
        let has_fin = matches!(state, State::FinWait1 | State::Closing | State::LastAck);
        self.unsent.saturating_sub(u32::from(has_fin))
    }
}

impl Life {
    /// Whether the socket was destroyed from outside, as `ss -K` does. A connection in the accept queue of a
    /// listener that is destroyed ends without an error: `tcp_abort()` stops the listener as `close()` does.
    /// But that happens in the system call that sends a netlink message, and a process closes no listener in
    /// such a call, unless it is killed in it.
    pub fn is_destroyed(&self) -> bool {
        const SENDS: [libc::c_long; 5] =
            [libc::SYS_sendmsg, libc::SYS_sendmmsg, libc::SYS_sendto, libc::SYS_write, libc::SYS_writev];
        let sends = |task: Task| matches!(task.act, Activity::Syscall(number) if SENDS.contains(&number));
        self.error() == Some(libc::ECONNABORTED) || self.is_unaccepted() && self.actor.is_some_and(sends)
    }

    /// Whether it ended in the accept queue of a listener that closed: it was alive, but had no descriptor.
    pub fn is_unaccepted(&self) -> bool {
        self.inode.is_none()
            && self.actor.is_some()
            && self.end.is_some_and(|end| end.error == Some(0) && !end.locked && end.orphan == Some(false))
    }

    /// The task that acted first for this side. A task that destroyed a listener from outside does not count.
    pub fn own_actor(&self) -> Option<&Task> {
        self.actor.as_ref().filter(|_| !(self.is_unaccepted() && self.is_destroyed()))
    }

    /// When the first act of this side was, nanoseconds of `CLOCK_BOOTTIME`: it sent a FIN, or it ended the
    /// connection at once. `None` if there was none, or if it was before the trace.
    pub fn acted_at(&self) -> Option<u64> {
        self.own_actor()?;
        let is_fin = |state| matches!(state, State::FinWait1 | State::LastAck);
        let steps = self.path.steps();
        let seen_from = usize::from(self.path.began_before);
        if let Some((_, at)) = steps.iter().skip(seen_from).find(|(state, _)| is_fin(*state)) {
            return Some(*at);
        }
        let was_before = |state| is_fin(state) || matches!(state, State::FinWait2 | State::Closing);
        if steps.first().is_some_and(|(state, _)| was_before(*state)) {
            return None;
        }
        self.end.map(|end| end.at)
    }

    /// `sk_err` at the end; 0 if there was no error, `None` while it lives or if it could not be read.
    pub fn error(&self) -> Option<i32> {
        self.end.and_then(|end| end.error)
    }

    /// Payload written that the peer has not acknowledged. A SYN and a FIN take a sequence number each, but
    /// carry no payload.
    pub fn unacknowledged_payload(&self) -> Option<u32> {
        let unacknowledged = self.sample.unacknowledged?;
        let flag = match self.state {
            Some(State::SynSent | State::SynRecv | State::FinWait1 | State::Closing | State::LastAck) => 1,
            _ => 0,
        };
        Some(unacknowledged.saturating_sub(flag))
    }

    /// Which side moved first.
    pub fn moved_first(&self) -> Option<Side> {
        self.first_move.and_then(|first| first.by)
    }
}

impl Path {
    /// No state was seen.
    pub const EMPTY: Self = Self { steps: [(State::Close, 0); MAX_STEPS], length: 0, began_before: false };

    /// Adds a state, with the time when it was entered. If there is no more room, the last state is
    /// overwritten.
    pub fn push(&mut self, state: State, at: u64) {
        let place = self.length.min(MAX_STEPS - 1);
        self.steps[place] = (state, at);
        self.length = place + 1;
    }

    /// The states, and when each was entered, nanoseconds of `CLOCK_BOOTTIME`.
    pub fn steps(&self) -> &[(State, u64)] {
        &self.steps[..self.length]
    }

    /// Whether the connection was ever in this state.
    pub fn contains(&self, state: State) -> bool {
        self.steps().iter().any(|(step, _)| *step == state)
    }

    /// Nanoseconds between entering `state` and leaving it; `None` if it was never there, has not left it, or
    /// was there before the trace.
    pub fn time_in(&self, state: State) -> Option<u64> {
        let entered = self.steps().iter().position(|(step, _)| *step == state)?;
        let (_, left) = self.steps().get(entered + 1)?;
        (entered > 0 || !self.began_before).then(|| left.saturating_sub(self.steps()[entered].1))
    }
}

impl FromIterator<(State, u64)> for Path {
    fn from_iter<T: IntoIterator<Item = (State, u64)>>(steps: T) -> Self {
        let mut path = Self::EMPTY;
        for (state, at) in steps {
            path.push(state, at);
        }
        path
    }
}

impl Task {
    /// The thread's name.
    pub fn comm(&self) -> String {
        name(&self.comm)
    }
}

/// The name of a task, up to 15 bytes, padded with zeros.
pub fn name(comm: &[u8; 16]) -> String {
    let length = comm.iter().position(|byte| *byte == 0).unwrap_or(comm.len());
    String::from_utf8_lossy(&comm[..length]).into_owned()
}

/// Lives, tasks and RSTs for tests, to be changed with the struct update syntax.
#[cfg(test)]
pub(crate) mod examples {
    use super::*;

    /// A task in this system call.
    pub(crate) fn task(pid: u32, act: Activity) -> Task {
        Task { pid, tid: Some(pid), uid: 0, comm: [0; 16], mm: 0, act, user_stack: None, kernel_stack: None }
    }

    /// A RST that answered a packet; nothing else is known about it.
    pub(crate) const RESET: Rst = Rst {
        at: 9,
        direction: Direction::Sent,
        reason: None,
        state: None,
        answer: true,
        ambiguous: false,
        ttl: None,
        handshake_ttl: None,
    };

    /// An end without an error, of a socket that a descriptor refers to.
    pub(crate) const END: SocketEnd = SocketEnd {
        at: 10,
        error: Some(0),
        shut_down: false,
        locked: false,
        orphan: Some(false),
        linger_zero: false,
        no_fin_wait2: false,
        reset_follows: None,
    };

    /// A live socket; nothing else is known about it.
    pub(crate) fn unknown() -> Life {
        Life {
            id: SocketId { address: 0xffff_8880_0000_1000, born: 1 },
            endpoints: Endpoints::default(),
            cookie: None,
            role: None,
            established: None,
            path: Path::EMPTY,
            state: None,
            inode: None,
            opener: None,
            actor: None,
            holder: None,
            first_move: None,
            sample: Sample::default(),
            send_queue: None,
            jiffies: None,
            end: None,
            reset: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_close_wait() {
        let path = |steps: &[(State, u64)]| steps.iter().copied().collect::<Path>();
        let waits = [(State::Established, 5), (State::CloseWait, 100)];
        assert_eq!(path(&waits).time_in(State::CloseWait), None, "it has not left yet");
        let left = [(State::CloseWait, 100), (State::LastAck, 350)];
        assert_eq!(path(&left).time_in(State::CloseWait), Some(250));
        assert_eq!(path(&left).time_in(State::FinWait1), None);
        let found = Path { began_before: true, ..path(&left) };
        assert_eq!(found.time_in(State::CloseWait), None, "it was there before the trace");
    }

    #[test]
    fn a_long_path_keeps_its_last_state() {
        let path: Path = (0..20).map(|at| (State::SynRecv, at)).chain([(State::Close, 20)]).collect();
        assert_eq!(path.steps().len(), MAX_STEPS);
        assert_eq!(path.steps().last(), Some(&(State::Close, 20)));
    }
}
