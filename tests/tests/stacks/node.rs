//! Functions that V8 compiles, which have no unwind tables but keep frame pointers: compared with gdb's
//! backtrace and, where node lists its functions for perf, with the frames that V8 itself shows the program.

use std::{fs, io::Write as _, net::TcpStream, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    expect::shortened,
    netns::Namespace,
    program::Program,
    scratch::Scratch,
    servers::{NODE, is_missing},
    sockets::{ESTABLISHED, Socket},
    tool::Launch,
};

use super::{
    PORT, descriptor,
    gdb::{Backtrace, GDB, Gdb},
    part, told,
};

const LISTED_FOR_PERF: &[&str] = &["--perf-basic-prof", "--interpreted-frames-native-stack"];

/// The frame of a function that is interpreted without having code of its own. It has no name.
const INTERPRETED: &str = "Builtins_InterpreterEntryTrampoline";

/// A function and its file.
type ScriptPlace = (String, String);

/// Runs the server with these options until it has closed a connection. Returns gdb's backtrace of the close,
/// the frames that V8 shows, and the reported ones.
fn hangs_up(options: &[&str]) -> Result<(Backtrace, Vec<ScriptPlace>, Value)> {
    let (namespace, folder) = (Namespace::new()?, Scratch::new()?);
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let mut command = Command::new(NODE);
    // It writes a log where it runs.
    command.current_dir(folder.path()).args(options).arg(part("server.js")).arg(PORT.to_string());
    let node = Program::start(&namespace, command)?;
    ensure!(node.line()? == "ready");
    let mut client = namespace.inside(|| Ok(TcpStream::connect(("127.0.0.1", PORT))?))?;
    let is_accepted = |socket: &Socket| socket.local.port() == PORT && socket.state == ESTABLISHED;
    let descriptor = descriptor(&namespace, node.pid(), is_accepted)?;
    let gdb = Gdb::attach_to_compiler(&namespace, node.pid(), descriptor)?;
    client.write_all(b"x")?;
    let backtrace = gdb.backtrace()?;
    let shown: Vec<String> = serde_json::from_str(&node.line()?)?;
    let line = told(&tool, &json!({"connection": {"role": "server"}, "process": {"pid": node.pid()}}));
    let _ = fs::remove_file(format!("/tmp/perf-{}.map", node.pid()));
    Ok((
        backtrace,
        shown.iter().filter_map(|line| shown_place(line)).collect(),
        line?["stack"]["user"].clone(),
    ))
}

/// `at Server.takes (/x/server.js:21:14)`, or `at /x/server.js:21:14` if the function has no name. `None` is
/// a function that is part of V8, such as `Array.forEach()`.
fn shown_place(line: &str) -> Option<ScriptPlace> {
    let line = line.trim().strip_prefix("at ")?;
    let (name, place) = line.strip_suffix(')').and_then(|line| line.split_once(" (")).unwrap_or(("", line));
    let mut parts = place.rsplitn(3, ':').skip(2);
    Some((name.rsplit('.').next()?.to_owned(), parts.next()?.to_owned()))
}

/// `JS:~takes /x/server.js:20:8`, after a character for the compiler. An empty place is a function without a
/// name.
fn reported_place(frame: &Value) -> Option<ScriptPlace> {
    let symbol = frame["symbol"].as_str()?;
    if symbol == INTERPRETED {
        return Some(ScriptPlace::default());
    }
    let (name, place) = symbol.strip_prefix("JS:")?.split_once(' ')?;
    let name = name.trim_start_matches(['~', '^', '+', '*']).rsplit('.').next()?;
    Some((name.to_owned(), place.rsplitn(3, ':').nth(2)?.to_owned()))
}

#[test]
fn node_as_it_is_here() -> Result<()> {
    if is_missing(&[GDB, NODE]) {
        return Ok(());
    }
    let (backtrace, _, frames) = hangs_up(&[])?;
    backtrace.ensure_equals(&frames)
}

#[test]
fn javascript_functions_are_those_that_v8_shows() -> Result<()> {
    if is_missing(&[GDB, NODE]) {
        return Ok(());
    }
    let (backtrace, shown, frames) = hangs_up(LISTED_FOR_PERF)?;
    backtrace.ensure_equals(&frames)?;
    let reported: Vec<_> = frames.as_array().context("no stack")?.iter().filter_map(reported_place).collect();
    let difference = || format!("not {shown:#?}\n{reported:#?}\n{}", shortened(&frames));
    ensure!(reported.len() == shown.len(), "{}", difference());
    for (reported, shown) in reported.iter().zip(&shown) {
        // All functions of the script have names; of node's own, those that it has started with have none.
        let may_lack_a_name = shown.1.starts_with("node:") && *reported == ScriptPlace::default();
        ensure!(reported == shown || may_lack_a_name, "{shown:?}: {}", difference());
    }
    Ok(())
}
