//! Names that come from outside: nothing that they contain reaches a terminal, or breaks JSON or metrics.

use std::{
    ffi::OsStr,
    fs,
    io::{Read, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tcpclose_tests::{
    netns::{self, Namespace},
    scratch::Scratch,
    servers::{PYTHON, is_missing},
    tool::Launch,
    until,
};

/// The number of processes that connect; each has a name of its own.
const NAMES: usize = 1000;

/// A port where nothing listens.
const PORT: &str = "9";

const METRICS: u16 = 9435;

const GCC: &str = "/usr/bin/gcc";
const OBJCOPY: &str = "/usr/bin/objcopy";

/// The path of an interpreter whose directories have hostile names, 3 KiB long in all.
fn hostile_path(folder: &Scratch) -> Result<PathBuf> {
    let mut path = folder.path().to_owned();
    for _ in 0..15 {
        let name = [b"\x1b[2J\n\r\"\\\xff\xc2\x9b".as_slice(), &[b'a'; 190]].concat();
        path.push(OsStr::from_bytes(&name));
    }
    fs::create_dir_all(&path)?;
    let program = path.join(OsStr::from_bytes(b"py\x1b[31m\nthon\xff"));
    fs::copy(fs::canonicalize(PYTHON)?, &program)?;
    Ok(program)
}

fn script() -> String {
    format!("{}/servers/hostile.py", env!("CARGO_MANIFEST_DIR"))
}

/// The control characters of a text, except for the end of a line.
fn controls(text: &str) -> Vec<char> {
    text.chars().filter(|character| character.is_control() && *character != '\n').collect()
}

/// Two tools at once, which must not disturb each other: one writes text and serves metrics, the other writes
/// JSON.
#[test]
fn a_thousand_names_are_escaped() -> Result<()> {
    if is_missing(&[PYTHON]) {
        return Ok(());
    }
    let namespace = Namespace::new()?;
    let folder = Scratch::new()?;
    let program = hostile_path(&folder)?;
    let json = Launch::new()?.trace([&namespace]).start()?;
    let ready = folder.path().join("ready");
    let mut command = Command::new(std::env::var_os("TCPCLOSE_BIN").context("no TCPCLOSE_BIN")?);
    command.args(["--netns", &namespace.inode().to_string(), "--metrics", &METRICS.to_string()]);
    command.arg("--ready-file").arg(&ready).stdout(Stdio::piped()).stderr(Stdio::piped());
    namespace.enter(&mut command)?;
    let mut text = command.spawn()?;
    let mut stdout = text.stdout.take().context("no stdout")?;
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).map(|_| bytes)
    });
    until("the other tool is ready", || Ok(fs::metadata(&ready).ok().filter(|file| file.len() > 0)))?;

    let mut hostile = Command::new(&program);
    hostile.args([&script(), PORT, "1"]).env("PYTHONHOME", "/usr");
    namespace.enter(&mut hostile)?;
    let output = hostile.output()?;
    ensure!(output.stdout == b"done\n", "{output:?}");

    let refused = |line: &Value| line["event"] == "close" && line["cause"] == "refused";
    let are_there = json.wait_until(|lines| lines.iter().filter(|line| refused(line)).count() >= NAMES);
    let lines = json.stop()?.lines;
    ensure!(are_there, "{} of {NAMES} closes are there", lines.iter().filter(|line| refused(line)).count());
    for line in &lines {
        ensure!(line["process"].is_null() || line["process"]["comm"].is_string(), "{line}");
    }
    let names = lines.iter().filter_map(|line| line["process"]["comm"].as_str());
    ensure!(names.clone().any(|name| name.contains('\u{1b}')), "JSON keeps names as they are");

    let metrics = namespace.inside(|| {
        let mut stream = TcpStream::connect(("127.0.0.1", METRICS))?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })?;
    let samples: Vec<_> = metrics.lines().filter(|line| line.starts_with("tcpclose_closes_total{")).collect();
    ensure!(samples.len() > 100 && samples.len() < 200, "{} series", samples.len());
    for sample in samples {
        let count = sample.rsplit(' ').next().and_then(|count| count.parse::<u64>().ok());
        ensure!(sample.contains("\"} ") && count.is_some(), "{sample:?}");
    }

    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(text.id().try_into()?),
        nix::sys::signal::Signal::SIGINT,
    )?;
    let mut errors = String::new();
    text.stderr.take().context("no stderr")?.read_to_string(&mut errors)?;
    ensure!(text.wait()?.success(), "{errors}");
    let written = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    let written = String::from_utf8(written).context("the text is not UTF-8")?;
    ensure!(written.lines().filter(|line| line.contains("refused")).count() >= NAMES, "lines are missing");
    for (name, text) in [("stdout", &written), ("stderr", &errors)] {
        let found = controls(text);
        ensure!(found.is_empty(), "control characters in {name}: {found:?}");
    }
    Ok(())
}

