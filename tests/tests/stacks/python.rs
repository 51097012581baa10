//! Functions of Python programs, with files and lines: what is reported is compared with the frames that the
//! interpreter itself shows the program at that moment.

use std::{
    collections::BTreeSet,
    env,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tcpclose_tests::{
    expect::shortened,
    netns::Namespace,
    program::Program,
    servers::{PYTHON, is_missing},
    tool::{Launch, Tool},
};

use super::{PORT, part, path};

/// Steps of a path: see `frames.py`.
const STEPS: &[u8] = b"lrsgfpx";

/// The number of closes of each interpreter's program.
const CLOSES: usize = 100;

/// The number of closes that may precede the examination of the process.
const FIRST: usize = 10;

/// A function, its file and its line.
type PythonPlace = (String, String, u64);

/// Interpreters: Debian's, and those that pyenv has built.
fn interpreters() -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from(PYTHON)];
    let root = env::var_os("PYENV_ROOT").map(PathBuf::from);
    let root = root.or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".pyenv")));
    for version in root.and_then(|root| root.join("versions").read_dir().ok()).into_iter().flatten().flatten()
    {
        let is_known =
            |minor: &u32| version.file_name().to_string_lossy().starts_with(&format!("3.{minor}."));
        found
            .extend((9..=14).find(is_known).map(|minor| version.path().join(format!("bin/python3.{minor}"))));
    }
    found
}

#[test]
fn python_functions_are_those_that_the_interpreter_shows() -> Result<()> {
    if is_missing(&[PYTHON]) {
        return Ok(());
    }
    let namespace = Namespace::new()?;
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", PORT))?))?;
    let mut seen = 0;
    for interpreter in interpreters() {
        // Names are read from its memory, so it has to run until all lines are there.
        let mut program = start(&namespace, &interpreter)?;
        let closes = closes(&mut program, &tool, &listener, &mut seen)
            .with_context(|| format!("{} does not close", interpreter.display()))?;
        seen += closes.len();
        ensure!(tool.wait_until(|lines| of_clients(lines).count() >= seen), "closes were not reported");
        let said = tool.said_so_far();
        let mut lines: Vec<_> = of_clients(&said.lines).skip(seen - closes.len()).collect();
        lines.sort_by_key(|line| line["time"].as_str());
        let mut missing = 0;
        for (close, line) in closes.iter().zip(lines) {
            missing += close.compare(line).with_context(|| format!("{} differs", interpreter.display()))?;
        }
        let paths: BTreeSet<_> = closes.iter().map(|close| &close.path).collect();
        println!("{}: {} paths, {missing} functions without names", interpreter.display(), paths.len());
    }
    Ok(())
}

/// The first stack of a process comes before the process can be examined. If a program of the same name has
/// run before, it has the functions of the program all the same.
#[test]
fn first_stack_of_the_next_python_program() -> Result<()> {
    if is_missing(&[PYTHON]) {
        return Ok(());
    }
    let namespace = Namespace::new()?;
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", PORT))?))?;
    closes(&mut start(&namespace, Path::new(PYTHON))?, &tool, &listener, &mut 0)?;
    let mut next = start(&namespace, Path::new(PYTHON))?;
    ensure!(next.line()? == "ready");
    let PythonClose { port, .. } = close(&listener, &mut next, "")?;
    let pid = next.pid();
    let is_it = |line: &&Value| line["connection"]["local"]["port"] == port && line["process"]["pid"] == pid;
    ensure!(tool.wait_until(|lines| of_clients(lines).any(|line| is_it(&line))), "no line");
    let said = tool.said_so_far();
    let line = of_clients(&said.lines).find(is_it).context("no line")?;
    let reported = functions(&line["opener"]["stack"])?;
    ensure!(reported.iter().any(|(name, ..)| name == "<module>"), "{reported:#?}\n{}", shortened(line));
    Ok(())
}

