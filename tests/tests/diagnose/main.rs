//! `tcpclose diagnose` on the connections of real programs. A fault has a finding with the numbers that the
//! programs themselves report, and programs without a fault have none.

mod faults;
mod firewall;
mod healthy;
mod heartbeats;
mod last_words;
mod page;
mod pools;
mod standard_input;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::{
    signal::Signal,
    socket::{setsockopt, sockopt},
};
use serde_json::Value;
use tcpclose_tests::{
    PATIENCE,
    contract::Checker,
    descriptors,
    netns::Namespace,
    program::Program,
    scratch::Scratch,
    servers::{
        BACKEND_PORT, NGINX, NGINX_PORT, PYTHON, REDIS, is_missing, start_nginx, start_redis, start_script,
    },
    sockets::{self, CLOSE_WAIT, LISTEN, Socket, TIME_WAIT},
    tool::{Launch, Tool},
    until,
};

const DATABASE: u16 = 5432;
const KEYS: u16 = 6379;

/// More connections than a finding needs.
const SEVERAL: usize = 6;

/// A network namespace that is being traced.
struct Site {
    tool: Tool,
    namespace: Namespace,
    folder: Scratch,
}

impl Site {
    fn open() -> Result<Self> {
        Self::open_with(&["--stack", "none"])
    }

    fn open_with(args: &[&str]) -> Result<Self> {
        descriptors::keep_to_this_thread()?;
        let namespace = Namespace::new()?;
        let tool = Launch::new()?.trace([&namespace]).args(["--linger", "1s"]).args(args).start()?;
        Ok(Self { tool, namespace, folder: Scratch::new()? })
    }

    fn app(&self, keepalive: &str) -> Result<Program> {
        let args = [&BACKEND_PORT.to_string(), keepalive, &DATABASE.to_string()];
        start_script(&self.namespace, "http_server.py", &args)
    }

    fn nginx(&self) -> Result<Program> {
        start_nginx(&self.namespace, self.folder.path())
    }

    fn redis(&self, timeout: u64) -> Result<Program> {
        start_redis(&self.namespace, self.folder.path(), KEYS, timeout)
    }

    fn connect(&self, port: u16) -> Result<TcpStream> {
        let stream = self.namespace.inside(|| Ok(TcpStream::connect(("127.0.0.1", port))?))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    fn connect_several(&self, port: u16) -> Result<Vec<TcpStream>> {
        (0..SEVERAL).map(|_| self.connect(port)).collect()
    }

    /// Waits until this many ends of connections at a port have been reported, and returns the findings in
    /// all lines.
    fn diagnose(self, port: u16, ends: usize) -> Result<Vec<Value>> {
        let is_end = |line: &&Value| {
            let connection = &line["connection"];
            line["event"] == "close"
                && (connection["local"]["port"] == port || connection["remote"]["port"] == port)
        };
        let came = self.tool.wait_until(|lines| lines.iter().filter(is_end).count() >= ends);
        ensure!(came, "fewer than {ends} ends at port {port} were reported\n{}", self.tool.said_so_far());
        self.findings()
    }

    /// Ends the trace and returns its findings, which must be those that its lines have when they are read
    /// from a file.
    fn findings(self) -> Result<Vec<Value>> {
        let ended = self.tool.stop()?;
        let (own, lines): (Vec<_>, Vec<_>) =
            ended.lines.into_iter().partition(|line| line["event"] == "finding");
        let read = findings_of_files(&self.folder, &[&lines])?;
        ensure!(told(&own) == told(&read), "the trace found {own:#?}\nits lines have {read:#?}");
        Ok(read)
    }
}

/// The text of a file with these lines.
fn json_lines(lines: &[Value]) -> String {
    lines.iter().flat_map(|line| [line.to_string(), "\n".to_owned()]).collect()
}

/// What `diagnose` finds in files with these lines.
fn findings_of_files(folder: &Scratch, files: &[&[Value]]) -> Result<Vec<Value>> {
    let mut launch = Launch::new()?.args(["diagnose", "-o", "json"]);
    for (number, lines) in files.iter().enumerate() {
        let file = folder.path().join(format!("{number}.jsonl"));
        let text = json_lines(lines);
        fs::write(&file, text)?;
        launch = launch.args([file]);
    }
    let output = launch.output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && complaint.is_empty(), "diagnose: {complaint}");
    let mut checker = Checker::default();
    let text = String::from_utf8(output.stdout)?;
    let findings = text.lines().map(|line| {
        let finding: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        let violations = checker.check(&finding);
        ensure!(violations.is_empty(), "the contract is broken: {violations:?}\n{finding:#}");
        Ok(finding)
    });
    findings.collect()
}

