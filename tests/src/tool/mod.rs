//! The tool under test: waits for its lines, and stops it.

mod launch;

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    io::{BufRead, BufReader},
    process::{Child, ChildStderr, ChildStdout, ExitStatus},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{PATIENCE, contract, expect::shortened, netns, scratch::Scratch, until};

pub use launch::{Capability, Launch};

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

impl Tool {
    /// Begins to read the output of a tool that has been started.
    fn of(mut child: Child, most_lines: usize, scratch: Scratch) -> Result<Self> {
        // None if the lines go to a file.
        let stdout = child.stdout.take();
        let stderr = child.stderr.take().context("no stderr")?;
        let lines = Arc::new(Lines::default());
        let stderr_text = Arc::new(Mutex::new(String::new()));
        let (sink, text) = (Arc::clone(&lines), Arc::clone(&stderr_text));
        Ok(Self {
            child,
            lines,
            stdout: stdout.map(|stdout| thread::spawn(move || sink.fill(stdout, most_lines))),
            stderr: stderr_text,
            stderr_read: Some(thread::spawn(move || read_stderr(stderr, &text))),
            scratch: Some(scratch),
        })
    }

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

    /// Passes every line of a view to `visit`, past and future ones, until it returns a value or until no
    /// line has arrived for the length of the timeout.
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

    /// Prepares for many tests that share the tool, which is not dropped before the process ends: removes the
    /// scratch directory, and keeps nothing but the namespace of lines about connections of others. Another
    /// program may end hundreds of thousands, and a line with its stacks takes 50 KiB.
    pub fn share(&mut self) {
        self.scratch = None;
        self.lines.lock().is_shared = true;
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

impl fmt::Display for Ended {
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
    /// Lines about foreign namespaces are reduced to the namespace.
    is_shared: bool,
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
            // `serde_json::from_str()` would be compiled here, without optimization.
            let mut value: Value = line.parse().with_context(|| format!("not a line of JSON: {line}"))?;
            let violations = checker.check(&value);
            let netns = value["connection"]["netns"].as_u64();
            let mut lines = self.lock();
            if lines.is_shared && netns.is_some_and(netns::is_foreign) {
                value = json!({"connection": {"netns": netns}});
            }
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
