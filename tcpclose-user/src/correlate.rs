//! Records → endings: what belongs together is put together, and held back for no longer than it takes.
//!
//! The kernel half writes a record when a socket reaches CLOSE and one for each RST. Three things come after the fact:
//! the RST of an application's abort (`__tcp_close()` changes the state first), the RST that unmasks a `tcp_reset()` as
//! this host's own abort on late data, and the owner of a socket that ended in softirq. The first two follow within
//! microseconds on the same CPU; the third whenever the application closes the descriptor.

use std::collections::{BTreeMap, HashMap};

use tcpclose_common::{
    record::{Connection, Owner, Task, direction, holds, reset_after},
    tcp::state,
};

/// How many endings may wait at once. Beyond it the oldest goes as it is.
const MAX_WAITING: usize = 65_536;

/// How much later than the end its RST may come, nanoseconds. The kernel is not preempted between the two, but the
/// processor of a virtual machine may be taken away there. Longer is another life at the same address.
const RESET_WITHIN: u64 = 1_000_000_000;

/// How long after an end in softirq the same softirq has surely sent its RST, nanoseconds.
const SOFTIRQ_IS_OVER: u64 = 5_000_000;

/// How many reads of the ring an ending waits for its RST, and for its owner: at ten reads a second, both stay within
/// the quarter of a second that the contract allows.
const PATIENCE: u8 = 2;

/// What happened to one end of a connection, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Its RSTs, in order; each is a record of its own whose `reset` tells of it.
    pub resets: Vec<Connection>,
    /// Its end; `None` for a RST that ended nothing.
    pub close: Option<Connection>,
    /// Who closed its descriptor afterwards, or has it open still.
    pub late_owner: Option<LateOwner>,
    /// A look at all descriptors since its end has shown that nobody has it open: whoever had it before has handed it on.
    pub unheld: bool,
}

/// An owner that turned up after the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LateOwner {
    /// Who.
    pub task: Task,
    /// It did not close the descriptor but has it open.
    pub holds: bool,
}

impl Ending {
    /// The record with the most facts.
    pub fn connection(&self) -> Option<&Connection> {
        self.close.as_ref().or(self.resets.last())
    }

    /// Whether its owner is still to be found out: it had a descriptor when it ended, and nobody has acted on it. Who
    /// opened it may have handed it on.
    pub fn lacks_owner(&self) -> bool {
        self.late_owner.is_none()
            && self.close.as_ref().is_some_and(|close| close.actor.pid == 0 && close.inode != 0)
    }

    fn lacks_reset(&self) -> bool {
        self.close.as_ref().is_some_and(|close| close.reset_after != reset_after::NEVER)
    }
}

struct Waiting {
    ending: Ending,
    reads: u8,
}

/// See the module.
#[derive(Default)]
pub struct Correlator {
    /// By order of arrival.
    waiting: BTreeMap<u64, Waiting>,
    /// Socket address → its latest entry in `waiting`.
    by_sock: HashMap<u64, u64>,
    arrivals: u64,
}

impl Correlator {
    /// A RST. Returns what is whole by now.
    pub fn reset(&mut self, reset: Connection) -> Option<Ending> {
        let of_own_accord = reset.reset.answer == 0 && reset.ended == 0 && reset.steps != 0;
        if reset.reset.direction == direction::RECEIVED || of_own_accord {
            // Its CLOSE follows at once: tcp_reset(), or tcp_abort() and the keepalive timer, which send it first.
            return self.wait(Ending { resets: vec![reset], close: None, late_owner: None, unheld: false });
        }
        let Some((arrival, close)) = self.awaiting_reset(&reset) else {
            return Some(Ending { resets: vec![reset], close: None, late_owner: None, unheld: false });
        };
        // Of its own accord the kernel sends one too where a socket that was closed goes: __tcp_close().
        let late_data =
            close.reset_after == reset_after::SOFTIRQ && reset.reset.answer != 0 && close.no_fin_wait2 == 0;
        let mut ending = self.take(arrival)?;
        let close = ending.close.as_mut()?;
        close.reset_after = reset_after::NEVER;
        close.reset = reset.reset;
        if close.reset.state == state::CLOSE {
            // The record of the RST does not know any more what it was in before.
            close.reset.state = close.last_state;
        }
        if late_data {
            // Nothing was received but data, to which this RST is the answer: one RST, one line.
            ending.resets.clear();
            close.reset.ambiguous = 1;
        }
        // The record of the RST may have come after the socket's entry was gone, so the line is told from the end's.
        ending.resets.push(*close);
        self.whole_or_wait(ending)
    }

