//! Records → endings. Facts that belong to one end of a connection are joined, and held back no longer than
//! necessary.
//!
//! The kernel half writes a record when a socket reaches CLOSE and one for each RST. Three facts arrive after
//! the event that they belong to: the RST of an application's abort (`__tcp_close()` changes the state
//! first), the RST that shows a `tcp_reset()` to be this host's own abort on late data, and the owner of a
//! socket that ended in softirq. The first two follow within microseconds on the same CPU; the third follows
//! whenever the application closes the descriptor.

use std::collections::{HashMap, VecDeque};

use foldhash::fast::RandomState;

use crate::{
    ingest::life::{Follows, LaterAct, Life, Rst, SocketEnd, SocketId, Task},
    tcp::{Direction, State},
};

/// The number of endings that may wait at once. When there are more, the oldest is reported as it is.
const MAX_WAITING: usize = 65_536;

/// The number of live sockets whose further acts are remembered, and the number of acts for each. When there
/// are more sockets, the oldest is forgotten.
const MAX_ACTED: usize = 16_384;
const MAX_ACTS: usize = 8;

/// How much later than the end its RST may come, nanoseconds. The kernel is not preempted between the two,
/// but the CPU of a virtual machine may be descheduled there. A longer gap means that another socket has the
/// same address.
const RESET_WITHIN: u64 = 1_000_000_000;

/// How long after an end in softirq the same softirq has certainly sent its RST, nanoseconds.
const SOFTIRQ_IS_OVER: u64 = 5_000_000;

/// How long an ending waits for its RST, and for its owner, nanoseconds after the first read that found it.
/// With a read of the ring each tenth of a second, this stays within the quarter of a second that the output
/// contract allows. The number of reads is not used, because a ring that fills quickly is read many times in
/// a moment.
const PATIENCE: u64 = 100_000_000;

/// How long after an end a search of all descriptors for its owner is worth its cost, nanoseconds: most
/// programs close a socket that was reset within this time, which shows the owner for nothing.
const CLOSED_SOON: u64 = 50_000_000;

/// Everything that is known about what happened to one end of a connection.
#[derive(Clone, Debug, PartialEq)]
pub struct Ending {
    /// The connection. Its `reset` is the RST that ended it, if one did.
    pub life: Box<Life>,
    /// Whether this is its end; otherwise only RSTs are reported, which ended nothing.
    pub is_end: bool,
    /// Its RSTs, in order.
    pub resets: Vec<Rst>,
    /// A task that closed its descriptor after the end, or still has it open.
    pub late_owner: Option<LateOwner>,
    /// A search of all descriptors since its end has found none that refers to it: its former owner has
    /// passed it on.
    pub unheld: bool,
    /// The acts on it after the first act of this side, in order.
    pub later_acts: Vec<LaterAct>,
}

/// An owner that was found after the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LateOwner {
    /// It closed the descriptor.
    Closed(Task),
    /// It has the descriptor open.
    Holds(Task),
}

impl LateOwner {
    /// The task.
    pub fn task(&self) -> &Task {
        match self {
            Self::Closed(task) | Self::Holds(task) => task,
        }
    }
}

impl Ending {
    fn end(life: Box<Life>, resets: Vec<Rst>) -> Self {
        Self { life, is_end: true, resets, late_owner: None, unheld: false, later_acts: Vec::new() }
    }

    fn reset_alone(life: Box<Life>, reset: Rst) -> Self {
        Self {
            life,
            is_end: false,
            resets: vec![reset],
            late_owner: None,
            unheld: false,
            later_acts: Vec::new(),
        }
    }

    /// Whether its owner is still to be found: it had a descriptor when it ended, and no task has acted on
    /// it. The task that opened it may have passed it on.
    pub fn lacks_owner(&self) -> bool {
        self.is_end && self.late_owner.is_none() && self.life.actor.is_none() && self.life.inode.is_some()
    }

