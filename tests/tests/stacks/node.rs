//! JavaScript functions: compared with gdb's backtrace and, by name, file and line, with the frames that V8
//! itself shows the program at that moment, while they are interpreted and after they were compiled.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    expect::{differences, shortened},
    netns::Namespace,
    program::Program,
    scratch::Scratch,
    servers::{NODE, is_missing},
    sockets::{ESTABLISHED, Socket},
    tool::{Launch, Tool},
};

use super::{
    PORT, descriptor,
    gdb::{Backtrace, GDB, Gdb},
    part, told,
};

/// Lets perf show each function, interpreted ones too.
const LISTED_FOR_PERF: &[&str] = &["--perf-basic-prof", "--interpreted-frames-native-stack"];

/// Functions are compiled early, and by each compiler; each keeps a frame of its own.
const COMPILED_EARLY: &[&str] = &["--interrupt-budget=2000", "--no-turbo-inlining"];

/// The builtin that runs interpreted functions.
const INTERPRETER: &str = "Builtins_InterpreterEntryTrampoline";

/// The number of connections that a server closes at a time, and how often.
const AT_ONCE: usize = 20;
const ROUNDS: usize = 30;

/// A function as V8 shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ShownFrame {
    /// The last part of its name; empty if it has none.
    name: String,
    file: String,
    line: u64,
}

/// What a server says before it closes a connection: the port of the client, and V8's frames.
fn shown(line: &str) -> Result<(u64, Vec<ShownFrame>)> {
    let (port, lines): (_, Vec<String>) = serde_json::from_str(line)?;
    Ok((port, lines.iter().filter_map(|line| shown_frame(line)).collect()))
}

/// `at Server.takes (/x/server.js:21:14)`, or `at /x/server.js:21:14` if the function has no name. `None` is
/// a function that is part of V8, such as `Array.forEach()`.
fn shown_frame(line: &str) -> Option<ShownFrame> {
    let line = line.trim().strip_prefix("at ")?;
    let (name, place) = line.strip_suffix(')').and_then(|line| line.split_once(" (")).unwrap_or(("", line));
    let mut parts = place.rsplitn(3, ':').skip(1);
    let line = parts.next()?.parse().ok()?;
    let file = parts.next()?.to_owned();
    // A method that has another name there: `Server.takes [as f]`.
    let name = name.split(" [as ").next()?.rsplit('.').next()?;
    Some(ShownFrame { name: name.replace("<anonymous>", ""), file, line })
}

/// A reported frame of a function of the program: the name, the file and the line; `None` if only the address
/// is known.
type ReportedFrame = Option<(String, String, Option<u64>)>;

/// The frames of functions of the program, in a reported stack: functions of files have a module.
fn reported(frames: &Value) -> Result<Vec<ReportedFrame>> {
    let frames = frames.as_array().context("no stack")?;
    let text = |frame: &Value, key: &str| frame[key].as_str().map(str::to_owned);
    let is_of_program = |frame: &&Value| frame["module"].is_null() || frame["symbol"] == INTERPRETER;
    let of_program = frames.iter().filter(is_of_program).map(|frame| {
        let found = text(frame, "symbol").zip(text(frame, "file"));
        found.map(|(name, file)| (name, file, frame["line"].as_u64()))
    });
    Ok(of_program.collect())
}

/// Whether a reported frame is this function; one without a name can be any.
fn is_it(reported: &ReportedFrame, shown: &ShownFrame) -> bool {
    let Some((name, file, line)) = reported else { return true };
    let is_anonymous = |name: &str| name.starts_with("<anonymous:");
    let is_named =
        if shown.name.is_empty() { is_anonymous(name) } else { name.rsplit('.').next() == Some(&shown.name) };
    is_named && *file == shown.file && line.is_none_or(|line| line == shown.line)
}

/// What there is to say if a stack is not the one that V8 has shown.
fn difference(reported: &[ReportedFrame], shown: &[ShownFrame], frames: &Value) -> String {
    format!("not {shown:#?}\n{reported:#?}\n{}", shortened(frames))
}

/// Whether these are the functions that V8 has shown. Returns the number of frames with names, and with lines.
fn ensure_shown(frames: &Value, shown: &[ShownFrame]) -> Result<(usize, usize)> {
    let reported = reported(frames)?;
    let difference = || difference(&reported, shown, frames);
    ensure!(reported.len() == shown.len(), "another number: {}", difference());
    for (frame, shown) in reported.iter().zip(shown) {
        ensure!(is_it(frame, shown), "{frame:?} is not {shown:?}: {}", difference());
    }
    let found = reported.iter().flatten();
    Ok((found.clone().count(), found.filter(|(_, _, line)| line.is_some()).count()))
}

/// A server, with these options.
fn start(namespace: &Namespace, folder: &Scratch, options: &[&str]) -> Result<Program> {
    let mut command = Command::new(NODE);
    // It writes a log where it runs.
    command.current_dir(folder.path()).args(options).arg(part("server.js")).arg(PORT.to_string());
    let node = Program::start(namespace, command)?;
    ensure!(node.line()? == "ready");
    Ok(node)
}

fn connect(namespace: &Namespace) -> Result<TcpStream> {
    namespace.inside(|| Ok(TcpStream::connect(("127.0.0.1", PORT))?))
}

