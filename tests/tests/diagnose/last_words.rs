//! What clients say last need not be a request: a farewell, a line of a log, an acknowledgement of HTTP/2.
//! What the server does then is no lost answer, and of requests that are lost no more are reported than are.

use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tcpclose_tests::{
    program::Program,
    servers::{
        BACKEND_PORT, MEMCACHED, NGINX, NGINX_HTTP2_PORT, NODE, PYTHON, REDIS, file, is_missing,
        start_memcached, start_script,
    },
};

use super::{KEYS, SEVERAL, Site, ask, none, only, status};

const CACHE: u16 = 11_211;
const LOGS: u16 = 5140;

fn say(stream: &mut TcpStream, what: &str, answer: &str) -> Result<()> {
    stream.write_all(what.as_bytes())?;
    let mut read = vec![0; answer.len()];
    stream.read_exact(&mut read)?;
    ensure!(read == answer.as_bytes(), "{what:?}: {:?}", String::from_utf8_lossy(&read));
    Ok(())
}

fn is_closed(stream: &mut TcpStream) -> Result<()> {
    ensure!(stream.read(&mut [0])? == 0, "there is more");
    Ok(())
}

/// memcached answers to `quit` by closing. Most clients just close, so that this is not how all of its
/// connections end.
#[test]
fn memcached_closes_when_asked_to() -> Result<()> {
    if is_missing(&[MEMCACHED]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _memcached = start_memcached(&site.namespace, CACHE)?;
    for number in 0..4 * SEVERAL {
        let mut client = site.connect(CACHE)?;
        say(&mut client, "set key 0 0 2\r\n42\r\n", "STORED\r\n")?;
        if number % 4 == 0 {
            // As an application that has used it for a while.
            thread::sleep(Duration::from_millis(100));
            client.write_all(b"quit\r\n")?;
            is_closed(&mut client)?;
        }
    }
    none(&site.diagnose(CACHE, 8 * SEVERAL)?)
}

/// redis answers to `QUIT`, and closes.
#[test]
fn redis_closes_when_asked_to() -> Result<()> {
    if is_missing(&[REDIS]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _redis = site.redis(0)?;
    for _ in 0..2 * SEVERAL {
        let mut client = site.connect(KEYS)?;
        say(&mut client, "PING\r\n", "+PONG\r\n")?;
        say(&mut client, "QUIT\r\n", "+OK\r\n")?;
        is_closed(&mut client)?;
    }
    none(&site.diagnose(KEYS, 4 * SEVERAL)?)
}

/// Senders of logs, whose server answers nobody and closes their connections when it has received nothing for
/// a second.
#[test]
fn a_log_server_closes_idle_connections() -> Result<()> {
    if is_missing(&[PYTHON]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _server = start_script(&site.namespace, "log_server.py", &[&LOGS.to_string(), "1"])?;
    let mut clients = site.connect_several(LOGS)?;
    for client in &mut clients {
        client.write_all(b"all is well\n")?;
    }
    clients.iter_mut().try_for_each(is_closed)?;
    drop(clients);
    none(&site.diagnose(LOGS, 2 * SEVERAL)?)
}

/// The same server is killed: nobody waits for an answer.
#[test]
fn a_log_server_is_killed() -> Result<()> {
    if is_missing(&[PYTHON]) {
        return Ok(());
    }
    let site = Site::open()?;
    let server = start_script(&site.namespace, "log_server.py", &[&LOGS.to_string(), "60"])?;
    let mut clients = site.connect_several(LOGS)?;
    for client in &mut clients {
        client.write_all(b"all is well\n")?;
        ensure!(server.line()? == "all is well");
    }
    let finding = killed(site, server, LOGS, SEVERAL)?;
    is_nothing_known_to_be_lost(&finding)
}

/// HTTP/2 clients of nginx that have had their answers. The last that they said acknowledges nginx's
/// settings.
#[test]
fn idle_http2_clients_wait_for_nothing() -> Result<()> {
    if is_missing(&[PYTHON, NGINX, NODE]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _app = site.app("60")?;
    let nginx = site.nginx()?;
    let mut command = std::process::Command::new(NODE);
    command.arg(file("http2_client.js")).arg(NGINX_HTTP2_PORT.to_string());
    let mut client = Program::start(&site.namespace, command)?;
    ensure!(client.line()? == "ready");
    for _ in 0..2 * SEVERAL {
        ensure!(client.ask("/busy")? == "200");
    }
    // They are idle.
    thread::sleep(Duration::from_secs(2));
    let finding = killed(site, nginx, NGINX_HTTP2_PORT, 2 * SEVERAL)?;
    is_nothing_known_to_be_lost(&finding)
}

/// The only finding after a process with this many connections has been killed.
fn killed(site: Site, mut process: Program, port: u16, connections: usize) -> Result<Value> {
    process.signal(Signal::SIGKILL)?;
    process.ended()?;
    only(&site.diagnose(port, connections)?, "deploy")
}

fn is_nothing_known_to_be_lost(finding: &Value) -> Result<()> {
    ensure!(finding["evidence"]["requests_lost"] == 0, "{finding:#}");
    let summary = finding["summary"].as_str().unwrap_or_default();
    ensure!(
        summary.ends_with("of them is not known.") || summary.ends_with("and nothing was lost."),
        "{finding:#}"
    );
    Ok(())
}

/// A server is killed while eight requests are pending, each sent directly after the answer to the one
/// before: not all of them show on their connections.
#[test]
fn a_server_is_killed_with_pending_requests() -> Result<()> {
    const REQUESTS: usize = 8;
    if is_missing(&[PYTHON]) {
        return Ok(());
    }
    let site = Site::open()?;
    let mut app = site.app("60")?;
    let mut clients = Vec::new();
    for number in 0..REQUESTS {
        let mut client = site.connect(BACKEND_PORT)?;
        // The first has not been answered before, and is certain.
        if number > 0 {
            ask(&mut client, "GET /")?;
            ensure!(status(&mut client)? == 200);
        }
        ask(&mut client, "GET /slow")?;
        ensure!(app.line()? == "asked");
        clients.push(client);
    }
    app.signal(Signal::SIGKILL)?;
    let pid = app.pid();
    app.ended()?;
    drop(clients);
    let finding = only(&site.diagnose(BACKEND_PORT, 2 * REQUESTS)?, "backend_died")?;
    ensure!(finding["process"]["pid"] == pid, "{finding:#}");
    let number = |name: &str| finding["evidence"][name].as_u64().unwrap_or_default();
    let (lost, undecided) = (number("requests_lost"), number("undecided_connections"));
    ensure!(lost >= 1 && lost + undecided == REQUESTS as u64, "{finding:#}");
    let summary = finding["summary"].as_str().unwrap_or_default();
    ensure!(summary.contains("at least") == (undecided > 0), "{finding:#}");
    Ok(())
}
