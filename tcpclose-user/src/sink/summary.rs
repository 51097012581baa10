//! Events → the summary on stderr when the trace ends: how the connections of each process ended, and at
//! which place in its code, the most frequent first; and the sockets that are still stuck.

use std::{
    collections::HashMap,
    fmt::{self, Display, Write as _},
    hash::{Hash, Hasher},
};

use foldhash::fast::RandomState;

use crate::{
    event::{
        Cause, Close, ClosedBy, Ended, Endpoint, Event, Frames, LingeringKind, Process, Role, Shared, Stack,
        State, shown_pid,
    },
    sink::{endpoint, escape, human_millis, or_dash},
};

/// The number of kinds of end that are counted separately. Ends of further kinds are counted together.
const MAX_KINDS: usize = 4_096;

/// The number of ends that are remembered by [`EndIdentity`]. When there are more, all are forgotten.
const MAX_RECENT: usize = 1_024;

/// The number of rows of each table that are shown.
const ROWS: usize = 20;

/// The number of frames that identify a place.
const FRAMES: usize = 4;

/// The largest width of a line.
const COLUMNS: usize = 100;

/// Counts events for the summary.
#[derive(Default)]
pub struct Summary {
    /// Indexes in `counts`.
    ends: HashMap<EndGroup, usize>,
    counts: Vec<Count>,
    /// The same indexes, by a key that is quick to compare.
    recent: HashMap<EndIdentity, Recent, RandomState>,
    lingering: HashMap<Stay, Count>,
    /// Events of kinds for which there was no room.
    others: u64,
}

/// Ends that are counted together.
#[derive(Clone, PartialEq, Eq, Hash)]
struct EndGroup {
    process: Option<(Option<u32>, String)>,
    closed_by: Option<ClosedBy>,
    ended: Option<Ended>,
    cause: Option<Cause>,
    place: CallSite,
}

/// The identity of an end, made of the addresses of the values that it shares with others: addresses are
/// compared faster than names.
#[derive(PartialEq, Eq, Hash)]
struct EndIdentity {
    process: Option<usize>,
    frames: Option<usize>,
    closed_by: Option<ClosedBy>,
    ended: Option<Ended>,
    cause: Option<Cause>,
}

/// Ends with one [`EndIdentity`].
struct Recent {
    /// Their index in `counts`.
    place: usize,
    /// Kept, so that their addresses are not reused.
    _kept: (Option<Shared<Process>>, CallSite),
}

/// Sockets that linger, counted together.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Stay {
    process: Option<(Option<u32>, String)>,
    state: State,
    kind: LingeringKind,
    remote: Option<Endpoint>,
    place: CallSite,
}

