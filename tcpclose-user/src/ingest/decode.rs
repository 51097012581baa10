//! Bytes of a ring buffer → records, in terms of the domain ([`life`](super::life)).
//!
//! Sentinels, tags and byte orders end here. There is no `unsafe`, and no input causes a panic: it is either
//! a whole record of this layout, or an error that says what was found.

use std::{borrow::Cow, fmt, net::Ipv6Addr};

use tcpclose_common::{
    record::{
        ActRecord, Address, ConnectionRecord, Header, Interpreted, MAX_STEPS, OwnerRecord, ProcessRecord,
        StackCopy, UNKNOWN_U32, UNKNOWN_U64, VERSION, act, direction, first_move, holder, relation, role,
        tag,
    },
    tcp::{is_one_of, shutdown, sock_flag, state, task_flag},
};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::{
    abi,
    life::{
        Activity, Claimant, Endpoints, FirstMove, Follows, LaterAct, Life, Path, Rst, Sample, SendQueue,
        Side, SocketEnd, SocketId, Task,
    },
};
use crate::tcp::{Direction, Endpoint, Family, Role, State};

/// A record of the kernel half.
#[derive(Clone, Debug, PartialEq)]
pub enum Record<'a> {
    /// One end of a connection is over.
    Close(Box<Life>),
    /// A RST was sent or received: the socket at that moment, and the RST.
    Reset(Box<Life>, Rst),
    /// A task closed the descriptor of a socket that had already ended.
    Closer(SocketId, Task),
    /// A task has a descriptor of a socket that has already ended.
    StillOpen(SocketId, Task),
    /// A task has this descriptor of a socket whose holders were asked for.
    Descriptor(SocketId, Task, u32),
    /// A task acted on a socket after this side had acted, or from outside.
    Act(SocketId, LaterAct),
    /// A socket in a teardown state, as it is now.
    Stuck(Box<Life>),
    /// A process touched a socket for the first time.
    Process(NewProcess),
    /// A copy of a user stack, and its bytes.
    Stack(StackCopy, &'a [u8]),
    /// The frames of an interpreter, for the copy of a stack that follows.
    Interpreted(Box<Interpreted>),
}

impl Record<'_> {
    /// When the event occurred that a line reports, nanoseconds of `CLOCK_BOOTTIME`; `None` if the record is
    /// not about one.
    pub fn at(&self) -> Option<u64> {
        match self {
            Self::Close(life) => Some(life.end.as_ref()?.at),
            Self::Reset(_, rst) => Some(rst.at),
            _ => None,
        }
    }
}

/// A process, or a new program image of a known one, that touched a socket for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewProcess {
    /// Process id in the initial pid namespace.
    pub pid: u32,
    /// Process id in the pid namespace of tcpclose, if that is another one and the process is in it.
    pub local: Option<u32>,
    /// Address of its `mm_struct`; 0 if it has released it.
    pub mm: u64,
    /// The name of its main thread, padded with zeros; all zero if it could not be read.
    pub comm: [u8; 16],
}

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// They are shorter than a header. The value is their length.
    Short(usize),
    /// They have another layout version.
    Version(u16),
    /// Their tag is unknown.
    Tag(u16),
    /// Their length does not match their tag, or the length in their header.
    Length {
        /// The tag.
        tag: u16,
        /// Length found, bytes.
        found: usize,
        /// Length needed, bytes.
        expected: usize,
    },
    /// A field has a value that this version does not know.
    Value {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u32,
    },
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short(length) => write!(f, "a record of {length} bytes is shorter than its header"),
            Self::Version(version) => {
                write!(f, "a record has layout version {version}; this build reads version {VERSION}")
            }
            Self::Tag(tag) => write!(f, "a record has the unknown tag {tag}"),
            Self::Length { tag, found, expected } => {
                write!(f, "a record with tag {tag} has {found} bytes instead of {expected}")
            }
            Self::Value { field, value } => write!(f, "a record has the unknown value {value} in {field}"),
        }
    }
}

impl std::error::Error for DecodeError {}

