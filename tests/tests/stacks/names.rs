//! Names that are not in the program itself: in debug files, in compressed symbols, and in perf maps.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    netns::{self, Namespace},
    program::Program,
    scratch::Scratch,
    servers::is_missing,
    tool::Launch,
    until,
};

use super::{GCC, GDB, PORT, compile, gdb, hangs_up_as, told};

const OBJCOPY: &str = "/usr/bin/objcopy";
const STRIP: &str = "/usr/bin/strip";

/// A program with symbols of its own functions, and options that make it (not) have a build id.
fn program(build_id: &str, folder: &Scratch) -> Result<PathBuf> {
    compile(GCC, &["-O2", "-g", build_id], "hang_up.c", folder)
}

fn build_id(program: &Path) -> Result<String> {
    let notes = netns::run(Command::new("readelf").arg("-n").arg(program))?;
    let id = notes.lines().find_map(|line| line.trim().strip_prefix("Build ID: "));
    Ok(id.context("no build id")?.to_owned())
}

/// Writes the debug information of a program to `debug`, and strips the program.
fn separate(program: &Path, debug: &Path) -> Result<()> {
    fs::create_dir_all(debug.parent().context("no parent")?)?;
    netns::run(Command::new(OBJCOPY).arg("--only-keep-debug").arg(program).arg(debug))?;
    netns::run(Command::new(STRIP).arg(program))?;
    Ok(())
}

/// The functions of the program, with lines where `with_lines`.
fn ensure_named((backtrace, frames): &(gdb::Backtrace, Value), with_lines: bool) -> Result<()> {
    for function in ["hang_up", "serve", "main"] {
        let is_it = |frame: &&Value| frame["symbol"] == function;
        let frame = frames.as_array().context("no stack")?.iter().find(is_it);
        let frame = frame.with_context(|| format!("no {function}: {frames:#}"))?;
        ensure!(frame["line"].is_u64() == with_lines, "{frame}");
        let file = frame["file"].as_str().is_some_and(|file| file.ends_with("hang_up.c"));
        ensure!(file == with_lines, "{frame}");
    }
    backtrace.ensure_addresses(frames)
}

/// The program names the file, which lies beside it, in `.debug`; the file is known by its checksum or its
/// build id.
#[test]
fn stripped_with_a_debug_link() -> Result<()> {
    if is_missing(&[GDB, GCC, OBJCOPY]) {
        return Ok(());
    }
    for id in ["-Wl,--build-id=none", "-Wl,--build-id"] {
        let folder = Scratch::new()?;
        let program = program(id, &folder)?;
        let debug = folder.path().join(".debug/program.debug");
        separate(&program, &debug)?;
        let link = format!("--add-gnu-debuglink={}", debug.display());
        netns::run(Command::new(OBJCOPY).arg(link).arg(&program))?;
        ensure_named(&hangs_up_as(&program, &[], Launch::new()?)?, true)?;
        // Another file in its place is not accepted.
        fs::write(&debug, [fs::read(&debug)?, vec![0]].concat())?;
        if id.ends_with("none") {
            let (_, frames) = hangs_up_as(&program, &[], Launch::new()?)?;
            let named =
                frames.as_array().context("no stack")?.iter().any(|frame| frame["symbol"] == "hang_up");
            ensure!(!named, "{frames:#}");
        }
    }
    Ok(())
}

/// The file was downloaded before, by gdb, perf or `debuginfod-find`.
#[test]
fn stripped_with_a_file_in_the_cache_of_debuginfod() -> Result<()> {
    if is_missing(&[GDB, GCC, OBJCOPY]) {
        return Ok(());
    }
    let folder = Scratch::new()?;
    let program = program("-Wl,--build-id", &folder)?;
    let cache = folder.path().join("cache");
    separate(&program, &cache.join(build_id(&program)?).join("debuginfo"))?;
    let launch = Launch::new()?.variable("DEBUGINFOD_CACHE_PATH", &cache);
    ensure_named(&hangs_up_as(&program, &[], launch)?, true)
}

