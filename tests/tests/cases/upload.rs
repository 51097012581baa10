//! A server that destroys a request instead of reading its body, so that the client is not told why.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    process::Command,
};

use anyhow::{Result, ensure};
use serde_json::json;
use tcpclose_tests::{
    PATIENCE,
    expect::at_least,
    netns::Namespace,
    program::Program,
    servers::{BACKEND_PORT, NODE, file},
    sockets,
    tool::Launch,
};

use super::{at, process, wait_for_line};

pub(crate) const NEEDS: &[&str] = &[NODE];

/// Much more than Node reads before it has called the server's function.
const BODY: usize = 4 << 20;

pub(crate) fn node_refuses_an_upload() -> Result<()> {
    let namespace = Namespace::new()?;
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let mut command = Command::new(NODE);
    command.arg(file("upload.js")).arg(BACKEND_PORT.to_string());
    let mut server = Program::start(&namespace, command)?;
    ensure!(server.line()? == "ready");
    let mut client = namespace.inside(|| Ok(TcpStream::connect(("127.0.0.1", BACKEND_PORT))?))?;
    client.set_read_timeout(Some(PATIENCE))?;
    let head = format!("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {BODY}\r\n\r\n");
    client.write_all(head.as_bytes())?;
    ensure!(server.line()? == "asked");
    client.set_nonblocking(true)?;
    // As much as the buffers of both ends hold.
    loop {
        match client.write(&[0; 16 << 10]) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
    }
    sockets::wait_until(&namespace, "the server has not read all of it", |sockets| {
        sockets.iter().any(|socket| socket.local.port() == BACKEND_PORT && socket.untaken > 0)
    })?;
    server.tell("destroy")?;
    client.set_nonblocking(false)?;
    let error = client.read(&mut [0; 100]).expect_err("no answer, but a reset");
    ensure!(error.kind() == ErrorKind::ConnectionReset, "{error}");
    wait_for_line(
        &tool,
        &json!({"event": "close", "connection": at("local", BACKEND_PORT)}),
        &json!({
            "connection": {"role": "server", "bytes_sent": 0, "bytes_received": at_least(1)},
            "process": process(&server, "node"),
            "closed_by": "local",
            "ended": "reset_sent",
            "trigger": "close",
            "cause": "unread_data",
            "unread_bytes": at_least(1),
        }),
    )?;
    wait_for_line(
        &tool,
        &json!({"event": "close", "connection": at("remote", BACKEND_PORT)}),
        &json!({"closed_by": "peer", "ended": "reset_received", "cause": "peer_reset"}),
    )?;
    tool.stop()?;
    Ok(())
}