/// Decodes one record.
///
/// # Errors
/// See [`DecodeError`].
pub fn decode(bytes: &[u8]) -> Result<Record<'_>, DecodeError> {
    let (header, _) = Header::read_from_prefix(bytes).map_err(|_| DecodeError::Short(bytes.len()))?;
    if header.version != VERSION {
        return Err(DecodeError::Version(header.version));
    }
    Ok(match header.tag {
        tag::CLOSE => Record::Close(boxed_life(&*whole(header, bytes)?)),
        tag::STUCK => Record::Stuck(boxed_life(&*whole(header, bytes)?)),
        tag::RESET => {
            let connection = whole::<ConnectionRecord>(header, bytes)?;
            let unknown =
                DecodeError::Value { field: "reset.direction", value: u32::from(connection.reset.direction) };
            Record::Reset(boxed_life(&connection), reset(&connection).ok_or(unknown)?)
        }
        tag::OWNER => owner(&*whole(header, bytes)?)?,
        tag::ACT => later_act(&*whole(header, bytes)?)?,
        tag::PROCESS => {
            let process = whole::<ProcessRecord>(header, bytes)?;
            Record::Process(NewProcess {
                pid: process.pid,
                local: (process.local != 0).then_some(process.local),
                mm: process.mm,
                comm: process.comm,
            })
        }
        tag::STACK => stack(header, bytes)?,
        tag::INTERPRETED => Record::Interpreted(Box::new(whole::<Interpreted>(header, bytes)?.into_owned())),
        unknown => return Err(DecodeError::Tag(unknown)),
    })
}

/// The record that fills `bytes`, in place if it is aligned. It is copied if not, as in a file, or if it
/// extended beyond the end of the ring.
fn whole<T>(header: Header, bytes: &[u8]) -> Result<Cow<'_, T>, DecodeError>
where
    T: FromBytes + KnownLayout + Immutable + Clone,
{
    let wrong = DecodeError::Length { tag: header.tag, found: bytes.len(), expected: size_of::<T>() };
    if usize::try_from(header.length) != Ok(size_of::<T>()) {
        return Err(wrong);
    }
    match T::ref_from_bytes(bytes) {
        Ok(record) => Ok(Cow::Borrowed(record)),
        Err(_) => T::read_from_bytes(bytes).map(Cow::Owned).map_err(|_| wrong),
    }
}

/// The memory is allocated first, so that the compiler can write the life there, instead of copying it.
fn boxed_life(connection: &ConnectionRecord) -> Box<Life> {
    Box::write(Box::new_uninit(), life(connection))
}

fn life(connection: &ConnectionRecord) -> Life {
    let ended = connection.ended != 0;
    let moved = (connection.moved != 0).then_some(connection.moved);
    let by = match connection.first_move {
        first_move::LOCAL => Some(Side::Local),
        first_move::PEER => Some(Side::Peer),
        _ => None,
    };
    // The jiffies were read with the sample: at the end or, if it has not ended, when the RST was sent or
    // received.
    let read_at = if ended { connection.ended } else { connection.reset.at };
    Life {
        id: SocketId { address: connection.sock, born: connection.born },
        endpoints: endpoints(&connection.endpoints),
        cookie: (connection.cookie != 0).then_some(connection.cookie),
        role: match connection.role {
            role::CLIENT => Some(Role::Client),
            role::SERVER => Some(Role::Server),
            _ => None,
        },
        established: (connection.established != 0).then_some(connection.established),
        path: path(connection),
        state: State::from_kernel(connection.last_state),
        inode: (connection.inode != 0).then_some(connection.inode),
        opener: task(&connection.opener),
        actor: task(&connection.actor),
        holder: match (connection.holder_kind, task(&connection.holder)) {
            (holder::DESCRIPTOR, Some(task)) => Some(Claimant::Descriptor(task)),
            (holder::LISTENER, Some(task)) => Some(Claimant::Listener(task)),
            _ => None,
        },
        first_move: (by.is_some() || moved.is_some()).then(|| FirstMove {
            by,
            at: moved,
            sample: sample(&connection.at_move),
        }),
        sample: sample(&connection.at_end),
        send_queue: send_queue(connection),
        jiffies: (connection.jiffies != 0 && read_at != 0).then_some((connection.jiffies, read_at)),
        end: ended.then(|| end(connection)),
        reset: reset(connection),
    }
}

