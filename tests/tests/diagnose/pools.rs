//! Pools and other clients that keep too much, or nothing.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tcpclose_tests::{
    fewer,
    netns::{Namespace, run},
    program::Program,
    scratch::Scratch,
    servers::{BACKEND_PORT, MARIADB, MARIADB_INSTALL, PYTHON, is_missing, start_mariadb, start_script},
    sockets::{self, CLOSE_WAIT, Socket},
    tool::Launch,
    until,
};

use super::{SEVERAL, Site, is_about, only};

const DATABASE: u16 = 3306;
const DATABASE_CLIENT: &str = "/usr/bin/mariadb";

const COMPILER: &str = "/usr/bin/javac";
const JVM: &str = "/usr/bin/java";
const HTTP_CLIENT: &str = "/usr/share/java/httpclient.jar";

/// MariaDB closes connections that have been idle for `wait_timeout`; the applications keep them longer.
#[test]
fn a_database_that_closes_idle_clients() -> Result<()> {
    if is_missing(&[MARIADB, MARIADB_INSTALL, DATABASE_CLIENT]) {
        return Ok(());
    }
    let site = Site::open()?;
    let timeout = Duration::from_secs(2);
    let _mariadb = start_mariadb(&site.namespace, site.folder.path(), DATABASE, timeout.as_secs())?;
    let mut clients = Vec::new();
    for _ in 0..SEVERAL {
        let mut command = Command::new(DATABASE_CLIENT);
        command.args(["--no-defaults", "--batch", "--unbuffered", "--skip-column-names", "--skip-reconnect"]);
        command.args(["--protocol=tcp", "--host=127.0.0.1", "--skip-ssl", &format!("--port={DATABASE}")]);
        let mut client = Program::start(&site.namespace, command)?;
        ensure!(client.ask("SELECT 42;")? == "42");
        clients.push(client);
    }
    // MariaDB ends them with a RST.
    let finding = only(&site.diagnose(DATABASE, 2 * SEVERAL)?, "keepalive_mismatch")?;
    drop(clients);
    ensure!(finding["process"]["comm"] == "mariadb" && finding["count"] == SEVERAL, "{finding:#}");
    ensure!(finding["remote"]["comm"] == "mariadbd" && finding["remote"]["port"] == DATABASE, "{finding:#}");
    is_about(&finding["evidence"]["peer_timeout_ms"], timeout, timeout)
}

/// A JVM whose pool gets its connections back only after an answer with status 200. Here a connection is
/// requested only once the one before it has been closed by the server, as by a service with little traffic.
#[test]
fn a_java_pool_that_leaks_after_errors() -> Result<()> {
    if is_missing(&[PYTHON, COMPILER, JVM, HTTP_CLIENT]) {
        return Ok(());
    }
    let site = Site::open_with(&["--stack", "user"])?;
    let _app = site.app("60")?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/Prices.java");
    let folder = site.folder.path();
    run(Command::new(COMPILER).args(["-cp", HTTP_CLIENT, "-d"]).arg(folder).arg(source))?;
    let mut command = Command::new(JVM);
    command.arg("-cp").arg(format!("{HTTP_CLIENT}:{}", folder.display())).args(["Prices", "10"]);
    let mut jvm = Program::start(&site.namespace, command)?;
    for asked in 1..=SEVERAL {
        let answer = jvm.ask(&format!("1 http://127.0.0.1:{BACKEND_PORT}/broken"))?;
        ensure!(answer == format!("answered=0 failed=1 refused=0 leased={asked}"), "{answer}");
        wait_for_close_wait(&site, asked)?;
    }
    let finding = leak(site)?;
    ensure!(finding["process"]["pid"] == jvm.pid() && finding["process"]["comm"] == "java", "{finding:#}");
    let opener = finding["evidence"]["opened_in"].as_str().context("no place in the code")?;
    ensure!(opener.contains("Prices.price(") && opener.contains("(Prices.java:"), "{opener}");
    Ok(())
}

/// A crawler that has forgotten several responses, whose status was 404.
fn crawler(site: &Site) -> Result<Program> {
    let mut crawler = start_script(&site.namespace, "crawler.py", &[])?;
    for page in 1..=SEVERAL {
        let status = crawler.ask(&format!("http://127.0.0.1:{BACKEND_PORT}/missing"))?;
        ensure!(status == "404", "{status}");
        wait_for_close_wait(site, page)?;
        ensure!(crawler.ask(&format!("http://127.0.0.1:{BACKEND_PORT}/"))? == "200");
    }
    Ok(crawler)
}