    /// Whether its owner is to be searched for at `now`: nobody has closed it soon.
    fn is_owner_overdue(&self, now: u64) -> bool {
        let ended = self.life.end.map_or(now, |end| end.at);
        self.lacks_owner() && now.saturating_sub(ended) >= CLOSED_SOON
    }

    fn reset_follows(&self) -> Option<Follows> {
        self.life.end.filter(|_| self.is_end).and_then(|end| end.reset_follows)
    }
}

struct WaitingEnding {
    ending: Ending,
    /// The `now` of the first [`caught_up`](Correlator::caught_up) that found it, or its end if that came later.
    since: Option<u64>,
}

/// Joins records into endings.
#[derive(Default)]
pub struct Correlator {
    /// In order of arrival; `None` where an ending has left.
    waiting: VecDeque<Option<WaitingEnding>>,
    /// Arrival number of the first element of `waiting`.
    first: u64,
    /// The number of endings that wait.
    count: usize,
    /// Socket address → arrival number of its latest ending.
    by_address: HashMap<u64, u64, RandomState>,
    /// The acts on live sockets after the first act of this side.
    later_acts: HashMap<SocketId, Vec<LaterAct>, RandomState>,
    /// These sockets in the order of arrival; some may have ended since.
    acted: VecDeque<SocketId>,
}

impl Correlator {
    /// Takes in a RST. Returns the ending that it completes, if any.
    pub fn reset(&mut self, life: Box<Life>, reset: Rst) -> Option<Ending> {
        let of_own_accord = !reset.answer && life.end.is_none() && !life.path.steps().is_empty();
        if reset.direction == Direction::Received || of_own_accord {
            // Its CLOSE follows at once: tcp_reset(), tcp_abort() and the keepalive timer report the RST
            // first.
            return self.wait(Ending::reset_alone(life, reset));
        }
        let Some((arrival, end)) = self.awaiting_reset(&life, &reset) else {
            return Some(Ending::reset_alone(life, reset));
        };
        // __tcp_close() also sends a RST unprompted for a closed socket that must not wait.
        let answers_late_data =
            end.reset_follows == Some(Follows::InSoftirq) && reset.answer && !end.no_fin_wait2;
        let mut ending = self.take(arrival)?;
        let Life { end: Some(end), state: before, reset: ended_by, .. } = &mut *ending.life else {
            return Some(ending);
        };
        end.reset_follows = None;
        // The record of the RST no longer contains the state before CLOSE.
        let state = if reset.state == Some(State::Close) { *before } else { reset.state };
        let mut reset = Rst { state, ..reset };
        if answers_late_data {
            // What was received was data, which this RST answers. There is one RST, and one line.
            ending.resets.clear();
            reset.ambiguous = true;
        }
        *ended_by = Some(reset);
        ending.resets.push(reset);
        self.complete_or_wait(ending)
    }

    /// Takes in an end. Returns an ending that is complete.
    pub fn close(&mut self, life: Box<Life>) -> Option<Ending> {
        let mut resets = Vec::new();
        if let Some(&arrival) = self.by_address.get(&life.id.address)
            && self
                .get(arrival)
                .is_some_and(|waiting| !waiting.ending.is_end && waiting.ending.life.id == life.id)
            && let Some(before) = self.take(arrival)
        {
            resets = before.resets;
        }
        let later_acts = self.later_acts.remove(&life.id).unwrap_or_default();
        self.complete_or_wait(Ending { later_acts, ..Ending::end(life, resets) })
    }

    /// Takes in an act on a socket that has not ended.
    pub fn act(&mut self, id: SocketId, act: LaterAct) {
        let acts = self.later_acts.entry(id).or_default();
        if acts.is_empty() {
            self.acted.push_back(id);
        }
        if acts.len() < MAX_ACTS {
            acts.push(act);
        }
        while self.acted.len() > MAX_ACTED {
            if let Some(oldest) = self.acted.pop_front() {
                self.later_acts.remove(&oldest);
            }
        }
    }