fn end(connection: &ConnectionRecord) -> SocketEnd {
    let flags = (connection.sock_flags != UNKNOWN_U64).then_some(connection.sock_flags);
    SocketEnd {
        at: connection.ended,
        error: (connection.error != i32::MIN).then_some(connection.error),
        shut_down: connection.shutdown == shutdown::BOTH,
        locked: connection.owned != 0,
        orphan: flags.map(|flags| flags & sock_flag::DEAD != 0),
        linger_zero: flags.is_some_and(|flags| flags & sock_flag::LINGER != 0) && connection.linger == 0,
        no_fin_wait2: connection.no_fin_wait2 != 0,
        reset_follows: reset_follows(connection),
    }
}

/// Whether this host may send a RST after the state change that ended the connection, and where.
fn reset_follows(connection: &ConnectionRecord) -> Option<Follows> {
    let (from, flags) = (connection.last_state, connection.sock_flags);
    let (error, owned) = (connection.error, connection.owned != 0);
    let came_before = connection.reset.at != 0 && connection.reset.at <= connection.ended;
    if from == 0 {
        // No program saw the end.
        return None;
    }
    if connection.reset.ambiguous != 0 {
        return Some(Follows::InSoftirq);
    }
    if error != 0 && error != i32::MIN || came_before {
        return None;
    }
    let is_known = flags != UNKNOWN_U64;
    let alive = is_known && flags & sock_flag::DEAD == 0;
    let done = is_known && flags & sock_flag::DONE != 0;
    if from == state::FIN_WAIT2 && !done {
        // Usually the small TIME_WAIT socket takes over here. But if the segment that acknowledged our FIN
        // brought data, tcp_rcv_state_process() aborts in the same way, and answers with a RST. So does
        // __tcp_close(), whose socket is an orphan by then, if the socket may not wait.
        return Some(if alive { Follows::InSyscall } else { Follows::InSoftirq });
    }
    // Our FIN was not acknowledged, so this is not an orderly end, and there was no error.
    let unanswered = is_one_of(from, &[state::FIN_WAIT1, state::LAST_ACK, state::CLOSING])
        && !matches!(connection.at_end.unacknowledged, 0 | UNKNOWN_U32);
    let is_abort =
        alive && is_one_of(from, &[state::ESTABLISHED, state::CLOSE_WAIT, state::SYN_RECV, state::FIN_WAIT1]);
    (owned && unanswered || is_abort).then_some(Follows::InSyscall)
}

/// The RST of a connection; `None` if there was none.
fn reset(connection: &ConnectionRecord) -> Option<Rst> {
    let reset = &connection.reset;
    let direction = match reset.direction {
        direction::SENT => Direction::Sent,
        direction::RECEIVED => Direction::Received,
        _ => return None,
    };
    let received = |ttl: u8| (direction == Direction::Received && ttl != 0).then_some(ttl);
    Some(Rst {
        at: reset.at,
        direction,
        reason: known(reset.reason),
        state: State::from_kernel(reset.state),
        answer: reset.answer != 0,
        ambiguous: reset.ambiguous != 0,
        ttl: received(reset.ttl),
        handshake_ttl: received(reset.handshake_ttl),
    })
}

fn owner(owner: &OwnerRecord) -> Result<Record<'static>, DecodeError> {
    let unknown = |field, value| DecodeError::Value { field, value };
    let id = SocketId { address: owner.sock, born: owner.born };
    let task = task(&owner.task).ok_or(unknown("owner.task.pid", 0))?;
    Ok(match owner.relation {
        relation::CLOSED => Record::Closer(id, task),
        relation::OPEN => Record::StillOpen(id, task),
        relation::ASKED => Record::Descriptor(id, task, owner.fd),
        value => return Err(unknown("owner.relation", value)),
    })
}

fn later_act(record: &ActRecord) -> Result<Record<'static>, DecodeError> {
    let unknown = |field, value| DecodeError::Value { field, value };
    let id = SocketId { address: record.sock, born: record.born };
    let task = task(&record.task).ok_or(unknown("act.task.pid", 0))?;
    let destroyed = match record.kind {
        act::AGAIN => false,
        act::DESTROYED => true,
        value => return Err(unknown("act.kind", value)),
    };
    Ok(Record::Act(id, LaterAct { at: record.at, task, destroyed }))
}

/// What waits to be sent on a socket that was inspected.
fn send_queue(connection: &ConnectionRecord) -> Option<SendQueue> {
    let (unsent, unacknowledged) = (known(connection.unsent)?, known(connection.at_end.unacknowledged)?);
    // Without the socket's lock, the two may have been read at different moments.
    let in_flight = unacknowledged.saturating_sub(unsent);
    Some(SendQueue { unsent, in_flight, probes: known(connection.probes)? })
}