    /// An end. Returns what is whole by now.
    pub fn close(&mut self, close: Connection) -> Option<Ending> {
        let mut ending = Ending { resets: Vec::new(), close: None, late_owner: None, unheld: false };
        if let Some(&arrival) = self.by_sock.get(&close.sock) {
            let is_its_reset = self.waiting.get(&arrival).is_some_and(|waiting| {
                waiting.ending.close.is_none()
                    && waiting.ending.resets.iter().all(|reset| reset.born == close.born)
            });
            if is_its_reset {
                // The end knows more than what came before it.
                let before = self.take(arrival).map(|before| before.resets).unwrap_or_default();
                for reset in before {
                    let mut told = close;
                    told.reset = reset.reset;
                    ending.resets.push(told);
                }
            }
        }
        ending.close = Some(close);
        self.whole_or_wait(ending)
    }

    /// Who closed the descriptor of a socket that had ended before. Returns what is whole by now.
    pub fn owner(&mut self, owner: &Owner) -> Option<Ending> {
        let &arrival = self.by_sock.get(&owner.sock)?;
        let close = self.waiting.get(&arrival)?.ending.close?;
        if close.born != owner.born {
            return None;
        }
        if owner.holds == holds::CLOSED {
            let mut ending = self.take(arrival)?;
            ending.late_owner = Some(LateOwner { task: owner.task, holds: false });
            return self.whole_or_wait(ending);
        }
        // Of several holders the one who opened it counts, else the first. Told when the ring has been read to its end.
        let late_owner = &mut self.waiting.get_mut(&arrival)?.ending.late_owner;
        if late_owner.is_none() || owner.task.pid == close.opener.pid {
            *late_owner = Some(LateOwner { task: owner.task, holds: true });
        }
        None
    }

    /// What has arrived until now, for [`searched`](Self::searched).
    pub fn arrivals(&self) -> u64 {
        self.arrivals
    }

    /// All descriptors have been looked at since the first `arrivals` came, and what was found has been read.
    pub fn searched(&mut self, arrivals: u64) {
        for (_, waiting) in self.waiting.range_mut(..=arrivals) {
            waiting.ending.unheld = waiting.ending.lacks_owner();
        }
    }

    /// The ring has been read to its end, and it was `now` (boot time) before that. `find_owner` is asked for the owner of each ending that lacks one, all of them
    /// at once. Returns what is whole by now, or has waited long enough.
    pub fn caught_up(&mut self, now: u64, mut find_owners: impl FnMut(&[u64]) -> Vec<bool>) -> Vec<Ending> {
        let ownerless: Vec<_> = self
            .waiting
            .iter()
            .filter(|(_, waiting)| waiting.ending.lacks_owner())
            .filter_map(|(arrival, waiting)| Some((*arrival, waiting.ending.close.as_ref()?.inode)))
            .collect();
        let mut found = HashMap::new();
        if !ownerless.is_empty() {
            let inodes: Vec<_> = ownerless.iter().map(|(_, inode)| *inode).collect();
            found = ownerless.iter().map(|(arrival, _)| *arrival).zip(find_owners(&inodes)).collect();
        }
        let mut ready = Vec::new();
        for (arrival, waiting) in &mut self.waiting {
            waiting.reads += 1;
            let owned = !waiting.ending.lacks_owner() || found.get(arrival) == Some(&true);
            let whole = waiting.ending.close.as_ref().is_some_and(|close| match close.reset_after {
                reset_after::NEVER => owned,
                // A softirq that began that long ago is over, and its RST would have been in the ring.
                reset_after::SOFTIRQ => owned && now.saturating_sub(close.ended) > SOFTIRQ_IS_OVER,
                _ => false,
            });
            if whole || waiting.reads >= PATIENCE {
                ready.push(*arrival);
            }
        }
        ready.into_iter().filter_map(|arrival| self.take(arrival)).collect()
    }

