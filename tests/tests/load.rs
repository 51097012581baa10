//! Many connections at once: none is lost or reported twice, and the tool reports as many RSTs as the kernel
//! has counted.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Side},
    expect::{differences, known, one_of},
    fewer,
    netns::Namespace,
    scenario::{Trace, routes},
    scratch::Scratch,
    tool::{Ended, Launch},
    until, window,
};

/// Held by each test while it runs: the connections of one would take the room in the tables of another's
/// tool, and its wake-ups.
static ALONE: Mutex<()> = Mutex::new(());

/// The number of connections. Half of them end with a FIN, half with a RST.
fn connections() -> usize {
    2000 / usize::from(fewer())
}

#[test]
fn every_connection_is_told_once() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let connections = connections();
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let trace = Trace::alone(&bed, &[])?;
    let server = bed.listen()?;
    let serve = format!("serve {connections}");
    bed.peer(Side::Server).tell(&serve)?;
    let sent =
        bed.peer(Side::Client).ask(&format!("burst {} {} {connections}", server.ip(), server.port()))?;
    bed.peer(Side::Server).finish(&serve)?;

    let ended = trace.finish(&bed, |lines| lines.len() >= 2 * connections + 2 * (connections / 2))?;
    let lost = ended.lines.iter().filter(|line| line["event"] == "lost").count();
    ensure!(lost == 0, "{lost} lines report losses\n{ended}");

    // A port whose connection was closed with a RST is free again at once, so it may have been used twice.
    let mut used = BTreeMap::<u64, usize>::new();
    for port in sent.get::<String>("ports")?.split(',') {
        *used.entry(port.parse()?).or_default() += 1;
    }
    for side in [Side::Client, Side::Server] {
        let end = if side == Side::Client { "local" } else { "remote" };
        let closed: Vec<&Value> = lines_of(&ended, side).filter(|line| line["event"] == "close").collect();
        let mut reported = BTreeMap::<u64, usize>::new();
        for line in &closed {
            *reported.entry(line["connection"][end]["port"].as_u64().unwrap_or(0)).or_default() += 1;
        }
        let wrong: Vec<_> = used.iter().filter(|(port, times)| reported.get(port) != Some(times)).collect();
        ensure!(
            wrong.is_empty() && reported.len() == used.len(),
            "{} closes of the {side}'s end were reported, a wrong number for the ports {wrong:?}\n{ended}",
            closed.len()
        );
        let resets = closed.iter().filter(|line| !line["cause"].is_null()).count();
        ensure!(resets == connections / 2, "{resets} of the {side}'s ends were not closed in order\n{ended}");

        let pid = json!({"pid": bed.peer(side).pid()});
        for line in closed {
            // No process holds a connection that was reset before it was accepted. If one is named, it must
            // be the right one.
            let unaccepted = side == Side::Server && line["ended"] == "reset_received";
            let process = if unaccepted { one_of(&[json!(null), pid.clone()]) } else { pid.clone() };
            let found =
                differences(line, &json!({"process": process, "closed_by": known(), "ended": known()}));
            ensure!(found.is_empty(), "a line of the {side}'s is wrong: {}\n{line}", found.join(" and "));
        }
    }
    // An ACK that crosses a RST finds no socket any more and is answered with a RST too. It is reported and
    // counted like any other, but the client did not cause it.
    for (direction, side) in [("sent", Side::Client), ("received", Side::Server)] {
        let count = lines_of(&ended, side).filter(|line| line["direction"] == direction).count();
        ensure!(count == connections / 2, "the {side} {direction} {count} RSTs\n{ended}");
    }
    Ok(())
}

/// The close lines of one side.
fn lines_of(ended: &Ended, side: Side) -> impl Iterator<Item = &Value> {
    ended.lines.iter().filter(move |line| line["connection"]["role"] == side.to_string())
}

/// Events that occur while the tool reads its ring buffer, followed by none that would wake it. It begins to
/// read a tenth of a second after the first of many connections has ended, and takes some milliseconds for
/// all; the exact time is unknown.
#[test]
fn events_during_a_read_are_reported() -> Result<()> {
    const PAUSE: Duration = Duration::from_millis(98);
    const STEP: Duration = Duration::from_millis(1);
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let namespace = Namespace::new()?;
    let tool = Launch::new()?.trace([&namespace]).start()?;
    namespace.inside(|| {
        for step in 0..8 {
            for _ in 0..40 {
                window::end_of_own()?;
            }
            thread::sleep(PAUSE + step * STEP);
            let line = window::end_of_own()?;
            tool.wait_for(&format!("like {line}"), |reported| differences(reported, &line).is_empty())?;
        }
        Ok(())
    })?;
    tool.stop().map(drop)
}

