//! What is known about processes, including those that have exited.
//!
//! A short-lived program has exited before the close of its connection is reported. The facts in its
//! `/proc/PID` that will be needed are therefore copied as soon as it first touches a socket: see
//! [`Processes::notice`].

pub mod beneath;
pub mod container;
pub mod container_names;
pub mod holder;
pub mod mappings;
pub mod perf_map;
pub mod signals;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::{
    container_names::{ContainerNames, RuntimeNames},
    mappings::{Backing, Mapping, Modules, undeleted},
    perf_map::LeftBehind,
};
use crate::{kernel::privilege, pace::Pace};

/// The number of program images that are kept.
const MAX_IMAGES: usize = 4096;

/// The number of mappings of all these images together. They take most of the memory, about 64 bytes each.
const MAX_MAPPINGS: usize = 1 << 20;

/// The shortest time between two reads of a process's name, and between two reads of its mappings because a
/// stack has an address outside them. Such addresses are common: following frame pointers through code that
/// keeps none yields arbitrary addresses.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// How long files stay open for a process that has exited.
const KEEP_OPEN: Duration = Duration::from_mins(1);

/// How many ids of another pid namespace are kept. When there are more, all are forgotten; a process whose id
/// is not known any more is reported without one.
const MAX_LOCAL_PIDS: usize = 32_768;

/// The id of a process in the pid namespace of tcpclose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LocalPid {
    /// That of the initial pid namespace, in which tcpclose runs.
    #[default]
    Same,
    /// This one.
    Other(u32),
    /// The process is not in this namespace, or its id there is not known.
    None,
}

impl LocalPid {
    /// The id in tcpclose's namespace of the process with this id in the initial pid namespace.
    pub fn of(self, pid: u32) -> Option<u32> {
        match self {
            Self::Same => Some(pid),
            Self::Other(local) => Some(local),
            Self::None => None,
        }
    }
}

/// A program image: what a process runs until its next exec. What could not be read is `None` or empty.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// Process id in the pid namespace of this tool's `/proc`; 0 if it has none there.
    pub pid: u32,
    /// Address of its `mm_struct`; 0 if not known.
    pub mm: u64,
    /// When the process started, in clock ticks since boot: distinguishes it from a later one with the same
    /// id.
    pub started: Option<u64>,
    /// The program's name, which is that of its main thread.
    pub comm: Option<String>,
    /// Path of the executable, as the process sees it.
    pub exe: Option<String>,
    /// Id of its container.
    pub container: Option<String>,
    /// The names of the container and of its pod.
    pub names: Arc<RuntimeNames>,
    /// Process id in its own pid namespace.
    pub inner_pid: Option<u32>,
    /// Effective user id, in the initial user namespace.
    pub uid: Option<u32>,
    /// Executable mappings in the order of addresses.
    pub mappings: Vec<Mapping>,
    /// The perf map, which is needed when the process has ended.
    pub perf_map: LeftBehind,
}

impl Image {
    /// The executable mapping at an address.
    pub fn mapping(&self, address: u64) -> Option<&Mapping> {
        let index = self.mappings.partition_point(|mapping| mapping.end <= address);
        self.mappings.get(index).filter(|mapping| mapping.start <= address)
    }

    /// Opens the perf map of the process. After the process has ended, it is the file that it has left
    /// behind, unless another process has the same id by now.
    pub fn open_perf_map(&self) -> Option<File> {
        if self.is_running() {
            return perf_map::open(self.pid, self.inner_pid?, self.uid);
        }
        if started(self.pid).is_some() {
            return None;
        }
        self.perf_map.reopen(self.started, self.uid)
    }

    /// Whether the process still runs, and is not another one with the same id. It may have called exec
    /// since.
    pub fn is_running(&self) -> bool {
        self.started.is_some() && self.started == started(self.pid)
    }

    /// Whether the executable and the vDSO, which stay mapped for an image's whole life, have the same
    /// addresses in `other`. If not, the process called exec for the same program between the two.
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

