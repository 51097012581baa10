//! nginx in front of a backend whose timeout for idle connections is shorter than nginx's.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use tcpclose_tests::{
    PATIENCE,
    bed::user_stack,
    expect::{known, one_of, path},
    features::Feature,
    netns::Namespace,
    program::Program,
    scratch::Scratch,
    servers::{BACKEND_PORT, NGINX, NGINX_PORT, PYTHON, start_nginx, start_script},
    sockets::{self, ESTABLISHED, Socket},
    tool::{Launch, Tool},
    until,
};

use super::{at, idle_for, process, wait_for_line};

pub(crate) const NEEDS: &[&str] = &[NGINX, PYTHON];

/// The keepalive timeout of the backend.
const KEPT: Duration = Duration::from_secs(1);

struct ProxySite {
    tool: Tool,
    nginx: Program,
    backend: Program,
    namespace: Namespace,
    folder: Scratch,
}

impl ProxySite {
    fn open() -> Result<Self> {
        let namespace = Namespace::new()?;
        let folder = Scratch::new()?;
        let tool = Launch::new()?.trace([&namespace]).start()?;
        let seconds = KEPT.as_secs().to_string();
        let backend = start_script(&namespace, "http_server.py", &[&BACKEND_PORT.to_string(), &seconds])?;
        let nginx = start_nginx(&namespace, folder.path())?;
        Ok(Self { tool, nginx, backend, namespace, folder })
    }

    fn client(&self) -> Result<Client> {
        let stream = self.namespace.inside(|| Ok(TcpStream::connect(("127.0.0.1", NGINX_PORT))?))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Client(BufReader::new(stream)))
    }

    /// The connection from nginx to the backend, unless nginx has closed it.
    fn upstream(&self) -> Result<Option<Socket>> {
        let is_it = |socket: &Socket| socket.remote.port() == BACKEND_PORT && socket.state == ESTABLISHED;
        Ok(sockets::list(&self.namespace)?.into_iter().find(is_it))
    }

    /// Stops nginx, so that it notices nothing until it is continued.
    fn pause(&self) -> Result<()> {
        self.nginx.signal(Signal::SIGSTOP)?;
        let stat = format!("/proc/{}/stat", self.nginx.pid());
        until("nginx has stopped", || Ok(fs::read_to_string(&stat)?.contains(") T ").then_some(())))
    }

    fn go_on(&self) -> Result<()> {
        self.nginx.signal(Signal::SIGCONT)
    }
}

/// A client of nginx.
struct Client(BufReader<TcpStream>);

impl Client {
    fn send(&mut self, request: &str) -> Result<()> {
        let end = "Host: localhost\r\nContent-Length: 0\r\n\r\n";
        Ok(self.0.get_mut().write_all(format!("{request} HTTP/1.1\r\n{end}").as_bytes())?)
    }

    /// Reads the status of a response. The body is left unread.
    fn status(&mut self) -> Result<u16> {
        let mut lines = self.0.by_ref().lines();
        let first = lines.next().context("no answer")??;
        for line in lines {
            if line?.is_empty() {
                break;
            }
        }
        Ok(first.split(' ').nth(1).context("no status")?.parse()?)
    }
}

/// The backend closes an idle connection while a request for it is on its way. nginx, which is busy for a
/// moment, sees the client's request first, and sends it over a connection that the backend has closed.
pub(crate) fn backend_closes_what_nginx_is_about_to_use() -> Result<()> {
    let site = ProxySite::open()?;
    let mut client = site.client()?;
    let upstream = until("a request waits in nginx before the backend has closed", || {
        client.send("POST /")?;
        ensure!(client.status()? == 204, "the backend does not answer");
        ensure!(site.nginx.line()? == "204 POST / HTTP/1.1");
        site.pause()?;
        client.send("POST /")?;
        if let Some(upstream) = site.upstream()? {
            return Ok(Some(upstream));
        }
        // The machine was too slow. nginx finds the connection closed and opens a new one.
        site.go_on()?;
        ensure!(client.status()? == 204);
        ensure!(site.nginx.line()? == "204 POST / HTTP/1.1");
        Ok(None)
    })?;
    let port = upstream.local.port();
    wait_for_line(
        &site.tool,
        &json!({"event": "close", "connection": {"local": {"port": BACKEND_PORT}, "remote": {"port": port}}}),
        &json!({
            "connection": {"role": "server"},
            "process": process(&site.backend, "python3"),
            "closed_by": "local",
            "ended": "fin",
            "trigger": "shutdown",
            "idle_ms": idle_for(KEPT)?,
            "cause": null,
        }),
    )?;
    site.go_on()?;

    ensure!(client.status()? == 502);
    ensure!(site.nginx.line()? == "502 POST / HTTP/1.1");
    let log = fs::read_to_string(site.folder.path().join("error.log"))?;
    ensure!(log.contains("upstream prematurely closed connection"), "the log of nginx: {log}");

    let nginx = process(&site.nginx, "nginx");
    wait_for_line(
        &site.tool,
        &json!({"event": "close", "connection": {"local": {"port": port}, "remote": {"port": BACKEND_PORT}}}),
        &json!({
            "connection": {"role": "client"},
            "process": nginx,
            "closed_by": "peer",
            "ended": "reset_received",
            "cause": "peer_reset",
            "idle_ms": idle_for(KEPT)?,
            "last_data": one_of(&[json!(null), json!("received")]),
            "close_wait_ms": known(),
            "states": path(&["ESTABLISHED", "CLOSE_WAIT", "CLOSE"]),
            "opener": {"process": nginx, "stack": user_stack("__libc_connect")},
        }),
    )?;
    // The RST that answers the late request.
    if Feature::EveryReset.is_here() {
        wait_for_line(
            &site.tool,
            &json!({"event": "reset", "direction": "sent", "connection": {"remote": {"port": port}}}),
            &json!({"cause": "timewait", "connection": {"local": {"port": BACKEND_PORT}}, "process": null}),
        )?;
    }
    site.tool.stop()?;
    Ok(())
}

/// The client closes before the backend has answered.
pub(crate) fn client_gives_up() -> Result<()> {
    let site = ProxySite::open()?;
    let mut client = site.client()?;
    client.send("GET /slow")?;
    ensure!(site.backend.line()? == "asked");
    drop(client);
    ensure!(site.nginx.line()? == "499 GET /slow HTTP/1.1");

    let nginx = process(&site.nginx, "nginx");
    wait_for_line(
        &site.tool,
        &json!({"event": "close", "connection": at("local", NGINX_PORT)}),
        &json!({
            "connection": {"role": "server", "bytes_sent": 0},
            "process": nginx,
            "closed_by": "peer",
            "ended": "fin",
            "trigger": "close",
            "last_data": "received",
            "cause": null,
        }),
    )?;
    // nginx closes its connection to the backend in turn; the backend does not learn the reason.
    wait_for_line(
        &site.tool,
        &json!({"event": "close", "connection": at("remote", BACKEND_PORT)}),
        &json!({
            "connection": {"role": "client", "bytes_received": 0},
            "process": nginx,
            "closed_by": "local",
            "trigger": "close",
            "last_data": "sent",
            "cause": null,
        }),
    )?;
    site.tool.stop()?;
    Ok(())
}
