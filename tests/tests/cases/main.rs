//! Common programs that fail in ways for which people use this tool. Each case ends in a line that names the
//! responsible program, descriptor or code; `docs/cases.md` explains how to read it. The truth comes from the
//! programs: from their logs, their answers and their descriptors.

mod farewell;
mod go;
mod health_check;
mod idle_client;
mod keep_alive;
mod memory;
mod pool;
mod proxy;
mod upload;
mod websocket;
mod worker;
mod worker_timeout;

use std::{
    io::Read,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    PATIENCE,
    expect::{at_least, differences, shortened},
    netns::Namespace,
    program::Program,
    servers::is_missing,
    sockets::{self, Socket},
    tool::Tool,
};

macro_rules! cases {
    ($($file:ident::$case:ident)*) => {$(
        #[test]
        fn $case() -> Result<()> {
            if is_missing($file::NEEDS) {
                return Ok(());
            }
            $file::$case()
        }
    )*};
}

cases! {
    proxy::backend_closes_what_nginx_is_about_to_use
    proxy::client_gives_up
    farewell::nginx_closes_an_idle_tls_connection
    farewell::tls_client_gives_up
    farewell::tls_client_closes_an_idle_connection
    go::goroutines_of_a_stripped_program
    health_check::haproxy_resets_its_health_checks
    idle_client::redis_closes_what_its_client_has_forgotten
    keep_alive::node_closes_what_nginx_keeps
    memory::the_oom_killer_is_named
    upload::node_refuses_an_upload
    websocket::nginx_closes_a_silent_websocket
    worker_timeout::gunicorn_aborts_a_slow_worker
    worker::leaking_worker_has_read_the_end
    worker::blocked_worker_has_not_read
    pool::pool_runs_dry_and_the_method_is_named
}

/// The kernel records the time of the last data in jiffies, which last at most this long.
const TICK: Duration = Duration::from_millis(10);

/// The path of a file of these cases.
fn part(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name)
}

/// The only socket of a namespace that has this state and remote port.
fn only_socket(namespace: &Namespace, remote_port: u16, state: u8) -> Result<Socket> {
    let of_interest = |socket: &Socket| socket.remote.port() == remote_port && socket.state == state;
    let found: Vec<Socket> = sockets::list(namespace)?.into_iter().filter(of_interest).collect();
    let [socket] = found.as_slice() else { anyhow::bail!("not one socket, but {found:?}") };
    Ok(*socket)
}

/// Waits for a line that matches `which`, and checks that it also matches `rest`.
fn wait_for_line(tool: &Tool, which: &Value, rest: &Value) -> Result<Value> {
    let line = tool.wait_for(&which.to_string(), |line| differences(line, which).is_empty())?;
    let differences = differences(&line, rest);
    ensure!(differences.is_empty(), "{}\n  {}", shortened(&line), differences.join("\n  "));
    Ok(line)
}

/// The next connection, and the head of the HTTP request that came over it.
fn requested(listener: &TcpListener) -> Result<(TcpStream, Vec<u8>)> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        request.push(byte[0]);
    }
    Ok((stream, request))
}

/// An end of a connection, by its local or remote port.
fn at(local_or_remote: &str, port: u16) -> Value {
    json!({ local_or_remote: {"port": port} })
}

/// The expected idle time of a connection that a program ended after `timeout` without data.
fn idle_for(timeout: Duration) -> Result<Value> {
    let least = timeout.checked_sub(TICK).context("shorter than a tick")?;
    Ok(at_least(least.as_secs_f64() * 1000.0))
}

/// The expected process.
fn process(program: &Program, comm: &str) -> Value {
    json!({"pid": program.pid(), "comm": comm})
}
