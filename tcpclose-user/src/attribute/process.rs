//! What is known of processes, also after they have ended.
//!
//! A short-lived program is gone before the close of its connection has been told. So what will be needed of
//! its `/proc/PID` is copied as soon as it first touches a socket: see [`Processes::notice`].

use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::container;
use super::mappings::{Backing, Mapping, Modules, undeleted};
use crate::kernel::privilege;

/// How many images are kept.
const MAX_IMAGES: usize = 4096;

/// How many mappings they may have together: what bounds the memory, about 64 bytes each.
const MAX_MAPPINGS: usize = 1 << 20;

/// When stacks lead out of the known mappings, a process is asked again, but not sooner than this. A walk along
/// frame pointers through code that has none ends in arbitrary numbers, so addresses that are nowhere are
/// common.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// How long files of an ended process stay open.
const LINGER: Duration = Duration::from_mins(1);

/// A program as a process runs it: exec makes another one. What could not be read is `None` or empty.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// Process id in the initial pid namespace.
    pub pid: u32,
    /// Address of its `mm_struct`, 0 when not known.
    pub mm: u64,
    /// When the process started, in clock ticks since boot: tells it from a later one with the same id.
    pub started: Option<u64>,
    /// Path of the program, as the process sees it.
    pub exe: Option<String>,
    /// Id of the container it is in.
    pub container: Option<String>,
    /// The process id that it has in its own pid namespace.
    pub inner_pid: Option<u32>,
    /// Effective user id, in the initial user namespace.
    pub uid: Option<u32>,
    /// Executable mappings in the order of addresses.
    pub mappings: Vec<Mapping>,
}

impl Image {
    /// The executable mapping at an address.
    pub fn mapping(&self, address: u64) -> Option<&Mapping> {
        let index = self.mappings.partition_point(|mapping| mapping.end <= address);
        self.mappings.get(index).filter(|mapping| mapping.start <= address)
    }

    /// Whether the process still runs, and is not another one with the same id. It may have called exec
    /// since.
    pub fn is_running(&self) -> bool {
        self.started.is_some() && self.started == started(self.pid)
    }

    /// Whether what is mapped from the first instruction to the last is where it is in another image. Where not, the
    /// process has called exec for the same program between the two.
    fn has_layout_of(&self, other: &Self) -> bool {
        let is_lasting = |mapping: &&Mapping| match &mapping.backing {
            Backing::File { path, .. } => self.exe.as_deref() == path.to_str(),
            Backing::Vdso => true,
            Backing::Anonymous => false,
        };
        let is_there =
            |mapping: &Mapping| other.mapping(mapping.start).is_some_and(|it| it.start == mapping.start);
        self.mappings.iter().filter(is_lasting).all(is_there)
    }

    /// Whether files are held open for it.
    fn holds_files(&self) -> bool {
        self.mappings.iter().any(|mapping| holds_file(&mapping.backing))
    }
}

fn holds_file(backing: &Backing) -> bool {
    matches!(backing, Backing::File { module: Some(module), .. } if module.is_held())
}

#[derive(Debug)]
struct Entry {
    image: Arc<Image>,
    /// The higher, the more recently used.
    used: u64,
    /// When a stack that led out of the known mappings last had them read again.
    asked: Option<Instant>,
    /// When the process was first found to be gone.
    gone: Option<Instant>,
}

/// The images of processes. At most 4096 are kept, with at most a million mappings together; beyond that
/// those that have not been asked for longest are forgotten, and are read again if they are asked for and
/// still there.
#[derive(Debug, Default)]
pub struct Processes {
    images: HashMap<(u32, u64), Entry>,
    /// The image of each process that was noticed last.
    latest: HashMap<u32, u64>,
    modules: Modules,
    mappings: usize,
    clock: u64,
    /// Whether the ids that are asked for are none of those in `/proc`.
    are_elsewhere: bool,
}

impl Processes {
    /// Knows none yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// For processes by the ids that the kernel half tells. In another pid namespace than the first these lead nowhere,
    /// or to somebody else.
    pub fn of_kernel_half() -> Self {
        Self { are_elsewhere: !privilege::in_initial_pid_namespace(), ..Self::default() }
    }

