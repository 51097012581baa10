//! Sockets that stay in a state of the teardown: what they wait for, who holds them, and since when.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Connection, Route, Side, user_stack},
    expect::{but, differences, known, one_of},
    features::Feature,
    scenario::{Trace, routes, shut_window, watch},
    scenarios, sockets,
    tool::Launch,
    until,
};

/// An age that no socket reaches before its test is done with it, but that all remaining sockets reach soon.
const SOON: [&str; 2] = ["--linger", "300ms"];

type LingeringScenario = fn(&mut Bed) -> Result<Value>;

/// Makes a socket linger, and waits for the line that reports it.
fn run(route: Route, scenario: LingeringScenario) -> Result<()> {
    let mut bed = Bed::new(route)?;
    let trace = Trace::start(&bed, &SOON)?;
    let expected = scenario(&mut bed)?;
    let is_expected = |line: &Value| differences(line, &expected).is_empty();
    let line = trace.wait_for(&format!("like {expected}"), is_expected)?;
    ensure!(
        line["for_ms"] == line["for_ms_at_most"],
        "the exact age is known, so both bounds must be equal: {line}"
    );
    ensure!(line["for_ms"].as_f64() >= Some(300.0), "the line came too early: {line}");
    trace.finish(&bed, |_| true)?;
    Ok(())
}

scenarios! {
    run on [loopback_ipv4 veth_ipv6]:
    server_forgets_to_close
    server_never_reads
    server_never_accepts
    client_forgets_to_close
    client_shuts_down_and_server_goes_on
    child_has_it_too
}

scenarios! {
    run on [veth_ipv4 veth_ipv6]:
    server_does_not_read_what_is_before_the_fin
    server_does_not_read_before_the_client_is_killed
    nobody_answers_the_fin
    nobody_answers_the_last_fin
    fins_cross_and_one_is_lost
}

/// `--kind` selects among lines of sockets that linger, and `--cause` does not apply to them: they have none.
#[test]
fn kinds_are_filtered_and_causes_are_not() -> Result<()> {
    let (mut leaks, mut reads_not) = (Bed::new(routes::loopback_ipv4())?, Bed::new(routes::loopback_ipv4())?);
    let namespaces = leaks.namespaces().chain(reads_not.namespaces());
    let tool = Launch::new()?.trace(namespaces).args(SOON);
    let tool = tool.args(["--kind", "unread", "--cause", "linger_zero"]).start()?;
    // It lingers for longer, so that its line would come first.
    server_forgets_to_close(&mut leaks)?;
    let expected = server_never_reads(&mut reads_not)?;
    tool.wait_for(&format!("like {expected}"), |line| differences(line, &expected).is_empty())?;
    let ended = tool.stop()?;
    ensure!(ended.lines.iter().all(|line| line["kind"] == "unread"), "{ended}");
    Ok(())
}

/// The holder of a side's socket: the process itself.
fn holder(bed: &mut Bed, side: Side) -> Result<Value> {
    let fd: u32 = bed.peer(side).ask("descriptor")?.get("fd")?;
    let owner = bed.owner(side)?;
    Ok(json!({"pid": owner["pid"], "comm": owner["comm"], "fd": fd}))
}

fn server_forgets_to_close(bed: &mut Bed) -> Result<Value> {
    let connection = bed.established()?;
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("receive-end")?;
    let holder = holder(bed, Side::Server)?;
    bed.lingering_line(
        &connection,
        Side::Server,
        json!({"state": "CLOSE_WAIT", "kind": "leaked", "holders": [holder]}),
    )
}

fn server_never_reads(bed: &mut Bed) -> Result<Value> {
    let mut connection = bed.idle()?;
    bed.send(&mut connection, Side::Client, 100)?;
    bed.peer(Side::Client).ask("close")?;
    let holder = holder(bed, Side::Server)?;
    let this = json!({"state": "CLOSE_WAIT", "kind": "unread", "unread_bytes": 100, "holders": [holder]});
    bed.lingering_line(&connection, Side::Server, this)
}