    /// Whether both have the same mappings at the same addresses, apart from files that could not be
    /// identified.
    fn has_mappings_of(&self, other: &Self) -> bool {
        let of = |image: &Self| -> Vec<_> {
            let place = |it: &Mapping| (it.start, it.end, it.offset, it.backing.identity());
            image.mappings.iter().map(place).collect()
        };
        of(self) == of(other)
    }

    /// The program's name. The process may have been renamed since it was noticed, unless it has ended or
    /// executes another program by now.
    fn comm_now(&self) -> Option<String> {
        let read = || {
            let comm = fs::read_to_string(format!("/proc/{}/comm", self.pid)).ok()?;
            let exe = fs::read_link(format!("/proc/{}/exe", self.pid)).ok()?;
            let is_this = exe.to_str() == self.exe.as_deref() && self.is_running();
            Some(comm.trim_end().to_owned()).filter(|comm| is_this && !comm.is_empty())
        };
        read().or_else(|| self.comm.clone())
    }

    fn holds_files(&self) -> bool {
        self.perf_map.is_held() || self.mappings.iter().any(|mapping| holds_file(&mapping.backing))
    }
}

fn holds_file(backing: &Backing) -> bool {
    matches!(backing, Backing::File { module: Some(module), .. } if module.is_held())
}

#[derive(Debug)]
struct KnownImage {
    image: Arc<Image>,
    /// When it was last used, by [`Processes::clock`].
    used: u64,
    /// When the mappings were last read again because a stack had an address outside them.
    asked: Option<Instant>,
    /// The program's name, and when it was read.
    comm: Option<(Option<String>, Instant)>,
    /// When the process was first found to have exited.
    gone: Option<Instant>,
    /// Limits how often the mappings are read again.
    pace: Pace,
}

/// The program images of processes. At most 4096 are kept, with at most a million mappings in all. Beyond
/// that the least recently used are dropped; they are read again when needed if the process still runs.
#[derive(Debug, Default)]
pub struct Processes {
    images: HashMap<(u32, u64), KnownImage>,
    /// The latest image of each process, by its `mm`.
    latest: HashMap<u32, u64>,
    modules: Modules,
    container_names: ContainerNames,
    mappings: usize,
    clock: u64,
    /// Counts the changes of `images`.
    version: Arc<AtomicU64>,
    /// The ids in `/proc` of processes with other ids in the kernel, if this is not the initial pid
    /// namespace; 0 for a process that `/proc` does not show.
    local_pids: Option<HashMap<u32, u32>>,
}

impl Processes {
    /// Makes an empty collection.
    pub fn new() -> Self {
        Self { container_names: ContainerNames::new(), ..Self::default() }
    }

    /// Makes an empty collection for the ids that the kernel half reports, which are those of the initial pid
    /// namespace. In any other namespace, `/proc` has other ids, which [`notice_as`](Self::notice_as) adds.
    pub fn of_kernel_half() -> Self {
        let local_pids = (!privilege::in_initial_pid_namespace()).then(HashMap::new);
        Self { local_pids, ..Self::new() }
    }

    /// Like [`notice`](Self::notice), for a process with the id `local` in this pid namespace, or with none.
    pub fn notice_as(&mut self, pid: u32, local: Option<u32>, mm: u64, comm: Option<String>) {
        if let Some(known) = &mut self.local_pids {
            if known.len() >= MAX_LOCAL_PIDS && !known.contains_key(&pid) {
                known.clear();
            }
            known.insert(pid, local.unwrap_or(0));
            self.version.fetch_add(1, Ordering::Release);
        }
        // Of a process that is about to exit, what was known before says more.
        if mm != 0 || !self.latest.contains_key(&pid) {
            self.notice(pid, mm, comm);
        }
    }

    /// The id that process `pid` has in `/proc`.
    pub fn local_pid(&self, pid: u32) -> LocalPid {
        match &self.local_pids {
            None => LocalPid::Same,
            Some(known) => {
                known.get(&pid).filter(|local| **local != 0).map_or(LocalPid::None, |it| LocalPid::Other(*it))
            }
        }
    }

