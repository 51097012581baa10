//! Node closes a connection that nginx has kept for later requests. The stack shows the timer that did it.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    PATIENCE,
    netns::Namespace,
    program::Program,
    scratch::Scratch,
    servers::{BACKEND_PORT, NGINX, NGINX_PORT, NODE, file, start_nginx},
    tool::{Launch, Tool},
};

use super::{at, idle_for, process, wait_for_line};

pub(crate) const NEEDS: &[&str] = &[NGINX, NODE];

/// Node's `keepAliveTimeout`. Some of its versions wait a second longer.
const SILENCE: Duration = Duration::from_secs(1);

/// The function that Node calls when the time of a connection is over.
const TIMER: &str = "socketOnTimeout";

pub(crate) fn node_closes_what_nginx_keeps() -> Result<()> {
    let namespace = Namespace::new()?;
    let folder = Scratch::new()?;
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let mut command = Command::new(NODE);
    // They give names to JavaScript functions. Node also writes a log where it runs.
    command.args(["--perf-basic-prof", "--interpreted-frames-native-stack"]).current_dir(folder.path());
    command.arg(file("keep_alive.js")).args([BACKEND_PORT.to_string(), SILENCE.as_millis().to_string()]);
    let node = Program::start(&namespace, command)?;
    let result = node_closes(&tool, &namespace, &folder, &node);
    // It names the functions while the test runs.
    let _ = fs::remove_file(format!("/tmp/perf-{}.map", node.pid()));
    result?;
    tool.stop()?;
    Ok(())
}

fn node_closes(tool: &Tool, namespace: &Namespace, folder: &Scratch, node: &Program) -> Result<()> {
    ensure!(node.line()? == "ready");
    let nginx = start_nginx(namespace, folder.path())?;
    let mut client = namespace.inside(|| Ok(TcpStream::connect(("127.0.0.1", NGINX_PORT))?))?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    client.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let line = wait_for_line(
        tool,
        &json!({"event": "close", "connection": at("local", BACKEND_PORT)}),
        &json!({
            "connection": {"role": "server"},
            "process": process(node, "node"),
            "closed_by": "local",
            "ended": "fin",
            "trigger": "close",
            "last_data": "sent",
            "idle_ms": idle_for(SILENCE)?,
            "cause": null,
        }),
    )?;
    let frames = line["stack"]["user"].as_array().context("no stack")?;
    let symbol = |frame: &Value| frame["symbol"].as_str().unwrap_or("?").to_owned();
    let symbols: Vec<String> = frames.iter().map(symbol).collect();
    ensure!(symbols.iter().any(|symbol| symbol.contains(TIMER)), "{symbols:#?}");
    wait_for_line(
        tool,
        &json!({"event": "close", "connection": at("remote", BACKEND_PORT)}),
        &json!({
            "process": process(&nginx, "nginx"),
            "closed_by": "peer",
            "ended": "fin",
            "last_data": "received",
            "idle_ms": idle_for(SILENCE)?,
        }),
    )?;
    Ok(())
}