fn server_never_accepts(bed: &mut Bed) -> Result<Value> {
    let mut connection = bed.connect()?;
    bed.send(&mut connection, Side::Client, 7)?;
    bed.peer(Side::Client).ask("close")?;
    let this = json!({
        "state": "CLOSE_WAIT",
        "kind": "unaccepted",
        "unread_bytes": 7,
        "holders": [],
        "process": {"attribution": "listener"},
        "opener": null,
    });
    bed.lingering_line(&connection, Side::Server, this)
}

/// An HTTP client does this when it keeps a connection for reuse or has forgotten it.
fn client_forgets_to_close(bed: &mut Bed) -> Result<Value> {
    let connection = bed.established()?;
    bed.peer(Side::Server).ask("close")?;
    bed.peer(Side::Client).ask("receive-end")?;
    let holder = holder(bed, Side::Client)?;
    let this = json!({
        "state": "CLOSE_WAIT",
        "kind": "leaked",
        "holders": [holder],
        "process": {"attribution": "connect"},
    });
    bed.lingering_line(&connection, Side::Client, this)
}

fn client_shuts_down_and_server_goes_on(bed: &mut Bed) -> Result<Value> {
    let connection = bed.established()?;
    bed.peer(Side::Client).ask("shutdown-write")?;
    let holder = holder(bed, Side::Client)?;
    let this = json!({
        "state": "FIN_WAIT2",
        "kind": "half_closed",
        "holders": [holder],
        "process": {"attribution": "syscall", "thread": known()},
        "trigger": "shutdown",
        "stack": user_stack("peer_shuts_socket_outer"),
    });
    bed.lingering_line(&connection, Side::Client, this)
}

fn child_has_it_too(bed: &mut Bed) -> Result<Value> {
    let connection = bed.established()?;
    let child = bed.peer(Side::Server).fork()?;
    bed.peer(Side::Client).ask("close")?;
    let parent = holder(bed, Side::Server)?;
    let heir = but(parent.clone(), json!({ "pid": child }));
    let owner = bed.owner(Side::Server)?;
    let this = json!({
        "state": "CLOSE_WAIT",
        "kind": "unread",
        "holders": one_of(&[json!([parent, heir]), json!([heir, parent])]),
        "process": {"pid": one_of(&[owner["pid"].clone(), json!(child)]), "tid": known()},
    });
    bed.lingering_line(&connection, Side::Server, this)
}

/// No process holds the socket any more: only the kernel waits.
fn orphan(bed: &Bed, connection: &Connection, state: &str) -> Result<Value> {
    let this = json!({
        "state": state,
        "kind": "unacked",
        "holders": [],
        "process": {"attribution": "syscall", "thread": known()},
        "trigger": "close",
        "stack": user_stack("peer_closes_socket_outer"),
        "connection": {"retransmits": known()},
    });
    bed.lingering_line(connection, Side::Client, this)
}

/// The client fills the server's window and its own send buffer. Its FIN has to wait behind the rest.
fn server_does_not_read_what_is_before_the_fin(bed: &mut Bed) -> Result<Value> {
    let (connection, unsent) = shut_out(bed)?;
    bed.peer(Side::Client).ask("close")?;
    let this = json!({
        "state": "FIN_WAIT1",
        "kind": "peer_not_reading",
        "unsent_bytes": unsent,
        "holders": [],
        "process": {"attribution": "syscall", "thread": known()},
        "trigger": "close",
        "stack": user_stack("peer_closes_socket_outer"),
        "connection": {"retransmits": known()},
    });
    bed.lingering_line(&connection, Side::Client, this)
}