/// The kind of an act, and the place in the program where it was done.
#[derive(Clone, Default)]
struct CallSite(Option<(&'static str, Frames)>);

#[derive(Clone, Copy, Default)]
struct Count {
    sockets: u64,
    /// Ends that have left a TIME_WAIT behind.
    time_wait: u64,
    /// The age of the oldest one that lingers, milliseconds.
    oldest: f64,
}

impl Summary {
    /// Counts an event.
    pub fn add(&mut self, event: &Event) {
        let Event::Close(close) = event else { return };
        let Some(place) = self.place(close) else {
            self.others += 1;
            return;
        };
        let count = &mut self.counts[place];
        count.sockets += 1;
        count.time_wait += u64::from(leaves_time_wait(close));
    }

    /// The index in `counts` of ends of this kind; `None` if there is no room for another kind.
    fn place(&mut self, close: &Close) -> Option<usize> {
        let Close { closed_by, ended, cause, .. } = *close;
        let (what, frames) = CallSite::frames_of(close).unzip();
        let identity = EndIdentity {
            process: close.process.as_ref().map(Shared::address),
            frames: frames.map(Shared::address),
            closed_by,
            ended,
            cause,
        };
        if let Some(recent) = self.recent.get(&identity) {
            return Some(recent.place);
        }
        let place_in_code = CallSite(what.zip(frames.cloned()));
        let process = close.process.as_ref().map(|process| (process.pid, process.comm.clone()));
        let end = EndGroup { process, closed_by, ended, cause, place: place_in_code.clone() };
        let place = match self.ends.get(&end) {
            Some(place) => *place,
            None if self.ends.len() >= MAX_KINDS => return None,
            None => {
                self.counts.push(Count::default());
                self.ends.insert(end, self.counts.len() - 1);
                self.counts.len() - 1
            }
        };
        if self.recent.len() >= MAX_RECENT {
            self.recent.clear();
        }
        self.recent.insert(identity, Recent { place, _kept: (close.process.clone(), place_in_code) });
        Some(place)
    }

    /// Counts a socket that lingers when the trace ends.
    pub fn add_lingering(&mut self, event: &Event) {
        let Event::Lingering(lingering) = event else { return };
        let opener = lingering.opener.as_ref().and_then(|opener| opener.stack.as_ref());
        let stay = Stay {
            process: lingering.process.as_ref().map(|process| (process.pid, process.comm.clone())),
            state: lingering.state,
            kind: lingering.kind,
            // Only of a client: the remote ends of a server are all different.
            remote: lingering.connection.remote.filter(|_| lingering.connection.role == Some(Role::Client)),
            place: CallSite::of("opened at", opener).unwrap_or_default(),
        };
        if self.lingering.len() >= MAX_KINDS && !self.lingering.contains_key(&stay) {
            self.others += 1;
            return;
        }
        let count = self.lingering.entry(stay).or_default();
        count.sockets += 1;
        count.oldest = count.oldest.max(lingering.for_ms.unwrap_or(0.0));
    }

    fn ends(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ends.is_empty() {
            return Ok(());
        }
        // The processes with the most ends come first, and for each process the kinds with the most ends.
        let mut of_process = HashMap::<_, u64>::new();
        let mut rows: Vec<_> = self.ends.iter().map(|(end, place)| (end, self.counts[*place])).collect();
        for (end, count) in &rows {
            *of_process.entry(&end.process).or_default() += count.sockets;
        }
        rows.sort_by_key(|(end, count)| {
            let of_process = of_process.get(&end.process).copied().unwrap_or(0);
            (std::cmp::Reverse(of_process), end.process.clone(), std::cmp::Reverse(count.sockets))
        });
        writeln!(f, "How connections ended, by process and by place in its code:")?;
        writeln!(
            f,
            "{:>8} {:16} {:>8} {:6} {:15} {:20} {:>9}",
            "PID", "COMM", "ENDS", "BY", "HOW", "CAUSE", "TIME_WAIT"
        )?;
        for (end, count) in rows.iter().take(ROWS) {
            let (pid, comm) = named(end.process.as_ref());
            writeln!(
                f,
                "{pid:>8} {comm:16} {:>8} {:6} {:15} {:20} {:>9}",
                count.sockets,
                or_dash(end.closed_by),
                or_dash(end.ended),
                or_dash(end.cause),
                count.time_wait
            )?;
            write!(f, "{}", end.place)?;
        }
        rest(f, rows.len())
    }

    fn lingering(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.lingering.is_empty() {
            return Ok(());
        }
        let mut rows: Vec<_> = self.lingering.iter().collect();
        rows.sort_by(|(_, one), (_, other)| {
            other.sockets.cmp(&one.sockets).then(other.oldest.total_cmp(&one.oldest))
        });
        writeln!(f, "What lingers still:")?;
        writeln!(
            f,
            "{:>8} {:16} {:>8} {:10} {:11} {:>8} REMOTE",
            "PID", "COMM", "SOCKETS", "KIND", "STATE", "OLDEST"
        )?;
        for (stay, count) in rows.iter().take(ROWS) {
            let (pid, comm) = named(stay.process.as_ref());
            writeln!(
                f,
                "{pid:>8} {comm:16} {:>8} {:10} {:11} {:>8} {}",
                count.sockets,
                stay.kind.to_string(),
                stay.state.to_string(),
                human_millis(count.oldest),
                endpoint(stay.remote)
            )?;
            write!(f, "{}", stay.place)?;
        }
        rest(f, rows.len())
    }
}

impl Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ends(f)?;
        self.lingering(f)?;
        if self.others > 0 {
            writeln!(f, "{} more, of kinds that there was no room to count apart.", self.others)?;
        }
        Ok(())
    }
}

/// Whether this end closed first and in order, and so left a `TIME_WAIT` behind: the small socket replaces a
/// socket only in these states.
fn leaves_time_wait(close: &Close) -> bool {
    let before = close.states.iter().rev().nth(1).map(|step| step.state);
    close.ended == Some(Ended::Fin) && matches!(before, Some(State::FinWait2 | State::Closing))
}