    /// The acts on a socket that has not ended, after the first act of this side.
    pub fn later_acts(&self, id: SocketId) -> &[LaterAct] {
        self.later_acts.get(&id).map_or(&[], Vec::as_slice)
    }

    /// Takes in the task that closed the descriptor of a socket after its end. Returns the ending that it
    /// completes.
    pub fn closer(&mut self, id: SocketId, task: Task) -> Option<Ending> {
        let arrival = self.ended(id)?;
        let mut ending = self.take(arrival)?;
        ending.late_owner = Some(LateOwner::Closed(task));
        self.complete_or_wait(ending)
    }

    /// Takes in a task that has the descriptor of a socket open after its end. Of several such tasks the one
    /// that opened the connection counts, otherwise the first. The ending is reported once the ring has been
    /// read to its end.
    pub fn still_open(&mut self, id: SocketId, task: Task) {
        let Some(waiting) = self.ended(id).and_then(|arrival| self.get_mut(arrival)) else { return };
        let is_opener = waiting.ending.life.opener.is_some_and(|opener| opener.pid == task.pid);
        if waiting.ending.late_owner.is_none() || is_opener {
            waiting.ending.late_owner = Some(LateOwner::Holds(task));
        }
    }

    /// The number of endings that have arrived so far, for [`searched`](Self::searched).
    pub fn arrivals(&self) -> u64 {
        self.first + self.waiting.len() as u64
    }

    /// A search of all descriptors began after the first `arrivals` endings had arrived, and its results were
    /// read.
    pub fn searched(&mut self, arrivals: u64) {
        let count = usize::try_from(arrivals.saturating_sub(self.first)).unwrap_or(usize::MAX);
        for waiting in self.waiting.iter_mut().take(count).flatten() {
            waiting.ending.unheld = waiting.ending.lacks_owner();
        }
    }

    /// The ring was read to its end; `now` (`CLOCK_BOOTTIME`, nanoseconds) was read before that.
    /// `find_owners` looks up the owners of all endings whose owner is overdue, by inode number, and returns for
    /// each whether it was found. Returns the endings that are complete or have waited long enough.
    pub fn caught_up(&mut self, now: u64, find_owners: impl FnOnce(&[u64]) -> Vec<bool>) -> Vec<Ending> {
        let overdue = self.waiting.iter().flatten().filter(|waiting| waiting.ending.is_owner_overdue(now));
        let inodes: Vec<u64> = overdue.filter_map(|waiting| waiting.ending.life.inode).collect();
        let found = if inodes.is_empty() { Vec::new() } else { find_owners(&inodes) };
        let mut found = found.into_iter();
        let mut ready = Vec::new();
        for (arrival, place) in (self.first..).zip(&mut self.waiting) {
            let Some(waiting) = place else { continue };
            // It may have ended after `now`, while the ring was read, which takes long if this process is not
            // given a CPU.
            let ended = waiting.ending.life.end.map_or(now, |end| end.at);
            let since = *waiting.since.get_or_insert(now.max(ended));
            let is_found = waiting.ending.is_owner_overdue(now) && found.next() == Some(true);
            let owned = is_found || !waiting.ending.lacks_owner();
            let complete = waiting.ending.is_end
                && match waiting.ending.reset_follows() {
                    None => owned,
                    // A softirq that began that long ago has ended, and the record of its RST would be in the
                    // ring.
                    Some(Follows::InSoftirq) => {
                        let ended = waiting.ending.life.end.map_or(0, |end| end.at);
                        owned && now.saturating_sub(ended) > SOFTIRQ_IS_OVER
                    }
                    Some(Follows::InSyscall) => false,
                };
            if complete || now.saturating_sub(since) >= PATIENCE {
                ready.push(arrival);
            }
        }
        ready.into_iter().filter_map(|arrival| self.take(arrival)).collect()
    }

    /// Whether the owner of an ending is to be searched for at `now` (`CLOCK_BOOTTIME`, nanoseconds).
    pub fn is_owner_overdue(&self, now: u64) -> bool {
        self.waiting.iter().flatten().any(|waiting| waiting.ending.is_owner_overdue(now))
    }