fn start(namespace: &Namespace, interpreter: &Path) -> Result<Program> {
    let mut command = Command::new(interpreter);
    command.arg(part("frames.py")).arg(PORT.to_string());
    Program::start(namespace, command)
}

/// A connection that a program closed.
struct PythonClose {
    /// The steps of the path.
    path: String,
    port: Value,
    /// The frames that the interpreter shows, innermost first.
    shown: Vec<PythonPlace>,
}

impl PythonClose {
    /// Compares the frames with the line about it. Returns how many have no name because their code objects
    /// no longer existed.
    fn compare(&self, line: &Value) -> Result<usize> {
        let Self { path, port, shown } = self;
        let reported = functions(&line["stack"])?;
        let difference = || format!("path {path}: not {shown:#?}\n{reported:#?}\n{}", shortened(line));
        ensure!(line["connection"]["local"]["port"] == *port, "another connection: {}", difference());
        // A code object that was made for this call may not exist any more. Then the call of the loop that
        // ran it is shown instead.
        let is_made = |(_, file, _): &&PythonPlace| file.starts_with("<made");
        let named: Vec<_> = reported.iter().filter(|(name, ..)| !name.is_empty()).collect();
        let mut found = named.iter();
        let mut next = found.next();
        for place in shown {
            if next == Some(&place) {
                next = found.next();
            } else {
                ensure!(is_made(&place), "{place:?}: {}", difference());
            }
        }
        ensure!(next.is_none(), "{next:?}: {}", difference());
        Ok(shown.len() - named.len())
    }
}

/// Makes a program close from many paths, in random order.
fn closes(
    program: &mut Program,
    tool: &Tool,
    listener: &TcpListener,
    seen: &mut usize,
) -> Result<Vec<PythonClose>> {
    ensure!(program.line()? == "ready");
    // The first close may come before the process has been examined.
    for _ in 0..FIRST {
        close(listener, program, "")?;
        *seen += 1;
        ensure!(tool.wait_until(|lines| of_clients(lines).count() >= *seen), "a close was not reported");
        let said = tool.said_so_far();
        let line = of_clients(&said.lines).last().context("no line")?;
        if !functions(&line["stack"])?.is_empty() {
            let mut random = 1_u64;
            return (0..CLOSES).map(|_| close(listener, program, &path(&mut random, STEPS))).collect();
        }
    }
    bail!("the first {FIRST} closes show no function of the program")
}

/// Makes the program close a connection.
fn close(listener: &TcpListener, program: &mut Program, path: &str) -> Result<PythonClose> {
    let said: Value = serde_json::from_str(&program.ask(path)?)?;
    let _accepted = listener.accept()?;
    let place = |frame: &Value| {
        Some((frame[0].as_str()?.to_owned(), frame[1].as_str()?.to_owned(), frame[2].as_u64()?))
    };
    let shown = said["frames"].as_array().context("no frames")?.iter().map(place);
    let shown = shown.collect::<Option<Vec<_>>>().with_context(|| format!("{said}"))?;
    Ok(PythonClose { path: path.to_owned(), port: said["port"].clone(), shown })
}

/// The ends of the programs' connections.
fn of_clients(lines: &[Value]) -> impl Iterator<Item = &Value> {
    lines.iter().filter(|line| line["event"] == "close" && line["connection"]["role"] == "client")
}

/// The functions of the program, without those of `socket.py`; one without a name is empty.
fn functions(stack: &Value) -> Result<Vec<PythonPlace>> {
    let frames = stack["user"].as_array().context("no stack")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    // Those of files that are mapped have modules.
    let of_program = frames.iter().filter(|frame| frame["module"].is_null());
    let place =
        |frame: &Value| (text(&frame["symbol"]), text(&frame["file"]), frame["line"].as_u64().unwrap_or(0));
    let is_own = |(_, file, _): &PythonPlace| !file.ends_with("/socket.py");
    Ok(of_program.map(place).filter(is_own).collect())
}
