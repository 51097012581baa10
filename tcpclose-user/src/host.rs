//! Facts that records do not contain, and that are looked up on the host: programs, holders of sockets, and
//! names of stack frames.
//!
//! A trace asks the running host ([`Running`]). With `--record`, the answers are kept beside the records, and
//! `tcpclose replay` reads them from there ([`Recorded`]), so that all other stages run as they did in the
//! trace.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    mem,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use serde::{Deserialize, Serialize};
use tcpclose_common::record::{Interpreted, StackCopy};

use crate::{
    event::{Pod, SignalFrom, Stack},
    kernel::{followed::Followed, privilege},
    processes::{
        LocalPid, Processes,
        holder::{Holders, ProcfsHolder},
        lock,
        signals::Signals,
    },
    stacks::{Stacks, TaskStacks},
};

/// What is known about the program that a process runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramInfo {
    /// Its name, which is that of its main thread.
    #[serde(default)]
    pub comm: Option<String>,
    /// Its path, as the process sees it.
    pub exe: Option<String>,
    /// The id of the container that the process is in.
    pub container: Option<String>,
    /// That container's name.
    #[serde(default)]
    pub container_name: Option<String>,
    /// The pod of that container.
    #[serde(default)]
    pub pod: Option<Pod>,
    /// Its process id in the pid namespace of tcpclose.
    #[serde(default)]
    pub pid: LocalPid,
}

impl ProgramInfo {
    /// Looks up the program of a process in `processes`, or on the host.
    pub fn of(processes: &mut Processes, pid: u32, mm: u64) -> Self {
        let comm = processes.comm(pid, mm, Instant::now());
        let image = processes.image(pid, mm).unwrap_or_default();
        let (exe, container) = (image.exe.clone(), image.container.clone());
        let (container_name, pod) = (image.names.container.clone(), image.names.pod.clone());
        Self { comm, exe, container, container_name, pod, pid: processes.local_pid(pid) }
    }
}

/// Answers questions about the host.
pub trait Host {
    /// The program of process `pid`. `mm` is the address of its `mm_struct`, which identifies the program
    /// image; 0 stands for its latest.
    fn program(&mut self, pid: u32, mm: u64) -> ProgramInfo;
    /// A number that changes whenever the answers of [`Self::program`] may have changed.
    fn programs_version(&self) -> u64;
    /// The process that has the socket with this inode number open, if it has been looked up before.
    fn holder(&mut self, inode: u64) -> Option<Arc<ProcfsHolder>>;
    /// The named stacks of a task.
    fn stack(&mut self, task: &TaskStacks) -> Option<Stack>;
    /// Whether this process belongs to the command that is traced.
    fn is_followed(&mut self, pid: u32) -> bool;
    /// Who sent the signal with this number to a process that died of it.
    fn signal_from(&mut self, pid: u32, number: i32) -> Option<SignalFrom>;
    /// Tells the host that the connection of the task with these stacks has ended, so that they are unlikely
    /// to be needed again.
    fn release(&mut self, _: &TaskStacks) {}
}

/// A question to the host.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Question {
    /// [`Host::program`].
    Program {
        /// Process id.
        pid: u32,
        /// Address of its `mm_struct`.
        mm: u64,
    },
    /// [`Host::holder`], with the inode number.
    Holder(u64),
    /// [`Host::stack`].
    Stack(TaskStacks),
    /// [`Host::is_followed`], with the process id.
    IsFollowed(u32),
    /// [`Host::signal_from`].
    SignalFrom {
        /// Process id of the process that died.
        pid: u32,
        /// The signal.
        number: i32,
    },
}

/// What the host answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    /// To [`Question::Program`].
    Program(ProgramInfo),
    /// To [`Question::Holder`].
    Holder(Option<ProcfsHolder>),
    /// To [`Question::Stack`].
    Stack(Option<Stack>),
    /// To [`Question::IsFollowed`].
    IsFollowed(bool),
    /// To [`Question::SignalFrom`].
    SignalFrom(Option<SignalFrom>),
}

/// The number of questions that are remembered, so that an answer is recorded only if it differs from the
/// last one. When there are more, all are forgotten, and answers are written again.
const MAX_QUESTIONS: usize = 65_536;

/// The running host.
pub struct Running {
    processes: Arc<Mutex<Processes>>,
    programs_version: Arc<AtomicU64>,
    holders: Holders,
    /// Stacks that records refer to.
    pub stacks: Stacks,
    followed: Option<Followed>,
    /// Who sent signals.
    signals: Signals,
    /// With `--record`: the answers that are to be recorded.
    kept: Option<KeptAnswers>,
}

#[derive(Default)]
struct KeptAnswers {
    hasher: RandomState,
    /// A hash of the last answer to each question.
    last: HashMap<Question, u64>,
    fresh: Vec<(Question, Answer)>,
}

impl Running {
    /// Asks `processes` about programs. `followed` are the processes of the command that is traced, if there
    /// is one. With `keep`, answers are kept for a recording.
    pub fn new(
        processes: Arc<Mutex<Processes>>,
        stacks: Stacks,
        followed: Option<Followed>,
        signals: Signals,
        keep: bool,
    ) -> Self {
        let programs_version = lock(&processes).version();
        Self {
            processes,
            programs_version,
            holders: Holders::default(),
            stacks,
            followed,
            signals,
            kept: keep.then(KeptAnswers::default),
        }
    }