#[test]
fn a_crawler_that_leaks_after_404() -> Result<()> {
    if is_missing(&[PYTHON]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _app = site.app("60")?;
    let crawler = crawler(&site)?;
    let finding = leak(site)?;
    ensure!(finding["process"]["pid"] == crawler.pid(), "{finding:#}");
    Ok(())
}

/// It is stopped before its descriptors run out. The kernel closes the sockets, which the program never did.
#[test]
fn a_crawler_that_leaks_until_it_is_restarted() -> Result<()> {
    if is_missing(&[PYTHON]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _app = site.app("60")?;
    let mut crawler = crawler(&site)?;
    wait_until_they_linger(&site)?;
    crawler.signal(Signal::SIGTERM)?;
    crawler.ended()?;
    // Both ends of each connection, of those that it closed and of those that it did not.
    let finding = only(&site.diagnose(BACKEND_PORT, 4 * SEVERAL)?, "leak")?;
    ensure!(finding["process"]["pid"] == crawler.pid() && finding["count"] == SEVERAL, "{finding:#}");
    let summary = finding["summary"].as_str().unwrap_or_default();
    ensure!(summary.contains("until it ended"), "{summary}");
    Ok(())
}

fn wait_for_close_wait(site: &Site, count: usize) -> Result<()> {
    sockets::wait_until(&site.namespace, "the server has closed", |sockets| {
        let held = |socket: &&Socket| socket.remote.port() == BACKEND_PORT && socket.state == CLOSE_WAIT;
        sockets.iter().filter(held).count() == count
    })
}

fn wait_until_they_linger(site: &Site) -> Result<()> {
    let lingers = |line: &&Value| line["event"] == "lingering" && line["state"] == "CLOSE_WAIT";
    let came = site.tool.wait_until(|lines| lines.iter().filter(lingers).count() >= SEVERAL);
    ensure!(came, "they do not linger\n{}", site.tool.said_so_far());
    Ok(())
}

/// The only finding, once all sockets linger.
fn leak(site: Site) -> Result<Value> {
    wait_until_they_linger(&site)?;
    let finding = only(&site.findings()?, "leak")?;
    ensure!(finding["count"] == SEVERAL, "{finding:#}");
    Ok(finding)
}

/// A client that connects for every request and closes first takes up most of the ports that Linux gives out.
#[test]
fn a_client_that_uses_up_its_ports() -> Result<()> {
    // 60 % of the ports from 32,768 to 60,999.
    const CONNECTIONS: u16 = 16_940;
    if fewer() > 1 {
        println!("skipped: an emulated processor takes too long for {CONNECTIONS} connections");
        return Ok(());
    }
    // The lines are not checked one by one, which would take minutes.
    let (namespace, folder) = (Namespace::new()?, Scratch::new()?);
    let ready = folder.path().join("ready");
    let port = BACKEND_PORT.to_string();
    let tool = Launch::new()?.trace([&namespace]).args(["--stack", "none", "--remote-port", &port]);
    let tool = tool.args(["--event", "close", "--count", &CONNECTIONS.to_string()]);
    let tool = tool.args(["--ready-file".as_ref(), ready.as_os_str()]);
    let tool = thread::spawn(move || tool.output());
    until("the tool is ready", || Ok(ready.exists().then_some(())))?;
    let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", BACKEND_PORT))?))?;
    let server = thread::spawn(move || -> Result<()> {
        for connection in listener.incoming().take(CONNECTIONS.into()) {
            let mut connection = connection?;
            connection.read_exact(&mut [0; 4])?;
            connection.write_all(b"42")?;
            ensure!(connection.read(&mut [0])? == 0, "more data");
        }
        Ok(())
    });
    namespace.inside(|| {
        for _ in 0..CONNECTIONS {
            let mut client = TcpStream::connect(("127.0.0.1", BACKEND_PORT))?;
            client.write_all(b"ask\n")?;
            client.read_exact(&mut [0; 2])?;
        }
        Ok(())
    })?;
    server.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    let output = tool.join().map_err(|_| anyhow::anyhow!("the thread of the tool panicked"))??;
    let text = String::from_utf8(output.stdout)?;
    let findings = text.lines().filter(|line| line.starts_with("{\"event\":\"finding\""));
    let findings: Vec<Value> = findings.map(serde_json::from_str).collect::<Result<_, _>>()?;
    let finding = only(&findings, "time_wait_pressure")?;
    ensure!(finding["count"] == CONNECTIONS, "{finding:#}");
    let share = finding["evidence"]["ports_used_percent"].as_f64().context("no share")?;
    ensure!((59.0..61.0).contains(&share), "{finding:#}");
    Ok(())
}
