//! Faults of servers, and of what is in front of them.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tcpclose_tests::{
    PATIENCE, descriptors,
    features::Feature,
    groups::MemoryLimit,
    netns::Namespace,
    scratch::Scratch,
    servers::{
        BACKEND_PORT, NGINX, NGINX_DEFERRED_PORT, NGINX_DEFERRED_ROOM, NGINX_PORT, PYTHON, is_missing,
        start_nginx, start_script,
    },
    snmp::Counters,
    tool::{Launch, Tool},
};

use super::{DATABASE, SEVERAL, Site, ask, connect_in_vain, findings_of_files, is_about, only, status, told};

/// The address of the host of an application.
const ADDRESS: &str = "10.77.0.2";

/// The length of an upload.
const BODY: usize = 64 << 10;

/// People wait for a page of nginx as long as they please.
#[test]
fn people_who_leave() -> Result<()> {
    if is_missing(&[PYTHON, NGINX]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _app = site.app("60")?;
    let nginx = site.nginx()?;
    // Somebody is answered.
    let mut client = site.connect(NGINX_PORT)?;
    ask(&mut client, "GET /")?;
    ensure!(status(&mut client)? == 200 && nginx.line()?.starts_with("200 "));
    drop(client);
    let mut clients = site.connect_several(NGINX_PORT)?;
    clients.iter_mut().try_for_each(|client| ask(client, "GET /slow"))?;
    for client in clients {
        thread::sleep(Duration::from_millis(1300));
        drop(client);
        ensure!(nginx.line()?.starts_with("499 "));
    }
    let finding = only(&site.diagnose(NGINX_PORT, 2 * SEVERAL)?, "client_gave_up")?;
    ensure!(finding["process"]["comm"] == "nginx" && finding["count"] == SEVERAL, "{finding:#}");
    ensure!(finding["evidence"]["timeout_ms"].is_null(), "{finding:#}");
    let summary = finding["summary"].as_str().unwrap_or_default();
    ensure!(summary.contains("people who left"), "{summary}");
    Ok(())
}

/// A request for more memory than the application may have.
#[test]
fn an_application_without_memory() -> Result<()> {
    if is_missing(&[PYTHON]) {
        return Ok(());
    }
    let Some(group) = MemoryLimit::new()? else { return Ok(()) };
    let site = Site::open()?;
    let mut app = site.app("60")?;
    group.add(&app)?;
    let mut client = site.connect(BACKEND_PORT)?;
    ask(&mut client, "GET /memory")?;
    app.ended()?;
    drop(client);
    let finding = only(&site.diagnose(BACKEND_PORT, 2)?, "backend_died")?;
    ensure!(finding["process"]["pid"] == app.pid() && finding["confidence"] == "proven", "{finding:#}");
    let summary = finding["summary"].as_str().unwrap_or_default();
    ensure!(summary.contains("killed by the kernel's OOM killer"), "{summary}");
    Ok(())
}

/// A server that refuses uploads without reading them: the RST makes some clients lose the answer.
#[test]
fn uploads_that_are_refused_unread() -> Result<()> {
    if is_missing(&[PYTHON]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _app = site.app("60")?;
    // None of them closes before the server has.
    let mut clients = site.connect_several(BACKEND_PORT)?;
    for client in &mut clients {
        let head = format!("POST /full HTTP/1.1\r\nHost: localhost\r\nContent-Length: {BODY}\r\n\r\n");
        let mut request = head.into_bytes();
        request.resize(request.len() + BODY, 0);
        client.write_all(&request)?;
        // The answer, or the RST before it.
        match client.read_to_end(&mut Vec::new()) {
            Ok(_) => {}
            Err(error) => ensure!(error.kind() == ErrorKind::ConnectionReset, "{error}"),
        }
    }
    let is_reset = |line: &&Value| line["event"] == "reset" && line["direction"] == "sent";
    let came = site.tool.wait_until(|lines| lines.iter().filter(is_reset).count() >= SEVERAL);
    ensure!(came, "no RSTs\n{}", site.tool.said_so_far());
    drop(clients);
    let finding = only(&site.diagnose(BACKEND_PORT, 2 * SEVERAL)?, "unread_close")?;
    ensure!(finding["process"]["comm"] == "python3" && finding["count"] == SEVERAL, "{finding:#}");
    ensure!(finding["evidence"]["unread_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{finding:#}");
    Ok(())
}

/// A server that handles one connection at a time, while the first one is silent. The others wait to be
/// accepted, and their clients leave.
#[test]
fn connections_that_are_not_accepted() -> Result<()> {
    if is_missing(&[PYTHON]) {
        return Ok(());
    }
    let site = Site::open()?;
    let server = start_script(&site.namespace, "database.py", &[&DATABASE.to_string()])?;
    let silent = site.connect(DATABASE)?;
    for mut client in site.connect_several(DATABASE)? {
        client.write_all(b"query\n")?;
    }
    let waits = |line: &&Value| line["event"] == "lingering" && line["kind"] == "unaccepted";
    let came = site.tool.wait_until(|lines| lines.iter().filter(waits).count() >= SEVERAL);
    ensure!(came, "they do not wait\n{}", site.tool.said_so_far());
    let findings = site.findings()?;
    drop((server, silent));
    let finding = only(&findings, "accept_overflow")?;
    ensure!(finding["evidence"]["waiting_connections"] == SEVERAL, "{finding:#}");
    ensure!(finding["evidence"]["local_port"] == DATABASE, "{finding:#}");
    Ok(())
}

/// nginx is stuck, and its accept queue is full. The kernel resets further connections, because an
/// administrator has told it to. The findings are the same on the server's host and on both hosts together;
/// the client's host alone shows only that its connections were reset.
#[test]
fn a_full_accept_queue_that_resets_connections() -> Result<()> {
    if is_missing(&[PYTHON, NGINX]) || Feature::ReasonsOfOwnResets.is_missed() {
        return Ok(());
    }
    descriptors::keep_to_this_thread()?;
    let hosts = Namespace::pair([&["10.77.0.1/24"], &["10.77.0.2/24"]])?;
    hosts[1].set_sysctl("net/ipv4/tcp_abort_on_overflow", "1")?;
    let (tool, folder) = (trace(&[&hosts[0], &hosts[1]])?, Scratch::new()?);
    let _app = start_script(&hosts[1], "http_server.py", &[&BACKEND_PORT.to_string(), "60", "0"])?;
    let nginx = start_nginx(&hosts[1], folder.path())?;
    let connect = || -> Result<TcpStream> {
        let stream = hosts[0].inside(|| Ok(TcpStream::connect((ADDRESS, NGINX_DEFERRED_PORT))?))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    };
    let before = Counters::read(&hosts[1])?;
    nginx.signal(Signal::SIGSTOP)?;
    let mut late: Vec<_> = (0..SEVERAL).map(|_| connect()).collect::<Result<_>>()?;
    let mut in_time = Vec::new();
    for _ in 0..NGINX_DEFERRED_ROOM {
        let mut client = connect()?;
        ask(&mut client, "GET /")?;
        in_time.push(client);
    }
    for client in &mut late {
        ask(client, "GET /")?;
        let error = client.read(&mut [0]).err().map(|error| error.kind());
        ensure!(error == Some(ErrorKind::ConnectionReset), "{error:?}");
    }
    let reset = Counters::read(&hosts[1])?.since(&before, "TcpExtListenOverflows")?;
    ensure!(usize::try_from(reset)? == SEVERAL, "{reset} connections found the queue full");
    drop(late);
    nginx.signal(Signal::SIGCONT)?;
    for client in &mut in_time {
        ensure!(status(client)? == 200);
    }
    drop(in_time);

    let lines = lines_after(tool, SEVERAL + 2 * NGINX_DEFERRED_ROOM)?;
    let (own, lines): (Vec<_>, Vec<_>) = lines.into_iter().partition(|line| line["event"] == "finding");
    let finding = only(&own, "accept_overflow")?;
    ensure!(finding["count"] == SEVERAL && finding["process"]["pid"] == nginx.pid(), "{finding:#}");
    ensure!(finding["evidence"]["local_port"] == NGINX_DEFERRED_PORT, "{finding:#}");
    ensure!(finding["evidence"]["reset_connections"] == SEVERAL, "{finding:#}");
    let of = |host: &Namespace| -> Vec<Value> {
        lines.iter().filter(|line| line["connection"]["netns"] == host.inode()).cloned().collect()
    };
    let server = findings_of_files(&folder, &[&of(&hosts[1])])?;
    ensure!(only(&server, "accept_overflow")?["count"] == SEVERAL, "{server:#?}");
    let apart = findings_of_files(&folder, &[&of(&hosts[0]), &of(&hosts[1])])?;
    ensure!(told(&apart) == told(&own), "the files of both hosts have {apart:#?}");
    let client = only(&findings_of_files(&folder, &[&of(&hosts[0])])?, "backend_died")?;
    let advice = client["advice"].as_str().unwrap_or_default();
    ensure!(client["count"] == SEVERAL && advice.contains("TcpExtListenOverflows"), "{client:#}");
    Ok(())
}

/// nginx in front of an application that does not run.
#[test]
fn an_application_that_is_not_there() -> Result<()> {
    if is_missing(&[NGINX]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _nginx = site.nginx()?;
    for _ in 0..SEVERAL {
        let mut client = site.connect(NGINX_PORT)?;
        ask(&mut client, "GET /")?;
        ensure!(status(&mut client)? == 502);
    }
    let finding = only(&site.diagnose(NGINX_PORT, 2 * SEVERAL)?, "refused")?;
    ensure!(finding["process"]["comm"] == "nginx" && finding["count"] == SEVERAL, "{finding:#}");
    ensure!(finding["remote"]["port"] == BACKEND_PORT, "{finding:#}");
    Ok(())
}

/// A host that does not exist, and clients that wait a second for it.
#[test]
fn a_host_that_does_not_answer() -> Result<()> {
    descriptors::keep_to_this_thread()?;
    let timeout = Duration::from_secs(1);
    let [client, _network] = Namespace::pair([&["10.77.0.1/24"], &["10.77.0.2/24"]])?;
    // Its neighbours would notice that nobody has the address.
    client.ip(&["neighbour add 10.77.0.9 lladdr 02:00:00:00:00:09 dev eth0"])?;
    let tool = trace(&[&client])?;
    for _ in 0..SEVERAL {
        let address = ([10, 77, 0, 9], BACKEND_PORT).into();
        let refused = client.inside(|| Ok(TcpStream::connect_timeout(&address, timeout).err()))?;
        let kind = refused.map(|error| error.kind());
        ensure!(kind == Some(ErrorKind::TimedOut), "{kind:?}");
    }
    let lines = lines_after(tool, SEVERAL)?;
    let findings: Vec<_> = lines.iter().filter(|line| line["event"] == "finding").collect();
    let [finding] = findings[..] else {
        anyhow::bail!("{} findings, of {lines:#?}", findings.len());
    };
    let is_complete = finding["kind"] == "connect_unanswered" && finding["count"] == SEVERAL;
    ensure!(is_complete, "{finding:#}, of {lines:#?}");
    ensure!(finding["remote"]["address"] == "10.77.0.9", "{finding:#}");
    is_about(&finding["evidence"]["wait_ms"], timeout, timeout)
}

fn trace(hosts: &[&Namespace]) -> Result<Tool> {
    Launch::new()?.trace(hosts.iter().copied()).args(["--linger", "1s", "--stack", "none"]).start()
}

/// The findings of a tool that has reported this many ends.
fn findings_after(tool: Tool, ends: usize) -> Result<Vec<Value>> {
    Ok(lines_after(tool, ends)?.into_iter().filter(|line| line["event"] == "finding").collect())
}

fn lines_after(tool: Tool, ends: usize) -> Result<Vec<Value>> {
    let is_end = |line: &&Value| line["event"] == "close";
    let came = tool.wait_until(|lines| lines.iter().filter(is_end).count() >= ends);
    ensure!(came, "fewer than {ends} ends were reported\n{}", tool.said_so_far());
    Ok(tool.stop()?.lines)
}

/// Two hosts, each with a tool of its own, and a tool that sees both: the files of the two say what the third
/// says. An application closes idle connections of clients on the other host, and is then killed while it
/// owes answers.
#[test]
fn two_tools_on_two_hosts_find_what_one_finds() -> Result<()> {
    if is_missing(&[PYTHON]) {
        return Ok(());
    }
    descriptors::keep_to_this_thread()?;
    let hosts = Namespace::pair([&["10.77.0.1/24"], &["10.77.0.2/24"]])?;
    let tools = [trace(&[&hosts[0]])?, trace(&[&hosts[1]])?, trace(&[&hosts[0], &hosts[1]])?];
    let args = [&BACKEND_PORT.to_string(), "1", "0", ADDRESS];
    let mut app = start_script(&hosts[1], "http_server.py", &args)?;
    let connect = || hosts[0].inside(|| Ok(TcpStream::connect((ADDRESS, BACKEND_PORT))?));
    let mut clients: Vec<TcpStream> = (0..SEVERAL).map(|_| connect()).collect::<Result<_>>()?;
    clients.iter_mut().try_for_each(|client| ask(client, "GET /busy"))?;
    for client in &mut clients {
        ensure!(status(client)? == 200);
    }
    for client in &mut clients {
        ensure!(client.read(&mut [0])? == 0, "the application keeps it");
    }
    drop(clients);
    let mut waiting = Vec::new();
    for _ in 0..SEVERAL {
        let mut client = connect()?;
        ask(&mut client, "GET /slow")?;
        ensure!(app.line()? == "asked");
        waiting.push(client);
    }
    app.signal(Signal::SIGKILL)?;
    app.ended()?;
    drop(waiting);

    let [client, server, both] = tools;
    let (client, server) = (lines_after(client, 2 * SEVERAL)?, lines_after(server, 2 * SEVERAL)?);
    let both = findings_after(both, 4 * SEVERAL)?;
    let apart = findings_of_files(&Scratch::new()?, &[&client, &server])?;
    ensure!(told(&apart) == told(&both), "one tool found {both:#?}\nthe files of two have {apart:#?}");
    let kinds: Vec<_> = both.iter().map(|finding| &finding["kind"]).collect();
    ensure!(kinds == ["backend_died", "keepalive_mismatch"], "{both:#?}");
    ensure!(both.iter().all(|finding| finding["count"] == SEVERAL), "{both:#?}");
    // Each finding names the file of each of its lines.
    let files = apart[0]["files"].as_array().map_or(0, Vec::len);
    ensure!(files == apart[0]["lines"].as_array().map_or(0, Vec::len) && files > 0, "{apart:#?}");
    Ok(())
}

/// A trace writes findings while it runs (`--findings TIME`), and each again only when more connections show
/// it.
#[test]
fn findings_come_while_a_trace_runs() -> Result<()> {
    if is_missing(&[NGINX]) {
        return Ok(());
    }
    let site = Site::open_with(&["--stack", "none", "--findings", "1s"])?;
    let _nginx = site.nginx()?;
    let request = || -> Result<()> {
        for _ in 0..SEVERAL {
            let mut client = site.connect(NGINX_PORT)?;
            ask(&mut client, "GET /")?;
            ensure!(status(&mut client)? == 502);
        }
        Ok(())
    };
    request()?;
    let finding = |count: usize| move |line: &Value| line["kind"] == "refused" && line["count"] == count;
    site.tool.wait_for("a finding", finding(SEVERAL))?;
    request()?;
    site.tool.wait_for("the finding with more connections", finding(2 * SEVERAL))?;
    let ended = site.tool.stop()?;
    let counts: Vec<_> =
        ended.lines.iter().filter(|line| line["event"] == "finding").map(|line| &line["count"]).collect();
    let shown = counts.iter().filter(|count| ***count == SEVERAL).count();
    ensure!(shown <= 1, "the same finding came again: {counts:?}");
    Ok(())
}

/// With `--findings off` there are none, in lines or with the summary.
#[test]
fn findings_are_left_out_where_nobody_wants_them() -> Result<()> {
    let site = Site::open_with(&["--stack", "none", "--findings", "off"])?;
    connect_in_vain(&site.namespace)?;
    let is_end = |line: &&Value| line["event"] == "close";
    ensure!(site.tool.wait_until(|lines| lines.iter().filter(is_end).count() >= SEVERAL), "not all ended");
    let ended = site.tool.stop()?;
    ensure!(ended.lines.iter().all(|line| line["event"] != "finding"), "{ended}");
    ensure!(!ended.stderr.contains("finding"), "{ended}");
    Ok(())
}