fn server_does_not_read_before_the_client_is_killed(bed: &mut Bed) -> Result<Value> {
    let (connection, unsent) = shut_out(bed)?;
    let exe = one_of(&[json!(null), json!(bed.peer(Side::Client).exe()?)]);
    let this = json!({
        "state": "FIN_WAIT1",
        "kind": "peer_not_reading",
        "unsent_bytes": unsent,
        "holders": [],
        "process": {"attribution": "syscall", "thread": known(), "exe": exe},
        "trigger": "signal",
        "signal": "SIGKILL",
        "signal_from": {"pid": std::process::id()},
        "stack": one_of(&[json!(null), json!({"user": null, "kernel": null})]),
        "connection": {"retransmits": known()},
        "opener": {"process": {"exe": exe}, "stack": known()},
    });
    let line = bed.lingering_line(&connection, Side::Client, this)?;
    bed.peer(Side::Client).kill(Signal::SIGKILL)?;
    Ok(line)
}

/// A connection whose server reads nothing and whose client has written until there was no more room. Returns
/// the bytes that are in the client's buffer: those that did not arrive at the server.
fn shut_out(bed: &mut Bed) -> Result<(Connection, Value)> {
    let (connection, written) = shut_window(bed)?;
    let ends = (connection.address(Side::Server), connection.address(Side::Client));
    let of_server = sockets::list(bed.namespace(Side::Server))?;
    let server = of_server.iter().find(|socket| (socket.local, socket.remote) == ends);
    let arrived = server.context("the server has no socket")?.untaken;
    // On an emulated processor the server's host still accepts a part of a probe after its queue was read.
    let unsent = if Feature::OwnMachine.is_here() { known() } else { json!(written - u64::from(arrived)) };
    Ok((connection, unsent))
}

fn nobody_answers_the_fin(bed: &mut Bed) -> Result<Value> {
    let connection = bed.established()?;
    bed.lose(bed.route().address(Side::Server))?;
    bed.peer(Side::Client).ask("close")?;
    orphan(bed, &connection, "FIN_WAIT1")
}

fn nobody_answers_the_last_fin(bed: &mut Bed) -> Result<Value> {
    let connection = bed.established()?;
    bed.peer(Side::Server).ask("shutdown-write")?;
    bed.peer(Side::Client).ask("receive-end")?;
    bed.lose(bed.route().address(Side::Server))?;
    bed.peer(Side::Client).ask("close")?;
    orphan(bed, &connection, "LAST_ACK")
}

fn fins_cross_and_one_is_lost(bed: &mut Bed) -> Result<Value> {
    let connection = bed.established()?;
    bed.lose(bed.route().address(Side::Server))?;
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("close")?;
    orphan(bed, &connection, "CLOSING")
}

/// Whether a line is about the server's end.
fn of_server(connection: &Connection) -> impl Fn(&Value) -> bool {
    let port = connection.address(Side::Client).port();
    move |line| line["event"] == "lingering" && line["connection"]["remote"]["port"] == port
}

/// It is reported again at twice the age, and not any more once it is closed; the close line has the
/// duration.
#[test]
fn is_told_again_at_twice_the_age() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let trace = Trace::start(&bed, &SOON)?;
    let connection = bed.established()?;
    bed.peer(Side::Client).ask("close")?;
    let is_it = of_server(&connection);
    let ages = |lines: &[Value]| -> Vec<f64> {
        lines.iter().filter(|line| is_it(line)).filter_map(|line| line["for_ms"].as_f64()).collect()
    };
    ensure!(trace.wait_until(|lines| ages(lines).len() >= 3), "fewer than three lines report the socket");
    bed.peer(Side::Server).ask("receive-end")?;
    bed.peer(Side::Server).ask("close")?;
    let is_close = |line: &Value| line["event"] == "close" && line["connection"]["role"] == "server";
    let close = trace.wait_for("the server's close", is_close)?;
    let ended = trace.finish(&bed, |_| true)?;
    let ages = ages(&ended.lines);
    ensure!(ages.windows(2).all(|pair| pair[1] >= 2.0 * pair[0]), "ages {ages:?}");
    let waited = close["close_wait_ms"].as_f64().context("close_wait_ms is null")?;
    ensure!(ages.iter().all(|age| *age <= waited), "{ages:?}, and in the end {waited}");
    Ok(())
}

