//! redis, configured to close the connections of idle clients, and a client that does not notice before its
//! next request.

use std::{
    fs,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Result, ensure};
use serde_json::json;
use tcpclose_tests::{
    expect::{at_least, calls, path},
    netns::Namespace,
    program::Program,
    scratch::Scratch,
    servers::{REDIS, start_redis},
    sockets::{self, CLOSE_WAIT},
    tool::Launch,
};

use super::{at, idle_for, only_socket, process, wait_for_line};

pub(crate) const NEEDS: &[&str] = &[REDIS, CLIENT];

const CLIENT: &str = "/usr/bin/redis-cli";

const PORT: u16 = 6379;

/// redis compares seconds of a cached clock, so it may close up to a second earlier.
const TIMEOUT: Duration = Duration::from_secs(2);
const SURELY_IDLE: Duration = Duration::from_secs(1);

pub(crate) fn redis_closes_what_its_client_has_forgotten() -> Result<()> {
    let namespace = Namespace::new()?;
    let folder = Scratch::new()?;
    let tool = Launch::new()?.trace([&namespace]).args(["--linger", "1s"]).start()?;
    let redis = start_redis(&namespace, folder.path(), PORT, TIMEOUT.as_secs())?;
    let mut command = Command::new(CLIENT);
    // redis warns about its environment on stderr.
    command.args(["-p", &PORT.to_string()]).stderr(Stdio::null());
    let mut client = Program::start(&namespace, command)?;
    ensure!(client.ask("PING")? == "PONG");
    sockets::wait_until(&namespace, "redis has closed", |sockets| {
        sockets.iter().any(|socket| socket.state == CLOSE_WAIT)
    })?;
    let log = fs::read_to_string(folder.path().join("log"))?;
    ensure!(log.contains("Closing idle client"), "the log of redis: {log}");

    wait_for_line(
        &tool,
        &json!({"event": "close", "connection": at("local", PORT)}),
        &json!({
            "connection": {"role": "server"},
            "process": process(&redis, "redis-server"),
            "closed_by": "local",
            "ended": "fin",
            "trigger": "close",
            "idle_ms": idle_for(SURELY_IDLE)?,
            "cause": null,
            // Debian builds redis without frame pointers, but with the symbols of these functions.
            "stack": {"user": calls("clientsCronHandleTimeout")},
        }),
    )?;

    let held = only_socket(&namespace, PORT, CLOSE_WAIT)?;
    let descriptors = sockets::descriptors(client.pid(), &held)?;
    ensure!(descriptors.len() == 1, "{descriptors:?}");
    wait_for_line(
        &tool,
        &json!({"event": "lingering", "connection": at("remote", PORT)}),
        &json!({
            "connection": {"role": "client", "local": {"port": held.local.port()}},
            "process": process(&client, "redis-cli"),
            "state": "CLOSE_WAIT",
            "kind": "unread",
            "unread_bytes": 0,
            "for_ms": at_least(1000),
            "holders": [{"pid": client.pid(), "comm": "redis-cli", "fd": descriptors[0]}],
            "opener": {"process": process(&client, "redis-cli")},
        }),
    )?;

    // The next request of the client fails, and it opens a new connection.
    client.tell("PING")?;
    wait_for_line(
        &tool,
        &json!({"event": "close", "connection": {"local": {"port": held.local.port()}}}),
        &json!({
            "process": process(&client, "redis-cli"),
            "closed_by": "peer",
            "ended": "reset_received",
            "idle_ms": idle_for(SURELY_IDLE)?,
            "close_wait_ms": at_least(1000),
            "states": path(&["ESTABLISHED", "CLOSE_WAIT", "CLOSE"]),
        }),
    )?;
    tool.stop()?;
    Ok(())
}