    /// Copies what will be needed of a process, at once. To be called when it first touches a socket, and
    /// again after exec, with the `mm` that the kernel told: reading it later would find the next program, or
    /// nothing.
    pub fn notice(&mut self, pid: u32, mm: u64) {
        let image = self.take(pid, mm);
        // Told twice, the second time too late.
        if image.started.is_none() && self.images.contains_key(&(pid, mm)) {
            return;
        }
        self.insert(image);
    }

    /// The image of a process: the one noticed, or else, if the process is still there, the one it has now.
    /// With an `mm` of 0, which a process has when it is about to end, its latest.
    pub fn image(&mut self, pid: u32, mm: u64) -> Option<Arc<Image>> {
        let key = self.key(pid, mm);
        if !self.images.contains_key(&key) {
            let image = self.take(pid, key.1);
            image.started?;
            self.insert(image);
        }
        self.clock += 1;
        let entry = self.images.get_mut(&key)?;
        entry.used = self.clock;
        Some(entry.image.clone())
    }

    /// Like [`image`](Self::image), for naming `frames`. Where one of them is in none of the known mappings,
    /// they are first read again, unless they were within the last second: a library may have been loaded
    /// since, or the place for code that is compiled at run time may have grown.
    pub fn image_for(&mut self, pid: u32, mm: u64, frames: &[u64], now: Instant) -> Option<Arc<Image>> {
        let image = self.image(pid, mm)?;
        if frames.iter().all(|address| image.mapping(*address).is_some()) {
            return Some(image);
        }
        let key = self.key(pid, mm);
        let entry = self.images.get_mut(&key)?;
        if entry.asked.is_some_and(|asked| now.saturating_duration_since(asked) < ASK_AGAIN) {
            return Some(image);
        }
        entry.asked = Some(now);
        self.refresh(pid, mm)
    }

    /// Reads the mappings again, if the process is still there, is the same and runs the same program; the
    /// image that it has then, or had.
    pub fn refresh(&mut self, pid: u32, mm: u64) -> Option<Arc<Image>> {
        let key = self.key(pid, mm);
        let old = self.images.get(&key)?.image.clone();
        // After an exec, what can be read now belongs to another image.
        let is_latest = self.latest.get(&pid) == Some(&key.1);
        if !is_latest || !old.is_running() {
            return Some(old);
        }
        let new = self.take(pid, key.1);
        if new.started != old.started || new.exe != old.exe || !old.has_layout_of(&new) {
            return Some(old);
        }
        let entry = self.images.get_mut(&key)?;
        self.mappings = self.mappings - old.mappings.len() + new.mappings.len();
        entry.image = Arc::new(new);
        Some(entry.image.clone())
    }

    /// Lets go of files that are held open for processes which ended more than a minute ago. What else is
    /// known of those stays. To be called every few seconds.
    pub fn sweep(&mut self, now: Instant) {
        for entry in self.images.values_mut().filter(|entry| entry.image.holds_files()) {
            if entry.image.is_running() {
                continue;
            }
            let gone = *entry.gone.get_or_insert(now);
            if now.saturating_duration_since(gone) < LINGER {
                continue;
            }
            let mut image = Image::clone(&entry.image);
            for mapping in &mut image.mappings {
                if let Backing::File { module, .. } = &mut mapping.backing {
                    module.take_if(|module| module.is_held());
                }
            }
            entry.image = Arc::new(image);
        }
    }

    fn take(&mut self, pid: u32, mm: u64) -> Image {
        if self.are_elsewhere {
            return Image { pid, mm, ..Image::default() };
        }
        take(&mut self.modules, pid, mm)
    }

    /// How many files are held open.
    pub fn files_held(&self) -> usize {
        self.modules.held()
    }

    fn key(&self, pid: u32, mm: u64) -> (u32, u64) {
        (pid, if mm == 0 { self.latest.get(&pid).copied().unwrap_or(0) } else { mm })
    }

