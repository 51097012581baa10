//! Sockets in `CLOSE_WAIT` that their programs do not close.

use std::{collections::HashMap, net::SocketAddr, path::Path};

use serde::Deserialize;

use crate::{
    diagnose::{
        end::{Place, nanoseconds},
        marks::Marks,
        names::Who,
        observation::{Observation, ProcessFields, Text},
        pairs::PairKey,
        statistics::ENOUGH,
    },
    event::LingeringKind,
};

/// The number of open sockets that are kept, over all programs; 8 MiB.
const SOCKETS: usize = 65_536;
const PROCESSES: usize = 4_096;
/// The number of places in the code that are distinguished per process.
const OPENERS: usize = 64;

/// The time after which a socket counts as leaked even if its end of file has not been read. Pools check
/// their idle connections more often than this.
const FORGOTTEN_MS: f64 = 300_000.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ProcessKey {
    source: u16,
    pub(crate) pid: u32,
    pub(crate) who: Option<Who>,
}

#[derive(Clone, Debug)]
struct LeakedSocket {
    process: ProcessKey,
    remote: Option<SocketAddr>,
    opened: Option<i64>,
    since: i64,
    for_ms: f64,
    kind: LingeringKind,
    place: Place,
    time: i64,
}

#[derive(Debug, Default)]
pub(crate) struct Leaks {
    open: HashMap<PairKey, LeakedSocket>,
    processes: HashMap<ProcessKey, Holdings>,
}

#[derive(Debug, Default)]
struct Holdings {
    /// The number of its sockets that have been closed later.
    closed: u64,
    has_ended: bool,
    highest_fd: Option<u32>,
    openers: HashMap<String, u64>,
}

/// The leaked sockets of a process.
pub(crate) struct Leak {
    pub(crate) key: ProcessKey,
    pub(crate) marks: Marks,
    pub(crate) told_of_end: u64,
    /// The number of sockets that were opened to an address while another socket to the same address was in
    /// `CLOSE_WAIT`, and still is.
    pub(crate) opened_later: u64,
    pub(crate) closed: u64,
    /// Whether the process ended, and left it to the kernel to close the sockets.
    pub(crate) has_ended: bool,
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
        pair: PairKey,
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
        state.highest_fd = state.highest_fd.max(observation.highest_fd);
        if is_new
            && let Some(opener) = observation.opener.as_ref().and_then(|text| opener(text.get()))
            && (state.openers.len() < OPENERS || state.openers.contains_key(&opener))
        {
            *state.openers.entry(opener).or_default() += 1;
        }
        let age = observation.connection.age_ms.map(nanoseconds);
        let opened = age.map(|age| observation.time.saturating_sub(age));
        let remote = observation.connection.remote;
        let time = observation.time;
        self.open
            .insert(pair, LeakedSocket { process: key, remote, opened, since, for_ms, kind, place, time });
    }

    /// Whether no open socket lingers.
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Records that a socket was closed: by its program, or by the kernel because the process ended. Then the
    /// program never closed it.
    pub(crate) fn closed(&mut self, pair: PairKey, by_death: bool) {
        let Some(socket) = self.open.get(&pair) else { return };
        if let Some(process) = self.processes.get_mut(&socket.process) {
            process.closed += u64::from(!by_death);
            process.has_ended |= by_death;
        }
        if !by_death {
            self.open.remove(&pair);
        }
    }

    /// The processes that hold enough sockets and have not closed most of them.
    pub(crate) fn all(&self) -> Vec<Leak> {
        let mut leaks: HashMap<ProcessKey, Leak> = HashMap::new();
        let mut sockets: Vec<_> = self.open.values().collect();
        sockets.sort_unstable_by_key(|socket| (socket.since, socket.place.seq));
        // The time since which the first socket of each process to each address has been in CLOSE_WAIT.
        let mut oldest: HashMap<(ProcessKey, SocketAddr), i64> = HashMap::new();
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
                    opened_later: 0,
                    closed: process.map_or(0, |process| process.closed),
                    has_ended: process.is_some_and(|process| process.has_ended),
                    first_since: socket.since,
                    last_since: socket.since,
                    longest_ms: 0.0,
                    highest_fd: process.and_then(|process| process.highest_fd),
                    opener,
                }
            });
            leak.marks.add(socket.place, socket.time);
            leak.told_of_end += u64::from(socket.kind == LingeringKind::Leaked);
            if let Some(remote) = socket.remote {
                let oldest = *oldest.entry((socket.process, remote)).or_insert(socket.since);
                leak.opened_later += u64::from(socket.opened.is_some_and(|opened| opened > oldest));
            }
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
        // An idle connection in a healthy pool looks the same until its next use, when the program reads the
        // end of file and closes it. But a pool tries all connections that it has before it opens new ones.
        let is_sure = self.told_of_end > 0 || self.opened_later >= ENOUGH || self.longest_ms >= FORGOTTEN_MS;
        self.marks.count >= ENOUGH && self.closed * 4 < self.marks.count && is_sure
    }
}