/// A task; `None` for process id 0, which stands for no task.
fn task(task: &tcpclose_common::record::RawTask) -> Option<Task> {
    let act = if task.flags & task_flag::EXITING != 0 {
        // wait(2): the low seven bits are the signal. PF_SIGNALED is also set on the siblings of an
        // exit_group().
        match task.exit_code & 0x7f {
            0 => Activity::Exit,
            signal => Activity::Signal(signal),
        }
    } else if task.flags & task_flag::IO_WORKER != 0 {
        Activity::IoWorker
    } else if task.syscall == -1 {
        Activity::Unknown
    } else {
        Activity::Syscall(abi::native(task.syscall))
    };
    (task.pid != 0).then(|| Task {
        pid: task.pid,
        tid: (task.tid != 0).then_some(task.tid),
        uid: task.uid,
        comm: task.comm,
        mm: task.mm,
        act,
        user_stack: (task.user_stack != 0).then_some(task.user_stack),
        kernel_stack: (task.kernel_stack != 0).then_some(task.kernel_stack),
    })
}

fn sample(sample: &tcpclose_common::record::RawSample) -> Sample {
    let bytes_sent = (sample.bytes_sent != UNKNOWN_U64).then_some(sample.bytes_sent);
    let bytes_received = (sample.bytes_received != UNKNOWN_U64).then_some(sample.bytes_received);
    // The kernel sets both times when the connection is established, so they mean nothing before the first
    // byte.
    let since = |bytes: Option<u64>, ago: u32| known(ago).filter(|_| bytes.is_some_and(|bytes| bytes != 0));
    Sample {
        bytes_sent,
        bytes_received,
        retransmits: known(sample.retransmits),
        rtt_us: known(sample.rtt_us).filter(|rtt| *rtt != 0),
        unread: known(sample.unread),
        unacknowledged: known(sample.unacknowledged),
        sent_ago: since(bytes_sent, sample.sent_ago),
        received_ago: since(bytes_received, sample.received_ago),
        user_timeout: known(sample.user_timeout).filter(|millis| *millis != 0),
        recv_queue: known(sample.untaken),
    }
}

fn path(connection: &ConnectionRecord) -> Path {
    let length = usize::from(connection.steps).min(MAX_STEPS);
    let steps = connection.states.iter().zip(connection.times).take(length);
    let mut path: Path = steps.filter_map(|(state, at)| Some((State::from_kernel(*state)?, at))).collect();
    path.began_before = connection.found != 0;
    path
}

/// An endpoint is `None` if neither its address nor its port is known.
fn endpoints(ends: &tcpclose_common::record::RawEndpoints) -> Endpoints {
    let end = |address: Address, port: u16| {
        (address != [0; 4] || port != 0).then(|| Endpoint { address: ip(address).to_canonical(), port })
    };
    let (local, remote) = (end(ends.local, ends.local_port), end(ends.remote, ends.remote_port));
    let family = match remote.or(local) {
        Some(end) if ends.family != 0 => {
            Some(if end.address.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 })
        }
        _ => None,
    };
    Endpoints { family, local, remote, netns: known(ends.netns) }
}

fn ip(address: Address) -> Ipv6Addr {
    let mut octets = [0; 16];
    for (to, word) in octets.chunks_exact_mut(4).zip(address) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    octets.into()
}

fn known(value: u32) -> Option<u32> {
    (value != UNKNOWN_U32).then_some(value)
}

/// The bytes of the stack fill the rest of the record or a part of it.
fn stack(header: Header, bytes: &[u8]) -> Result<Record<'_>, DecodeError> {
    let (found, expected) = (bytes.len(), usize::try_from(header.length).unwrap_or(usize::MAX));
    let wrong = DecodeError::Length { tag: header.tag, found, expected };
    let (copy, rest) = StackCopy::read_from_prefix(bytes).map_err(|_| wrong)?;
    let length = usize::try_from(copy.bytes).unwrap_or(usize::MAX);
    if found != expected || length > rest.len() {
        return Err(wrong);
    }
    Ok(Record::Stack(copy, &rest[..length]))
}

#[cfg(test)]
#[expect(clippy::large_types_passed_by_value, reason = "wire records are built with the update syntax")]
mod tests {
    use std::net::Ipv4Addr;

