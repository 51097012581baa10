//! A program that closes from many call paths that differ only further out in the stack, in random order: each stack must
//! be that of the path that was taken, whether it was copied or recognized.

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
    PATIENCE, expect::shortened, netns::Namespace, program::Program, scratch::Scratch, servers::is_missing,
    until,
};

use super::{PORT, compile};

const CLOSES: usize = 100_000;

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
    functions.extend(["one", "main"]);
    functions
}

#[test]
fn each_stack_is_that_of_its_path() -> Result<()> {
    const GCC: &str = "/usr/bin/gcc";
    if is_missing(&[GCC]) {
        return Ok(());
    }
    let (namespace, folder) = (Namespace::new()?, Scratch::new()?);
    let options = ["-O2", "-g", "-fomit-frame-pointer", "-fno-ipa-icf", "-fno-optimize-sibling-calls"];
    let program = compile(GCC, &options, "paths.c", &folder)?;
    // Too many lines to keep all of them, as the other tests do.
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
    while closes < CLOSES {
        if closes == ordered {
            // As many as there is room for copies at once, until all paths have been taken; then as many as there is room for records.
            let next =
                if paths.len() < 243 && closes < CLOSES / 20 { 100 } else { 2_000.min(CLOSES - closes) };
            program.tell(&next.to_string())?;
            ordered += next;
        }
        let line =
            lines.recv_timeout(PATIENCE).with_context(|| format!("after {closes} of {ordered} closes"))?;
        let line: Value = serde_json::from_str(&line)?;
        if line["event"] == "lost" {
            // What other processes of the host do may be lost meanwhile.
            ensure!(line["where"] != "stacks", "{line}");
            continue;
        }
        closes += 1;
        if line["process"]["pid"] != program.pid() {
            // Another tcpclose on this host, which looks through all descriptors, had the file open while it was closed,
            // and closed it in the end.
            by_others += 1;
            continue;
        }
        let port = line["connection"]["local"]["port"].as_u64().context("no port")?;
        let frames = line["stack"]["user"].as_array().with_context(|| format!("no stack: {line}"))?;
        let names: Vec<_> = frames
            .iter()
            .filter(|frame| frame["inlined"] == false)
            .filter_map(|frame| frame["symbol"].as_str())
            .collect();
        let of_program = names.get(1..=expected(port).len());
        ensure!(of_program == Some(&expected(port)), "{port}: {names:?}\n{}", shortened(&line));
        ensure!(frames.last().is_some_and(|frame| frame["truncated"].is_null()), "{}", shortened(&line));
        paths.insert(expected(port));
    }
    ensure!(by_others < CLOSES / 1_000, "{by_others} closed by other processes");
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
    ensure!(copied + recognized >= 2 * CLOSES, "{said}");
    ensure!(copied >= paths.len() && copied < CLOSES / 20, "{said}");
    Ok(())
}
