//! Whole stacks by default: each is compared with gdb's backtrace of the same system call, for programs that
//! are built in different ways, for servers as Debian ships them, and for stacks of unusual shape.

mod damaged;
mod flames;
mod gdb;
mod java;
mod names;
mod node;
mod python;
mod unusual;

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use gdb::{GDB, Gdb};
use serde_json::{Value, json};
use tcpclose_tests::{
    expect::differences,
    netns::{self, Namespace},
    program::Program,
    scratch::Scratch,
    servers::{NGINX, NGINX_PORT, PYTHON, REDIS, is_missing, start_nginx, start_redis, wait_for_listener},
    sockets::{self, ESTABLISHED, Socket},
    tool::{Launch, Tool},
    until,
};

const PORT: u16 = NGINX_PORT;
const GCC: &str = "/usr/bin/gcc";

/// The path of a source file or configuration of these tests.
fn part(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stacks").join(name)
}

fn compile(compiler: &str, options: &[&str], source: &str, folder: &Scratch) -> Result<PathBuf> {
    let program = folder.path().join("program");
    netns::run(Command::new(compiler).args(options).arg("-o").arg(&program).arg(part(source)))?;
    Ok(program)
}

/// <https://en.wikipedia.org/wiki/Linear_congruential_generator>
fn next_random(random: &mut u64) -> u64 {
    *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *random
}

/// A random call path: up to three of these steps.
fn path(random: &mut u64, steps: &[u8]) -> String {
    let random = next_random(random);
    let length = (random >> 60) % 4;
    let digit = |level| usize::try_from((random >> (33 + 6 * level)) % 64).unwrap_or(0) % steps.len();
    (0..length).map(|level| char::from(steps[digit(level)])).collect()
}

/// Runs a program that connects, and closes on request. Returns gdb's backtrace of the close, and the
/// reported stack.
fn hangs_up(program: &Path) -> Result<(gdb::Backtrace, Value)> {
    hangs_up_as(program, &[], Launch::new()?)
}

/// The same with further arguments of the program, and with a launch of the tool.
fn hangs_up_as(program: &Path, args: &[&str], launch: Launch) -> Result<(gdb::Backtrace, Value)> {
    hangs_up_under(program, args, launch, Gdb::attach)
}

/// The same with a way to attach gdb.
fn hangs_up_under(
    program: &Path,
    args: &[&str],
    launch: Launch,
    attach: impl FnOnce(&Namespace, u32, i32) -> Result<Gdb>,
) -> Result<(gdb::Backtrace, Value)> {
    let mut connected = Connected::start(program, args, launch)?;
    let Connected { namespace, program, .. } = &connected;
    let descriptor = descriptor(namespace, program.pid(), |socket| socket.remote.port() == PORT)?;
    let gdb = attach(namespace, program.pid(), descriptor)?;
    connected.program.tell("go")?;
    let backtrace = gdb.backtrace()?;
    Ok((backtrace, connected.reported()?))
}

/// A traced program that has connected, and closes on request.
struct Connected {
    tool: Tool,
    program: Program,
    _accepted: TcpStream,
    namespace: Namespace,
}

impl Connected {
    fn start(program: &Path, args: &[&str], launch: Launch) -> Result<Self> {
        let namespace = Namespace::new()?;
        let tool = launch.trace([&namespace]).start()?;
        let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", PORT))?))?;
        let mut command = Command::new(program);
        command.arg(PORT.to_string()).args(args);
        let program = Program::start(&namespace, command)?;
        ensure!(program.line()? == "connected");
        let (accepted, _) = listener.accept()?;
        Ok(Self { tool, program, _accepted: accepted, namespace })
    }

    /// Waits until the close is reported, and returns its stack.
    fn reported(&self) -> Result<Value> {
        let which = json!({"connection": {"role": "client"}, "process": {"pid": self.program.pid()}});
        Ok(told(&self.tool, &which)?["stack"]["user"].clone())
    }
}

/// The descriptor that a process has of such a socket, once it has one.
fn descriptor(namespace: &Namespace, pid: u32, is_it: impl Fn(&Socket) -> bool) -> Result<i32> {
    until("it has the socket", || {
        let sockets = sockets::list(namespace)?;
        let found =
            sockets.iter().filter(|socket| is_it(socket)).map(|socket| sockets::descriptors(pid, socket));
        Ok(found.collect::<Result<Vec<_>>>()?.concat().first().copied())
    })
}

/// Waits for the first move that matches.
fn told(tool: &Tool, which: &Value) -> Result<Value> {
    let is_it = |line: &Value| {
        line["event"] == "close" && !line["stack"].is_null() && differences(line, which).is_empty()
    };
    tool.wait_for(&which.to_string(), is_it)
}

#[test]
fn c_without_frame_pointers() -> Result<()> {
    if is_missing(&[GDB, GCC]) {
        return Ok(());
    }
    let folder = Scratch::new()?;
    let program = compile(GCC, &["-O2", "-g", "-fomit-frame-pointer"], "hang_up.c", &folder)?;
    let (backtrace, frames) = hangs_up(&program)?;
    backtrace.ensure_equals(&frames)?;
    for function in ["hang_up", "serve", "main"] {
        backtrace.ensure_names(function, &frames)?;
    }
    Ok(())
}

/// A walk along frame pointers leaves out the function that called `close()`, even if the program keeps frame
/// pointers.
#[test]
fn c_with_frame_pointers() -> Result<()> {
    if is_missing(&[GDB, GCC]) {
        return Ok(());
    }
    let folder = Scratch::new()?;
    let program = compile(GCC, &["-O2", "-g", "-fno-omit-frame-pointer"], "hang_up.c", &folder)?;
    let (backtrace, frames) = hangs_up(&program)?;
    backtrace.ensure_equals(&frames)?;
    backtrace.ensure_names("hang_up", &frames)
}

