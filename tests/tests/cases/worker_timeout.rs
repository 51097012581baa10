//! gunicorn aborts a worker that takes too long. The worker handles the signal, so that it does not die of
//! it.

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tcpclose_tests::{
    PATIENCE,
    netns::Namespace,
    program::Program,
    scratch::Scratch,
    servers::{BACKEND_PORT, GUNICORN, NGINX, NGINX_PORT, file, start_nginx, wait_for_listener},
    tool::Launch,
};

use super::{at, idle_for, process, wait_for_line};

pub(crate) const NEEDS: &[&str] = &[GUNICORN, NGINX];

const LIMIT: Duration = Duration::from_secs(1);

pub(crate) fn gunicorn_aborts_a_slow_worker() -> Result<()> {
    let namespace = Namespace::new()?;
    let folder = Scratch::new()?;
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let servers = file("");
    let mut command = Command::new(GUNICORN);
    command.args(["--bind", &format!("127.0.0.1:{BACKEND_PORT}"), "--timeout", &LIMIT.as_secs().to_string()]);
    command.arg("--chdir").arg(servers).args(["--log-file", "-", "slow_app:app"]);
    command.env("PYTHONDONTWRITEBYTECODE", "1").stderr(Stdio::null());
    let gunicorn = Program::start(&namespace, command)?;
    wait_for_listener(&namespace, BACKEND_PORT)?;
    let nginx = start_nginx(&namespace, folder.path())?;
    let mut client = namespace.inside(|| Ok(TcpStream::connect(("127.0.0.1", NGINX_PORT))?))?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    client.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
    ensure!(nginx.line()? == "502 GET / HTTP/1.0");
    let line = wait_for_line(
        &tool,
        &json!({"event": "close", "connection": at("local", BACKEND_PORT)}),
        &json!({
            "connection": {"role": "server", "bytes_sent": 0},
            "closed_by": "local",
            "ended": "fin",
            "trigger": "close",
            "signal": null,
            "last_data": "received",
            "idle_ms": idle_for(LIMIT)?,
            "cause": null,
        }),
    )?;
    // The worker, not the master that listens.
    let worker = line["process"]["pid"].as_u64().context("no owner")?;
    ensure!(worker != u64::from(gunicorn.pid()), "{line}");
    wait_for_line(
        &tool,
        &json!({"event": "close", "connection": at("remote", BACKEND_PORT)}),
        &json!({
            "process": process(&nginx, "nginx"),
            "closed_by": "peer",
            "ended": "fin",
            "last_data": "sent",
            "since_sent_ms": idle_for(LIMIT)?,
        }),
    )?;
    tool.stop()?;
    Ok(())
}