    /// Whether an ending is held back.
    pub fn is_waiting(&self) -> bool {
        self.count > 0
    }

    /// The waiting ending of this life, if there is one.
    fn ended(&self, id: SocketId) -> Option<u64> {
        let &arrival = self.by_address.get(&id.address)?;
        let ending = &self.get(arrival)?.ending;
        (ending.is_end && ending.life.id == id).then_some(arrival)
    }

    /// The waiting ending that this RST belongs to, if there is one.
    fn awaiting_reset(&self, life: &Life, reset: &Rst) -> Option<(u64, SocketEnd)> {
        let &arrival = self.by_address.get(&life.id.address)?;
        let ending = &self.get(arrival)?.ending;
        let follows = ending.reset_follows()?;
        let end = ending.life.end?;
        let in_time = reset.at >= end.at && reset.at - end.at <= RESET_WITHIN;
        // Addresses are reused within microseconds, so the time of birth has to match too. Only an orphan
        // that aborts on late data has lost its entry by the time the RST is sent; the record then contains
        // no states except that of the socket.
        let orphaned = follows == Follows::InSoftirq
            && life.path.steps().is_empty()
            && reset.state == Some(State::Close)
            && reset.answer;
        (in_time && (life.id == ending.life.id || orphaned)).then_some((arrival, end))
    }

    fn complete_or_wait(&mut self, ending: Ending) -> Option<Ending> {
        if ending.reset_follows().is_some() || ending.lacks_owner() {
            self.wait(ending)
        } else {
            Some(ending)
        }
    }

    /// Holds `ending` back. Returns the oldest instead when there is no more room.
    fn wait(&mut self, ending: Ending) -> Option<Ending> {
        self.by_address.insert(ending.life.id.address, self.arrivals());
        self.waiting.push_back(Some(WaitingEnding { ending, since: None }));
        self.count += 1;
        // The first element is never empty, which `take` ensures.
        if self.count > MAX_WAITING { self.take(self.first) } else { None }
    }

    fn place(&self, arrival: u64) -> Option<usize> {
        usize::try_from(arrival.checked_sub(self.first)?).ok()
    }

    fn get(&self, arrival: u64) -> Option<&WaitingEnding> {
        self.waiting.get(self.place(arrival)?)?.as_ref()
    }

    fn get_mut(&mut self, arrival: u64) -> Option<&mut WaitingEnding> {
        let place = self.place(arrival)?;
        self.waiting.get_mut(place)?.as_mut()
    }

    fn take(&mut self, arrival: u64) -> Option<Ending> {
        let place = self.place(arrival)?;
        let WaitingEnding { ending, .. } = self.waiting.get_mut(place)?.take()?;
        self.count -= 1;
        let address = ending.life.id.address;
        if self.by_address.get(&address) == Some(&arrival) {
            self.by_address.remove(&address);
        }
        while self.waiting.front().is_some_and(Option::is_none) {
            self.waiting.pop_front();
            self.first += 1;
        }
        Some(ending)
    }
}

#[cfg(test)]
mod tests {
    use crate::ingest::life::{
        Activity,
        examples::{END, RESET, task, unknown},
    };

    use super::*;

    const ID: SocketId = SocketId { address: 0xffff_8880_0000_1000, born: 1 };

    fn live(born: u64) -> Box<Life> {
        Box::new(Life {
            id: SocketId { born, ..ID },
            actor: Some(task(7, Activity::Syscall(libc::SYS_close))),
            ..unknown()
        })
    }

    fn closed(born: u64, end: SocketEnd) -> Box<Life> {
        Box::new(Life { end: Some(end), ..*live(born) })
    }

    fn ended(follows: Option<Follows>) -> Box<Life> {
        closed(1, SocketEnd { reset_follows: follows, ..END })
    }

    fn received(at: u64) -> Rst {
        Rst { at, direction: Direction::Received, answer: false, state: Some(State::Established), ..RESET }
    }