fn named(process: Option<&(Option<u32>, String)>) -> (String, String) {
    match process {
        Some((pid, comm)) => (shown_pid(*pid), escape(comm).into_owned()),
        None => ("-".to_owned(), "-".to_owned()),
    }
}

fn rest(f: &mut fmt::Formatter<'_>, rows: usize) -> fmt::Result {
    if rows > ROWS { writeln!(f, "{:>8} and {} more rows", "", rows - ROWS) } else { Ok(()) }
}

/// The frames that are most specific to a place.
fn frames(stack: Option<&Stack>) -> Option<&Frames> {
    let stack = stack?;
    stack.user.as_ref().or(stack.kernel.as_ref()).filter(|frames| !frames.is_empty())
}

impl CallSite {
    fn of(what: &'static str, stack: Option<&Stack>) -> Option<Self> {
        Some(Self(Some((what, frames(stack)?.clone()))))
    }

    /// The place where a connection was closed or, if that is not known, opened.
    fn frames_of(close: &Close) -> Option<(&'static str, &Frames)> {
        if let Some(frames) = frames(close.stack.as_ref()) {
            return Some(("closed at", frames));
        }
        Some(("opened at", frames(close.opener.as_ref()?.stack.as_ref())?))
    }

    /// The frames that identify the place, which are also those that are shown.
    fn frames(&self) -> impl Iterator<Item = (Option<&str>, Option<&str>, &str)> {
        let frames = self.0.iter().flat_map(|(_, frames)| frames.iter()).take(FRAMES);
        frames.map(|frame| (frame.symbol.as_deref(), frame.module.as_deref(), frame.address.as_str()))
    }
}

impl PartialEq for CallSite {
    fn eq(&self, other: &Self) -> bool {
        self.frames().eq(other.frames())
    }
}

impl Eq for CallSite {}

impl Hash for CallSite {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.frames().for_each(|frame| frame.hash(state));
    }
}

/// A separate line: the innermost function first, and `<` for "called by".
impl Display for CallSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((what, _)) = &self.0 else { return Ok(()) };
        let mut line = format!("{:>25} {what} ", "");
        for (number, (symbol, module, address)) in self.frames().enumerate() {
            let file = module.map(|path| path.rsplit('/').next().unwrap_or(path));
            if number > 0 {
                line.push_str(" < ");
            }
            write!(line, "{}", escape(symbol.or(file).unwrap_or(address)))?;
        }
        writeln!(f, "{}", line.chars().take(COLUMNS).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Lingering, examples};

    #[test]
    fn counts_what_is_alike_together() {
        let mut summary = Summary::default();
        for event in examples::all().iter().chain(&examples::all()) {
            summary.add(event);
        }
        let closes = examples::all().iter().filter(|event| matches!(event, Event::Close(_))).count();
        let counted: u64 = summary.counts.iter().map(|count| count.sockets).sum();
        assert_eq!(counted, 2 * closes as u64);
        assert!(summary.ends.len() <= closes, "{}", summary.ends.len());
        let text = summary.to_string();
        assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
    }

    #[test]
    fn what_lingers_is_told_with_its_oldest() {
        let Event::Lingering(lingering) = examples::lingering() else { unreachable!() };
        let older = Box::new(Lingering { for_ms: Some(60_000.0), ..*lingering.clone() });
        let mut summary = Summary::default();
        summary.add_lingering(&Event::Lingering(lingering));
        summary.add_lingering(&Event::Lingering(older));
        let text = summary.to_string();
        assert!(text.contains("leaked") && text.contains("CLOSE_WAIT") && text.contains("1m"), "{text}");
        assert_eq!(summary.lingering.values().map(|count| count.sockets).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn kinds_without_number_are_counted_together() {
        let mut summary = Summary::default();
        let closes = || {
            examples::all().into_iter().find_map(|event| match event {
                Event::Close(close) if close.process.is_some() => Some(close),
                _ => None,
            })
        };
        for pid in (0_u32..).take(MAX_KINDS + 3) {
            let mut close = closes().expect("one has");
            close.process.as_mut().expect("it has").pid = Some(pid);
            summary.add(&Event::Close(close));
        }
        assert_eq!((summary.ends.len(), summary.others), (MAX_KINDS, 3));
        assert!(summary.to_string().contains("3 more"));
    }
}