    /// Copies the facts about a process that will be needed. Call it when the process first touches a socket,
    /// and again after exec, with the `mm` that the kernel half reported: a later read would find the next
    /// program, or nothing.
    pub fn notice(&mut self, pid: u32, mm: u64, comm: Option<String>) {
        let mut image = self.take(pid, mm);
        // The name that the kernel half has read is this image's in any case.
        image.comm = comm.or(image.comm);
        // This is a second notice, and it came too late.
        if image.started.is_none() && self.images.contains_key(&(pid, mm)) {
            return;
        }
        self.insert(pid, image);
    }

    /// The image that was noticed or, if there is none and the process still runs, its current one. With an
    /// `mm` of 0, which a process has when it is about to exit, its latest.
    pub fn image(&mut self, pid: u32, mm: u64) -> Option<Arc<Image>> {
        let key = self.key(pid, mm);
        if !self.images.contains_key(&key) {
            let image = self.take(pid, key.1);
            image.started?;
            self.insert(pid, image);
        }
        self.clock += 1;
        let entry = self.images.get_mut(&key)?;
        entry.used = self.clock;
        Some(entry.image.clone())
    }

    /// The name of the program of [`image`](Self::image), read again unless that was done within the last
    /// second.
    pub fn comm(&mut self, pid: u32, mm: u64, now: Instant) -> Option<String> {
        let image = self.image(pid, mm)?;
        let key = self.key(pid, mm);
        let entry = self.images.get_mut(&key)?;
        if let Some((comm, read)) = &entry.comm
            && now.saturating_duration_since(*read) < ASK_AGAIN
        {
            return comm.clone();
        }
        let comm = image.comm_now();
        entry.comm = Some((comm.clone(), now));
        comm
    }

    /// Like [`image`](Self::image), for the addresses `frames`. If one of them is in no known mapping, the
    /// mappings are read again first, unless that was done within the last second: a library may have been
    /// loaded since, or the region for code compiled at run time may have grown.
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

    /// Like [`image`](Self::image), with mappings that are read again unless that has just been done: a
    /// library may have been unloaded, and another one loaded in its place.
    pub fn current(&mut self, pid: u32, mm: u64) -> Option<Arc<Image>> {
        let known = self.image(pid, mm)?;
        let key = self.key(pid, mm);
        let mut pace = self.images.get(&key)?.pace;
        let read = pace.run(|| self.refresh(pid, mm)).flatten();
        self.images.get_mut(&key)?.pace = pace;
        Some(read.unwrap_or(known))
    }

    /// Reads the mappings again if the process still runs and has not called exec. Returns its image, the old
    /// one if nothing was read or nothing has changed.
    pub fn refresh(&mut self, pid: u32, mm: u64) -> Option<Arc<Image>> {
        let key = self.key(pid, mm);
        let old = self.images.get(&key)?.image.clone();
        // After an exec, what can be read belongs to another image.
        let is_latest = self.latest.get(&pid) == Some(&key.1);
        if !is_latest || !old.is_running() {
            return Some(old);
        }
        let mut new = self.take(pid, key.1);
        new.comm.clone_from(&old.comm);
        if new.started != old.started
            || new.exe != old.exe
            || !old.has_layout_of(&new)
            || old.has_mappings_of(&new)
        {
            return Some(old);
        }
        let entry = self.images.get_mut(&key)?;
        self.mappings = self.mappings - old.mappings.len() + new.mappings.len();
        entry.image = Arc::new(new);
        let image = entry.image.clone();
        self.version.fetch_add(1, Ordering::Release);
        Some(image)
    }

    /// Closes files that are kept open for processes that exited more than a minute ago. The rest of their
    /// images stays. Call it every few seconds.
    pub fn sweep(&mut self, now: Instant) {
        for entry in self.images.values_mut().filter(|entry| entry.image.holds_files()) {
            if entry.image.is_running() {
                continue;
            }
            let gone = *entry.gone.get_or_insert(now);
            if now.saturating_duration_since(gone) < KEEP_OPEN {
                continue;
            }
            let mut image = Image::clone(&entry.image);
            image.perf_map.release();
            for mapping in &mut image.mappings {
                if let Backing::File { module, .. } = &mut mapping.backing {
                    module.take_if(|module| module.is_held());
                }
            }
            entry.image = Arc::new(image);
        }
    }