/// Its symbols are in another file, where distributions install it: by build id.
#[test]
fn stripped_with_a_debug_file() -> Result<()> {
    if is_missing(&[GDB, GCC, "/usr/bin/objcopy"]) {
        return Ok(());
    }
    let folder = Scratch::new()?;
    let program = compile(GCC, &["-O2", "-g", "-Wl,--build-id"], "hang_up.c", &folder)?;
    let notes = netns::run(Command::new("readelf").arg("-n").arg(&program))?;
    let id = notes.lines().find_map(|line| line.trim().strip_prefix("Build ID: ")).context("no build id")?;
    let debug = PathBuf::from(format!("/usr/lib/debug/.build-id/{}/{}.debug", &id[..2], &id[2..]));
    std::fs::create_dir_all(debug.parent().context("no parent")?)?;
    netns::run(Command::new("objcopy").arg("--only-keep-debug").arg(&program).arg(&debug))?;
    let result = netns::run(Command::new("strip").arg(&program)).and_then(|_| hangs_up(&program));
    std::fs::remove_file(&debug)?;
    let (backtrace, frames) = result?;
    backtrace.ensure_equals(&frames)?;
    backtrace.ensure_names("hang_up", &frames)
}

#[test]
fn cpp_with_inlined_functions() -> Result<()> {
    if is_missing(&[GDB, "/usr/bin/g++"]) {
        return Ok(());
    }
    let folder = Scratch::new()?;
    let program = compile("/usr/bin/g++", &["-O2", "-g"], "inlined.cpp", &folder)?;
    let (backtrace, frames) = hangs_up(&program)?;
    backtrace.ensure_equals(&frames)?;
    for function in ["hang_up", "~Connection", "serve", "main"] {
        backtrace.ensure_names(function, &frames)?;
    }
    Ok(())
}

#[test]
fn rust_with_inlined_functions() -> Result<()> {
    let compiler = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    if is_missing(&[GDB]) || Command::new(&compiler).arg("--version").output().is_err() {
        println!("skipped: {compiler} is not here");
        return Ok(());
    }
    let folder = Scratch::new()?;
    let program = compile(&compiler, &["--edition=2024", "-O", "-g"], "dropped.rs", &folder)?;
    let (backtrace, frames) = hangs_up(&program)?;
    backtrace.ensure_equals(&frames)?;
    for function in ["forget_about", "serve", "main"] {
        backtrace.ensure_names(function, &frames)?;
    }
    Ok(())
}

/// Runs a server that closes the connection of a client that sends something. Returns gdb's backtrace of the
/// close, and the reported stack.
fn server_hangs_up(
    namespace: &Namespace,
    tool: &Tool,
    server: &Program,
    say: &[u8],
) -> Result<(gdb::Backtrace, Value)> {
    wait_for_listener(namespace, PORT)?;
    let mut client = namespace.inside(|| Ok(TcpStream::connect(("127.0.0.1", PORT))?))?;
    let is_accepted = |socket: &Socket| socket.local.port() == PORT && socket.state == ESTABLISHED;
    let gdb = Gdb::attach(namespace, server.pid(), descriptor(namespace, server.pid(), is_accepted)?)?;
    client.write_all(say)?;
    let backtrace = gdb.backtrace()?;
    client.read_to_end(&mut Vec::new())?;
    let which = json!({"connection": {"role": "server"}, "process": {"pid": server.pid()}});
    let line = told(tool, &which)?;
    Ok((backtrace, line["stack"]["user"].clone()))
}

#[test]
fn nginx_as_debian_ships_it() -> Result<()> {
    if is_missing(&[GDB, NGINX]) {
        return Ok(());
    }
    let (namespace, folder) = (Namespace::new()?, Scratch::new()?);
    let tool = Launch::new()?.trace([&namespace]).start()?;
    // There is no backend, so it answers with an error and closes.
    let nginx = start_nginx(&namespace, folder.path())?;
    let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let (backtrace, frames) = server_hangs_up(&namespace, &tool, &nginx, request)?;
    backtrace.ensure_equals(&frames)
}

#[test]
fn redis_as_debian_ships_it() -> Result<()> {
    if is_missing(&[GDB, REDIS]) {
        return Ok(());
    }
    let (namespace, folder) = (Namespace::new()?, Scratch::new()?);
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let redis = start_redis(&namespace, folder.path(), PORT, 0)?;
    let (backtrace, frames) = server_hangs_up(&namespace, &tool, &redis, b"QUIT\r\n")?;
    backtrace.ensure_equals(&frames)
}

#[test]
fn python_as_debian_ships_it() -> Result<()> {
    const LOOP: &str = "_PyEval_EvalFrameDefault";
    if is_missing(&[GDB, PYTHON]) {
        return Ok(());
    }
    let namespace = Namespace::new()?;
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let mut command = Command::new(PYTHON);
    command.arg(part("server.py")).arg(PORT.to_string());
    let python = Program::start(&namespace, command)?;
    let (backtrace, mut frames) = server_hangs_up(&namespace, &tool, &python, b"x")?;
    // Functions of the program, which gdb does not know, take the places of the interpreter's loop.
    let frames_of_c = |frame: &Value| !frame["module"].is_null() && frame["symbol"] != LOOP;
    frames.as_array_mut().context("no stack")?.retain(frames_of_c);
    backtrace.without(LOOP).ensure_equals(&frames)
}
