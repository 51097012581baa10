//! A JVM that takes connections from a pool and does not return them after an error.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    expect::{at_least, differences, shortened},
    netns::{self, Namespace},
    program::Program,
    scratch::Scratch,
    servers::{PYTHON, start_script},
    sockets::{self, CLOSE_WAIT, Socket},
    tool::Launch,
    until,
};

use super::{at, part, process, wait_for_line};

pub(crate) const NEEDS: &[&str] = &[PYTHON, COMPILER, JVM, HTTP_CLIENT];

const COMPILER: &str = "/usr/bin/javac";
const JVM: &str = "/usr/bin/java";

/// The jar refers to the others that it needs.
const HTTP_CLIENT: &str = "/usr/share/java/httpclient.jar";

const PORT: u16 = 8000;
const LIMIT: usize = 5;

const SOURCE: &str = "Prices.java";

/// The method with the mistake: the response that it receives is not always closed.
const GUILTY: &str = "java.lang.String Prices.price(java.lang.String)";
const GUILTY_LINE: &str = "http.execute(";

/// Starts a JVM as usual, without options for tracing.
fn start_jvm(namespace: &Namespace, folder: &Path) -> Result<Program> {
    netns::run(Command::new(COMPILER).args(["-cp", HTTP_CLIENT, "-d"]).arg(folder).arg(part(SOURCE)))?;
    let mut command = Command::new(JVM);
    command.arg("-cp").arg(format!("{HTTP_CLIENT}:{}", folder.display()));
    command.args(["Prices", &LIMIT.to_string()]);
    Program::start(namespace, command)
}

/// The number of the line with the mistake.
fn guilty_line() -> Result<usize> {
    let source = fs::read_to_string(part(SOURCE))?;
    let index = source.lines().position(|line| line.contains(GUILTY_LINE));
    Ok(index.context("the source has no such line")? + 1)
}

pub(crate) fn pool_runs_dry_and_the_method_is_named() -> Result<()> {
    let namespace = Namespace::new()?;
    let folder = Scratch::new()?;
    let tool = Launch::new()?.trace([&namespace]).args(["--linger", "1s"]).start()?;
    let idle = Duration::from_mins(1).as_secs().to_string();
    let backend = start_script(&namespace, "http_server.py", &[&PORT.to_string(), &idle])?;
    let mut jvm = start_jvm(&namespace, folder.path())?;
    let answer = jvm.ask(&format!("1 http://127.0.0.1:{PORT}/"))?;
    ensure!(answer == "answered=1 failed=0 refused=0 leased=0", "the client answered: {answer}");

    let answer = jvm.ask(&format!("{} http://127.0.0.1:{PORT}/broken", LIMIT + 2))?;
    ensure!(
        answer == format!("answered=0 failed={LIMIT} refused=2 leased={LIMIT}"),
        "the client answered: {answer}"
    );
    let is_held = |socket: &Socket| socket.remote.port() == PORT && socket.state == CLOSE_WAIT;
    let held = until("the backend has closed all that the pool may have", || {
        let found: Vec<_> = sockets::list(&namespace)?.into_iter().filter(is_held).collect();
        Ok((found.len() == LIMIT).then_some(found))
    })?;

    for socket in held {
        let descriptors = sockets::descriptors(jvm.pid(), &socket)?;
        let descriptor = descriptors.first().context("the JVM does not have it")?;
        // Whether the FIN had arrived by the time of the last read decides whether that read consumed it.
        let kind = if socket.untaken == 0 { "leaked" } else { "unread" };
        let line = wait_for_line(
            &tool,
            &json!({"event": "lingering", "connection": {"local": {"port": socket.local.port()}}}),
            &json!({
                "connection": {"role": "client", "remote": {"port": PORT}},
                "process": process(&jvm, "java"),
                "state": "CLOSE_WAIT",
                "kind": kind,
                "unread_bytes": socket.untaken.saturating_sub(1),
                "for_ms": at_least(1000),
                "holders": [{"pid": jvm.pid(), "comm": "java", "fd": descriptor}],
                "opener": {"process": process(&jvm, "java")},
            }),
        )?;
        let frames = &line["opener"]["stack"]["user"];
        let guilty = json!({"symbol": GUILTY, "file": SOURCE, "line": guilty_line()?});
        let is_it = |frame: &Value| differences(frame, &guilty).is_empty();
        ensure!(frames.as_array().is_some_and(|frames| frames.iter().any(is_it)), "{}", shortened(frames));
    }
    // The backend has closed its end at once, as it should.
    wait_for_line(
        &tool,
        &json!({"event": "close", "connection": at("local", PORT)}),
        &json!({"process": process(&backend, "python3"), "closed_by": "local", "ended": "fin"}),
    )?;
    tool.stop()?;
    Ok(())
}