    fn insert(&mut self, image: Image) {
        let key = (image.pid, image.mm);
        self.remove(key);
        while !self.images.is_empty()
            && (self.images.len() >= MAX_IMAGES || self.mappings + image.mappings.len() > MAX_MAPPINGS)
        {
            let oldest = self.images.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| *key);
            let Some(oldest) = oldest else { break };
            self.remove(oldest);
        }
        self.clock += 1;
        self.mappings += image.mappings.len();
        self.latest.insert(key.0, key.1);
        self.images.insert(key, Entry { image: Arc::new(image), used: self.clock, asked: None, gone: None });
    }

    fn remove(&mut self, key: (u32, u64)) {
        if let Some(entry) = self.images.remove(&key) {
            self.mappings -= entry.image.mappings.len();
            if self.latest.get(&key.0) == Some(&key.1) {
                self.latest.remove(&key.0);
            }
        }
    }
}

/// Reads everything of a process. It may call exec or end meanwhile: then once more, lest two programs get
/// mixed up.
fn take(modules: &mut Modules, pid: u32, mm: u64) -> Image {
    for _ in 0..3 {
        let Some(before) = exe(pid) else { break };
        let image = read(modules, pid, mm, &before);
        // If it ended between one file and the next, what was read up to then was its own.
        if exe(pid).is_none_or(|after| after == before) {
            return image;
        }
    }
    Image { pid, mm, started: started(pid), ..Image::default() }
}

/// In the order in which a process that ends loses things: its memory goes first, and may be gone a tenth of a
/// millisecond from now.
fn read(modules: &mut Modules, pid: u32, mm: u64, exe: &[u8]) -> Image {
    let text = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let maps = text("maps");
    let cgroup = text("cgroup");
    let status = text("status");
    let started = started(pid);
    let exe = undeleted(exe).0;
    let mappings = modules.mappings(pid, &maps, Some(exe));
    let status = String::from_utf8_lossy(&status);
    Image {
        pid,
        mm,
        started,
        exe: Some(display(exe)),
        container: container::id(&String::from_utf8_lossy(&cgroup)),
        inner_pid: status_field(&status, "NStgid:").and_then(|ids| ids.last().copied()),
        uid: status_field(&status, "Uid:").and_then(|ids| ids.get(1).copied()),
        mappings,
    }
}