/// What findings say.
fn told(findings: &[Value]) -> Vec<[&Value; 4]> {
    findings
        .iter()
        .map(|finding| ["kind", "count", "summary", "confidence"].map(|field| &finding[field]))
        .collect()
}

/// The only finding, which must be of this kind.
fn only(findings: &[Value], kind: &str) -> Result<Value> {
    match findings {
        [finding] if finding["event"] == "finding" && finding["kind"] == kind => Ok(finding.clone()),
        _ => bail!("not {kind} alone, but {findings:#?}"),
    }
}

fn none(findings: &[Value]) -> Result<()> {
    ensure!(findings.is_empty(), "found where nothing is wrong: {findings:#?}");
    Ok(())
}

/// Checks a timeout in milliseconds. The kernel records the time of the last data in ticks, and a busy
/// machine may be late.
fn is_about(value: &Value, least: Duration, most: Duration) -> Result<()> {
    let range = least.as_secs_f64() * 970.0..most.as_secs_f64() * 1500.0;
    let found = value.as_f64().with_context(|| format!("{value} is no number"))?;
    ensure!(range.contains(&found), "{found} ms, which is not within {range:?}");
    Ok(())
}

/// Connects several times to a port at which nothing listens.
fn connect_in_vain(namespace: &Namespace) -> Result<()> {
    for _ in 0..SEVERAL {
        let connected = namespace.inside(|| Ok(TcpStream::connect(("127.0.0.1", 1)).is_ok()))?;
        ensure!(!connected, "something listens at port 1");
    }
    Ok(())
}

fn ask(stream: &mut TcpStream, request: &str) -> Result<()> {
    let end = "Host: localhost\r\nContent-Length: 0\r\n\r\n";
    Ok(stream.write_all(format!("{request} HTTP/1.1\r\n{end}").as_bytes())?)
}

/// Reads an answer to its end and returns its status.
fn status(stream: &mut TcpStream) -> Result<u16> {
    let mut reader = BufReader::new(stream);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        if let Some((_, value)) =
            line.split_once(':').filter(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        {
            length = value.trim().parse()?;
        }
    }
    reader.take(length).read_to_end(&mut Vec::new())?;
    first.split(' ').nth(1).with_context(|| format!("no status in {first:?}"))?.parse().context("no status")
}