    /// Whether something is held back for want of an owner.
    pub fn lacks_owners(&self) -> bool {
        self.waiting.values().any(|waiting| waiting.ending.lacks_owner())
    }

    /// Whether something is held back.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The end that this RST belongs to, if one waits for it.
    fn awaiting_reset(&self, reset: &Connection) -> Option<(u64, Connection)> {
        let &arrival = self.by_sock.get(&reset.sock)?;
        let ending = &self.waiting.get(&arrival)?.ending;
        let close = ending.close?;
        let in_time = reset.reset.at >= close.ended && reset.reset.at - close.ended <= RESET_WITHIN;
        // Addresses are used again within microseconds, lives are not. Only an orphan that aborts on late data has lost
        // its entry by the time the RST goes; then the record knows no states but that of the socket.
        let orphaned = close.reset_after == reset_after::SOFTIRQ
            && (reset.steps, reset.reset.state, reset.reset.answer) == (0, state::CLOSE, 1);
        let same_life = reset.born == close.born || orphaned;
        (ending.lacks_reset() && in_time && same_life).then_some((arrival, close))
    }

    fn whole_or_wait(&mut self, ending: Ending) -> Option<Ending> {
        if ending.lacks_reset() || ending.lacks_owner() { self.wait(ending) } else { Some(ending) }
    }

    /// Holds `ending` back. Returns the oldest in its place when there is no more room.
    fn wait(&mut self, ending: Ending) -> Option<Ending> {
        let sock = ending.connection()?.sock;
        self.arrivals += 1;
        self.waiting.insert(self.arrivals, Waiting { ending, reads: 0 });
        self.by_sock.insert(sock, self.arrivals);
        if self.waiting.len() <= MAX_WAITING {
            return None;
        }
        let (&oldest, _) = self.waiting.first_key_value()?;
        self.take(oldest)
    }

    fn take(&mut self, arrival: u64) -> Option<Ending> {
        let waiting = self.waiting.remove(&arrival)?;
        if let Some(connection) = waiting.ending.connection()
            && self.by_sock.get(&connection.sock) == Some(&arrival)
        {
            self.by_sock.remove(&connection.sock);
        }
        Some(waiting.ending)
    }
}

#[cfg(test)]
mod tests {
    use tcpclose_common::record::{Header, Reset};

    use super::*;

    const SOCK: u64 = 0xffff_8880_0000_1000;

    fn close(born: u64, ended: u64) -> Connection {
        let mut connection = Connection { sock: SOCK, born, ended, ..Connection::NEW };
        connection.actor.pid = 7;
        connection
    }

    fn reset(mut connection: Connection, direction: u8, at: u64) -> Connection {
        connection.reset = Reset { direction, at, ..connection.reset };
        connection
    }

    fn nobody(_: &[u64]) -> Vec<bool> {
        panic!("nobody lacks an owner here")
    }

    #[test]
    fn an_orderly_end_does_not_wait() {
        let mut correlator = Correlator::default();
        let ending = correlator.close(close(1, 10)).unwrap();
        assert_eq!((ending.resets.len(), ending.close.unwrap().ended), (0, 10));
        assert!(!correlator.is_waiting());
    }

    #[test]
    fn a_received_reset_goes_with_its_end() {
        let mut correlator = Correlator::default();
        let received = reset(close(1, 0), direction::RECEIVED, 9);
        assert_eq!(correlator.reset(received), None);
        let ending = correlator.close(reset(close(1, 10), direction::RECEIVED, 9)).unwrap();
        assert_eq!(ending.resets, [ending.close.unwrap()], "told with what the end knows");
        assert!(!correlator.is_waiting());
    }