/// The innermost frame of the program's own code, with the line if it is known.
fn opener(json: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct OpenerFields<'a> {
        #[serde(borrow)]
        process: Option<ProcessFields<'a>>,
        #[serde(borrow)]
        stack: Option<StackFields<'a>>,
    }
    let opener: OpenerFields<'_> = serde_json::from_str(json).ok()?;
    let frames = opener.stack?.user?;
    let exe = opener.process.and_then(|process| process.exe);
    let is_in_exe = |frame: &&FrameFields<'_>| frame.symbol.is_some() && frame.module_is(exe.as_ref());
    let is_named = |frame: &&FrameFields<'_>| frame.symbol.is_some() && !frame.is_of_libc();
    let own = own_java_frame(&frames).or_else(|| own_python_frame(&frames));
    let own = own.or_else(|| frames.iter().find(is_in_exe));
    own.or_else(|| frames.iter().find(is_named)).or(frames.first()).and_then(FrameFields::name)
}

/// The innermost Java method of the application. The outermost method that is not part of the JDK belongs to
/// the application, and so do all methods whose packages have the same first two parts in their names. Other
/// methods are those of libraries.
fn own_java_frame<'a, 'b>(frames: &'b [FrameFields<'a>]) -> Option<&'b FrameFields<'a>> {
    const JDK: [&str; 6] = ["java.", "javax.", "jdk.", "sun.", "com.sun.", "jakarta."];
    let class = |frame: &'b FrameFields<'a>| {
        frame.file.as_ref().filter(|file| file.0.ends_with(".java"))?;
        let (method, _) = frame.symbol.as_ref()?.0.split_once('(')?;
        let (class, _) = method.rsplit(' ').next()?.rsplit_once('.')?;
        (!JDK.iter().any(|prefix| class.starts_with(prefix))).then_some(class)
    };
    let package = |class: &'b str| class.match_indices('.').nth(1).map_or(class, |(end, _)| &class[..end]);
    let own = frames.iter().rev().find_map(class).map(package)?;
    frames.iter().find(|frame| class(frame).map(package) == Some(own))
}

/// The innermost Python function that is not in a library.
fn own_python_frame<'a, 'b>(frames: &'b [FrameFields<'a>]) -> Option<&'b FrameFields<'a>> {
    const LIBRARIES: [&str; 3] = ["/lib/python3", "/site-packages/", "/dist-packages/"];
    let is_python = |file: &str| Path::new(file).extension().is_some_and(|extension| extension == "py");
    let is_own = |file: &str| is_python(file) && !LIBRARIES.iter().any(|part| file.contains(part));
    frames
        .iter()
        .find(|frame| frame.module.is_none() && frame.file.as_ref().is_some_and(|file| is_own(&file.0)))
}