    const LATER: u64 = END.at + PATIENCE;

    fn nobody(_: &[u64]) -> Vec<bool> {
        panic!("no owner is to be searched for here")
    }

    #[test]
    fn an_orderly_end_does_not_wait() {
        let mut correlator = Correlator::default();
        let ending = correlator.close(ended(None)).unwrap();
        assert_eq!((ending.is_end, ending.resets.len()), (true, 0));
        assert!(!correlator.is_waiting());
    }

    #[test]
    fn a_received_reset_is_reported_with_its_end() {
        let mut correlator = Correlator::default();
        assert_eq!(correlator.reset(live(1), received(9)), None);
        let end = Box::new(Life { reset: Some(received(9)), ..*ended(None) });
        let ending = correlator.close(end.clone()).unwrap();
        assert_eq!((ending.resets, ending.life), (vec![received(9)], end));
        assert!(!correlator.is_waiting());
    }

    #[test]
    fn a_reset_sent_before_the_end_is_reported_with_it() {
        let mut correlator = Correlator::default();
        let path = [(State::SynSent, 1), (State::Established, 2)].into_iter().collect();
        let sent = Rst { answer: false, ..RESET };
        assert_eq!(correlator.reset(Box::new(Life { path, ..*live(1) }), sent), None);
        let destroyed = closed(1, SocketEnd { error: Some(libc::ECONNABORTED), ..END });
        let ending = correlator.close(destroyed.clone()).unwrap();
        assert_eq!((ending.resets, ending.life), (vec![sent], destroyed), "`ss -K`, as only the end shows");
    }

    #[test]
    fn a_reset_of_another_life_stays_alone() {
        let mut correlator = Correlator::default();
        assert_eq!(correlator.reset(live(1), received(9)), None);
        let ending = correlator.close(closed(20, END)).unwrap();
        assert_eq!(ending.resets, []);
        correlator.caught_up(0, nobody);
        let late = correlator.caught_up(LATER, nobody);
        assert_eq!(late.len(), 1);
        assert_eq!((late[0].resets.len(), late[0].is_end), (1, false));
    }

    #[test]
    fn an_abort_waits_for_its_reset() {
        let mut correlator = Correlator::default();
        assert_eq!(correlator.close(ended(Some(Follows::InSyscall))), None);
        let sent = Rst { at: 12, answer: false, ..RESET };
        let ending = correlator.reset(ended(None), sent).unwrap();
        assert!(ending.is_end);
        assert_eq!((ending.life.reset, ending.resets), (Some(sent), vec![sent]));
        assert!(!correlator.is_waiting());
    }

    #[test]
    fn an_abort_whose_reset_never_comes_waits_a_tenth_of_a_second() {
        let mut correlator = Correlator::default();
        correlator.close(ended(Some(Follows::InSyscall)));
        for soon in 0..5 {
            assert_eq!(correlator.caught_up(END.at + soon, nobody), [], "reads in quick succession");
        }
        let reported = correlator.caught_up(LATER, nobody);
        assert_eq!(reported.len(), 1);
        assert_eq!(reported[0].resets, []);
        // A much later RST belongs to another socket.
        correlator.close(ended(Some(Follows::InSyscall)));
        let later = Rst { at: END.at + RESET_WITHIN + 1, answer: false, ..RESET };
        assert!(!correlator.reset(ended(None), later).unwrap().is_end);
    }

    #[test]
    fn a_reset_of_the_next_socket_at_the_same_address_stays_alone() {
        let mut correlator = Correlator::default();
        correlator.close(ended(Some(Follows::InSyscall)));
        let path = [(State::SynRecv, 11)].into_iter().collect();
        let next = Box::new(Life { path, ..*live(11) });
        assert!(!correlator.reset(next, Rst { at: 12, ..RESET }).unwrap().is_end);
        assert!(correlator.is_waiting());
    }