    #[test]
    fn a_reset_that_was_sent_before_the_end() {
        let mut correlator = Correlator::default();
        let alive = Connection { steps: 2, ..close(1, 0) };
        assert_eq!(correlator.reset(reset(alive, direction::SENT, 9)), None);
        let end = reset(Connection { error: 103, ..close(1, 10) }, direction::SENT, 9);
        let ending = correlator.close(end).unwrap();
        assert_eq!(ending.resets, [end], "ss -K, as only the end tells");
    }

    #[test]
    fn a_reset_of_another_life_stays_alone() {
        let mut correlator = Correlator::default();
        assert_eq!(correlator.reset(reset(close(1, 0), direction::RECEIVED, 9)), None);
        let ending = correlator.close(close(20, 30)).unwrap();
        assert_eq!(ending.resets, []);
        correlator.caught_up(0, nobody);
        let late = correlator.caught_up(0, nobody);
        assert_eq!(late.len(), 1);
        assert_eq!((late[0].resets.len(), late[0].close), (1, None));
    }

    #[test]
    fn an_abort_waits_for_its_reset() {
        let mut correlator = Correlator::default();
        let aborted = Connection { reset_after: reset_after::SYSCALL, ..close(1, 10) };
        assert_eq!(correlator.close(aborted), None);
        let ending = correlator.reset(reset(close(1, 10), direction::SENT, 12)).unwrap();
        assert_eq!(ending.close.unwrap().reset.direction, direction::SENT);
        assert_eq!(ending.resets.len(), 1);
        assert!(!correlator.is_waiting());
    }