fn display(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn exe(pid: u32) -> Option<Vec<u8>> {
    Some(fs::read_link(format!("/proc/{pid}/exe")).ok()?.as_os_str().as_bytes().to_vec())
}

/// When a process started, clock ticks since boot. `None` when there is none, or only its remains are left.
fn started(pid: u32) -> Option<u64> {
    started_in(&fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// The same, from the content of a `/proc/PID/stat`.
fn started_in(stat: &[u8]) -> Option<u64> {
    // The thread's name is in brackets, and may itself have brackets and spaces in it.
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = str::from_utf8(stat.get(name_end + 1..)?).ok()?.split_ascii_whitespace();
    // The third field of the line, then the twenty-second.
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The numbers behind a name in a `/proc/PID/status`.
fn status_field(status: &str, name: &str) -> Option<Vec<u32>> {
    let numbers = status.lines().find_map(|line| line.strip_prefix(name))?;
    numbers.split_ascii_whitespace().map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs::File;
    use std::io::Read as _;
    use std::path::PathBuf;
    use std::process::{Child, ChildStdin, Command, Stdio};

    /// A program that waits until it is told to end.
    struct Waiting {
        child: Child,
        stdin: Option<ChildStdin>,
    }

    impl Waiting {
        fn start(program: &Path) -> Self {
            let mut child =
                Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let mut stdin = child.stdin.take().unwrap();
            // Once it answers, exec is over and its libraries are loaded.
            std::io::Write::write_all(&mut stdin, b"!").unwrap();
            child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
            Self { child, stdin: Some(stdin) }
        }

        fn end(&mut self) {
            self.stdin.take();
            self.child.wait().unwrap();
        }
    }

    impl Drop for Waiting {
        fn drop(&mut self) {
            self.end();
        }
    }

    fn scratch(name: &str) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("tcpclose-process-{}-{name}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    fn own_pid() -> u32 {
        std::process::id()
    }

    #[test]
    fn knows_this_process() {
        let mut processes = Processes::new();
        let here = knows_this_process as fn() as usize as u64;
        let image = processes.image_for(own_pid(), 7, &[here], Instant::now()).unwrap();
        let exe = std::env::current_exe().unwrap();
        assert_eq!(image.exe.as_deref(), exe.to_str());
        assert!(image.is_running());
        assert_eq!(image.inner_pid, Some(own_pid()));
        let mapping = image.mapping(here).unwrap();
        let Backing::File { path, module: Some(module) } = &mapping.backing else { panic!("{mapping:?}") };
        assert_eq!(**path, *exe);
        assert_eq!(module.host_path(), Some(exe.as_path()));
        assert_eq!(processes.files_held(), 0, "what its path leads to need not be held open");
        assert!(image.mapping(0).is_none());
        assert!(image.mapping(u64::MAX).is_none());
    }

    #[test]
    fn remembers_a_process_that_has_ended() {
        let mut processes = Processes::new();
        let mut waiting = Waiting::start(Path::new("cat"));
        let pid = waiting.child.id();
        processes.notice(pid, 1);
        waiting.end();
        processes.notice(pid, 1);
        let image = processes.image(pid, 1).unwrap();
        assert!(image.exe.as_deref().is_some_and(|exe| exe.starts_with('/')), "{image:?}");
        assert!(image.mappings.len() > 1);
        assert!(!image.is_running());
        // The kernel has taken the address space away: the latest image is meant.
        assert!(Arc::ptr_eq(&image, &processes.image(pid, 0).unwrap()));
        // Another image of a process that is gone cannot be had.
        assert!(processes.image(pid, 2).is_none());
    }

    #[test]
    fn makes_do_without_the_process() {
        let mut processes = Processes::new();
        let mut waiting = Waiting::start(Path::new("cat"));
        waiting.end();
        let pid = waiting.child.id();
        assert!(processes.image(pid, 1).is_none());
        processes.notice(pid, 1);
        let image = processes.image_for(pid, 1, &[1, 2], Instant::now()).unwrap();
        assert_eq!((image.started, &image.exe, &image.container), (None, &None, &None));
        assert!(image.mappings.is_empty());
        for pid in [0, u32::MAX] {
            processes.notice(pid, 0);
            let image = processes.image_for(pid, 0, &[1], Instant::now());
            assert!(image.is_none_or(|image| image.exe.is_none()));
        }
    }

    #[test]
    fn takes_nobody_for_another() {
        let mut processes = Processes { are_elsewhere: true, ..Processes::default() };
        processes.notice(own_pid(), 1);
        let image = processes.image_for(own_pid(), 1, &[1], Instant::now()).unwrap();
        assert_eq!((image.started, &image.exe, image.inner_pid), (None, &None, None));
        assert!(!image.is_running() && image.mappings.is_empty());
        assert!(processes.image(own_pid(), 2).is_none());
    }

    #[test]
    fn holds_a_removed_file_until_the_process_is_long_gone() {
        let directory = scratch("removed");
        let program = directory.join("program");
        fs::copy("/bin/cat", &program).unwrap();
        let mut processes = Processes::new();
        let mut waiting = Waiting::start(&program);
        let pid = waiting.child.id();
        fs::remove_file(&program).unwrap();
        processes.notice(pid, 1);
        assert_eq!(processes.files_held(), 1);
        let image = processes.image(pid, 1).unwrap();
        assert_eq!(image.exe.as_deref(), program.to_str(), "without the kernel's mark");
        let now = Instant::now();
        processes.sweep(now + 9 * LINGER);
        assert_eq!(processes.files_held(), 1, "it still runs");
        waiting.end();
        drop(image);
        processes.sweep(now);
        processes.sweep(now + LINGER / 2);
        assert_eq!(processes.files_held(), 1);
        processes.sweep(now + LINGER);
        assert_eq!(processes.files_held(), 0);
        assert_eq!(processes.image(pid, 1).unwrap().exe.as_deref(), program.to_str());
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn reads_mappings_again_when_one_is_missing() {
        let mut processes = Processes::new();
        let mut waiting = Waiting::start(Path::new("cat"));
        let pid = waiting.child.id();
        processes.notice(pid, 1);
        let address = processes.image(pid, 1).unwrap().mappings[0].start;
        let forget = |processes: &mut Processes| {
            let entry = processes.images.get_mut(&(pid, 1)).unwrap();
            let mut image = Image::clone(&entry.image);
            processes.mappings -= image.mappings.len();
            image.mappings.clear();
            entry.image = Arc::new(image);
        };
        let now = Instant::now();
        let times = [(Duration::ZERO, true), (ASK_AGAIN / 2, false), (ASK_AGAIN, true), (ASK_AGAIN, false)];
        for (later, found) in times {
            forget(&mut processes);
            let image = processes.image_for(pid, 1, &[address], now + later).unwrap();
            assert_eq!(image.mapping(address).is_some(), found, "after {later:?}");
        }
        assert!(processes.refresh(pid, 1).unwrap().mapping(address).is_some());
        // Nor is one image to be mixed with another, of the same program and with the same number.
        let entry = processes.images.get_mut(&(pid, 1)).unwrap();
        let mut moved = Image::clone(&entry.image);
        let vdso = moved.mappings.iter_mut().find(|mapping| matches!(mapping.backing, Backing::Vdso));
        if let Some(vdso) = vdso {
            (vdso.start, vdso.end) = (vdso.start - 0x1000, vdso.end - 0x1000);
            let moved = Arc::new(moved);
            entry.image = moved.clone();
            assert!(Arc::ptr_eq(&processes.refresh(pid, 1).unwrap(), &moved));
        }
        processes.notice(pid, 2);
        forget(&mut processes);
        assert!(processes.refresh(pid, 1).unwrap().mappings.is_empty());
        waiting.end();
        assert!(processes.refresh(pid, 2).unwrap().mapping(address).is_some(), "still known");
    }

    #[test]
    fn forgets_the_longest_unused() {
        let mut processes = Processes::new();
        let fake = |pid| Image { pid, mm: 1, started: Some(1), ..Image::default() };
        for pid in 0..u32::try_from(MAX_IMAGES).unwrap() {
            processes.insert(fake(pid));
        }
        processes.image(0, 1).unwrap();
        processes.insert(fake(1_000_000_000));
        assert_eq!(processes.images.len(), MAX_IMAGES);
        assert!(processes.images.contains_key(&(0, 1)));
        assert!(!processes.images.contains_key(&(1, 1)));
        assert!(!processes.latest.contains_key(&1));

        let mapping = Mapping { start: 0, end: 1, offset: 0, base: 0, backing: Backing::Anonymous };
        for pid in 0..3 {
            let mappings = vec![mapping.clone(); MAX_MAPPINGS / 2];
            processes.insert(Image { mappings, ..fake(pid) });
        }
        assert_eq!(processes.mappings, MAX_MAPPINGS);
        assert!(processes.images.contains_key(&(1, 1)) && processes.images.contains_key(&(2, 1)));
    }

    #[test]
    fn takes_proc_apart() {
        assert_eq!(
            started_in(b"12 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20"),
            Some(4711)
        );
        assert_eq!(started_in(b"12 (a) Z 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20"), None);
        for broken in [&b""[..], b"12 (a", b"12 (a)", b"12 (a) S", b"12 (a) S 1 2", b")"] {
            assert_eq!(started_in(broken), None);
        }
        let status = "Name:\tNStgid: 9\nUid:\t1\t2\t3\t4\nNStgid:\t77\t5\n";
        assert_eq!(status_field(status, "NStgid:"), Some(vec![77, 5]));
        assert_eq!(status_field(status, "Uid:"), Some(vec![1, 2, 3, 4]));
        assert_eq!(status_field("NStgid:\tx\n", "NStgid:"), None);
        assert_eq!(status_field("", "NStgid:"), None);
        assert!(File::open("/proc/self/stat").is_ok());
    }
}