/// The names in a stack.
#[derive(Deserialize)]
pub(crate) struct StackFields<'a> {
    #[serde(borrow, default)]
    pub(crate) user: Option<Vec<FrameFields<'a>>>,
    #[serde(borrow, default)]
    pub(crate) kernel: Option<Vec<FrameFields<'a>>>,
}

#[derive(Deserialize)]
pub(crate) struct FrameFields<'a> {
    #[serde(borrow, default)]
    pub(crate) symbol: Option<Text<'a>>,
    #[serde(borrow, default)]
    pub(crate) module: Option<Text<'a>>,
    #[serde(borrow, default)]
    pub(crate) file: Option<Text<'a>>,
    #[serde(default)]
    pub(crate) line: Option<u32>,
}

impl FrameFields<'_> {
    fn module_is(&self, exe: Option<&Text<'_>>) -> bool {
        self.module.as_ref().zip(exe).is_some_and(|(module, exe)| module.0 == exe.0)
    }

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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn opened_in(exe: &str, frames: &[(&str, &str, Option<&str>)]) -> Option<String> {
        let frames: Vec<_> = frames
            .iter()
            .map(|(symbol, module, file)| {
                let module = Some(module).filter(|module| !module.is_empty());
                json!({"symbol": symbol, "module": module, "file": file, "line": 7})
            })
            .collect();
        opener(
            &json!({"process": {"pid": 1, "comm": "x", "exe": exe}, "stack": {"user": frames}}).to_string(),
        )
    }

    #[test]
    fn the_own_code_of_a_program_is_named() {
        let connect = ("__connect", "/lib/libc.so.6", None);
        let curl = ("Curl_connect", "/lib/libcurl.so.4", None);
        let own = ("fetch", "/bin/app", Some("fetch.c"));
        assert_eq!(opened_in("/bin/app", &[connect, curl, own]).as_deref(), Some("fetch (fetch.c:7)"));
        assert_eq!(opened_in("/bin/other", &[connect, curl, own]).as_deref(), Some("Curl_connect"));
        assert_eq!(opened_in("/bin/other", &[connect]).as_deref(), Some("__connect"));
    }

    #[test]
    fn the_function_of_a_python_program_is_named() {
        let python = "/usr/bin/python3.11";
        let call = ("PyObject_Vectorcall", python, None);
        let standard = ("create_connection", "", Some("/usr/lib/python3.11/socket.py"));
        let package = ("get", "", Some("/srv/venv/lib/python3.11/site-packages/requests/api.py"));
        let own = ("fetch", "", Some("/srv/crawler.py"));
        let outer = ("main", "", Some("/srv/crawler.py"));
        assert_eq!(
            opened_in(python, &[call, standard, package, own, outer]).as_deref(),
            Some("fetch (/srv/crawler.py:7)")
        );
        assert_eq!(opened_in(python, &[call, standard]).as_deref(), Some("PyObject_Vectorcall"));
    }

    #[test]
    fn libraries_of_java_are_not_the_application() {
        let jdk = ("void sun.nio.ch.Net.connect(int)", "", Some("Net.java"));
        let library = ("void org.apache.http.Exec.execute(int)", "", Some("Exec.java"));
        let own = ("int com.acme.shop.Prices.price(java.lang.String)", "", Some("Prices.java"));
        let outer = ("void com.acme.jobs.Job.run()", "", Some("Job.java"));
        let thread = ("void java.lang.Thread.run()", "", Some("Thread.java"));
        assert_eq!(
            opened_in("/usr/bin/java", &[jdk, library, own, outer, thread]).as_deref(),
            Some("int com.acme.shop.Prices.price(java.lang.String) (Prices.java:7)")
        );
        assert_eq!(
            opened_in("/usr/bin/java", &[jdk, thread]).as_deref(),
            Some("void sun.nio.ch.Net.connect(int) (Net.java:7)")
        );
    }
}