/// nginx keeps idle connections for 60 s, the application for one. nginx is busy when the application closes
/// them, and sends the next requests over connections that have ended.
#[test]
fn a_pool_that_keeps_connections_longer_than_its_peer() -> Result<()> {
    if is_missing(&[PYTHON, NGINX]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _app = site.app("1")?;
    let nginx = site.nginx()?;
    let mut clients = site.connect_several(NGINX_PORT)?;
    clients.iter_mut().try_for_each(|client| ask(client, "POST /busy"))?;
    for client in &mut clients {
        ensure!(status(client)? == 200);
    }
    nginx.signal(Signal::SIGSTOP)?;
    clients.iter_mut().try_for_each(|client| ask(client, "POST /busy"))?;
    sockets::wait_until(&site.namespace, "the application has closed", |sockets| {
        let closed = |socket: &&Socket| socket.remote.port() == BACKEND_PORT && socket.state == CLOSE_WAIT;
        sockets.iter().filter(closed).count() == SEVERAL
    })?;
    nginx.signal(Signal::SIGCONT)?;
    let statuses: Vec<u16> = clients.iter_mut().map(status).collect::<Result<_>>()?;
    let lost = statuses.iter().filter(|status| **status == 502).count();
    ensure!(lost > 0, "no request was lost: {statuses:?}");
    // The connections between nginx and its clients are not part of the finding.
    let findings = site.diagnose(BACKEND_PORT, 2 * SEVERAL)?;
    let finding = only(&findings, "keepalive_mismatch")?;
    ensure!(finding["process"]["comm"] == "nginx" && finding["process"]["pid"] == nginx.pid(), "{finding:#}");
    ensure!(
        finding["remote"]["port"] == BACKEND_PORT && finding["remote"]["comm"] == "python3",
        "{finding:#}"
    );
    ensure!(finding["evidence"]["raced_requests"] == lost, "{lost} requests were lost: {finding:#}");
    ensure!(finding["count"] == SEVERAL, "{finding:#}");
    is_about(&finding["evidence"]["peer_timeout_ms"], Duration::from_secs(1), Duration::from_secs(1))
}

/// Clients wait a second for their second answer and close; nginx logs 499. The second request usually falls
/// into the tick of the kernel's clock in which nginx sent the first answer, so that the client's connection
/// does not show the wait. The first answer is an error, after which nginx needs a new connection to the
/// application.
#[test]
fn clients_that_give_up_through_a_proxy() -> Result<()> {
    if is_missing(&[PYTHON, NGINX]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _app = site.app("60")?;
    let nginx = site.nginx()?;
    let wait = Duration::from_secs(1);
    let mut clients = site.connect_several(NGINX_PORT)?;
    for client in &mut clients {
        ask(client, "GET /broken")?;
        ensure!(status(client)? == 500);
        ask(client, "GET /slow")?;
        client.set_read_timeout(Some(wait))?;
    }
    // All of them wait at the same time.
    ensure!(clients[0].read(&mut [0]).is_err(), "it was answered");
    drop(clients);
    let mut gave_up = 0;
    while gave_up < SEVERAL {
        gave_up += usize::from(nginx.line()?.starts_with("499 "));
    }
    let finding = only(&site.diagnose(NGINX_PORT, 2 * SEVERAL)?, "client_gave_up")?;
    ensure!(finding["process"]["comm"] == "nginx" && finding["count"] == SEVERAL, "{finding:#}");
    ensure!(finding["evidence"]["local_port"] == NGINX_PORT, "{finding:#}");
    ensure!(finding["evidence"]["upstream_dropped"] == SEVERAL, "{finding:#}");
    // The first of them had waited while the others were asking.
    is_about(&finding["evidence"]["timeout_ms"], wait, wait)
}

/// redis closes the connections of idle clients.
#[test]
fn a_server_that_closes_idle_clients() -> Result<()> {
    if is_missing(&[REDIS]) {
        return Ok(());
    }
    let site = Site::open()?;
    let redis = site.redis(2)?;
    let mut clients = site.connect_several(KEYS)?;
    for client in &mut clients {
        client.write_all(b"PING\r\n")?;
        let mut answer = [0; 7];
        client.read_exact(&mut answer)?;
        ensure!(&answer == b"+PONG\r\n");
    }
    for client in &mut clients {
        ensure!(client.read(&mut [0])? == 0, "redis does not close");
    }
    drop(clients);
    let findings = site.diagnose(KEYS, 2 * SEVERAL)?;
    let finding = only(&findings, "keepalive_mismatch")?;
    ensure!(finding["remote"]["comm"] == "redis-server" && finding["remote"]["port"] == KEYS, "{finding:#}");
    ensure!(finding["count"] == SEVERAL && finding["evidence"]["raced_requests"] == 0, "{finding:#}");
    // redis compares whole seconds of its clock, so it closes between two and three seconds after the last
    // command.
    is_about(&finding["evidence"]["peer_timeout_ms"], Duration::from_secs(2), Duration::from_secs(3))?;
    drop(redis);
    Ok(())
}

/// A process is terminated while it has connections, one of them with a pending request.
#[test]
fn a_deploy() -> Result<()> {
    if is_missing(&[PYTHON]) {
        return Ok(());
    }
    let site = Site::open()?;
    let mut app = site.app("60")?;
    let mut clients = site.connect_several(BACKEND_PORT)?;
    clients.iter_mut().try_for_each(|client| ask(client, "GET /busy"))?;
    for client in &mut clients {
        ensure!(status(client)? == 200);
    }
    // This request is still pending when the signal arrives.
    let mut waiting = site.connect(BACKEND_PORT)?;
    ask(&mut waiting, "GET /slow")?;
    sockets::wait_until(&site.namespace, "the request has been read", |sockets| {
        let is_read = |socket: &&Socket| {
            socket.local.port() == BACKEND_PORT && socket.state != LISTEN && socket.untaken == 0
        };
        sockets.iter().filter(is_read).count() == SEVERAL + 1
    })?;
    app.signal(Signal::SIGTERM)?;
    let pid = app.pid();
    app.ended()?;
    // The result is the end of the connection, or the error of a RST if the request had not been read.
    let _ = waiting.read(&mut [0]);
    drop((clients, waiting));
    let findings = site.diagnose(BACKEND_PORT, 2 * (SEVERAL + 1))?;
    let finding = only(&findings, "deploy")?;
    ensure!(finding["process"]["pid"] == pid && finding["count"] == SEVERAL + 1, "{finding:#}");
    ensure!(finding["evidence"]["requests_lost"] == 1, "{finding:#}");
    Ok(())
}

/// An application is replaced while nginx passes requests on to it. The requests that failed are those that
/// the clients saw fail.
#[test]
fn a_deploy_during_traffic() -> Result<()> {
    if is_missing(&[PYTHON, NGINX]) {
        return Ok(());
    }
    let site = Site::open()?;
    let mut app = site.app("60")?;
    let nginx = site.nginx()?;
    let is_over = Arc::new(AtomicBool::new(false));
    let busy = |mut client: TcpStream| {
        let is_over = Arc::clone(&is_over);
        thread::spawn(move || -> Result<usize> {
            let mut failed = 0;
            while !is_over.load(Ordering::Relaxed) {
                ask(&mut client, "GET /busy")?;
                failed += usize::from(status(&mut client)? == 502);
                thread::sleep(Duration::from_millis(20));
            }
            Ok(failed)
        })
    };
    let clients: Vec<_> = site.connect_several(NGINX_PORT)?.into_iter().map(busy).collect();
    for _ in 0..SEVERAL {
        ensure!(nginx.line()?.starts_with("200 "));
    }
    app.signal(Signal::SIGTERM)?;
    let pid = app.pid();
    app.ended()?;
    let _next = site.app("60")?;
    while !nginx.line()?.starts_with("502 ") {}
    while !nginx.line()?.starts_with("200 ") {}
    is_over.store(true, Ordering::Relaxed);
    let failed = clients.into_iter().map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?);
    let failed = failed.sum::<Result<usize>>()?;

    let findings = site.diagnose(BACKEND_PORT, failed)?;
    let [refused, deploy] = &findings[..] else { bail!("{} findings: {findings:#?}", findings.len()) };
    ensure!(refused["kind"] == "refused" && refused["process"]["pid"] == nginx.pid(), "{refused:#}");
    ensure!(deploy["kind"] == "deploy" && deploy["process"]["pid"] == pid, "{deploy:#}");
    ensure!(deploy["count"] == SEVERAL, "{deploy:#}");
    // The others were under way when the application ended, which lines show in part.
    let refused = refused["count"].as_u64().map(usize::try_from).context("no number")??;
    let under_way = failed.checked_sub(refused).context("more were refused than failed")?;
    let number = |name: &str| deploy["evidence"][name].as_u64().unwrap_or_default();
    let most = usize::try_from(number("requests_lost") + number("undecided_connections"))?;
    ensure!(under_way <= most && most <= SEVERAL, "{failed} failed, {refused} were refused: {deploy:#}");
    Ok(())
}

/// nginx, an application, and its database. The database is killed.
#[test]
fn a_chain_from_the_database_to_the_proxy() -> Result<()> {
    if is_missing(&[PYTHON, NGINX]) {
        return Ok(());
    }
    let site = Site::open()?;
    let mut database = start_script(&site.namespace, "database.py", &[&DATABASE.to_string()])?;
    let app = site.app("60")?;
    let _nginx = site.nginx()?;
    let mut clients = site.connect_several(NGINX_PORT)?;
    clients.iter_mut().try_for_each(|client| ask(client, "POST /query"))?;
    for _ in 0..SEVERAL {
        ensure!(database.line()? == "asked");
    }
    database.signal(Signal::SIGKILL)?;
    database.ended()?;
    for client in &mut clients {
        ensure!(status(client)? == 502);
    }
    let findings = site.diagnose(BACKEND_PORT, 2 * SEVERAL)?;
    let kinds: Vec<_> = findings.iter().map(|finding| &finding["kind"]).collect();
    ensure!(kinds == ["chain", "backend_died"], "{findings:#?}");
    let (chain, died) = (&findings[0], &findings[1]);
    ensure!(chain["count"] == SEVERAL && chain["confidence"] == "proven", "{chain:#}");
    ensure!(
        chain["evidence"]["root_port"] == DATABASE && chain["evidence"]["victim_port"] == BACKEND_PORT,
        "{chain:#}"
    );
    ensure!(chain["remote"]["comm"] == "nginx", "{chain:#}");
    ensure!(died["process"]["pid"] == database.pid() && died["count"] == SEVERAL, "{died:#}");
    drop(app);
    Ok(())
}

/// A load balancer checks that nginx accepts connections, and ends each with a RST.
#[test]
fn health_checks_are_no_finding() -> Result<()> {
    if is_missing(&[PYTHON, NGINX]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _nginx = site.nginx()?;
    for _ in 0..4 * SEVERAL {
        let check = site.connect(NGINX_PORT)?;
        setsockopt(&check, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?;
    }
    none(&site.diagnose(NGINX_PORT, 8 * SEVERAL)?)
}

/// nginx and an application without a fault; some connections are kept, others are closed after one request.
#[test]
fn a_healthy_proxy_is_no_finding() -> Result<()> {
    if is_missing(&[PYTHON, NGINX]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _app = site.app("60")?;
    let nginx = site.nginx()?;
    let mut clients = site.connect_several(NGINX_PORT)?;
    for _ in 0..5 {
        clients.iter_mut().try_for_each(|client| ask(client, "GET /busy"))?;
        for client in &mut clients {
            ensure!(status(client)? == 200);
        }
    }
    for _ in 0..2 * SEVERAL {
        let mut client = site.connect(NGINX_PORT)?;
        ask(&mut client, "GET /busy")?;
        ensure!(status(&mut client)? == 200);
    }
    drop(clients);
    // nginx then also closes its connections to the application in order.
    nginx.signal(Signal::SIGQUIT)?;
    until("nginx has closed its connections to the application", || {
        let sockets = sockets::list(&site.namespace)?;
        Ok((!sockets.iter().any(|socket| socket.remote.port() == BACKEND_PORT && socket.state != TIME_WAIT))
            .then_some(()))
    })?;
    none(&site.diagnose(NGINX_PORT, 6 * SEVERAL)?)
}

/// A malformed line is counted and reported, and the rest is read. A missing file is an error.
#[test]
fn it_reports_what_it_could_not_read() -> Result<()> {
    let folder = Scratch::new()?;
    let file = folder.path().join("events.jsonl");
    fs::write(
        &file,
        "{\"event\":\"lost\",\"seq\":1,\"time\":\"2026-03-01T12:00:00Z\",\"count\":3}\n{\"event\"\n",
    )?;
    let output = Launch::new()?.args(["diagnose".as_ref(), file.as_os_str()]).output()?;
    let complaint = String::from_utf8(output.stderr)?;
    ensure!(output.status.success(), "{complaint}");
    ensure!(complaint.contains("1 line is not an event") && complaint.contains("line 2 of"), "{complaint}");
    ensure!(complaint.contains("3 events were lost"), "{complaint}");
    ensure!(String::from_utf8(output.stdout)?.starts_with("No findings"));
    let output = Launch::new()?.args(["diagnose", "/nonexistent"]).output()?;
    ensure!(output.status.code() == Some(1) && String::from_utf8(output.stderr)?.contains("/nonexistent"));
    Ok(())
}