    /// What is known of processes.
    pub fn processes(&self) -> MutexGuard<'_, Processes> {
        lock(&self.processes)
    }

    /// Whether a process belongs to the command that is traced.
    pub fn follows(&self, pid: u32) -> bool {
        self.followed.as_ref().is_some_and(|followed| followed.contains(pid))
    }

    /// Takes in the frames of an interpreter, which belong to a copy that comes after them.
    pub fn interpreted(&mut self, list: Interpreted) {
        self.stacks.interpreted(list);
    }

    /// Takes in the copy of a user stack.
    pub fn stack_copied(&mut self, copy: &StackCopy, bytes: &[u8]) {
        self.stacks.copied(copy, bytes);
    }

    /// Looks up the holders of these sockets in `/proc`, by inode number. Returns for each whether one is
    /// known.
    pub fn find_holders(&mut self, inodes: &[u64]) -> Vec<bool> {
        // In another pid namespace, the ids in `/proc` are not those that the kernel half reports, and cannot
        // be translated.
        if !privilege::in_initial_pid_namespace() {
            return vec![false; inodes.len()];
        }
        self.holders.find(inodes)
    }

    /// Closes files that are kept open for programs that have ended. Call it every few seconds.
    pub fn sweep(&mut self) {
        lock(&self.processes).sweep(Instant::now());
        self.stacks.sweep();
    }

    /// The answers given since the last call that differ from earlier ones to the same question.
    pub fn fresh_answers(&mut self) -> Vec<(Question, Answer)> {
        self.kept.as_mut().map_or_else(Vec::new, |kept| mem::take(&mut kept.fresh))
    }

    fn keep(&mut self, question: impl FnOnce() -> Question, answer: impl FnOnce() -> Answer) {
        if let Some(kept) = &mut self.kept {
            kept.add(question(), answer());
        }
    }
}

impl KeptAnswers {
    fn add(&mut self, question: Question, answer: Answer) {
        // An answer that cannot be written as JSON cannot be kept either.
        let Ok(text) = serde_json::to_string(&answer) else { return };
        let hash = self.hasher.hash_one(text);
        if self.last.len() >= MAX_QUESTIONS {
            self.last.clear();
        }
        if self.last.insert(question.clone(), hash) != Some(hash) {
            self.fresh.push((question, answer));
        }
    }
}

impl Host for Running {
    fn program(&mut self, pid: u32, mm: u64) -> ProgramInfo {
        let program = ProgramInfo::of(&mut lock(&self.processes), pid, mm);
        self.keep(|| Question::Program { pid, mm }, || Answer::Program(program.clone()));
        program
    }

    fn programs_version(&self) -> u64 {
        self.programs_version.load(Ordering::Acquire)
    }

    fn holder(&mut self, inode: u64) -> Option<Arc<ProcfsHolder>> {
        let holder = self.holders.of(inode);
        self.keep(|| Question::Holder(inode), || Answer::Holder(holder.as_deref().cloned()));
        holder
    }

    fn stack(&mut self, task: &TaskStacks) -> Option<Stack> {
        let stack = self.stacks.named(task);
        self.keep(|| Question::Stack(*task), || Answer::Stack(stack.clone()));
        stack
    }

    fn is_followed(&mut self, pid: u32) -> bool {
        let follows = self.follows(pid);
        self.keep(|| Question::IsFollowed(pid), || Answer::IsFollowed(follows));
        follows
    }

    fn signal_from(&mut self, pid: u32, number: i32) -> Option<SignalFrom> {
        let from = self.signals.from(pid, number, |sender| lock(&self.processes).local_pid(sender));
        self.keep(|| Question::SignalFrom { pid, number }, || Answer::SignalFrom(from.clone()));
        from
    }

    fn release(&mut self, task: &TaskStacks) {
        self.stacks.release(task.user);
    }
}

/// The host as it was when a recording was made.
#[derive(Default)]
pub struct Recorded {
    answers: HashMap<Question, Answer, foldhash::fast::RandomState>,
    programs_version: u64,
}

impl Recorded {
    /// Adds an answer, which is valid until there is another one to the same question.
    pub fn learn(&mut self, question: Question, answer: Answer) {
        self.programs_version += u64::from(matches!(question, Question::Program { .. }));
        self.answers.insert(question, answer);
    }
}

impl Host for Recorded {
    fn program(&mut self, pid: u32, mm: u64) -> ProgramInfo {
        match self.answers.get(&Question::Program { pid, mm }) {
            Some(Answer::Program(program)) => program.clone(),
            _ => ProgramInfo::default(),
        }
    }

    fn programs_version(&self) -> u64 {
        self.programs_version
    }

    fn holder(&mut self, inode: u64) -> Option<Arc<ProcfsHolder>> {
        match self.answers.get(&Question::Holder(inode)) {
            Some(Answer::Holder(holder)) => holder.clone().map(Arc::new),
            _ => None,
        }
    }

    fn stack(&mut self, task: &TaskStacks) -> Option<Stack> {
        match self.answers.get(&Question::Stack(*task)) {
            Some(Answer::Stack(stack)) => stack.clone(),
            _ => None,
        }
    }

    fn signal_from(&mut self, pid: u32, number: i32) -> Option<SignalFrom> {
        match self.answers.get(&Question::SignalFrom { pid, number }) {
            Some(Answer::SignalFrom(from)) => from.clone(),
            _ => None,
        }
    }

    fn is_followed(&mut self, pid: u32) -> bool {
        matches!(self.answers.get(&Question::IsFollowed(pid)), Some(Answer::IsFollowed(true)))
    }
}