    use tcpclose_common::{
        record::{self, RawReset, RawSample, RawTask},
        tcp::state,
    };
    use zerocopy::{FromZeros as _, IntoBytes};

    use super::*;

    fn wire_owner() -> OwnerRecord {
        let length = u32::try_from(size_of::<OwnerRecord>()).unwrap();
        OwnerRecord {
            header: Header { tag: tag::OWNER, version: VERSION, length },
            sock: 1,
            born: 2,
            task: RawTask { pid: 3, ..RawTask::NONE },
            relation: relation::CLOSED,
            fd: 0,
        }
    }

    fn decoded(mut connection: ConnectionRecord, tag: u16) -> Result<Record<'static>, DecodeError> {
        connection.header.tag = tag;
        match decode(connection.as_bytes())? {
            Record::Close(life) => Ok(Record::Close(life)),
            Record::Reset(life, reset) => Ok(Record::Reset(life, reset)),
            other => panic!("{other:?}"),
        }
    }

    fn closed(connection: ConnectionRecord) -> Life {
        match decoded(connection, tag::CLOSE) {
            Ok(Record::Close(life)) => *life,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nothing_known_is_none_everywhere() {
        let life = closed(ConnectionRecord::NEW);
        assert_eq!(life.sample, Sample::default());
        assert_eq!(
            (life.cookie, life.role, life.established, life.state, life.inode),
            (None, None, None, None, None)
        );
        assert_eq!((life.opener, life.actor, life.holder), (None, None, None));
        assert_eq!((life.first_move, life.end, life.reset, life.jiffies), (None, None, None, None));
        assert_eq!((life.endpoints, life.path), (Endpoints::default(), Path::EMPTY));
    }

    #[test]
    fn an_end_has_its_facts() {
        let end = closed(ConnectionRecord { ended: 10, jiffies: 5, ..ConnectionRecord::NEW });
        assert_eq!(end.jiffies, Some((5, 10)));
        let unknown = end.end.unwrap();
        assert_eq!((unknown.error, unknown.orphan, unknown.linger_zero), (None, None, false));
        let lingers = ConnectionRecord {
            ended: 10,
            error: 0,
            sock_flags: sock_flag::LINGER,
            linger: 0,
            shutdown: shutdown::BOTH,
            last_state: state::FIN_WAIT2,
            ..ConnectionRecord::NEW
        };
        let end = closed(lingers).end.unwrap();
        assert_eq!(
            (end.error, end.orphan, end.linger_zero, end.shut_down),
            (Some(0), Some(false), true, true)
        );
        let timeout = closed(ConnectionRecord { linger: 500, ..lingers }).end.unwrap();
        assert!(!timeout.linger_zero);
    }

    #[test]
    fn a_reset_may_follow_an_end() {
        use state::{CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK, SYN_SENT};
        const ALIVE: u64 = 0;
        const ORPHAN: u64 = sock_flag::DEAD;
        let end = |last_state, sock_flags, unacknowledged| ConnectionRecord {
            ended: 10,
            error: 0,
            owned: 1,
            last_state,
            sock_flags,
            at_end: RawSample { unacknowledged, ..RawSample::UNKNOWN },
            ..ConnectionRecord::NEW
        };
        let follows = |connection| closed(connection).end.unwrap().reset_follows;
        let in_syscall = Some(Follows::InSyscall);
        for state in [ESTABLISHED, CLOSE_WAIT, FIN_WAIT1] {
            assert_eq!(follows(end(state, ALIVE, 0)), in_syscall, "{state}");
            assert_eq!(follows(end(state, ORPHAN, 0)), None, "{state}");
            assert_eq!(follows(end(state, UNKNOWN_U64, 0)), None, "{state}");
        }
        for state in [FIN_WAIT1, LAST_ACK, CLOSING] {
            assert_eq!(follows(end(state, ORPHAN, 1)), in_syscall, "{state}");
            assert_eq!(follows(end(state, ORPHAN, UNKNOWN_U32)), None, "{state}");
            assert_eq!(follows(ConnectionRecord { owned: 0, ..end(state, ORPHAN, 1) }), None, "{state}");
        }
        assert_eq!(follows(end(SYN_SENT, ALIVE, 1)), None);
        assert_eq!(follows(end(FIN_WAIT2, ALIVE, 0)), in_syscall);
        assert_eq!(follows(end(FIN_WAIT2, ORPHAN, 0)), Some(Follows::InSoftirq));
        assert_eq!(follows(end(FIN_WAIT2, ORPHAN | sock_flag::DONE, 0)), None);

        let aborted = end(ESTABLISHED, ALIVE, 0);
        assert_eq!(follows(ConnectionRecord { error: libc::ECONNRESET, ..aborted }), None);
        let reset = |at, ambiguous| RawReset { at, ambiguous, ..ConnectionRecord::NEW.reset };
        assert_eq!(follows(ConnectionRecord { reset: reset(9, 0), ..aborted }), None, "it came before");
        assert_eq!(follows(ConnectionRecord { reset: reset(11, 0), ..aborted }), in_syscall);
        let ambiguous = ConnectionRecord { error: libc::ECONNRESET, reset: reset(9, 1), ..aborted };
        assert_eq!(follows(ambiguous), Some(Follows::InSoftirq));
        assert_eq!(follows(ConnectionRecord { last_state: 0, ..aborted }), None, "no program saw the end");
    }

    #[test]
    fn what_a_task_was_doing() {
        let act = |flags, exit_code, syscall| {
            task(&RawTask { pid: 7, flags, exit_code, syscall, ..RawTask::NONE }).unwrap().act
        };
        // The system call in which an exiting task slept is meaningless, and so is PF_SIGNALED (0x400), which
        // exit_group() sets on the threads that it wakes.
        assert_eq!(act(task_flag::EXITING, 0x300, 202), Activity::Exit);
        assert_eq!(act(task_flag::EXITING | 0x400, 0x300, 202), Activity::Exit);
        assert_eq!(act(task_flag::EXITING, 9, 3), Activity::Signal(9));
        assert_eq!(act(task_flag::EXITING, 0x8b, -1), Activity::Signal(11), "0x80 says that it dumped core");
        assert_eq!(act(task_flag::IO_WORKER, 0, 3), Activity::IoWorker);
        assert_eq!(act(0, 0, 3), Activity::Syscall(3));
        assert_eq!(act(0, 0, -1), Activity::Unknown);
        assert_eq!(task(&RawTask::NONE), None);
    }

    #[test]
    fn times_of_data_need_data() {
        let wire = RawSample {
            bytes_sent: 0,
            bytes_received: 1,
            sent_ago: 5,
            received_ago: 7,
            rtt_us: 0,
            user_timeout: 0,
            ..RawSample::UNKNOWN
        };
        let sample = sample(&wire);
        assert_eq!((sample.sent_ago, sample.received_ago), (None, Some(7)));
        assert_eq!((sample.bytes_sent, sample.rtt_us, sample.user_timeout), (Some(0), None, None));
    }

    #[test]
    fn a_first_move_before_the_trace_has_no_time() {
        let found = ConnectionRecord { found: 1, first_move: first_move::PEER, ..ConnectionRecord::NEW };
        let first = closed(found).first_move.unwrap();
        assert_eq!((first.by, first.at), (Some(Side::Peer), None));
    }

    #[test]
    fn states_that_do_not_exist_are_left_out() {
        let mut connection = ConnectionRecord { steps: u8::MAX, ..ConnectionRecord::NEW };
        connection.states[..3].copy_from_slice(&[state::ESTABLISHED, 99, state::CLOSE]);
        connection.times[..3].copy_from_slice(&[1, 2, 3]);
        assert_eq!(closed(connection).path.steps(), [(State::Established, 1), (State::Close, 3)]);
    }

    #[test]
    fn a_reset_needs_a_direction() {
        let error = decoded(ConnectionRecord::NEW, tag::RESET).unwrap_err();
        assert_eq!(error, DecodeError::Value { field: "reset.direction", value: 0 });
        let mut connection = ConnectionRecord::NEW;
        (connection.reset.direction, connection.reset.at, connection.reset.ttl) = (direction::SENT, 4, 64);
        let Ok(Record::Reset(life, reset)) = decoded(connection, tag::RESET) else { panic!() };
        assert_eq!((life.reset, reset.ttl), (Some(reset), None), "the TTL of a RST that this host sent");
        connection.reset.direction = direction::RECEIVED;
        let Ok(Record::Reset(_, reset)) = decoded(connection, tag::RESET) else { panic!() };
        assert_eq!((reset.ttl, reset.handshake_ttl), (Some(64), None));
    }

    #[test]
    fn mapped_addresses_are_ipv4() {
        let words = |text: &str| -> Address {
            let octets = text.parse::<Ipv6Addr>().unwrap().octets();
            std::array::from_fn(|word| u32::from_ne_bytes(octets[word * 4..][..4].try_into().unwrap()))
        };
        let mut wire = ConnectionRecord::NEW.endpoints;
        assert_eq!(endpoints(&wire), Endpoints::default());
        wire.family = 10;
        wire.local = record::mapped(u32::from(Ipv4Addr::new(10, 0, 0, 1)).to_be());
        wire.remote = words("::ffff:10.0.0.2");
        (wire.local_port, wire.remote_port) = (80, 4711);
        let ends = endpoints(&wire);
        assert_eq!(ends.family, Some(Family::Ipv4));
        assert_eq!(ends.local.unwrap().address.to_string(), "10.0.0.1");
        assert_eq!(ends.remote.unwrap().address.to_string(), "10.0.0.2");
        wire.remote = words("fd00::2");
        assert_eq!(endpoints(&wire).family, Some(Family::Ipv6));
    }

    #[test]
    fn what_an_owner_has_to_do_with_the_socket() {
        let with = |relation, pid| {
            let wire = wire_owner();
            let task = RawTask { pid, ..wire.task };
            owner(&OwnerRecord { task, relation, fd: 9, ..wire })
        };
        let id = SocketId { address: 1, born: 2 };
        assert!(matches!(with(relation::CLOSED, 3), Ok(Record::Closer(socket, _)) if socket == id));
        assert!(matches!(with(relation::OPEN, 3), Ok(Record::StillOpen(socket, _)) if socket == id));
        assert!(matches!(with(relation::ASKED, 3), Ok(Record::Descriptor(socket, _, 9)) if socket == id));
        assert!(matches!(with(77, 3), Err(DecodeError::Value { field: "owner.relation", value: 77 })));
        assert!(matches!(with(relation::CLOSED, 0), Err(DecodeError::Value { field: "owner.task.pid", .. })));
    }

    #[test]
    fn every_wrong_length_is_named() {
        let wire = wire_owner();
        let bytes = wire.as_bytes();
        for length in 0..bytes.len() {
            let error = decode(&bytes[..length]).unwrap_err();
            if length < size_of::<Header>() {
                assert_eq!(error, DecodeError::Short(length));
            } else {
                let expected = size_of::<OwnerRecord>();
                assert_eq!(error, DecodeError::Length { tag: tag::OWNER, found: length, expected });
            }
        }
        let mut longer = bytes.to_vec();
        longer.push(0);
        assert!(matches!(decode(&longer), Err(DecodeError::Length { .. })));
    }

    #[test]
    fn a_stack_has_the_bytes_that_its_header_promises() {
        let header = size_of::<StackCopy>();
        let mut copy = StackCopy::new_zeroed();
        let length = u32::try_from(header + 16).expect("it is small");
        copy.header = Header { tag: tag::STACK, version: VERSION, length };
        copy.bytes = 8;
        let record = |copy: StackCopy| [copy.as_bytes(), &[1; 8], &[2; 8]].concat();
        assert_eq!(decode(&record(copy)), Ok(Record::Stack(copy, &[1; 8])));
        let long = StackCopy { bytes: 17, ..copy };
        assert!(matches!(decode(&record(long)), Err(DecodeError::Length { .. })));
        let whole = record(copy);
        let error = DecodeError::Length { tag: tag::STACK, found: header + 8, expected: header + 16 };
        assert_eq!(decode(&whole[..header + 8]), Err(error));
        assert!(matches!(decode(&whole[..header - 1]), Err(DecodeError::Length { .. })));
    }

    #[test]
    fn a_header_that_lies_about_its_length() {
        let mut lying = wire_owner();
        lying.header.length += 8;
        let error = decode(lying.as_bytes()).unwrap_err();
        assert!(matches!(error, DecodeError::Length { .. }), "{error}");
    }

    #[test]
    fn unknown_kinds_and_versions() {
        let mut unknown = wire_owner();
        unknown.header.tag = 77;
        assert_eq!(decode(unknown.as_bytes()), Err(DecodeError::Tag(77)));
        unknown.header.version = VERSION + 1;
        assert_eq!(decode(unknown.as_bytes()), Err(DecodeError::Version(VERSION + 1)));
    }
}
