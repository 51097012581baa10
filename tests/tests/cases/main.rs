//! Programs that people run, going wrong in ways that bring people to this tool. Each case ends in a line that
//! names the program, the descriptor or the code that is to blame; `docs/cases.md` says what to make of it.
//! What is true comes from the programs: from their logs, their answers and their descriptors.

mod idle_client;
mod pool;
mod proxy;
mod worker;

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    expect::{at_least, differences, shortened},
    netns::Namespace,
    program::Program,
    sockets::{self, LISTEN, Socket},
    tool::Tool,
};

macro_rules! cases {
    ($($file:ident::$case:ident)*) => {$(
        #[test]
        fn $case() -> Result<()> {
            if $file::NEEDS.iter().any(|file| is_missing(file)) {
                return Ok(());
            }
            $file::$case()
        }
    )*};
}

cases! {
    proxy::backend_closes_what_nginx_is_about_to_use
    proxy::client_gives_up
    idle_client::redis_closes_what_its_client_has_forgotten
    worker::leaking_worker_was_told_of_the_end
    worker::blocked_worker_has_not_read
    pool::pool_runs_dry_and_the_method_is_named
}

/// Debian's. One that comes first in the path may be a script that looks for yet another.
const PYTHON: &str = "/usr/bin/python3";

/// Whether a test has to do without a program, as in a virtual machine, which is then told to whoever runs it: `cargo
/// xtask test` reads this, and is content if the test ran elsewhere.
fn is_missing(file: &str) -> bool {
    let missing = !Path::new(file).exists();
    if missing {
        println!("skipped: {file} is not here");
    }
    missing
}

/// The kernel notes when data last went in ticks, the longest of which last so long.
const TICK: Duration = Duration::from_millis(10);

/// A script, a source or a configuration of these cases.
fn part(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name)
}

/// One of these scripts.
fn python(script: &str) -> Command {
    let mut command = Command::new(PYTHON);
    command.arg(part(script));
    command
}

/// Starts one of these scripts and waits until it is ready.
fn start_script(namespace: &Namespace, mut command: Command, args: &[&str]) -> Result<Program> {
    command.args(args);
    let script = Program::start(namespace, command)?;
    ensure!(script.line()? == "ready");
    Ok(script)
}

/// Waits until somebody listens on a port.
fn wait_for_listener(namespace: &Namespace, port: u16) -> Result<()> {
    let listens = |socket: &Socket| socket.state == LISTEN && socket.local.port() == port;
    sockets::wait_until(namespace, "somebody listens", |sockets| sockets.iter().any(listens))
}

/// The one socket that a namespace has in a state towards a port.
fn only_socket(namespace: &Namespace, remote_port: u16, state: u8) -> Result<Socket> {
    let of_interest = |socket: &Socket| socket.remote.port() == remote_port && socket.state == state;
    let found: Vec<Socket> = sockets::list(namespace)?.into_iter().filter(of_interest).collect();
    let [socket] = found.as_slice() else { anyhow::bail!("not one socket, but {found:?}") };
    Ok(*socket)
}

/// Waits for the line that looks like `which`, and checks that it says the rest of what is true as well.
fn told(tool: &Tool, which: &Value, rest: &Value) -> Result<Value> {
    let line = tool.wait_for(&which.to_string(), |line| differences(line, which).is_empty())?;
    let differences = differences(&line, rest);
    ensure!(differences.is_empty(), "{}\n  {}", shortened(&line), differences.join("\n  "));
    Ok(line)
}

/// A connection's end, by its port or that of the other end.
fn at(local_or_remote: &str, port: u16) -> Value {
    json!({ local_or_remote: {"port": port} })
}

/// The expected idle time of a connection that a program ended after `timeout` without data.
fn idle_for(timeout: Duration) -> Result<Value> {
    let least = timeout.checked_sub(TICK).context("shorter than a tick")?;
    Ok(at_least(least.as_secs_f64() * 1000.0))
}

/// The expected process.
fn process(program: &Program, comm: &str) -> Value {
    json!({"pid": program.pid(), "comm": comm})
}
