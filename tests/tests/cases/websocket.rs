//! nginx closes a WebSocket over which its backend has sent nothing for `proxy_read_timeout`.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Result, ensure};
use serde_json::json;
use tcpclose_tests::{
    PATIENCE,
    netns::Namespace,
    scratch::Scratch,
    servers::{BACKEND_PORT, NGINX, NGINX_PORT, PYTHON, start_nginx, start_script},
    tool::Launch,
};

use super::{at, idle_for, process, wait_for_line};

pub(crate) const NEEDS: &[&str] = &[NGINX, PYTHON];

/// What is certain of `proxy_read_timeout`, a second in `nginx.conf`: nginx counts from when it began to
/// handle the backend's answer, and sends that to the client later, so that both ends see less on a busy
/// host.
const SILENCE: Duration = Duration::from_millis(500);

pub(crate) fn nginx_closes_a_silent_websocket() -> Result<()> {
    let namespace = Namespace::new()?;
    let folder = Scratch::new()?;
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let backend = start_script(&namespace, "http_server.py", &[&BACKEND_PORT.to_string(), "60"])?;
    let nginx = start_nginx(&namespace, folder.path())?;
    let mut client = namespace.inside(|| Ok(TcpStream::connect(("127.0.0.1", NGINX_PORT))?))?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.write_all(b"GET /chat HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\r\n")?;
    let mut answer = String::new();
    client.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 101 ") && answer.ends_with("\r\n\r\n"), "{answer}");
    ensure!(nginx.line()? == "101 GET /chat HTTP/1.1");
    let log = fs::read_to_string(folder.path().join("error.log"))?;
    let reason = "upstream timed out (110: Connection timed out) while proxying upgraded connection";
    ensure!(log.contains(reason), "the log of nginx: {log}");
    for end in [at("local", NGINX_PORT), at("remote", BACKEND_PORT)] {
        wait_for_line(
            &tool,
            &json!({"event": "close", "connection": end}),
            &json!({
                "process": process(&nginx, "nginx"),
                "closed_by": "local",
                "ended": "fin",
                "trigger": "close",
                "idle_ms": idle_for(SILENCE)?,
                "cause": null,
            }),
        )?;
    }
    wait_for_line(
        &tool,
        &json!({"event": "close", "connection": at("local", BACKEND_PORT)}),
        &json!({
            "process": process(&backend, "python3"),
            "closed_by": "peer",
            "since_received_ms": idle_for(SILENCE)?,
        }),
    )?;
    tool.stop()?;
    Ok(())
}