    #[test]
    fn only_an_answer_shows_late_data() {
        let answer = Rst { at: 12, ..RESET };
        let own_accord = Rst { answer: false, ..answer };
        for (sent, no_fin_wait2, late_data) in
            [(own_accord, false, false), (answer, false, true), (answer, true, false)]
        {
            let mut correlator = Correlator::default();
            let end = SocketEnd { reset_follows: Some(Follows::InSoftirq), no_fin_wait2, ..END };
            assert_eq!(correlator.close(closed(1, end)), None);
            let ending = correlator.reset(closed(1, end), sent).unwrap();
            assert_eq!(ending.life.reset.unwrap().ambiguous, late_data, "{sent:?} {no_fin_wait2}");
        }
    }

    #[test]
    fn a_reset_after_close_has_the_state_before_it() {
        let mut correlator = Correlator::default();
        let before = Life { state: Some(State::CloseWait), ..*ended(Some(Follows::InSyscall)) };
        correlator.close(Box::new(before));
        let sent = Rst { at: 12, answer: false, state: Some(State::Close), ..RESET };
        let ending = correlator.reset(ended(None), sent).unwrap();
        assert_eq!(ending.resets[0].state, Some(State::CloseWait));
    }

    #[test]
    fn late_data_is_one_reset_and_it_was_sent() {
        let mut correlator = Correlator::default();
        let taken_for_received = Rst { ambiguous: true, ..received(9) };
        assert_eq!(correlator.reset(live(1), taken_for_received), None);
        assert_eq!(correlator.close(ended(Some(Follows::InSoftirq))), None);
        // The orphan has lost its entry by now, so the record contains only the address.
        let orphan = Box::new(Life { actor: None, ..*live(11) });
        let sent = Rst { at: 11, state: Some(State::Close), ..RESET };
        let ending = correlator.reset(orphan, sent).unwrap();
        let reset = ending.life.reset.unwrap();
        assert_eq!((reset.direction, reset.ambiguous), (Direction::Sent, true));
        assert_eq!(ending.resets, [reset]);
    }

    #[test]
    fn an_ambiguous_reset_without_an_answer_was_received() {
        let mut correlator = Correlator::default();
        let reset = Rst { ambiguous: true, ..received(9) };
        correlator.reset(live(1), reset);
        let end = Life { reset: Some(reset), ..*ended(Some(Follows::InSyscall)) };
        correlator.close(Box::new(end));
        correlator.caught_up(0, nobody);
        let reported = correlator.caught_up(LATER, nobody);
        assert_eq!(reported.len(), 1);
        assert_eq!((&reported[0].resets[..], reported[0].life.reset), (&[reset][..], Some(reset)));
    }

    #[test]
    fn an_end_in_softirq_waits_only_for_the_softirq() {
        let mut correlator = Correlator::default();
        let end = ended(Some(Follows::InSoftirq));
        assert_eq!(correlator.close(end.clone()), None);
        assert_eq!(correlator.caught_up(SOFTIRQ_IS_OVER, nobody), [], "the ring was read while it ran");
        assert_eq!(correlator.close(end), None);
        let reported = correlator.caught_up(SOFTIRQ_IS_OVER + END.at + 1, nobody);
        assert_eq!(reported.len(), 2);
    }

    fn ownerless(address: u64) -> Box<Life> {
        let id = SocketId { address, ..ID };
        Box::new(Life { id, inode: Some(99), actor: None, ..*ended(None) })
    }

    #[test]
    fn the_owner_closes_later() {
        let mut correlator = Correlator::default();
        assert_eq!(correlator.close(ownerless(ID.address)), None);
        let task = task(5, Activity::Syscall(libc::SYS_close));
        assert_eq!(
            correlator.closer(SocketId { born: 2, ..ID }, task),
            None,
            "another life at the same address"
        );
        let ending = correlator.closer(ID, task).unwrap();
        assert_eq!(ending.late_owner, Some(LateOwner::Closed(task)));
    }