    fn take(&mut self, pid: u32, mm: u64) -> Image {
        let Some(local) = self.local_pid(pid).of(pid) else { return Image { mm, ..Image::default() } };
        let mut image = take(&mut self.modules, local, mm);
        if let Some(container) = &image.container {
            image.names = self.container_names.of(container);
        }
        image
    }

    /// A number that changes whenever the results of [`image`](Self::image) have changed.
    pub fn version(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.version)
    }

    /// How many files are kept open.
    pub fn files_held(&self) -> usize {
        self.modules.held()
    }

    fn key(&self, pid: u32, mm: u64) -> (u32, u64) {
        (pid, if mm == 0 { self.latest.get(&pid).copied().unwrap_or(0) } else { mm })
    }

    fn insert(&mut self, pid: u32, image: Image) {
        let key = (pid, image.mm);
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
        self.images.insert(
            key,
            KnownImage {
                image: Arc::new(image),
                used: self.clock,
                asked: None,
                comm: None,
                gone: None,
                pace: Pace::default(),
            },
        );
        self.version.fetch_add(1, Ordering::Release);
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

/// Reads the image of a process. If it calls exec meanwhile, reads again, so that two programs are not mixed.
fn take(modules: &mut Modules, pid: u32, mm: u64) -> Image {
    for _ in 0..3 {
        let Some(before) = exe(pid) else { break };
        let image = read(modules, pid, mm, &before);
        // If it has exited meanwhile, everything that was read belonged to it.
        if exe(pid).is_none_or(|after| after == before) {
            return image;
        }
    }
    // What has exited has its name until its parent asks how.
    let comm = comm_in(&fs::read(format!("/proc/{pid}/comm")).unwrap_or_default());
    Image { pid, mm, started: started(pid), comm, ..Image::default() }
}

fn comm_in(text: &[u8]) -> Option<String> {
    Some(String::from_utf8_lossy(text.trim_ascii_end()).into_owned()).filter(|comm| !comm.is_empty())
}

/// The memory is read first, because an exiting process loses it first, sometimes within a tenth of a
/// millisecond.
fn read(modules: &mut Modules, pid: u32, mm: u64, exe: &[u8]) -> Image {
    let text = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let maps = text("maps");
    let comm = text("comm");
    let cgroup = text("cgroup");
    let status = text("status");
    let started = started(pid);
    let exe = undeleted(exe).0;
    let mappings = modules.mappings(pid, &maps, Some(exe));
    let status = String::from_utf8_lossy(&status);
    let inner_pid = status_field(&status, "NStgid:").and_then(|ids| ids.last().copied());
    let uid = status_field(&status, "Uid:").and_then(|ids| ids.get(1).copied());
    let perf_map = LeftBehind::of(pid, inner_pid, uid, modules);
    Image {
        pid,
        mm,
        started,
        comm: comm_in(&comm),
        exe: Some(display(exe)),
        container: container::id(&String::from_utf8_lossy(&cgroup)),
        names: Arc::default(),
        inner_pid,
        uid,
        mappings,
        perf_map,
    }
}

fn display(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn exe(pid: u32) -> Option<Vec<u8>> {
    Some(fs::read_link(format!("/proc/{pid}/exe")).ok()?.as_os_str().as_bytes().to_vec())
}

/// When a process started, in clock ticks since boot. `None` if there is no such process, or if it is a
/// zombie.
fn started(pid: u32) -> Option<u64> {
    started_in(&fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// The start time in the content of a `/proc/PID/stat`.
fn started_in(stat: &[u8]) -> Option<u64> {
    // The thread's name is in parentheses, and may contain parentheses and spaces itself.
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = str::from_utf8(stat.get(name_end + 1..)?).ok()?.split_ascii_whitespace();
    // This is the third field of the line; the one below is the twenty-second.
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The numbers in the line of a `/proc/PID/status` that begins with `name`.
fn status_field(status: &str, name: &str) -> Option<Vec<u32>> {
    let numbers = status.lines().find_map(|line| line.strip_prefix(name))?;
    numbers.split_ascii_whitespace().map(|number| number.parse().ok()).collect()
}

/// Locks the known processes. A thread that panicked while it held the lock has at worst left an incomplete
/// image.
pub fn lock(processes: &Mutex<Processes>) -> MutexGuard<'_, Processes> {
    processes.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs::File;
    use std::io::Read as _;
    use std::path::PathBuf;
    use std::process::{Child, ChildStdin, Command, Stdio};

    /// A program that waits until its standard input is closed.
    struct WaitingProgram {
        child: Child,
        stdin: Option<ChildStdin>,
    }

    impl WaitingProgram {
        fn start(program: &Path) -> Self {
            let mut child =
                Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let mut stdin = child.stdin.take().unwrap();
            // Once it answers, exec has finished and its libraries are loaded.
            std::io::Write::write_all(&mut stdin, b"!").unwrap();
            child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
            Self { child, stdin: Some(stdin) }
        }

        fn end(&mut self) {
            self.stdin.take();
            self.child.wait().unwrap();
        }
    }

    impl Drop for WaitingProgram {
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
    fn names_are_read_again_after_a_second() {
        let path = "/proc/self/comm";
        let name = || fs::read_to_string(path).unwrap().trim_end().to_owned();
        let before = name();
        let (pid, now) = (std::process::id(), Instant::now());
        let mut processes = Processes::default();
        processes.notice(pid, 7, Some("before".to_owned()));
        assert_eq!(processes.comm(pid, 7, now), Some(before.clone()), "it was renamed since it was noticed");
        fs::write(path, "renamed").unwrap();
        assert_eq!(processes.comm(pid, 7, now), Some(before.clone()));
        assert_eq!(processes.comm(pid, 7, now + ASK_AGAIN), Some("renamed".to_owned()));
        fs::write(path, before).unwrap();
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
        assert_eq!(processes.files_held(), 0, "a file that its path leads to need not be kept open");
        assert!(image.mapping(0).is_none());
        assert!(image.mapping(u64::MAX).is_none());
    }

    #[test]
    fn remembers_a_process_that_has_ended() {
        let mut processes = Processes::new();
        let mut waiting = WaitingProgram::start(Path::new("cat"));
        let pid = waiting.child.id();
        processes.notice(pid, 1, None);
        waiting.end();
        processes.notice(pid, 1, None);
        let image = processes.image(pid, 1).unwrap();
        assert!(image.exe.as_deref().is_some_and(|exe| exe.starts_with('/')), "{image:?}");
        assert!(image.mappings.len() > 1);
        assert!(!image.is_running());
        // An exiting process has no address space any more, so its latest image is meant.
        assert!(Arc::ptr_eq(&image, &processes.image(pid, 0).unwrap()));
        // There is no other image of a process that has exited.
        assert!(processes.image(pid, 2).is_none());
    }

    #[test]
    fn makes_do_without_the_process() {
        let mut processes = Processes::new();
        let mut waiting = WaitingProgram::start(Path::new("cat"));
        waiting.end();
        let pid = waiting.child.id();
        assert!(processes.image(pid, 1).is_none());
        processes.notice(pid, 1, None);
        let image = processes.image_for(pid, 1, &[1, 2], Instant::now()).unwrap();
        assert_eq!((image.started, &image.exe, &image.container), (None, &None, &None));
        assert!(image.mappings.is_empty());
        for pid in [0, u32::MAX] {
            processes.notice(pid, 0, None);
            let image = processes.image_for(pid, 0, &[1], Instant::now());
            assert!(image.is_none_or(|image| image.exe.is_none()));
        }
    }

    #[test]
    fn takes_nobody_for_another() {
        let mut processes = Processes { local_pids: Some(HashMap::new()), ..Processes::default() };
        processes.notice_as(own_pid(), None, 1, None);
        let image = processes.image_for(own_pid(), 1, &[1], Instant::now()).unwrap();
        assert_eq!((image.started, &image.exe, image.inner_pid), (None, &None, None));
        assert!(!image.is_running() && image.mappings.is_empty());
        assert!(processes.image(own_pid(), 2).is_none());
        assert_eq!(processes.local_pid(own_pid()), LocalPid::None);
    }

    #[test]
    fn looks_a_process_up_by_its_id_in_this_namespace() {
        let mut processes = Processes { local_pids: Some(HashMap::new()), ..Processes::default() };
        let in_kernel = own_pid() + 1;
        processes.notice_as(in_kernel, Some(own_pid()), 1, None);
        let image = processes.image(in_kernel, 1).unwrap();
        assert_eq!(image.exe.as_deref(), std::env::current_exe().unwrap().to_str());
        assert!(image.is_running());
        assert_eq!(processes.local_pid(in_kernel), LocalPid::Other(own_pid()));
        // The id now belongs to a process outside.
        processes.notice_as(in_kernel, None, 2, None);
        assert!(processes.image(in_kernel, 2).is_some_and(|image| image.exe.is_none()));
        assert_eq!(processes.local_pid(in_kernel), LocalPid::None);
        for pid in 0..2 * u32::try_from(MAX_LOCAL_PIDS).unwrap() {
            processes.notice_as(pid, None, 0, None);
        }
        assert!(processes.local_pids.unwrap().len() <= MAX_LOCAL_PIDS);
    }

    #[test]
    fn holds_a_removed_file_until_the_process_is_long_gone() {
        let directory = scratch("removed");
        let program = directory.join("program");
        fs::copy("/bin/cat", &program).unwrap();
        let mut processes = Processes::new();
        let mut waiting = WaitingProgram::start(&program);
        let pid = waiting.child.id();
        fs::remove_file(&program).unwrap();
        processes.notice(pid, 1, None);
        assert_eq!(processes.files_held(), 1);
        let image = processes.image(pid, 1).unwrap();
        assert_eq!(image.exe.as_deref(), program.to_str(), "without the kernel's mark");
        let now = Instant::now();
        processes.sweep(now + 9 * KEEP_OPEN);
        assert_eq!(processes.files_held(), 1, "it still runs");
        waiting.end();
        drop(image);
        processes.sweep(now);
        processes.sweep(now + KEEP_OPEN / 2);
        assert_eq!(processes.files_held(), 1);
        processes.sweep(now + KEEP_OPEN);
        assert_eq!(processes.files_held(), 0);
        assert_eq!(processes.image(pid, 1).unwrap().exe.as_deref(), program.to_str());
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn reads_mappings_again_when_one_is_missing() {
        let mut processes = Processes::new();
        let mut waiting = WaitingProgram::start(Path::new("cat"));
        let pid = waiting.child.id();
        processes.notice(pid, 1, None);
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
        // One image is not mixed with another of the same program and the same process.
        let entry = processes.images.get_mut(&(pid, 1)).unwrap();
        let mut moved = Image::clone(&entry.image);
        let vdso = moved.mappings.iter_mut().find(|mapping| matches!(mapping.backing, Backing::Vdso));
        if let Some(vdso) = vdso {
            (vdso.start, vdso.end) = (vdso.start - 0x1000, vdso.end - 0x1000);
            let moved = Arc::new(moved);
            entry.image = moved.clone();
            assert!(Arc::ptr_eq(&processes.refresh(pid, 1).unwrap(), &moved));
        }
        processes.notice(pid, 2, None);
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
            processes.insert(pid, fake(pid));
        }
        processes.image(0, 1).unwrap();
        processes.insert(1_000_000_000, fake(1_000_000_000));
        assert_eq!(processes.images.len(), MAX_IMAGES);
        assert!(processes.images.contains_key(&(0, 1)));
        assert!(!processes.images.contains_key(&(1, 1)));
        assert!(!processes.latest.contains_key(&1));

        let mapping = Mapping { start: 0, end: 1, offset: 0, base: 0, backing: Backing::Anonymous };
        for pid in 0..3 {
            let mappings = vec![mapping.clone(); MAX_MAPPINGS / 2];
            processes.insert(pid, Image { mappings, ..fake(pid) });
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
