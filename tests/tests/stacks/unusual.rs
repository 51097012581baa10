//! Stacks of unusual shape: of signal handlers, on other memory than the thread's, among many mappings, of
//! threads and coroutines that take turns, and in libraries that are unloaded at once.

use std::{
    io::Read as _,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tcpclose_tests::{
    expect::shortened,
    netns::{self, Namespace},
    program::Program,
    scratch::Scratch,
    servers::is_missing,
    tool::Launch,
};

use super::{
    GCC, GDB, PORT, compile,
    gdb::{self, Gdb},
    hangs_up_as, hangs_up_under, part,
};

/// The beginning of a 32-bit program on x86-64, and the directory of the kernel's headers.
const BEGINNING_32: &str = "/usr/lib32/crt1.o";
const HEADERS: &str = "/usr/include/x86_64-linux-gnu";

fn program(folder: &Scratch) -> Result<PathBuf> {
    compile(GCC, &["-O2", "-g", "-fomit-frame-pointer"], "unusual.c", folder)
}

fn one(shape: &str) -> Result<Option<(gdb::Backtrace, Value)>> {
    if is_missing(&[GDB, GCC]) {
        return Ok(None);
    }
    let folder = Scratch::new()?;
    hangs_up_as(&program(&folder)?, &[shape], Launch::new()?).map(Some)
}

/// The frames are the first of gdb's, and those of these functions are among them.
fn begins_with(shape: &str, functions: [&str; 2]) -> Result<()> {
    let Some((backtrace, frames)) = one(shape)? else { return Ok(()) };
    for function in functions {
        backtrace.ensure_names(function, &frames)?;
    }
    backtrace.ensure_begins_with(&frames)
}

/// The frames of the function that the signal interrupted follow those of the handler.
#[test]
fn signal_handler() -> Result<()> {
    let Some((backtrace, frames)) = one("signal")? else { return Ok(()) };
    for function in ["hang_up", "on_signal", "handle", "main"] {
        backtrace.ensure_names(function, &frames)?;
    }
    let is_handler = |frame: &Value| frame["symbol"] == gdb::SIGNAL;
    ensure!(frames.as_array().is_some_and(|frames| frames.iter().any(is_handler)), "{frames:#}");
    backtrace.ensure_equals(&frames)
}

/// The copied memory is that of the handler's stack. Of the one that the signal has interrupted, the innermost
/// frame is known.
#[test]
fn signal_handler_with_a_stack_of_its_own() -> Result<()> {
    begins_with("altstack", ["hang_up", "on_signal"])
}

/// It ends in a function of libc without unwind tables; gdb goes on to what it takes for frames, at address 0
/// in the end.
#[test]
fn coroutine() -> Result<()> {
    begins_with("coroutine", ["hang_up", "body"])
}

/// Copying it fails where the memory ends, which is a few words after the outermost frame.
#[test]
fn coroutine_at_the_end_of_memory() -> Result<()> {
    begins_with("edge", ["hang_up", "body"])
}

#[test]
fn ten_thousand_mappings() -> Result<()> {
    let Some((backtrace, frames)) = one("mappings")? else { return Ok(()) };
    backtrace.ensure_equals(&frames)
}

/// As the code of a just-in-time compiler may be. More than are kept, but the files are.
#[test]
fn ten_thousand_mappings_of_code() -> Result<()> {
    let Some((backtrace, frames)) = one("code")? else { return Ok(()) };
    backtrace.ensure_equals(&frames)
}

/// Its system calls are made from the vDSO, and `main()` aligns its stack, so that an expression of the
/// tables yields the address of its frame.
#[test]
fn i386() -> Result<()> {
    if is_missing(&[GDB, GCC, BEGINNING_32]) {
        return Ok(());
    }
    let folder = Scratch::new()?;
    // The compiler's own 32-bit files are in packages that conflict with compilers of other platforms. With
    // those of the C library alone, a program can be made as well.
    let without_them = ["-no-pie", "-nostartfiles", "-nodefaultlibs", BEGINNING_32, "-idirafter", HEADERS];
    for frame_pointers in ["-fomit-frame-pointer", "-fno-omit-frame-pointer"] {
        let options = [&["-m32", "-O2", "-g", frame_pointers][..], &without_them, &["-lc"]].concat();
        let program = compile(GCC, &options, "hang_up.c", &folder)?;
        let (backtrace, frames) = hangs_up_under(&program, &[], Launch::new()?, Gdb::attach_to_i386)?;
        backtrace.ensure_addresses(&frames)?;
        for function in ["hang_up", "serve", "main"] {
            backtrace.ensure_names(function, &frames)?;
        }
    }
    Ok(())
}

/// A running program of the kind, whose connections are accepted.
fn start(
    folder: &Scratch,
    namespace: &Namespace,
    shape: &str,
    libraries: &[(&str, &Path)],
) -> Result<Program> {
    for port in [PORT, PORT + 1] {
        let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", port))?))?;
        thread::spawn(move || {
            // Each ends with a RST.
            listener.incoming().flatten().for_each(|mut accepted| drop(accepted.read(&mut [0])));
        });
    }
    let mut command = Command::new(program(folder)?);
    command.args([&PORT.to_string(), shape, "orders"]).envs(libraries.iter().copied());
    let program = Program::start(namespace, command)?;
    ensure!(program.line()? == "connected");
    Ok(program)
}

/// Whether this line is the end of a connection that the program has closed.
fn is_close(line: &Value, program: &Program) -> bool {
    line["event"] == "close"
        && line["connection"]["role"] == "client"
        && line["process"]["pid"] == program.pid()
}

/// The destination's port, and the names of the frames that have one.
fn names(line: &Value) -> Result<(u16, Vec<String>)> {
    let frames = line["stack"]["user"].as_array().with_context(|| shortened(line))?;
    let names = frames.iter().filter_map(|frame| Some(frame["symbol"].as_str()?.to_owned())).collect();
    let port = line["connection"]["remote"]["port"].as_u64().context("no port")?;
    Ok((u16::try_from(port)?, names))
}

/// The function that closes connections to this port, and the one that does not close them.
fn expected(port: u16) -> (&'static str, &'static str) {
    if port == PORT { ("first", "second") } else { ("second", "first") }
}

fn ensure_each_is_its_own(shape: &str, outermost: &str) -> Result<()> {
    const FEW: usize = 6;
    const EACH: usize = 1_000;
    if is_missing(&[GCC]) {
        return Ok(());
    }
    let (folder, namespace) = (Scratch::new()?, Namespace::new()?);
    let tool = Launch::new()?.trace([&namespace]).args(["--event", "close"]).start()?;
    let mut program = start(&folder, &namespace, shape, &[])?;
    // The ring has room for only this many whole copies, if the tool gets no CPU meanwhile. After a first few
    // closes the stacks are recognized.
    for done in (0..FEW).step_by(2) {
        ensure!(program.ask("go 1")? == "done");
        let are_there =
            tool.wait_until(|lines| lines.iter().filter(|line| is_close(line, &program)).count() == done + 2);
        ensure!(are_there, "no lines for the closes after the first {done}");
    }
    ensure!(program.ask(&format!("go {EACH}"))? == "done");
    let lines = tool.stop()?.lines;
    let closes: Vec<_> = lines.iter().filter(|line| is_close(line, &program)).collect();
    ensure!(closes.len() == FEW + 2 * EACH, "{} of {} closes", closes.len(), FEW + 2 * EACH);
    for line in closes {
        let (port, names) = names(line)?;
        let (own, other) = expected(port);
        let is_there = |name: &str| names.iter().any(|it| it == name);
        let outermost = format!("{own}_{outermost}");
        ensure!(
            is_there("hang_up") && is_there(own) && is_there(&outermost) && !is_there(other),
            "{port}: {names:?}"
        );
    }
    Ok(())
}

#[test]
fn two_threads() -> Result<()> {
    ensure_each_is_its_own("threads", "thread")
}

#[test]
fn coroutines_that_switch() -> Result<()> {
    ensure_each_is_its_own("switching", "coroutine")
}

/// Each library is loaded in the place of the previous one. Cached mappings must not be used after that, and
/// the stack of the first library must not be recognized without reading the mappings again.
#[test]
fn libraries_that_take_turns() -> Result<()> {
    take_turns("libraries", |names, own| names.iter().any(|name| name == own))
}

/// Each library is unloaded before its mapping can be read.
#[test]
fn libraries_that_are_unloaded_at_once() -> Result<()> {
    take_turns("unloaded", |_, _| true)
}

fn take_turns(shape: &str, is_good: impl Fn(&[String], &str) -> bool) -> Result<()> {
    if is_missing(&[GCC]) {
        return Ok(());
    }
    let folder = Scratch::new()?;
    let library = |name: &str, more: &[&str]| {
        let path = folder.path().join(format!("{name}.so"));
        let mut compiler = Command::new(GCC);
        compiler.args(["-O2", "-g", "-shared", "-fPIC", &format!("-DNAME={name}"), "-o"]).arg(&path);
        netns::run(compiler.args(more).arg(part("library.c"))).map(|_| path)
    };
    let (first, second) = (library("first", &[])?, library("second", &["-DOTHER=other"])?);
    let namespace = Namespace::new()?;
    let tool = Launch::new()?.trace([&namespace]).args(["--event", "close"]).start()?;
    let mut program = start(&folder, &namespace, shape, &[("A", &first), ("B", &second)])?;
    let mut pages = Vec::new();
    for turn in 1..=6 {
        let answer = program.ask("go 1")?;
        pages.push(
            answer
                .get(..answer.find(' ').unwrap_or(0))
                .and_then(|it| it.get(..it.len() - 3))
                .map(str::to_owned),
        );
        let lines = std::cell::RefCell::new(Vec::new());
        let are_there = tool.wait_until(|lines_so_far| {
            let closes = lines_so_far.iter().filter(|line| is_close(line, &program));
            lines.replace(closes.cloned().collect());
            lines.borrow().len() == turn
        });
        ensure!(are_there, "no line for turn {turn}");
        let lines = lines.into_inner();
        let (port, names) = names(lines.last().context("no line")?)?;
        let (own, other) = expected(port);
        ensure!(is_good(&names, own) && !names.iter().any(|name| name == other), "{turn}: {port}: {names:?}");
    }
    pages.dedup();
    ensure!(pages.len() == 1, "the libraries were not loaded to the same place: {pages:?}");
    Ok(())
}
