//! Prometheus, a stripped Go program, as a client and as a server: its goroutines tell why they closed a
//! connection.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    process::{Command, Stdio},
};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    PATIENCE,
    expect::calls,
    netns::Namespace,
    program::Program,
    scratch::Scratch,
    servers::{BACKEND_PORT, wait_for_listener},
    tool::{Launch, Tool},
};

use super::{at, process, requested, wait_for_line};

pub(crate) const NEEDS: &[&str] = &[PROMETHEUS];

const PROMETHEUS: &str = "/usr/bin/prometheus";

/// Where Prometheus listens.
const PORT: u16 = 9090;

/// The request of Prometheus for metrics.
fn asked(listener: &TcpListener) -> Result<TcpStream> {
    let (stream, request) = requested(listener)?;
    ensure!(request.starts_with(b"GET /metrics "), "{}", request.escape_ascii());
    Ok(stream)
}

/// The line of the end at which Prometheus had this connection.
fn line_of(tool: &Tool, end: &Value, rest: &Value) -> Result<Value> {
    let line = wait_for_line(tool, &json!({"event": "close", "connection": end}), rest)?;
    // Nothing is missing below the function with which every goroutine begins.
    let last = line["stack"]["user"].as_array().and_then(|frames| frames.last()).cloned();
    let expected = json!({"symbol": "runtime.goexit", "truncated": null});
    let ends = last.is_some_and(|last| ["symbol", "truncated"].iter().all(|key| last[key] == expected[key]));
    ensure!(ends, "{line:#}");
    Ok(line)
}

pub(crate) fn goroutines_of_a_stripped_program() -> Result<()> {
    let namespace = Namespace::new()?;
    let folder = Scratch::new()?;
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", BACKEND_PORT))?))?;
    let configuration = folder.path().join("prometheus.yml");
    fs::write(
        &configuration,
        format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s}}\nscrape_configs:\n  - job_name: one\n    \
             static_configs: [{{targets: ['127.0.0.1:{BACKEND_PORT}']}}]\n"
        ),
    )?;
    let mut command = Command::new(PROMETHEUS);
    command.arg(format!("--config.file={}", configuration.display()));
    command.arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()));
    command.arg(format!("--web.listen-address=127.0.0.1:{PORT}")).arg("--web.read-timeout=1s");
    command.arg("--log.level=error").stderr(Stdio::null());
    let prometheus = Program::start(&namespace, command)?;

    // A server that closes after its answer.
    let mut stream = asked(&listener)?;
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n")?;
    let port = stream.peer_addr()?.port();
    drop(stream);
    let line = line_of(
        &tool,
        &at("local", port),
        &json!({
            "process": process(&prometheus, "prometheus"),
            "closed_by": "peer",
            "ended": "fin",
            "stack": {"user": calls("net/http.(*persistConn).readLoopPeekFailLocked")},
            "opener": {"stack": {"user": calls("net/http.(*Transport).dialConnFor")}},
        }),
    )?;
    let frames = line["stack"]["user"].as_array().cloned().unwrap_or_default();
    let has_line = |frame: &Value| {
        let file = frame["file"].as_str().unwrap_or_default();
        frame["symbol"] == "net/http.(*persistConn).readLoop"
            && file.ends_with("net/http/transport.go")
            && frame["line"].is_u64()
    };
    ensure!(frames.iter().any(has_line), "no file and line: {frames:#?}");

    // A server that does not answer: Prometheus gives up.
    let stream = asked(&listener)?;
    line_of(
        &tool,
        &at("local", stream.peer_addr()?.port()),
        &json!({
            "process": process(&prometheus, "prometheus"),
            "closed_by": "local",
            "last_data": "sent",
            "stack": {"user": calls("net/http.(*persistConn).readLoop")},
        }),
    )?;

    // A client that stays silent: the server of Prometheus closes.
    wait_for_listener(&namespace, PORT)?;
    let mut client = namespace.inside(|| Ok(TcpStream::connect(("127.0.0.1", PORT))?))?;
    client.set_read_timeout(Some(PATIENCE))?;
    ensure!(client.read(&mut [0])? == 0, "an answer to nothing");
    line_of(
        &tool,
        &at("local", PORT),
        &json!({
            "process": process(&prometheus, "prometheus"),
            "closed_by": "local",
            "stack": {"user": calls("net/http.(*conn).serve")},
        }),
    )?;
    tool.stop()?;
    Ok(())
}