/// A function of a program that tries to do something to a terminal, to the lines of `-o folded`, and to the
/// flame graph.
#[test]
fn a_symbol_is_escaped() -> Result<()> {
    const SYMBOL: &str = "\u{1b}[2J\n\r\u{9b};one 7<b>&\"";
    if is_missing(&[GCC, OBJCOPY]) {
        return Ok(());
    }
    let namespace = Namespace::new()?;
    let folder = Scratch::new()?;
    let place = |name: &str| folder.path().join(name);
    let (object, program) = (place("hang_up.o"), place("hang_up"));
    let source = format!("{}/tests/stacks/hang_up.c", env!("CARGO_MANIFEST_DIR"));
    netns::run(Command::new(GCC).args(["-O2", "-c", &source, "-o"]).arg(&object))?;
    netns::run(Command::new(OBJCOPY).arg(format!("--redefine-sym=hang_up={SYMBOL}")).arg(&object))?;
    netns::run(Command::new(GCC).arg(&object).arg("-o").arg(&program))?;
    let server = namespace.inside(|| Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?))?;
    let (output, picture, recording) = (place("lines"), place("picture.svg"), place("recording"));
    let tool = Launch::new()?
        .args(["--netns", &namespace.inode().to_string(), "-o", "text"])
        .args(["--flamegraph".as_ref(), picture.as_os_str(), "--record".as_ref(), recording.as_os_str()])
        .into_file(&output)?
        .start()?;
    let mut client = Command::new(&program);
    client.arg(server.local_addr()?.port().to_string()).stdin(Stdio::null()).stdout(Stdio::null());
    namespace.enter(&mut client)?;
    // A process that has exited before the tool could examine it has no names.
    until("the symbol is reported", || {
        ensure!(client.status()?.success(), "{client:?} failed");
        drop(server.accept()?);
        Ok(fs::read_to_string(&output)?.contains("one 7").then_some(()))
    })?;
    let ended = tool.stop()?;
    let text = fs::read_to_string(output)?;
    ensure!(text.contains(r#"\u{1b}[2J\n\r\u{9b};one 7<b>&""#), "{text}");
    let picture = fs::read_to_string(picture)?;
    ensure!(picture.contains(r"\u{1b}[2J\n\r\u{9b}:one 7&lt;b&gt;&amp;"), "the symbol is not in the picture");
    // A semicolon separates frames.
    let replay = Launch::new()?.args(["replay", "-o", "folded"]).args([recording]).output()?;
    let stacks = String::from_utf8(replay.stdout).context("folded stacks are not UTF-8")?;
    ensure!(stacks.contains(r#";\u{1b}[2J\n\r\u{9b}:one 7<b>&";"#), "{stacks}");
    for (name, text) in [("stdout", &text), ("stderr", &ended.stderr), ("folded stacks", &stacks)] {
        let found = controls(text);
        ensure!(found.is_empty(), "control characters in {name}: {found:?}");
    }
    Ok(())
}
