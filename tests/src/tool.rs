//! The tool under test: starting it, waiting for its lines, and stopping it.

use std::{
    collections::BTreeMap,
    env,
    ffi::{CStr, CString, OsString},
    fmt::Write as _,
    fs::{self, File},
    io::{self, BufRead, BufReader},
    mem,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    errno::Errno,
    libc,
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::{
        resource::{Resource, setrlimit},
        signal::{Signal, kill},
    },
    unistd::{Gid, Pid, Uid, chown, setgid, setgroups, setuid},
};
use serde_json::Value;

use crate::{
    PATIENCE, contract, expect::shortened, features::Feature, netns::Namespace, scratch::Scratch, until,
};

/// The usual limit of locked memory for unprivileged users, in bytes.
const LOCKED: u64 = 64 << 10;

/// The user and group ID of `nobody`.
const NOBODY: u32 = 65534;

/// The way in which the tool is started.
#[derive(Debug)]
pub struct Launch {
    program: OsString,
    args: Vec<OsString>,
    /// The steps that its process takes, in this order, before it executes the tool.
    steps: Vec<Step>,
    in_pid_namespace: bool,
    scratch: Scratch,
    most_lines: usize,
}

/// A step that restricts what the tool may do or see.
#[derive(Debug)]
enum Step {
    EnterNetns(File),
    /// Unshares the mount namespace and mounts something at these places.
    Mount(Vec<(&'static CStr, CString)>),
    NewUserNamespace,
    BecomeUnprivileged,
}

impl Step {
    /// Takes the step. It makes system calls and does not allocate, because it runs in a newly forked
    /// process.
    fn take(&self) -> io::Result<()> {
        const NOWHERE: Option<&CStr> = None;
        match self {
            Self::EnterNetns(namespace) => setns(namespace, CloneFlags::CLONE_NEWNET)?,
            Self::Mount(mounts) => {
                unshare(CloneFlags::CLONE_NEWNS)?;
                mount(NOWHERE, c"/", NOWHERE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOWHERE)?;
                for (kind, place) in mounts {
                    mount(Some(*kind), place.as_c_str(), Some(*kind), MsFlags::empty(), NOWHERE)?;
                }
            }
            Self::NewUserNamespace => unshare(CloneFlags::CLONE_NEWUSER)?,
            Self::BecomeUnprivileged => {
                // The usual limit: the tests may have raised their own.
                setrlimit(Resource::RLIMIT_MEMLOCK, LOCKED, LOCKED)?;
                setgroups(&[])?;
                setgid(Gid::from_raw(NOBODY))?;
                setuid(Uid::from_raw(NOBODY))?;
            }
        }
        Ok(())
    }
}

/// The running tool; killed on drop.
#[derive(Debug)]
pub struct Tool {
    child: Child,
    lines: Arc<Lines>,
    stdout: Option<JoinHandle<Result<()>>>,
    stderr: Arc<Mutex<String>>,
    stderr_read: Option<JoinHandle<()>>,
    // Removed last, after the tool has ended.
    scratch: Option<Scratch>,
}

/// A selection of a tool's lines.
#[derive(Clone, Debug)]
pub struct View {
    /// The number of lines that precede the view.
    pub from: usize,
    /// The namespaces whose lines are selected, together with lines that name no namespace; `None` selects
    /// all lines.
    pub namespaces: Option<Vec<u64>>,
}

impl View {
    /// All lines.
    pub const ALL: Self = Self { from: 0, namespaces: None };

    /// Whether the view contains a line that was written after the view was opened.
    fn has(&self, line: &Value) -> bool {
        let netns = line["connection"]["netns"].as_u64();
        self.namespaces.as_ref().is_none_or(|mine| netns.is_none_or(|netns| mine.contains(&netns)))
    }

    /// The lines of the view among all lines.
    pub fn of(&self, lines: &[Value]) -> Vec<Value> {
        lines.iter().skip(self.from).filter(|line| self.has(line)).cloned().collect()
    }
}

/// The tool at its end.
#[derive(Debug)]
pub struct Ended {
    /// The exit status; `None` while the tool is running.
    pub status: Option<ExitStatus>,
    /// Every line of its stdout.
    pub lines: Vec<Value>,
    /// All of its stderr.
    pub stderr: String,
    /// The violations of the contract in these lines.
    violations: Vec<String>,
}

impl Launch {
    /// A launch without arguments; nothing is started yet.
    pub fn new() -> Result<Self> {
        let program = env::var_os("TCPCLOSE_BIN").context(
            "TCPCLOSE_BIN does not name the tool's binary: run `cargo xtask test`, which builds and names it",
        )?;
        Ok(Self {
            program,
            args: Vec::new(),
            steps: Vec::new(),
            in_pid_namespace: false,
            scratch: Scratch::new()?,
            most_lines: usize::MAX,
        })
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item: Into<OsString>>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Makes the tool write JSON lines for these namespaces only, or for all namespaces if it runs without
    /// the kernel types that identify namespaces.
    #[must_use]
    pub fn trace<'a>(self, namespaces: impl IntoIterator<Item = &'a Namespace>) -> Self {
        if !Feature::Types.is_here() {
            return self.args(["-o", "json", "--btf", "none"]);
        }
        let filters = namespaces.into_iter().flat_map(|one| ["--netns".to_owned(), one.inode().to_string()]);
        self.args(["-o", "json"]).args(filters)
    }

    /// Runs the tool in a network namespace.
    pub fn inside(mut self, namespace: &Namespace) -> Result<Self> {
        self.steps.push(Step::EnterNetns(namespace.file()?));
        Ok(self)
    }

    /// Hides these places from the tool by mounting an empty file system over each that exists. Nothing is
    /// unmounted, because Linux 6.12 crashes on that when lockdown keeps tracefs empty.
    pub fn without(mut self, places: &[&str]) -> Result<Self> {
        let there = places.iter().filter(|place| Path::new(place).exists());
        let mounts = there.map(|place| Ok((c"tmpfs", CString::new(*place)?))).collect::<Result<_>>()?;
        self.steps.push(Step::Mount(mounts));
        Ok(self)
    }

    /// Runs the tool in its own pid namespace, as in a container, with a `/proc` of that namespace.
    #[must_use]
    pub fn in_pid_namespace(mut self) -> Self {
        self.in_pid_namespace = true;
        self.steps.push(Step::Mount(vec![(c"proc", c"/proc".to_owned())]));
        self
    }

    /// Closes the tool's stdout after this many lines, as `head` does.
    #[must_use]
    pub fn head(mut self, lines: usize) -> Self {
        self.most_lines = lines;
        self
    }

    /// Runs the tool as `nobody` with only these capabilities.
    pub fn as_nobody(mut self, capabilities: &[Capability]) -> Result<Self> {
        // The build directory may not be accessible to `nobody`.
        let copy = self.scratch.path().join("tcpclose");
        fs::copy(&self.program, &copy).context("copying the tool")?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
        // The tool creates the ready file in this directory.
        chown(self.scratch.path(), Some(Uid::from_raw(NOBODY)), None)?;
        if !capabilities.is_empty() {
            grant(&copy, capabilities)?;
        }
        self.program = copy.into();
        self.steps.push(Step::BecomeUnprivileged);
        Ok(self)
    }

    /// Runs the tool in its own user namespace, whose capabilities the kernel does not accept for BPF.
    #[must_use]
    pub fn in_user_namespace(mut self) -> Self {
        self.steps.push(Step::NewUserNamespace);
        self
    }

    /// Starts the tool and waits until it reports that every program is attached.
    pub fn start(self) -> Result<Tool> {
        let ready = self.scratch.path().join("ready");
        let in_pid_namespace = self.in_pid_namespace;
        let mut tool = self.args(["--ready-file".as_ref(), ready.as_os_str()]).spawn()?;
        let pid = until("the tool is ready", || {
            if let Some(status) = tool.child.try_wait()? {
                bail!("it ended before it was ready, with {status}");
            }
            // The tool creates the file before it writes the pid, so an empty file does not mean ready.
            Ok(fs::read_to_string(&ready).ok().filter(|text| !text.trim().is_empty()))
        });
        let named = pid.and_then(|text| Ok(text.trim().parse::<u32>()?));
        let named = match named {
            Ok(pid) => pid,
            Err(error) => {
                tool.child.kill()?;
                return Err(error.context(format!("starting the tool\n{}", tool.wait()?)));
            }
        };
        // The file contains the pid as the tool's own namespace has it; there the tool is the first process.
        let own = if in_pid_namespace { 1 } else { tool.child.id() };
        ensure!(named == own, "the ready file names pid {named}, not {own}");
        Ok(tool)
    }

    /// Starts the tool and waits for it to end.
    pub fn run(self) -> Result<Ended> {
        self.spawn()?.wait()
    }

    /// Runs the tool to its end, for output that is not JSON lines.
    pub fn output(mut self) -> Result<Output> {
        Ok(self.spawn_child()?.wait_with_output()?)
    }

    fn spawn_child(&mut self) -> Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let steps = mem::take(&mut self.steps);
        // SAFETY: a step only makes system calls and does not allocate.
        unsafe { command.pre_exec(move || steps.iter().try_for_each(Step::take)) };
        let mut spawn = || command.spawn().with_context(|| format!("starting {command:?}"));
        if !self.in_pid_namespace {
            return spawn();
        }
        // `unshare(CLONE_NEWPID)` does not move the caller; it affects only the later children of this
        // thread.
        thread::scope(|scope| {
            let moved = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWPID)?;
                spawn()
            });
            moved.join().unwrap_or_else(|_| bail!("the thread that starts the tool panicked"))
        })
    }

    fn spawn(mut self) -> Result<Tool> {
        let mut child = self.spawn_child()?;
        let stdout = child.stdout.take().context("no stdout")?;
        let stderr = child.stderr.take().context("no stderr")?;
        let lines = Arc::new(Lines::default());
        let stderr_text = Arc::new(Mutex::new(String::new()));
        let (sink, text) = (Arc::clone(&lines), Arc::clone(&stderr_text));
        Ok(Tool {
            child,
            lines,
            stdout: Some(thread::spawn(move || sink.fill(stdout, self.most_lines))),
            stderr: stderr_text,
            stderr_read: Some(thread::spawn(move || read_stderr(stderr, &text))),
            scratch: Some(self.scratch),
        })
    }
}

