//! The truth about a stack: gdb's backtrace, taken while the program is stopped in the system call that
//! tcpclose reports.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tcpclose_tests::{expect::shortened, netns::Namespace, program::Program};

use super::part;

pub(crate) const GDB: &str = "/usr/bin/gdb";

/// The frame that the kernel makes for a signal handler.
pub(crate) const SIGNAL: &str = "<signal handler called>";

/// The register with the first argument of a system call.
const FIRST_ARGUMENT: &str = if cfg!(target_arch = "x86_64") { "$rdi" } else { "$x0" };

/// A frame of a backtrace.
#[derive(Clone, Debug, PartialEq, Eq)]
struct GdbFrame {
    /// The return address; `None` in an inlined function, and in the innermost frame.
    address: Option<u64>,
    /// The function without its parameters; `None` if gdb does not know it.
    function: Option<String>,
}

/// gdb, attached to a program that it stops when it closes a descriptor.
pub(crate) struct Gdb(Program);

impl Gdb {
    /// Attaches to a process. The backtrace will be that of its `close()` of this descriptor.
    pub(crate) fn attach(namespace: &Namespace, pid: u32, descriptor: i32) -> Result<Self> {
        Self::attach_with(namespace, pid, &format!("{FIRST_ARGUMENT} == {descriptor}"), None)
    }

    /// The same for an i386 program.
    pub(crate) fn attach_to_i386(namespace: &Namespace, pid: u32, descriptor: i32) -> Result<Self> {
        Self::attach_with(namespace, pid, &format!("$ebx == {descriptor}"), None)
    }

    /// The same as [`Self::attach`], with a script that lets gdb follow frame pointers in code without unwind
    /// tables.
    pub(crate) fn attach_to_compiler(namespace: &Namespace, pid: u32, descriptor: i32) -> Result<Self> {
        let script = part("frame_pointers.py");
        Self::attach_with(namespace, pid, &format!("{FIRST_ARGUMENT} == {descriptor}"), Some(script))
    }

    fn attach_with(
        namespace: &Namespace,
        pid: u32,
        condition: &str,
        script: Option<PathBuf>,
    ) -> Result<Self> {
        let condition = format!("condition 1 {condition}");
        let mut command = Command::new(GDB);
        command.args(["-nx", "-q", "-batch", "-p", &pid.to_string()]);
        if let Some(script) = script {
            command.arg("-x").arg(script);
        }
        for order in [
            "set debuginfod enabled off",
            "set pagination off",
            "set width 0",
            "set print frame-arguments none",
            "set backtrace past-main on",
            "set backtrace past-entry on",
            "handle SIGUSR1 nostop noprint pass",
            // A JVM catches it when it waits for its threads.
            "handle SIGSEGV nostop noprint pass",
            "catch syscall close",
            &condition,
            "echo attached\\n",
            "continue",
            "echo backtrace\\n",
            "backtrace",
            "echo done\\n",
            "detach",
        ] {
            command.args(["-ex", order]);
        }
        let gdb = Self(Program::start(namespace, command)?);
        gdb.until("attached")?;
        Ok(gdb)
    }

    /// Waits for the backtrace, which the program waits for as well.
    pub(crate) fn backtrace(self) -> Result<Backtrace> {
        self.until("backtrace")?;
        let frames = self.until("done")?.iter().filter_map(|line| frame(line)).collect();
        Ok(Backtrace(frames))
    }

    /// The lines before this one.
    fn until(&self, last: &str) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        loop {
            let line = self.0.line().with_context(|| format!("gdb said: {lines:#?}"))?;
            if line.trim() == last {
                return Ok(lines);
            }
            lines.push(line);
        }
    }
}

/// `#1  0x000055d5 in hang_up (...) at hang_up.c:10`, or without an address.
fn frame(line: &str) -> Option<GdbFrame> {
    let (_, rest) = line.strip_prefix('#')?.split_once(' ')?;
    let rest = rest.trim_start();
    let (address, rest) = match rest.split_once(" in ") {
        Some((address, rest)) if address.starts_with("0x") => (parse(address), rest),
        _ => (None, rest),
    };
    let name = rest.split(" (").next()?.trim();
    Some(GdbFrame { address, function: (!["??", ""].contains(&name)).then(|| name.to_owned()) })
}

fn parse(address: &str) -> Option<u64> {
    u64::from_str_radix(address.strip_prefix("0x")?, 16).ok()
}

/// The backtrace of gdb, innermost frame first.
#[derive(Debug)]
pub(crate) struct Backtrace(Vec<GdbFrame>);

impl Backtrace {
    /// Leaves out the frames of a function.
    pub(crate) fn without(mut self, function: &str) -> Self {
        self.0.retain(|frame| frame.function.as_deref() != Some(function));
        self
    }

    /// Leaves out the name of a function, in the frames of which others may be reported.
    pub(crate) fn without_name(mut self, function: &str) -> Self {
        for frame in &mut self.0 {
            frame.function.take_if(|name| name == function);
        }
        self
    }