/// The symbols of the program's own functions, compressed, as Fedora ships its programs; the dynamic symbols
/// are not among them.
#[test]
fn stripped_with_mini_debug_info() -> Result<()> {
    const XZ: &str = "/usr/bin/xz";
    if is_missing(&[GDB, GCC, OBJCOPY, XZ]) {
        return Ok(());
    }
    let folder = Scratch::new()?;
    // `serve()` is a dynamic symbol, too.
    let listed = folder.path().join("dynamic");
    fs::write(&listed, "{ serve; };")?;
    let list = format!("-Wl,--dynamic-list={}", listed.display());
    let program = compile(GCC, &["-O2", "-g", &list], "hang_up.c", &folder)?;
    let mini = folder.path().join("mini");
    let strip = ["--strip-debug", "--remove-section=.comment", "--strip-symbol=serve"];
    let keep = folder.path().join("debug");
    netns::run(Command::new(OBJCOPY).arg("--only-keep-debug").arg(&program).arg(&keep))?;
    netns::run(Command::new(OBJCOPY).args(strip).arg(&keep).arg(&mini))?;
    netns::run(Command::new(XZ).arg(&mini))?;
    netns::run(Command::new(STRIP).arg(&program))?;
    let section = format!("--add-section=.gnu_debugdata={}.xz", mini.display());
    netns::run(Command::new(OBJCOPY).arg(section).arg(&program))?;
    ensure_named(&hangs_up_as(&program, &[], Launch::new()?)?, false)
}

/// A function that was compiled at run time, in a process that has ended when its stack is named.
#[test]
fn perf_map_of_a_process_that_has_ended() -> Result<()> {
    if is_missing(&[GCC]) {
        return Ok(());
    }
    let folder = Scratch::new()?;
    let program = compile(GCC, &["-O2", "-g"], "jit.c", &folder)?;
    for when in ["early", "late"] {
        let namespace = Namespace::new()?;
        let tool = Launch::new()?.trace([&namespace]).start()?;
        let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", PORT))?))?;
        let mut command = Command::new(&program);
        command.args([&PORT.to_string(), when]);
        let mut process = Program::start(&namespace, command)?;
        ensure!(process.line()? == "connected");
        let _accepted = listener.accept()?;
        let map = PathBuf::from(format!("/tmp/perf-{}.map", process.pid()));
        // It keeps these files open: the latter once it has unwound the stack of connect().
        let kept = if when == "early" { map.clone() } else { format!("/proc/{}/mem", process.pid()).into() };
        let descriptors = format!("/proc/{}/fd", tool.pid());
        until("the tool has read what is mapped", || {
            let mut links = fs::read_dir(&descriptors)?.flatten().map(|link| fs::read_link(link.path()));
            Ok(links.any(|file| file.is_ok_and(|file| file == kept)).then_some(()))
        })?;
        process.tell("go")?;
        process.ended()?;
        if when == "early" {
            // Names that were read while the process ran are kept.
            fs::remove_file(&map)?;
        }
        let line = told(&tool, &json!({"connection": {"role": "client"}, "process": {"pid": process.pid()}}));
        if when == "late" {
            fs::remove_file(&map)?;
        }
        let line = line?;
        let frames = line["stack"]["user"].as_array().context("no stack")?;
        let names: Vec<_> = frames.iter().map(|frame| frame["symbol"].as_str().unwrap_or("?")).collect();
        // Its caller cannot be verified: that takes reading, from the memory of the process, whether the
        // address follows a call.
        ensure!(names.get(1) == Some(&"hangUp /app/server.js:12"), "{when}: {names:?}");
    }
    Ok(())
}

/// node lists its functions for perf, and has ended when the stack is named.
#[test]
fn node_that_has_ended() -> Result<()> {
    const NODE: &str = "/usr/bin/node";
    if is_missing(&[NODE]) {
        return Ok(());
    }
    let (folder, namespace) = (Scratch::new()?, Namespace::new()?);
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", PORT))?))?;
    let mut command = Command::new(NODE);
    let script = format!(
        "function hangUp(socket) {{ socket._handle.close(); process.exit(0); }}\n\
         const socket = require('net').connect({PORT}, '127.0.0.1', () => hangUp(socket));"
    );
    // It writes a log where it runs.
    command.current_dir(folder.path());
    command.args(["--perf-basic-prof", "--interpreted-frames-native-stack", "-e", &script]);
    let mut node = Program::start(&namespace, command)?;
    let _accepted = listener.accept()?;
    let status = node.ended()?;
    let line = told(&tool, &json!({"connection": {"role": "client"}, "process": {"pid": node.pid()}}));
    let _ = fs::remove_file(format!("/tmp/perf-{}.map", node.pid()));
    let line = line?;
    let frames = line["stack"]["user"].as_array().context("no stack")?;
    let names: Vec<_> = frames.iter().map(|frame| frame["symbol"].as_str().unwrap_or("?")).collect();
    ensure!(status.success() && names.iter().any(|name| name.contains("hangUp")), "{names:#?}");
    Ok(())
}