impl Tool {
    /// Waits until the lines so far satisfy the condition. Returns false if no line has arrived for the
    /// length of the timeout.
    pub fn wait_until(&self, satisfied: impl Fn(&[Value]) -> bool) -> bool {
        self.wait_until_among(&View::ALL, satisfied)
    }

    /// Same as [`Tool::wait_until`], for the lines of a view.
    pub fn wait_until_among(&self, view: &View, satisfied: impl Fn(&[Value]) -> bool) -> bool {
        let mut shown = Vec::new();
        satisfied(&shown)
            || self
                .follow(view, |line| {
                    shown.push(line.clone());
                    satisfied(&shown).then_some(())
                })
                .is_some()
    }

    /// Waits for a line that `like` accepts, and returns it.
    pub fn wait_for(&self, what: &str, like: impl Fn(&Value) -> bool) -> Result<Value> {
        self.wait_for_among(&View::ALL, what, like)
    }

    /// Same as [`Tool::wait_for`], for the lines of a view.
    pub fn wait_for_among(&self, view: &View, what: &str, like: impl Fn(&Value) -> bool) -> Result<Value> {
        let found = self.follow(view, |line| like(line).then(|| line.clone()));
        found.with_context(|| {
            let shown = view.of(&self.lines.lock().read);
            format!("no line came that is {what}; these came:\n{}", listing(&shown))
        })
    }

