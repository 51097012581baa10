//! HAProxy ends its health checks with a RST, on purpose.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::TcpListener,
    process::{Command, Stdio},
};

use anyhow::{Result, ensure};
use serde_json::json;
use tcpclose_tests::{
    expect::calls,
    netns::Namespace,
    program::Program,
    scratch::Scratch,
    servers::{BACKEND_PORT, HAPROXY},
    tool::Launch,
};

use super::{at, process, requested, wait_for_line};

pub(crate) const NEEDS: &[&str] = &[HAPROXY];

/// A check of `/health` each second, and a port to which nobody connects.
fn configuration() -> String {
    format!(
        "defaults\n mode http\n timeout connect 5s\n timeout client 5s\n timeout server 5s\n\
         listen site\n bind 127.0.0.1:8080\n option httpchk GET /health\n \
         server one 127.0.0.1:{BACKEND_PORT} check inter 1s\n"
    )
}

/// The server keeps the connection open, as servers do that keep connections alive.
pub(crate) fn haproxy_resets_its_health_checks() -> Result<()> {
    let namespace = Namespace::new()?;
    let folder = Scratch::new()?;
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", BACKEND_PORT))?))?;
    let file = folder.path().join("haproxy.cfg");
    fs::write(&file, configuration())?;
    let mut command = Command::new(HAPROXY);
    command.arg("-db").arg("-f").arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
    let haproxy = Program::start(&namespace, command)?;
    let (mut check, request) = requested(&listener)?;
    ensure!(request.starts_with(b"GET /health HTTP/"), "{}", request.escape_ascii());
    check.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
    let error = check.read(&mut [0]).expect_err("a RST instead of a FIN");
    ensure!(error.kind() == ErrorKind::ConnectionReset, "{error}");
    wait_for_line(
        &tool,
        &json!({"event": "close", "connection": at("remote", BACKEND_PORT)}),
        &json!({
            "connection": {"role": "client", "bytes_sent": request.len()},
            "process": process(&haproxy, "haproxy"),
            "closed_by": "local",
            "ended": "reset_sent",
            "trigger": "close",
            "cause": "linger_zero",
            "stack": {"user": calls("process_chk_conn")},
        }),
    )?;
    wait_for_line(
        &tool,
        &json!({"event": "close", "connection": at("local", BACKEND_PORT)}),
        &json!({"closed_by": "peer", "ended": "reset_received", "cause": "peer_reset"}),
    )?;
    tool.stop()?;
    Ok(())
}