/// The work of a trace besides its records: how often its threads were woken, and how often they read or
/// wrote a file.
#[derive(Debug)]
struct Effort {
    wakeups: u64,
    calls: u64,
}

impl Effort {
    /// From `/proc/PID`: a thread that sleeps gives up its processor by itself (`voluntary_ctxt_switches`).
    fn of(pid: u32) -> Result<Self> {
        let number = |text: &str, name: &str| -> Result<u64> {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .with_context(|| format!("no {name}"))?;
            Ok(line.trim().parse()?)
        };
        let mut wakeups = 0;
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let status = fs::read_to_string(thread?.path().join("status"))?;
            wakeups += number(&status, "voluntary_ctxt_switches:")?;
        }
        let io = fs::read_to_string(format!("/proc/{pid}/io"))?;
        Ok(Self { wakeups, calls: number(&io, "syscr:")? + number(&io, "syscw:")? })
    }
}

/// Many connections end one after the other, and the lines go to a file: a pipe that is full wakes its writer
/// for each page that is read. The reader of the ring is woken for many records at once, and many lines are
/// written at once.
#[test]
fn neither_a_wakeup_nor_a_system_call_for_each_record() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let ends = 2 * connections();
    let namespace = Namespace::new()?;
    let scratch = Scratch::new()?;
    let lines = scratch.path().join("lines");
    let tool = Launch::new()?.trace([&namespace]).into_file(&lines)?.start()?;
    let end = |count: usize| -> Result<()> {
        let before = closes_in(&lines)?;
        namespace.inside(|| (0..count / 2).try_for_each(|_| window::end_of_own().map(drop)))?;
        until("all ends are reported", || Ok((closes_in(&lines)? == before + count).then_some(())))
    };
    // The first ends have processes and stacks that have to be looked up.
    end(16)?;
    let before = Effort::of(tool.pid())?;
    end(ends)?;
    let after = Effort::of(tool.pid())?;
    let (wakeups, calls) = (after.wakeups - before.wakeups, after.calls - before.calls);
    println!("{wakeups} wake-ups, {calls} reads and writes for {ends} ends");
    ensure!(wakeups * 10 < ends as u64, "{wakeups} wake-ups for {ends} ends");
    ensure!(calls * 5 < ends as u64, "{calls} reads and writes for {ends} ends");
    tool.stop().map(drop)
}

/// The number of close lines in a file.
fn closes_in(lines: &Path) -> Result<usize> {
    Ok(fs::read_to_string(lines)?.matches(r#"{"event":"close","#).count())
}

/// More live connections than there is room for: each is reported when it ends, those whose beginning was
/// evicted without it, and as many evictions are reported as connections lack their beginning, or more.
#[test]
fn what_is_evicted_is_counted() -> Result<()> {
    /// Room for 133 sockets in the table and 128 beside it; both ends of a connection are sockets.
    const ROOM: [&str; 2] = ["--connections", "128"];
    const CONNECTIONS: usize = 300;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let namespace = Namespace::new()?;
    let tool = Launch::new()?.trace([&namespace]).args(ROOM).start()?;
    namespace.inside(|| {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let open = |_| -> Result<_> {
            let client = TcpStream::connect(listener.local_addr()?)?;
            Ok((client, listener.accept()?))
        };
        let opened: Vec<_> = (0..CONNECTIONS).map(open).collect::<Result<_>>()?;
        let (clients, servers): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
        drop(clients);
        drop(servers);
        Ok(())
    })?;
    let closes = |lines: &[Value]| lines.iter().filter(|line| line["event"] == "close").count();
    tool.wait_until(|lines| closes(lines) >= 2 * CONNECTIONS);
    let ended = tool.stop()?;
    ensure!(closes(&ended.lines) == 2 * CONNECTIONS, "{} closes\n{ended}", closes(&ended.lines));
    let is_headless = |line: &&Value| line["event"] == "close" && line["connection"]["opened"].is_null();
    let headless = ended.lines.iter().filter(is_headless).count();
    let lost = ended.lines.iter().filter(|line| line["event"] == "lost" && line["where"] == "connections");
    let evicted: u64 = lost.filter_map(|line| line["count"].as_u64()).sum();
    ensure!(
        headless > 0 && evicted >= headless as u64,
        "{headless} connections lack their beginning, {evicted} evictions are reported\n{ended}"
    );
    // The table itself evicts nothing.
    ensure!(2 * CONNECTIONS - headless >= 128, "{headless} connections lack their beginning\n{ended}");
    Ok(())
}
