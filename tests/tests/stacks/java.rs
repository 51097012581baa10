//! Methods of a JVM, with files and lines: what is reported is compared with the frames that the JVM itself
//! shows the program at that moment, and with gdb's backtrace.

use std::{
    collections::{BTreeSet, HashMap},
    net::TcpListener,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    expect::shortened,
    netns::{self, Namespace},
    program::Program,
    scratch::Scratch,
    servers::is_missing,
    tool::Launch,
};

use super::{
    PORT, descriptor,
    gdb::{GDB, Gdb},
    part, path, told,
};

const COMPILER: &str = "/usr/bin/javac";
const JVM: &str = "/usr/bin/java";

/// Steps of a path: see `Frames.java`.
const STEPS: &[u8] = b"lrsfgmt";

/// How often the program closes before its lines are waited for: the ring has room for whole copies of so
/// many stacks.
const CLOSES: usize = 20;

/// So many rounds of these while methods are interpreted, and as many while they are compiled.
const ROUNDS: usize = 5;

/// The method that closes. What it calls is the JDK's.
const CLOSER: &str = "Frames.hangUp";

/// A method and its line, which is not known of native methods and of those that the JVM makes.
type JavaPlace = (String, Option<u64>);

/// Makes the JVM's own listing as complete as the stack: it leaves out the classes of lambda expressions.
const SHOW_HIDDEN: [&str; 2] = ["-XX:+UnlockDiagnosticVMOptions", "-XX:+ShowHiddenFrames"];

/// Runs the program with these options of the JVM.
fn start(namespace: &Namespace, folder: &Scratch, options: &[&str]) -> Result<Program> {
    netns::run(Command::new(COMPILER).arg("-d").arg(folder.path()).arg(part("Frames.java")))?;
    let mut command = Command::new(JVM);
    command.args(options).arg("-cp").arg(folder.path()).args(["Frames", &PORT.to_string()]);
    let java = Program::start(namespace, command)?;
    ensure!(java.line()? == "ready");
    Ok(java)
}

/// Interpreted at first, then compiled, some with others inlined. The JVM shows the class of a lambda
/// expression with a slash before its address.
#[test]
fn java_methods_are_those_that_the_jvm_shows() -> Result<()> {
    if is_missing(&[COMPILER, JVM]) {
        return Ok(());
    }
    let (namespace, folder) = (Namespace::new()?, Scratch::new()?);
    let tool = Launch::new()?.trace([&namespace]).args(["--event", "close"]).start()?;
    let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", PORT))?))?;
    let mut java = start(&namespace, &folder, &SHOW_HIDDEN)?;
    let (mut random, mut inlined, mut paths) = (1, 0, BTreeSet::new());
    for round in 0..2 * ROUNDS {
        if round == ROUNDS {
            ensure!(java.ask("warm")? == "warm");
        }
        // A port of an earlier round may be used again.
        let earlier = tool.said_so_far().lines.len();
        let mut expected = HashMap::new();
        for _ in 0..CLOSES {
            let path = path(&mut random, STEPS);
            ensure!(java.ask("connect")? == "connected");
            let _accepted = listener.accept()?;
            let (port, shown) = places(&java.ask(&path)?)?;
            expected.insert(port, (path.clone(), shown));
            paths.insert(path);
        }
        let of_port = |line: &Value| expected.get(&line["connection"]["local"]["port"].as_u64()?);
        let is_close = |line: &&Value| line["connection"]["role"] == "client" && of_port(line).is_some();
        let are_there =
            tool.wait_until(|lines| lines.iter().skip(earlier).filter(is_close).count() == expected.len());
        ensure!(are_there, "round {round}: closes were not reported");
        for line in tool.said_so_far().lines.iter().skip(earlier).filter(is_close) {
            let (path, shown) = of_port(line).context("not a port of the program")?;
            let reported = methods(line)?;
            let difference = || format!("not {shown:#?}\n{reported:#?}\n{}", shortened(line));
            ensure!(reported == *shown, "round {round}, path {path}: {}", difference());
            ensure!(frames(line)?.iter().all(|frame| frame["truncated"].is_null()), "{}", shortened(line));
            inlined +=
                frames(line)?.iter().filter(|frame| frame["inlined"] == true && is_method(frame)).count();
        }
    }
    println!("{} paths, {inlined} inlined methods", paths.len());
    ensure!(inlined > 0, "no method was inlined");
    Ok(())
}

/// The port of a connection and the methods that the JVM shows, innermost first.
fn places(said: &str) -> Result<(u64, Vec<JavaPlace>)> {
    let mut words = said.split(' ');
    let port = words.next().and_then(|port| port.parse().ok()).with_context(|| said.to_owned())?;
    let place = |word: &str| {
        let (method, line) = word.rsplit_once(':')?;
        Some((method.replace('/', "+"), line.parse().ok()))
    };
    let places = words.map(place).collect::<Option<Vec<_>>>().with_context(|| said.to_owned())?;
    Ok((port, places))
}

fn frames(line: &Value) -> Result<&Vec<Value>> {
    line["stack"]["user"].as_array().with_context(|| format!("no stack: {line}"))
}

/// Whether this is a method: the JVM's own functions are in a file.
fn is_method(frame: &Value) -> bool {
    frame["module"].is_null() && method(frame).is_some()
}

/// `Frames.main` of `void Frames.main(java.lang.String[])`.
fn method(frame: &Value) -> Option<&str> {
    let (before, _) = frame["symbol"].as_str()?.split_once('(')?;
    // `StubRoutines (1)` is the code by which the JVM calls methods.
    before.split_once(' ').map(|(_, name)| name).filter(|name| !name.is_empty())
}

/// The methods, from the one that closes outwards.
fn methods(line: &Value) -> Result<Vec<JavaPlace>> {
    let frames = frames(line)?.iter().filter(|frame| frame["module"].is_null());
    let places = frames.filter_map(|frame| Some((method(frame)?.to_owned(), frame["line"].as_u64())));
    Ok(places.skip_while(|(method, _)| method != CLOSER).collect())
}

/// All frames, from libc's through the JDK's, the program's and the JVM's to the start of the thread.
/// Compiled code keeps frame pointers here, which gdb needs, and tcpclose does not.
#[test]
fn jvm_as_debian_ships_it() -> Result<()> {
    if is_missing(&[GDB, COMPILER, JVM]) {
        return Ok(());
    }
    for options in [&["-Xint"][..], &["-Xcomp", "-XX:+PreserveFramePointer"]] {
        let (namespace, folder) = (Namespace::new()?, Scratch::new()?);
        let tool = Launch::new()?.trace([&namespace]).start()?;
        let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", PORT))?))?;
        let mut java = start(&namespace, &folder, options)?;
        ensure!(java.ask("connect")? == "connected");
        let _accepted = listener.accept()?;
        let descriptor = descriptor(&namespace, java.pid(), |socket| socket.remote.port() == PORT)?;
        let gdb = Gdb::attach_to_compiler(&namespace, java.pid(), descriptor)?;
        java.tell(std::str::from_utf8(STEPS)?)?;
        let backtrace = gdb.backtrace()?;
        let line = told(&tool, &json!({"connection": {"role": "client"}, "process": {"pid": java.pid()}}))?;
        backtrace.ensure_addresses(&line["stack"]["user"]).with_context(|| format!("{options:?}"))?;
    }
    Ok(())
}