    #[test]
    fn an_abort_whose_reset_never_comes_is_told_after_two_reads() {
        let mut correlator = Correlator::default();
        correlator.close(Connection { reset_after: reset_after::SYSCALL, ..close(1, 10) });
        assert_eq!(correlator.caught_up(0, nobody), []);
        let told = correlator.caught_up(0, nobody);
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].resets, []);
        // A reset much later is another one.
        correlator.close(Connection { reset_after: reset_after::SYSCALL, ..close(1, 10) });
        let alone = correlator.reset(reset(close(1, 10), direction::SENT, 10 + RESET_WITHIN + 1)).unwrap();
        assert_eq!(alone.close, None);
    }

    #[test]
    fn a_reset_of_the_next_socket_at_the_same_address() {
        let mut correlator = Correlator::default();
        correlator.close(Connection { reset_after: reset_after::SYSCALL, ..close(1, 10) });
        let mut next = reset(close(11, 0), direction::SENT, 12);
        (next.steps, next.reset.answer) = (3, 1);
        assert_eq!(correlator.reset(next).unwrap().close, None);
        assert!(correlator.is_waiting());
    }

    #[test]
    fn of_its_own_accord_is_no_answer_to_late_data() {
        let end =
            Connection { reset_after: reset_after::SOFTIRQ, last_state: state::FIN_WAIT2, ..close(1, 10) };
        let mut answer = reset(end, direction::SENT, 12);
        answer.reset.answer = 1;
        let cases = [(reset(end, direction::SENT, 12), 0, 0), (answer, 0, 1), (answer, 1, 0)];
        for (sent, no_fin_wait2, ambiguous) in cases {
            let mut correlator = Correlator::default();
            assert_eq!(correlator.close(Connection { no_fin_wait2, ..end }), None);
            let close = correlator.reset(sent).unwrap().close.unwrap();
            assert_eq!(close.reset.ambiguous, ambiguous);
        }
    }

    #[test]
    fn what_nobody_has_open_is_nobodys() {
        let mut correlator = Correlator::default();
        let mut end = close(1, 10);
        (end.actor.pid, end.opener.pid, end.inode) = (0, 7, 99);
        correlator.close(end);
        let arrivals = correlator.arrivals();
        correlator.close(Connection { sock: SOCK + 1, ..end });
        correlator.searched(arrivals);
        correlator.caught_up(0, |inodes| vec![false; inodes.len()]);
        let unheld = |ending: &Ending| ending.unheld;
        let told = correlator.caught_up(0, |inodes| vec![false; inodes.len()]);
        assert_eq!(
            told.iter().map(unheld).collect::<Vec<_>>(),
            [true, false],
            "the second came after the look"
        );
    }

    #[test]
    fn late_data_is_one_reset_and_it_was_sent() {
        let mut correlator = Correlator::default();
        let mut received = reset(close(1, 0), direction::RECEIVED, 9);
        received.reset.ambiguous = 1;
        assert_eq!(correlator.reset(received), None);
        let mut end = received;
        end.ended = 10;
        end.reset_after = reset_after::SOFTIRQ;
        assert_eq!(correlator.close(end), None);
        // The orphan's entry is gone by now: the record knows the address alone.
        let mut sent = reset(Connection { sock: SOCK, born: 11, ..Connection::NEW }, direction::SENT, 11);
        (sent.reset.state, sent.reset.answer) = (state::CLOSE, 1);
        let ending = correlator.reset(sent).unwrap();
        let close = ending.close.unwrap();
        assert_eq!((close.reset.direction, close.reset.ambiguous), (direction::SENT, 1));
        assert_eq!(ending.resets, [close]);
    }

    #[test]
    fn an_ambiguous_reset_without_an_answer_was_received() {
        let mut correlator = Correlator::default();
        let mut received = reset(close(1, 0), direction::RECEIVED, 9);
        received.reset.ambiguous = 1;
        correlator.reset(received);
        correlator.close(Connection { ended: 10, reset_after: reset_after::SYSCALL, ..received });
        correlator.caught_up(0, nobody);
        let told = correlator.caught_up(0, nobody);
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].resets, [told[0].close.unwrap()]);
        assert_eq!(told[0].close.unwrap().reset.direction, direction::RECEIVED);
    }

    #[test]
    fn an_end_in_softirq_waits_for_the_softirq_alone() {
        let mut correlator = Correlator::default();
        let end = Connection { reset_after: reset_after::SOFTIRQ, ..close(1, 10) };
        assert_eq!(correlator.close(end), None);
        assert_eq!(correlator.caught_up(SOFTIRQ_IS_OVER, nobody), [], "the ring was read while it ran");
        assert_eq!(correlator.close(end), None);
        let told = correlator.caught_up(SOFTIRQ_IS_OVER + 11, nobody);
        assert_eq!(told.len(), 2);
    }

    fn ownerless() -> Connection {
        Connection { inode: 99, actor: Task::NONE, ..close(1, 10) }
    }

    #[test]
    fn the_owner_that_closes_later() {
        let mut correlator = Correlator::default();
        assert_eq!(correlator.close(ownerless()), None);
        let header = Header { tag: 0, version: 0, length: 0 };
        let task = Task { pid: 5, ..Task::NONE };
        let other = Owner { header, sock: SOCK, born: 2, task, holds: holds::CLOSED, fd: 0 };
        assert_eq!(correlator.owner(&other), None, "another life at the same address");
        let ending = correlator.owner(&Owner { born: 1, ..other }).unwrap();
        assert_eq!(ending.late_owner, Some(LateOwner { task, holds: false }));
    }

    #[test]
    fn the_owner_that_is_looked_up() {
        let mut correlator = Correlator::default();
        correlator.close(ownerless());
        let told = correlator.caught_up(0, |inodes| {
            assert_eq!(inodes, [99]);
            vec![true]
        });
        assert_eq!(told.len(), 1);
        correlator.close(ownerless());
        assert_eq!(correlator.caught_up(0, |_| vec![false]), [], "it may close yet");
        assert_eq!(correlator.caught_up(0, |_| vec![false]).len(), 1, "told without");
    }

    #[test]
    fn a_reset_without_a_socket_does_not_wait() {
        let mut correlator = Correlator::default();
        let stray = reset(Connection { born: 1, ..Connection::NEW }, direction::SENT, 1);
        assert_eq!(correlator.reset(stray).unwrap().resets, [stray]);
    }
}