    /// Passes every line of a view to `visit`, past and future ones, until it returns a value or until no line
    /// has arrived for the length of the timeout.
    fn follow<T>(&self, view: &View, mut visit: impl FnMut(&Value) -> Option<T>) -> Option<T> {
        let mut lines = self.lines.lock();
        let (mut next, mut since) = (view.from, Instant::now());
        loop {
            let fresh = next;
            next = lines.read.len();
            for line in lines.read[fresh..].iter().filter(|line| view.has(line)) {
                if let Some(made) = visit(line) {
                    return Some(made);
                }
                since = Instant::now();
            }
            let left = PATIENCE.saturating_sub(since.elapsed());
            if left.is_zero() || lines.are_all {
                return None;
            }
            lines = self.lines.more.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether more lines may arrive.
    pub fn is_talking(&self) -> bool {
        !self.lines.lock().are_all
    }

    /// The number of lines so far.
    pub fn count(&self) -> usize {
        self.lines.lock().read.len()
    }

    /// The output so far.
    pub fn said_so_far(&self) -> Ended {
        let stderr = self.stderr.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let lines = self.lines.lock();
        let violations = lines.violations.values().flatten().cloned().collect();
        Ended { status: None, lines: lines.read.clone(), stderr, violations }
    }

    /// The output so far for a view. Every line since the view was opened must keep the contract.
    pub fn stderr_about(&self, view: &View) -> Result<Ended> {
        let stderr = self.stderr.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let lines = self.lines.lock();
        let violations = lines.violations.range(view.from..).flat_map(|(_, all)| all).cloned().collect();
        let ended = Ended { status: None, lines: view.of(&lines.read), stderr, violations };
        drop(lines);
        ended.keeping_the_contract()
    }

    /// Removes the scratch directory, for a tool that is not dropped before the process ends.
    pub fn leave_nothing(&mut self) {
        self.scratch = None;
    }

    /// The process ID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().try_into()?), signal)?)
    }

    /// Stops the tool as a user would, checks that it succeeds, and returns all output.
    pub fn stop(self) -> Result<Ended> {
        self.signal(Signal::SIGINT)?;
        self.wait()?.successful()
    }

    /// Waits for the tool to end. Every line that it wrote must keep the contract.
    pub fn wait(mut self) -> Result<Ended> {
        let status = until("the tool has ended", || Ok(self.child.try_wait()?));
        if status.is_err() {
            // Killing the tool closes its output, and the error then shows what it was waiting for.
            self.child.kill()?;
        }
        let read = self.stdout.take().map_or(Ok(Ok(())), JoinHandle::join);
        let _ = self.stderr_read.take().map(JoinHandle::join);
        let mut ended = self.said_so_far();
        read.unwrap_or_else(|_| bail!("the reader panicked")).with_context(|| ended.to_string())?;
        ended.status = Some(status.with_context(|| ended.to_string())?);
        ended.keeping_the_contract()
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        // An error means that the tool has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// The exit status, if the tool has exited.
    pub fn code(&self) -> Option<i32> {
        self.status?.code()
    }

    /// Checks the exit status.
    pub fn with_code(self, code: i32) -> Result<Self> {
        ensure!(self.code() == Some(code), "expected exit status {code}\n{self}");
        Ok(self)
    }

    /// Checks that the tool exited with status 0 and wrote a summary.
    pub fn successful(self) -> Result<Self> {
        let ended = self.with_code(0)?;
        ensure!(!ended.stderr.trim().is_empty(), "there is no summary on stderr\n{ended}");
        Ok(ended)
    }

    fn keeping_the_contract(self) -> Result<Self> {
        let violations = &self.violations;
        ensure!(violations.is_empty(), "the contract is broken:\n{}\n{self}", violations.join("\n"));
        Ok(self)
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { status, lines, stderr, .. } = self;
        match status {
            Some(status) => write!(f, "the tool ended with {status}")?,
            None => f.write_str("the tool has not been seen to end")?,
        }
        write!(f, "\nlines:\n{}\nstderr:\n{stderr}", listing(lines))
    }
}

/// The lines so far, and a condition variable that is notified of each.
#[derive(Debug, Default)]
struct Lines {
    so_far: Mutex<SoFar>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct SoFar {
    read: Vec<Value>,
    /// Violations of the contract, by the index of the line in `read`.
    violations: BTreeMap<usize, Vec<String>>,
    /// No more lines will arrive.
    are_all: bool,
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, SoFar> {
        self.so_far.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads this many lines and then closes the pipe.
    fn fill(&self, stdout: ChildStdout, most: usize) -> Result<()> {
        let mut checker = contract::Checker::default();
        let read = BufReader::new(stdout).lines().take(most).try_for_each(|line| {
            let line = line?;
            let value = serde_json::from_str(&line).with_context(|| format!("not a line of JSON: {line}"))?;
            let violations = checker.check(&value);
            let mut lines = self.lock();
            if !violations.is_empty() {
                let index = lines.read.len();
                lines.violations.insert(index, violations);
            }
            lines.read.push(value);
            drop(lines);
            self.more.notify_all();
            Ok(())
        });
        self.lock().are_all = true;
        self.more.notify_all();
        read
    }
}

/// A capability by its number (`linux/capability.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// `CAP_PERFMON`.
    Perfmon = 38,
    /// `CAP_BPF`.
    Bpf = 39,
}

/// Sets the file capabilities of a program, as `setcap` does (`struct vfs_cap_data`).
fn grant(program: &Path, capabilities: &[Capability]) -> Result<()> {
    const SECOND_VERSION: u32 = 0x0200_0000;
    const EFFECTIVE: u32 = 1;
    let permitted = capabilities.iter().fold(0_u64, |set, capability| set | 1 << *capability as u64);
    let [low, high] = [permitted & u64::from(u32::MAX), permitted >> 32].map(u32::try_from);
    let words = [SECOND_VERSION | EFFECTIVE, low?, 0, high?, 0];
    let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    let path = CString::new(program.as_os_str().as_bytes())?;
    let name = c"security.capability";
    // SAFETY: the strings and the bytes outlive the call, and the length is that of the bytes.
    let result =
        unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), bytes.as_ptr().cast(), bytes.len(), 0) };
    Errno::result(result).with_context(|| format!("giving capabilities to {}", program.display()))?;
    Ok(())
}

fn read_stderr(stderr: ChildStderr, text: &Mutex<String>) {
    let mut stderr = BufReader::new(stderr);
    let mut line = Vec::new();
    while stderr.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
        text.lock().unwrap_or_else(PoisonError::into_inner).push_str(&String::from_utf8_lossy(&line));
        line.clear();
    }
}

/// Formats lines for the message of a failed test, limited to the first ones.
pub(crate) fn listing(lines: &[Value]) -> String {
    const ENOUGH: usize = 40;
    let mut text = String::new();
    for line in lines.iter().take(ENOUGH) {
        let _ = writeln!(text, "  {}", shortened(line));
    }
    if lines.len() > ENOUGH {
        let _ = writeln!(text, "  … and {} more", lines.len() - ENOUGH);
    }
    text
}
