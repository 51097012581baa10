//! Two servers for which the kernel shows the same state, `CLOSE_WAIT`: one has forgotten the socket, the
//! other has not read it yet.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    expect::at_least,
    netns::Namespace,
    peer::Peer,
    servers::{PYTHON, start_script},
    sockets::{self, CLOSE_WAIT, Socket},
    tool::Launch,
    until,
};

use super::{at, process, wait_for_line};

pub(crate) const NEEDS: &[&str] = &[PYTHON];

const PORT: u16 = 8000;

pub(crate) fn leaking_worker_has_read_the_end() -> Result<()> {
    lingers("leaks", &json!({"kind": "leaked", "unread_bytes": 0}), 0)
}

pub(crate) fn blocked_worker_has_not_read() -> Result<()> {
    // The FIN counts as a byte in the kernel's list.
    lingers("blocks", &json!({"kind": "unread", "unread_bytes": 100}), 101)
}

/// A client sends 100 bytes to a server of this kind and closes.
fn lingers(habit: &str, expected: &Value, untaken: u32) -> Result<()> {
    let namespace = Namespace::new()?;
    let tool = Launch::new()?.trace([&namespace]).args(["--linger", "1s"]).start()?;
    let worker = start_script(&namespace, "worker.py", &[&PORT.to_string(), habit])?;
    let mut client = Peer::start(&namespace, "client")?;
    for order in [&format!("connect 127.0.0.1 {PORT}"), "send 100", "close"] {
        client.ask(order)?;
    }
    let descriptor: i32 = worker.line()?.parse()?;
    let of_worker = |socket: &Socket| socket.local.port() == PORT && socket.state == CLOSE_WAIT;
    let socket = until("the worker has a socket that its client has closed", || {
        Ok(sockets::list(&namespace)?.into_iter().find(of_worker))
    })?;
    ensure!(socket.untaken == untaken, "{socket:?}");
    ensure!(sockets::descriptors(worker.pid(), &socket)? == [descriptor]);

    let which = json!({"event": "lingering", "connection": at("local", PORT)});
    wait_for_line(&tool, &which, expected)?;
    wait_for_line(
        &tool,
        &which,
        &json!({
            "connection": {"role": "server", "bytes_received": 100},
            "process": process(&worker, "python3"),
            "state": "CLOSE_WAIT",
            "for_ms": at_least(1000),
            "holders": [{"pid": worker.pid(), "comm": "python3", "fd": descriptor}],
        }),
    )?;
    tool.stop()?;
    Ok(())
}