/// For an older socket the age has bounds, or at least a lower one, and the opener is unknown.
#[test]
fn is_found_though_older_than_the_trace() -> Result<()> {
    let mut bed = Bed::new(routes::veth_ipv4())?;
    let connection = bed.established()?;
    let before = Instant::now();
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("receive-end")?;
    let closed = Instant::now();
    until("the socket is older than the limit", || {
        Ok((closed.elapsed() > Duration::from_millis(400)).then_some(()))
    })?;
    let trace = Trace::alone(&bed, &SOON)?;
    let holder = holder(&mut bed, Side::Server)?;
    let this = json!({
        "state": "CLOSE_WAIT",
        "kind": "leaked",
        "since": null,
        "holders": [holder],
        "process": {"attribution": "descriptors"},
        "opener": null,
        "connection": {"opened": null},
    });
    let expected = bed.lingering_line(&connection, Side::Server, this)?;
    let line = trace.wait_for(&format!("like {expected}"), |line| differences(line, &expected).is_empty())?;
    let (at_least, at_most) = (line["for_ms"].as_f64(), line["for_ms_at_most"].as_f64());
    // The true age lies between the shortest and the longest time that the test can have waited.
    let most = before.elapsed().as_secs_f64() * 1000.0;
    ensure!(at_least <= Some(most), "{at_least:?} of {most} ms at most: {line}");
    ensure!(at_most.is_none_or(|at_most| at_most >= 400.0), "{at_most:?} of 400 ms at least: {line}");
    trace.finish(&bed, |_| true)?;
    Ok(())
}

/// The kernel keeps no time for a socket that no process holds and whose peer does not answer: its age is the
/// time since the trace first saw it.
#[test]
fn orphan_is_found_though_older_than_the_trace() -> Result<()> {
    let mut bed = Bed::new(routes::veth_ipv4())?;
    let connection = bed.established()?;
    bed.lose(bed.route().address(Side::Server))?;
    let before = Instant::now();
    bed.peer(Side::Client).ask("close")?;
    let tool = watch(&bed, &SOON)?;
    let this = json!({
        "state": "FIN_WAIT1",
        "kind": "unacked",
        "since": null,
        "holders": [],
        "process": null,
        "opener": null,
    });
    let expected = bed.lingering_line(&connection, Side::Client, this)?;
    let expected = but(expected, json!({"connection": {"role": null}}));
    for times in [1.0, 2.0] {
        let line = tool.wait_for(&format!("like {expected}, at {times} times the limit"), |line| {
            differences(line, &expected).is_empty()
                && line["for_ms"].as_f64().is_some_and(|age| age >= times * 300.0)
        })?;
        let most = before.elapsed().as_secs_f64() * 1000.0;
        ensure!(line["for_ms"].as_f64() <= Some(most), "of {most} ms at most: {line}");
    }
    tool.stop()?;
    Ok(())
}

#[test]
fn what_lingers_at_the_end_is_in_the_summary() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let tool = watch(&bed, &["--linger", "100ms", "--summary"])?;
    let connection = bed.established()?;
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("receive-end")?;
    let closed = Instant::now();
    until("the socket is older than the limit", || {
        Ok((closed.elapsed() > Duration::from_millis(200)).then_some(()))
    })?;
    let ended = tool.stop()?;
    ensure!(ended.lines.is_empty(), "lines were written\n{ended}");
    let pid = bed.peer(Side::Server).pid().to_string();
    let is_told = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.contains(&pid.as_str()) && words.contains(&"leaked") && words.contains(&"CLOSE_WAIT")
    };
    ensure!(ended.stderr.lines().any(is_told), "{connection:?} is not in the summary\n{ended}");
    Ok(())
}

#[test]
fn off_is_off() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let watched = watch(&bed, &SOON)?;
    let unwatched = watch(&bed, &["--linger", "off"])?;
    let connection = bed.established()?;
    bed.peer(Side::Client).ask("close")?;
    watched.wait_for("about the server's end", of_server(&connection))?;
    let ended = unwatched.stop()?;
    ensure!(!ended.lines.iter().any(of_server(&connection)), "the socket is reported\n{ended}");
    watched.stop()?;
    Ok(())
}
