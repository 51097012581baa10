//! Sockets in `CLOSE_WAIT` that their programs do not close.

use std::collections::HashMap;

use serde::Deserialize;

use crate::{
    diagnose::{
        end::{Place, nanoseconds},
        marks::Marks,
        names::Who,
        observation::{Observation, Text},
        pairs::Key,
        statistics::ENOUGH,
    },
    event::LingeringKind,
};

/// The number of open sockets that are kept, over all programs; 8 MiB.
const SOCKETS: usize = 65_536;
const PROCESSES: usize = 4_096;
/// The number of places in the code that are distinguished per process.
const OPENERS: usize = 64;

/// The time after which a socket counts as leaked although its end of file has not been read: pools check their idle
/// connections more often than this.
const FORGOTTEN_MS: f64 = 300_000.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ProcessKey {
    source: u16,
    pub(crate) pid: u32,
    pub(crate) who: Option<Who>,
}

#[derive(Clone, Debug)]
struct Socket {
    process: ProcessKey,
    since: i64,
    for_ms: f64,
    kind: LingeringKind,
    place: Place,
    time: i64,
}

#[derive(Debug, Default)]
pub(crate) struct Leaks {
    open: HashMap<Key, Socket>,
    processes: HashMap<ProcessKey, Holdings>,
}

#[derive(Debug, Default)]
struct Holdings {
    /// The number of its sockets that have been closed later.
    closed: u64,
    highest_fd: Option<u32>,
    openers: HashMap<String, u64>,
}

/// The leaked sockets of a process.
pub(crate) struct Leak {
    pub(crate) key: ProcessKey,
    pub(crate) marks: Marks,
    pub(crate) told_of_end: u64,
    pub(crate) closed: u64,
    /// The time from the first leaked socket to the last.
    pub(crate) first_since: i64,
    pub(crate) last_since: i64,
    pub(crate) longest_ms: f64,
    pub(crate) highest_fd: Option<u32>,
    /// The place where most of them were opened, and their number.
    pub(crate) opener: Option<(String, u64)>,
}

impl Leaks {
    /// Adds a lingering line of a socket in `CLOSE_WAIT`.
    pub(crate) fn lingering(
        &mut self,
        observation: &Observation<'_>,
        source: u16,
        pair: Key,
        who: Option<Who>,
    ) {
        let Some(kind @ (LingeringKind::Leaked | LingeringKind::Unread)) = observation.kind else { return };
        let Some(process) = &observation.process else { return };
        let key = ProcessKey { source, pid: process.pid, who };
        let for_ms = observation.for_ms.unwrap_or_default();
        let since = observation.since.unwrap_or(observation.time.saturating_sub(nanoseconds(for_ms)));
        let place = Place { source, seq: observation.seq };
        let is_new = !self.open.contains_key(&pair);
        if is_new
            && (self.open.len() >= SOCKETS
                || self.processes.len() >= PROCESSES && !self.processes.contains_key(&key))
        {
            // There are enough for a finding; further sockets are not counted.
            return;
        }
        let state = self.processes.entry(key).or_default();
        let fd = observation.holders.iter().flatten().filter_map(|holder| holder.fd).max();
        state.highest_fd = state.highest_fd.max(fd);
        if is_new
            && let Some(opener) = observation.opener.as_ref().and_then(|text| opener(text.get()))
            && (state.openers.len() < OPENERS || state.openers.contains_key(&opener))
        {
            *state.openers.entry(opener).or_default() += 1;
        }
        self.open.insert(pair, Socket { process: key, since, for_ms, kind, place, time: observation.time });
    }

    /// Records that a socket was closed.
    pub(crate) fn closed(&mut self, pair: Key) {
        if let Some(socket) = self.open.remove(&pair)
            && let Some(process) = self.processes.get_mut(&socket.process)
        {
            process.closed += 1;
        }
    }

    /// The processes that hold enough sockets and have not closed most of them.
    pub(crate) fn all(&self) -> Vec<Leak> {
        let mut leaks: HashMap<ProcessKey, Leak> = HashMap::new();
        let mut sockets: Vec<_> = self.open.values().collect();
        sockets.sort_unstable_by_key(|socket| (socket.since, socket.place.seq));
        for socket in sockets {
            let leak = leaks.entry(socket.process).or_insert_with(|| {
                let process = self.processes.get(&socket.process);
                let opener = process.and_then(|process| {
                    let most = process.openers.iter().max_by_key(|(name, count)| (**count, name.as_str()));
                    most.map(|(name, count)| (name.clone(), *count))
                });
                Leak {
                    key: socket.process,
                    marks: Marks::default(),
                    told_of_end: 0,
                    closed: process.map_or(0, |process| process.closed),
                    first_since: socket.since,
                    last_since: socket.since,
                    longest_ms: 0.0,
                    highest_fd: process.and_then(|process| process.highest_fd),
                    opener,
                }
            });
            leak.marks.add(socket.place, socket.time);
            leak.told_of_end += u64::from(socket.kind == LingeringKind::Leaked);
            leak.last_since = socket.since;
            leak.longest_ms = leak.longest_ms.max(socket.for_ms);
        }
        let mut leaks: Vec<Leak> = leaks.into_values().filter(Leak::is_one).collect();
        leaks.sort_unstable_by_key(|leak| leak.key);
        leaks
    }
}

impl Leak {
    fn is_one(&self) -> bool {
        // An idle connection in a healthy pool looks the same for a while. It is closed at its next use; until then the
        // program has not read the end of file.
        let is_sure = self.told_of_end > 0 || self.longest_ms >= FORGOTTEN_MS;
        self.marks.count >= ENOUGH && self.closed * 4 < self.marks.count && is_sure
    }
}

/// The innermost frame of the program itself, with the line if it is known.
fn opener(json: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Opener<'a> {
        #[serde(borrow)]
        stack: Option<Stack<'a>>,
    }
    let opener: Opener<'_> = serde_json::from_str(json).ok()?;
    let frames = opener.stack?.user?;
    let frame = frames.iter().find(|frame| !frame.is_of_libc() && frame.symbol.is_some());
    frame.or(frames.first()).and_then(Frame::name)
}

/// The names in a stack.
#[derive(Deserialize)]
pub(crate) struct Stack<'a> {
    #[serde(borrow, default)]
    pub(crate) user: Option<Vec<Frame<'a>>>,
    #[serde(borrow, default)]
    pub(crate) kernel: Option<Vec<Frame<'a>>>,
}

#[derive(Deserialize)]
pub(crate) struct Frame<'a> {
    #[serde(borrow, default)]
    pub(crate) symbol: Option<Text<'a>>,
    #[serde(borrow, default)]
    pub(crate) module: Option<Text<'a>>,
    #[serde(borrow, default)]
    pub(crate) file: Option<Text<'a>>,
    #[serde(default)]
    pub(crate) line: Option<u32>,
}

impl Frame<'_> {
    fn is_of_libc(&self) -> bool {
        let module =
            self.module.as_ref().map_or("", |module| module.0.rsplit('/').next().unwrap_or_default());
        ["libc.", "libc-", "libpthread", "ld-"].iter().any(|name| module.starts_with(name))
    }

    pub(crate) fn name(&self) -> Option<String> {
        let module = || self.module.as_ref().map(|module| module.0.rsplit('/').next().unwrap_or_default());
        let symbol = self.symbol.as_ref().map(|symbol| symbol.0.as_ref()).or_else(module)?;
        Some(match (&self.file, self.line) {
            (Some(file), Some(line)) => format!("{symbol} ({}:{line})", file.0),
            _ => symbol.to_owned(),
        })
    }
}