    #[test]
    fn of_several_holders_the_opener_is_the_owner() {
        let (opener, heir, other) =
            (task(5, Activity::Unknown), task(6, Activity::Unknown), task(8, Activity::Unknown));
        for (holders, owner) in [([heir, other], heir), ([heir, opener], opener), ([opener, heir], opener)] {
            let mut correlator = Correlator::default();
            let end = Life { opener: Some(opener), ..*ownerless(ID.address) };
            correlator.close(Box::new(end));
            for holder in holders {
                correlator.still_open(ID, holder);
            }
            let reported = correlator.caught_up(0, nobody);
            assert_eq!(reported[0].late_owner, Some(LateOwner::Holds(owner)));
        }
    }

    #[test]
    fn the_owner_is_looked_up() {
        let mut correlator = Correlator::default();
        correlator.close(ownerless(ID.address));
        let overdue = END.at + CLOSED_SOON;
        assert!(!correlator.is_owner_overdue(overdue - 1));
        assert_eq!(correlator.caught_up(overdue - 1, nobody), [], "most programs close it soon");
        assert!(correlator.is_owner_overdue(overdue));
        let reported = correlator.caught_up(overdue, |inodes| {
            assert_eq!(inodes, [99]);
            vec![true]
        });
        assert_eq!(reported.len(), 1);
        correlator.close(ownerless(ID.address));
        assert_eq!(correlator.caught_up(LATER, |_| vec![false]), [], "the first read came late");
        assert_eq!(correlator.caught_up(LATER + PATIENCE - 1, |_| vec![false]), [], "it may still close");
        let reported = correlator.caught_up(LATER + PATIENCE, |_| vec![false]);
        assert_eq!(reported.len(), 1, "reported without an owner");
    }

    #[test]
    fn the_owner_of_an_end_during_the_read_is_looked_up() {
        let mut correlator = Correlator::default();
        // It ends while the ring is read, long after that read began.
        let mut life = ownerless(ID.address);
        life.end = Some(SocketEnd { at: END.at + PATIENCE, ..END });
        correlator.close(life);
        assert_eq!(correlator.caught_up(END.at, nobody), []);
        assert_eq!(correlator.caught_up(LATER, nobody), [], "its owner has not been looked for");
        let overdue = END.at + PATIENCE + CLOSED_SOON;
        let reported = correlator.caught_up(overdue, |_| vec![true]);
        assert_eq!(reported.len(), 1);
    }

    #[test]
    fn an_ending_that_no_descriptor_refers_to_is_unheld() {
        let mut correlator = Correlator::default();
        correlator.close(ownerless(ID.address));
        let arrivals = correlator.arrivals();
        correlator.close(ownerless(ID.address + 1));
        correlator.searched(arrivals);
        correlator.caught_up(0, nobody);
        let reported = correlator.caught_up(LATER, |inodes| vec![false; inodes.len()]);
        let unheld: Vec<_> = reported.iter().map(|ending| ending.unheld).collect();
        assert_eq!(unheld, [true, false], "the second arrived after the search");
    }

    #[test]
    fn a_reset_without_a_socket_does_not_wait() {
        let mut correlator = Correlator::default();
        let stray = Life { id: SocketId { address: 0, born: 1 }, ..unknown() };
        let ending = correlator.reset(Box::new(stray), RESET).unwrap();
        assert_eq!((ending.resets, ending.is_end), (vec![RESET], false));
    }

    #[test]
    fn the_oldest_gives_way_when_too_many_wait() {
        let mut correlator = Correlator::default();
        for address in 1..=MAX_WAITING as u64 {
            assert_eq!(correlator.close(ownerless(address)), None);
        }
        let oldest = correlator.close(ownerless(MAX_WAITING as u64 + 1)).unwrap();
        assert_eq!(oldest.life.id.address, 1);
        // Empty elements in the middle do not count.
        let last = SocketId { address: MAX_WAITING as u64, ..ID };
        assert!(correlator.closer(last, task(5, Activity::Unknown)).is_some());
        assert_eq!(correlator.close(ownerless(MAX_WAITING as u64 + 2)), None);
    }
}