/// Runs the server with these options until it has closed a connection. Returns gdb's backtrace of the close,
/// the frames that V8 shows, and the reported ones.
fn hangs_up(options: &[&str]) -> Result<(Backtrace, Vec<ShownFrame>, Value)> {
    let (namespace, folder) = (Namespace::new()?, Scratch::new()?);
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let node = start(&namespace, &folder, options)?;
    let mut client = connect(&namespace)?;
    let is_accepted = |socket: &Socket| socket.local.port() == PORT && socket.state == ESTABLISHED;
    let descriptor = descriptor(&namespace, node.pid(), is_accepted)?;
    let gdb = Gdb::attach_to_compiler(&namespace, node.pid(), descriptor)?;
    client.write_all(b"x")?;
    let backtrace = gdb.backtrace()?;
    let (_, shown) = shown(&node.line()?)?;
    let line = told(&tool, &json!({"connection": {"role": "server"}, "process": {"pid": node.pid()}}));
    let _ = fs::remove_file(format!("/tmp/perf-{}.map", node.pid()));
    Ok((backtrace, shown, line?["stack"]["user"].clone()))
}

#[test]
fn node_as_it_is_here() -> Result<()> {
    if is_missing(&[GDB, NODE]) {
        return Ok(());
    }
    let (backtrace, shown, frames) = hangs_up(&[])?;
    backtrace.ensure_calls(INTERPRETER, shown.len())?;
    backtrace.without_name(INTERPRETER).ensure_equals(&frames)?;
    let found = ensure_shown(&frames, &shown)?;
    // All of them are interpreted.
    ensure!(found == (shown.len(), shown.len()), "{found:?} of {}: {}", shown.len(), shortened(&frames));
    Ok(())
}

#[test]
fn node_that_lists_its_functions_for_perf() -> Result<()> {
    if is_missing(&[GDB, NODE]) {
        return Ok(());
    }
    let (backtrace, shown, frames) = hangs_up(LISTED_FOR_PERF)?;
    backtrace.without_name(INTERPRETER).ensure_equals(&frames)?;
    let found = ensure_shown(&frames, &shown)?;
    ensure!(found == (shown.len(), shown.len()), "{found:?} of {}: {}", shown.len(), shortened(&frames));
    Ok(())
}

/// A stack that was reported, and what V8 has shown.
type Pair = (Value, Vec<ShownFrame>);

/// Lets the server close many connections, several at a time.
fn hangs_up_often(options: &[&str]) -> Result<Vec<Pair>> {
    let (namespace, folder) = (Namespace::new()?, Scratch::new()?);
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let node = start(&namespace, &folder, options)?;
    let (mut pairs, mut seen) = (Vec::new(), BTreeSet::new());
    for _ in 0..ROUNDS {
        let clients = (0..AT_ONCE).map(|_| connect(&namespace)).collect::<Result<Vec<_>>>()?;
        for mut client in &clients {
            client.write_all(b"x")?;
        }
        for mut client in &clients {
            ensure!(client.read(&mut [0])? == 0);
        }
        for _ in &clients {
            let (port, shown) = shown(&node.line()?)?;
            pairs.push((closed_by_server(&tool, port, &mut seen)?, shown));
        }
    }
    Ok(pairs)
}

/// The reported stack of the server, for the connection of a client with this port. Clients may use a port
/// again, so that lines are remembered by their numbers.
fn closed_by_server(tool: &Tool, port: u64, seen: &mut BTreeSet<u64>) -> Result<Value> {
    let which = json!({"event": "close", "connection": {"role": "server", "remote": {"port": port}}});
    let is_new = |line: &Value| line["seq"].as_u64().is_some_and(|number| !seen.contains(&number));
    let is_it =
        |line: &Value| !line["stack"].is_null() && is_new(line) && differences(line, &which).is_empty();
    let line = tool.wait_for(&which.to_string(), is_it)?;
    seen.extend(line["seq"].as_u64());
    Ok(line["stack"]["user"].clone())
}

/// Each stack is the one that V8 has shown, before the functions were compiled, after that, and in between.
#[test]
fn compiled_functions_are_those_that_v8_shows() -> Result<()> {
    if is_missing(&[NODE]) {
        return Ok(());
    }
    let pairs = hangs_up_often(COMPILED_EARLY)?;
    let (mut of_all, mut named, mut interpreted) = (0, 0, 0);
    for (frames, shown) in &pairs {
        let (with_names, with_lines) = ensure_shown(frames, shown)?;
        (of_all, named, interpreted) = (of_all + shown.len(), named + with_names, interpreted + with_lines);
    }
    // A function may lack its name if the garbage collector has moved it before it was read.
    ensure!(named * 10 > of_all * 9, "only {named} of {of_all} functions have names");
    ensure!(interpreted * 2 < of_all, "{interpreted} of {of_all} functions have lines, so few are compiled");
    Ok(())
}

/// Functions that the compiler has inlined have no frames. All others are there, in the order that V8 shows.
#[test]
fn inlined_functions_are_left_out() -> Result<()> {
    if is_missing(&[NODE]) {
        return Ok(());
    }
    let mut left_out = 0;
    for (frames, shown) in &hangs_up_often(&["--interrupt-budget=2000"])? {
        let reported = reported(frames)?;
        let mut rest = shown.iter();
        for frame in &reported {
            ensure!(rest.any(|shown| is_it(frame, shown)), "{}", difference(&reported, shown, frames));
        }
        left_out += shown.len() - reported.len();
    }
    ensure!(left_out > 0, "the compiler has inlined nothing");
    Ok(())
}

/// Each close is followed by a garbage collection, and by other functions that take the place of those that it
/// has moved, before the stack is read. No name may be that of another function.
#[test]
fn no_name_is_wrong_when_functions_are_moved() -> Result<()> {
    if is_missing(&[NODE]) {
        return Ok(());
    }
    let mut options = COMPILED_EARLY.to_vec();
    options.push("--expose-gc");
    let mut named = 0;
    for (frames, shown) in &hangs_up_often(&options)? {
        named += ensure_shown(frames, shown)?.0;
    }
    ensure!(named > 0, "no function has a name");
    Ok(())
}
