//! A program that closes from many call paths that differ only further out in the stack (`src/bin/paths.rs`),
//! in random order: each stack must be that of the path that was taken, whether it was copied or recognized.

use std::{
    collections::BTreeSet,
    env,
    io::{BufRead as _, BufReader, Read as _},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tcpclose_tests::{
    PATIENCE, expect::shortened, features::Feature, netns::Namespace, program::Program, scratch::Scratch,
    until,
};

const PORT: u16 = 8080;

/// How often the program closes; in a virtual machine, whose processor may be emulated, less often.
const CLOSES: usize = 100_000;
const CLOSES_IN_MACHINES: usize = 6_000;

/// The number of closes after which all paths have been taken, which is also the bound of copies.
const FEW: usize = 5_000;

/// The levels of a path, and the functions of a level.
const LEVELS: u32 = 5;
const STEPS: [&str; 3] = ["first", "second", "third"];

/// The functions that the program has taken for a connection from this port, innermost first.
fn expected(port: u64) -> Vec<&'static str> {
    let mut path = port % 3_u64.pow(LEVELS);
    let mut functions = Vec::new();
    for _ in 0..LEVELS {
        functions.push(STEPS[usize::try_from(path % 3).unwrap_or(0)]);
        path /= 3;
    }
    functions.extend(["leaf"]);
    functions.reverse();
    functions.push("one");
    // `descend()` is between every two of them.
    functions = functions.into_iter().flat_map(|name| [name, "descend"]).collect();
    functions.pop();
    functions.push("main");
    functions
}

#[test]
fn each_stack_is_that_of_its_path() -> Result<()> {
    if !Feature::Types.is_here() {
        println!("skipped: stacks are not copied without the kernel's types");
        return Ok(());
    }
    let closes_wanted = if Feature::OwnMachine.is_here() { CLOSES_IN_MACHINES } else { CLOSES };
    let (namespace, folder) = (Namespace::new()?, Scratch::new()?);
    let program = env::var_os("CARGO_BIN_EXE_paths")
        .context("CARGO_BIN_EXE_paths is not set: run `cargo xtask test`")?;
    // There are too many lines to keep all of them, as other tests do.
    let ready = folder.path().join("ready");
    let tool = env::var_os("TCPCLOSE_BIN").context("TCPCLOSE_BIN does not name the tool's binary")?;
    let mut tool = Command::new(tool)
        .args(["-o", "json", "--event", "close", "--remote-port", &PORT.to_string()])
        .args(["--netns", &namespace.inode().to_string(), "--ready-file"])
        .arg(&ready)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    until("the tool is ready", || Ok(ready.exists().then_some(())))?;
    let stdout = BufReader::new(tool.stdout.take().context("no stdout")?);
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));

    let mut command = Command::new(program);
    command.arg(PORT.to_string());
    let mut program = Program::start(&namespace, command)?;
    let (mut paths, mut closes, mut ordered, mut by_others) = (BTreeSet::new(), 0, 0, 0);
    while closes < closes_wanted {
        if closes == ordered {
            // First as many as there is room for copies at once, until all paths have been taken; then as
            // many as there is room for records.
            let next =
                if paths.len() < 243 && closes < FEW { 100 } else { 2_000.min(closes_wanted - closes) };
            program.tell(&next.to_string())?;
            ordered += next;
        }
        let line =
            lines.recv_timeout(PATIENCE).with_context(|| format!("after {closes} of {ordered} closes"))?;
        // `serde_json::from_str()` would be compiled here, without optimization.
        let line: Value = line.parse()?;
        if line["event"] == "lost" {
            // Events of other processes of the host may be lost meanwhile.
            ensure!(line["where"] != "stacks", "{line}");
            continue;
        }
        closes += 1;
        if line["process"]["pid"] != program.pid() {
            // Another tcpclose on this host, which was searching all descriptors, held the file while it was
            // closed, and so released it last.
            by_others += 1;
            continue;
        }
        let port = line["connection"]["local"]["port"].as_u64().context("no port")?;
        let frames = line["stack"]["user"].as_array().with_context(|| format!("no stack: {line}"))?;
        let names: Vec<_> = frames
            .iter()
            .filter(|frame| frame["inlined"] == false)
            .filter_map(|frame| frame["symbol"].as_str())
            .map(|name| {
                name.strip_prefix("paths::").map_or(name, |own| own.split("::").next().unwrap_or(own))
            })
            .collect();
        let of_program = names.get(1..=expected(port).len());
        ensure!(of_program == Some(&expected(port)), "{port}: {names:?}\n{}", shortened(&line));
        ensure!(frames.last().is_some_and(|frame| frame["truncated"].is_null()), "{}", shortened(&line));
        paths.insert(expected(port));
    }
    ensure!(by_others < closes_wanted / 1_000 + 1, "{by_others} closed by other processes");
    ensure!(paths.len() >= 200, "only {} paths were taken", paths.len());

    kill(Pid::from_raw(tool.id().try_into()?), Signal::SIGTERM)?;
    let mut said = String::new();
    tool.stderr.take().context("no stderr")?.read_to_string(&mut said)?;
    tool.wait()?;
    // `tcpclose: user stacks: 300 copied and unwound, 199700 recognized`
    let counts =
        said.lines().find_map(|line| line.strip_prefix("tcpclose: user stacks: ")).context("no counts")?;
    let numbers: Vec<usize> = counts.split(' ').filter_map(|word| word.parse().ok()).collect();
    let [copied, recognized] = numbers[..] else { bail!("{said}") };
    println!("{copied} copied, {recognized} recognized");
    // Each connection has two: where it was opened and where it was closed.
    ensure!(copied + recognized >= 2 * closes_wanted, "{said}");
    ensure!(copied >= paths.len() && copied < FEW, "{said}");
    Ok(())
}