    /// Whether there are so many frames of a function.
    pub(crate) fn ensure_calls(&self, function: &str, count: usize) -> Result<()> {
        let calls = self.0.iter().filter(|frame| frame.function.as_deref() == Some(function)).count();
        ensure!(calls == count, "{calls} calls of {function}, not {count}\n{self:#?}");
        Ok(())
    }

    /// Whether these reported frames are the same: all return addresses, the functions wherever both know
    /// them, and the functions that are inlined.
    pub(crate) fn ensure_equals(&self, frames: &Value) -> Result<()> {
        self.ensure_addresses(frames)?;
        let told = frames.as_array().context("no stack")?;
        let shown = || format!("tcpclose: {}\n{self:#?}", shortened(frames));
        ensure!(told.len() == self.0.len(), "{} frames, not {}\n{}", told.len(), self.0.len(), shown());
        // The innermost one is libc's, which has several names for `close`.
        for (told, expected) in told.iter().zip(&self.0).skip(1) {
            let (Some(name), Some(function)) = (told["symbol"].as_str(), &expected.function) else {
                continue;
            };
            ensure!(plain(name) == plain(function), "{name}, not {function}\n{}", shown());
        }
        Ok(())
    }

    /// Whether the return addresses of these reported frames are the same, and the last frame is the
    /// outermost one.
    pub(crate) fn ensure_addresses(&self, frames: &Value) -> Result<()> {
        let told = frames.as_array().context("no stack")?;
        let shown = || format!("tcpclose: {}\n{self:#?}", shortened(frames));
        ensure!(told.iter().all(|frame| frame["truncated"].is_null()), "truncated\n{}", shown());
        let is_inlined = |frame: &Value| frame["inlined"] == true;
        let addresses = told.iter().filter(|frame| !is_inlined(frame));
        let addresses: Vec<_> = addresses.filter_map(|frame| parse(frame["address"].as_str()?)).collect();
        // gdb does not show where inlined functions, the innermost one, and signal handlers return to, nor the
        // address of code that a signal interrupted at the beginning of a line.
        let of_signal = self.0.iter().filter(|frame| frame.function.as_deref() == Some(SIGNAL)).count();
        let mut expected = self.0.iter().skip(1).filter_map(|frame| frame.address);
        let mut missing = 0;
        let mut next = expected.next();
        for address in addresses.iter().skip(1) {
            if Some(*address) == next {
                next = expected.next();
            } else {
                missing += 1;
            }
        }
        let is_right = next.is_none() && (of_signal..=2 * of_signal).contains(&missing);
        ensure!(addresses.len() > 2 && is_right, "{addresses:x?}\n{}", shown());
        Ok(())
    }

    /// Whether these reported frames are the innermost ones of the same stack, and the last of them is marked
    /// as having callers.
    pub(crate) fn ensure_begins_with(&self, frames: &Value) -> Result<()> {
        let mut told = frames.as_array().context("no stack")?.clone();
        let last = told.last_mut().context("no frames")?;
        let why = last["truncated"].take();
        ensure!(
            !why.is_null() && told.len() < self.0.len(),
            "not truncated\n{}\n{self:#?}",
            shortened(frames)
        );
        let beginning = Self(self.0[..told.len()].to_vec());
        beginning.ensure_equals(&told.into())
    }

    /// Whether gdb knows that this function is among the callers, and that this is its name in the reported
    /// frames.
    pub(crate) fn ensure_names(&self, function: &str, frames: &Value) -> Result<()> {
        let is_it = |name: &str| plain(name) == function;
        let told = frames.as_array().context("no stack")?;
        ensure!(
            self.0.iter().any(|frame| frame.function.as_deref().is_some_and(is_it))
                && told.iter().any(|frame| frame["symbol"].as_str().is_some_and(is_it)),
            "no {function}\n{}\n{self:#?}",
            shortened(frames)
        );
        Ok(())
    }
}

/// The last part of a name, without parameters, without types in angle brackets, and without the additions of
/// symbol tables: the hash of a Rust function, and a version. Debuggers differ in the part before it.
fn plain(name: &str) -> String {
    let mut depth = 0_usize;
    let mut bare = String::new();
    for character in name.replace("->", "").chars() {
        match character {
            '<' => depth += 1,
            '>' => depth = depth.saturating_sub(1),
            character if depth == 0 => bare.push(character),
            _ => {}
        }
    }
    let name = bare.split(['(', '@']).next().unwrap_or(&bare);
    let name = name.rsplit_once("::h").filter(|(_, hash)| hash.len() == 16).map_or(name, |(name, _)| name);
    let last = name.rsplit("::").find(|part| !part.is_empty()).unwrap_or(name);
    // `{{closure}}` in one mangling, `{closure#0}` in the other and in debug information.
    if last.contains("{closure") { "{closure}".to_owned() } else { last.to_owned() }
}
