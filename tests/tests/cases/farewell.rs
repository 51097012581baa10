//! nginx with TLS: a farewell goes over the connection just before it is closed, so that it seems not to have
//! been idle. The silence shows in the other direction.

use std::{thread, time::Duration};

use anyhow::{Result, ensure};
use serde_json::json;
use tcpclose_tests::{
    expect::one_of,
    netns::Namespace,
    program::Program,
    scratch::Scratch,
    servers::{BACKEND_PORT, NGINX, NGINX_TLS_PORT, OPENSSL, PYTHON, start_nginx_with_tls, start_script},
    tool::{Launch, Tool},
};

use super::{at, idle_for, process, wait_for_line};

pub(crate) const NEEDS: &[&str] = &[NGINX, PYTHON, OPENSSL];

/// `keepalive_timeout` in `nginx-tls.conf`, and the client's own patience.
const SILENCE: Duration = Duration::from_secs(1);

struct TlsSite {
    tool: Tool,
    nginx: Program,
    backend: Program,
    client: Program,
    _folder: Scratch,
}

impl TlsSite {
    fn open() -> Result<Self> {
        let namespace = Namespace::new()?;
        let folder = Scratch::new()?;
        let tool = Launch::new()?.trace([&namespace]).start()?;
        let backend = start_script(&namespace, "http_server.py", &[&BACKEND_PORT.to_string(), "60"])?;
        let nginx = start_nginx_with_tls(&namespace, folder.path())?;
        let client = start_script(&namespace, "tls_client.py", &[&NGINX_TLS_PORT.to_string()])?;
        Ok(Self { tool, nginx, backend, client, _folder: folder })
    }
}

/// nginx closes after its keepalive timeout. Its `close_notify` is the last data, sent just before.
pub(crate) fn nginx_closes_an_idle_tls_connection() -> Result<()> {
    let mut site = TlsSite::open()?;
    ensure!(site.client.ask("ask /")? == "done");
    ensure!(site.nginx.line()? == "200 GET / HTTP/1.1");
    ensure!(site.client.ask("end")? == "done", "nginx has not closed");
    wait_for_line(
        &site.tool,
        &json!({"event": "close", "connection": at("local", NGINX_TLS_PORT)}),
        &json!({
            "process": process(&site.nginx, "nginx"),
            "closed_by": "local",
            "trigger": "close",
            "last_data": "sent",
            "since_received_ms": idle_for(SILENCE)?,
            "cause": null,
        }),
    )?;
    ensure!(site.client.ask("leave")? == "done");
    site.tool.stop()?;
    Ok(())
}

/// The client gives up before the answer, and says goodbye. On both ends the silence is in the direction of
/// the answer.
pub(crate) fn tls_client_gives_up() -> Result<()> {
    let mut site = TlsSite::open()?;
    ensure!(site.client.ask("send /slow")? == "done");
    ensure!(site.backend.line()? == "asked");
    // The client's timeout, which is what this test is about.
    thread::sleep(SILENCE);
    ensure!(site.client.ask("leave")? == "done");
    ensure!(site.nginx.line()? == "499 GET /slow HTTP/1.1");
    wait_for_line(
        &site.tool,
        &json!({"event": "close", "connection": at("local", NGINX_TLS_PORT)}),
        &json!({
            "process": process(&site.nginx, "nginx"),
            "closed_by": "peer",
            "last_data": "received",
            "since_sent_ms": idle_for(SILENCE)?,
            // nginx does not read the farewell of a client that it still has an answer for.
            "ended": "reset_sent",
            "cause": "unread_data",
        }),
    )?;
    wait_for_line(
        &site.tool,
        &json!({"event": "close", "connection": at("remote", NGINX_TLS_PORT)}),
        &json!({
            "process": process(&site.client, "python3"),
            "closed_by": "local",
            "trigger": "close",
            "last_data": one_of(&[json!("sent")]),
            "since_received_ms": idle_for(SILENCE)?,
        }),
    )?;
    site.tool.stop()?;
    Ok(())
}

/// A client closes a connection that it has kept for reuse. The silence is the same as if it had given up;
/// what differs is that nginx reads the farewell.
pub(crate) fn tls_client_closes_an_idle_connection() -> Result<()> {
    let mut site = TlsSite::open()?;
    ensure!(site.client.ask("ask /kept")? == "done");
    ensure!(site.nginx.line()? == "200 GET /kept HTTP/1.1");
    // How long the client keeps the connection.
    thread::sleep(SILENCE);
    ensure!(site.client.ask("leave")? == "done");
    wait_for_line(
        &site.tool,
        &json!({"event": "close", "connection": at("local", NGINX_TLS_PORT)}),
        &json!({
            // Whose FIN is first is open: nginx closes when it has read the client's close_notify.
            "process": process(&site.nginx, "nginx"),
            "last_data": "received",
            "since_sent_ms": idle_for(SILENCE)?,
            "unread_bytes": 0,
            "ended": "fin",
            "cause": null,
        }),
    )?;
    site.tool.stop()?;
    Ok(())
}
