//! How connections end, as seen from both ends: every scenario lists the expected lines, and no others may
//! appear.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Connection, Route, Side, user_stack},
    expect::{but, known, one_of, path},
    features::{Feature, reason},
    netns,
    peer::Peer,
    scenario::{Trace, aborted, fin_without_socket, orderly_lines, reset_in_close_wait, reset_lines, run},
    scenarios,
    sockets::{self, FIN_WAIT2},
};

scenarios! {
    run on [loopback_ipv4 loopback_ipv6 loopback_mapped veth_ipv4 veth_ipv6]:
    client_closes_first
    server_closes_first
    client_closes_with_unread_data
}

scenarios! {
    run on [loopback_ipv4 loopback_ipv6 veth_ipv4 veth_ipv6]:
    client_shuts_down_writing
    client_shuts_down_both_ways
    client_shuts_down_and_discards_the_answer
    client_exits
    client_is_killed
    client_is_terminated_by_its_handler
    client_faults
    client_aborts
    client_replaces_descriptor
    client_closes_range
    client_becomes_another_program
    client_closes_on_thread
    child_of_server_closes
    server_closes_with_unread_data
    client_lingers_not
    server_lingers_not
    client_disconnects
    client_lingers_without_need
    client_closes_what_it_shut_down
    client_lingers_not_after_shutdown
    client_closes_with_unread_data_and_end
    client_closes_under_repair
    data_comes_after_shutdown
    client_connects_with_data
    nobody_listens
    listener_closes_before_accepting
    somebody_destroys_it
    somebody_destroys_listener
}

scenarios! {
    run on [loopback_ipv4 loopback_ipv6 loopback_mapped]:
    client_connects_to_itself
}

scenarios! {
    run on [veth_ipv4 veth_ipv6]:
    both_close_at_once
}

scenarios! {
    run_older on [loopback_ipv4 veth_ipv6]:
    older_connection_closes
    older_connection_is_reset
    older_connection_dies_with_a_thread
}

scenarios! {
    run_half_closed on [loopback_ipv4 veth_ipv6]:
    older_half_closed_connection_closes
}

/// A scenario on a connection that is older than the trace.
type OfOlder = fn(&mut Bed, &Connection) -> Result<Vec<Value>>;

fn run_older(route: Route, scenario: OfOlder) -> Result<()> {
    run_late(route, Bed::established, scenario)
}

/// The client has shut down writing before the trace.
fn run_half_closed(route: Route, scenario: OfOlder) -> Result<()> {
    // Without them, the states of older sockets are not known.
    if Feature::Types.is_missed() {
        return Ok(());
    }
    run_late(route, half_closed, scenario)
}

fn run_late(route: Route, begin: fn(&mut Bed) -> Result<Connection>, scenario: OfOlder) -> Result<()> {
    let mut bed = Bed::new(route)?;
    let connection = begin(&mut bed)?;
    let trace = Trace::alone(&bed, &[])?;
    let expected = scenario(&mut bed, &connection)?;
    trace.verify(&bed, expected)
}

/// One side ends a new connection in order by `act`; the other reads to the end and closes.
fn in_order(
    bed: &mut Bed,
    first: Side,
    act: impl FnOnce(&mut Peer) -> Result<Value>,
    this: Value,
) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    let more = act(bed.peer(first))?;
    orderly_lines(bed, &connection, first, but(this, more))
}

/// An action that consists of one order, without further expectations.
fn order(order: &str) -> impl FnOnce(&mut Peer) -> Result<Value> {
    move |peer| peer.ask(order).map(|_| json!({}))
}

/// A trigger, and the function of the peer in which it occurred.
fn in_function(trigger: &str, function: &str) -> Value {
    json!({"trigger": trigger, "stack": user_stack(function)})
}

fn client_closes_first(bed: &mut Bed) -> Result<Vec<Value>> {
    in_order(bed, Side::Client, order("close"), in_function("close", "peer_closes_socket_outer"))
}

fn server_closes_first(bed: &mut Bed) -> Result<Vec<Value>> {
    in_order(bed, Side::Server, order("close"), in_function("close", "peer_closes_socket_outer"))
}

fn client_shuts_down_writing(bed: &mut Bed) -> Result<Vec<Value>> {
    shut_down(bed, "shutdown-write")
}

fn client_shuts_down_both_ways(bed: &mut Bed) -> Result<Vec<Value>> {
    shut_down(bed, "shutdown-both")
}

/// The descriptor outlives the connection; closing it causes no line.
fn shut_down(bed: &mut Bed, how: &str) -> Result<Vec<Value>> {
    let this = in_function("shutdown", "peer_shuts_socket_outer");
    let lines = in_order(bed, Side::Client, order(how), this)?;
    bed.peer(Side::Client).ask("receive-end")?;
    bed.peer(Side::Client).ask("close")?;
    Ok(lines)
}

/// The answer comes between the two acts, and nobody reads it.
fn client_shuts_down_and_discards_the_answer(bed: &mut Bed) -> Result<Vec<Value>> {
    let mut connection = bed.idle()?;
    bed.transfer(&mut connection, Side::Client, 1000)?;
    bed.peer(Side::Client).ask("shutdown-write")?;
    bed.peer(Side::Server).ask("receive-end")?;
    bed.send(&mut connection, Side::Server, 300)?;
    bed.peer(Side::Client).ask("await-data 300")?;
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("await-error")?;
    let client = json!({
        "closed_by": "local",
        "ended": "reset_sent",
        "trigger": "shutdown",
        "cause": "unread_data",
        "unread_bytes": 300,
        "since_received_ms": null,
        "last_data": "sent",
        "states": path(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]),
        "stack": user_stack("peer_shuts_socket_outer"),
        "acts": bed.shut_and_closed(),
    });
    let sent = json!({
        "direction": "sent",
        "cause": "unread_data",
        "reason": reason(json!("TCP_ABORT_ON_CLOSE")),
        "state": "FIN_WAIT2",
        "unread_bytes": 300,
        "last_data": one_of(&[json!(null), json!("received")]),
        "stack": user_stack("peer_closes_socket_outer"),
    });
    let mut lines = vec![
        bed.close_line(&connection, Side::Client, client)?,
        bed.reset_line(&connection, Side::Client, sent)?,
    ];
    let [mut close, reset] = <[Value; 2]>::try_from(reset_in_close_wait(bed, &connection, Side::Server)?)
        .map_err(|lines| anyhow::anyhow!("{lines:?}"))?;
    // The client's first act came before the answer.
    close = but(close, json!({"last_data": "received", "since_sent_ms": null}));
    lines.extend([close, reset]);
    Ok(lines)
}

fn client_exits(bed: &mut Bed) -> Result<Vec<Value>> {
    die(bed, json!({"trigger": "exit"}), |peer| {
        let status = peer.end_by("exit 3")?;
        ensure!(status.code() == Some(3), "the client ended with {status}");
        Ok(())
    })
}

fn client_is_killed(bed: &mut Bed) -> Result<Vec<Value>> {
    die_of(bed, Signal::SIGKILL, &this_process()?, |peer| peer.kill(Signal::SIGKILL))
}

/// The handler cleans up and sends the signal again, to its own process. That one is deadly.
fn client_is_terminated_by_its_handler(bed: &mut Bed) -> Result<Vec<Value>> {
    die_of(bed, Signal::SIGTERM, &this_process()?, |peer| {
        peer.ask("send-on SIGTERM")?;
        peer.kill(Signal::SIGTERM)
    })
}

/// The test as the sender of a signal.
fn this_process() -> Result<Value> {
    Ok(json!({
        "pid": std::process::id(),
        "comm": std::fs::read_to_string("/proc/self/comm")?.trim_end(),
        "uid": nix::unistd::getuid().as_raw(),
    }))
}

/// `raise()` sends the signal like any other, from the process to itself.
fn client_faults(bed: &mut Bed) -> Result<Vec<Value>> {
    let itself = itself(bed)?;
    die_of(bed, Signal::SIGSEGV, &itself, |peer| peer.end_by("raise SIGSEGV").map(drop))
}

fn client_aborts(bed: &mut Bed) -> Result<Vec<Value>> {
    let itself = itself(bed)?;
    die_of(bed, Signal::SIGABRT, &itself, |peer| peer.end_by("raise SIGABRT").map(drop))
}

/// The client as the sender of a signal.
fn itself(bed: &Bed) -> Result<Value> {
    let client = bed.owner(Side::Client)?;
    Ok(json!({"pid": client["pid"], "comm": client["comm"], "uid": client["uid"]}))
}

fn die_of(
    bed: &mut Bed,
    signal: Signal,
    from: &Value,
    act: fn(&mut Peer) -> Result<()>,
) -> Result<Vec<Value>> {
    die(bed, json!({"trigger": "signal", "signal": signal.as_str(), "signal_from": from}), act)
}

/// The process has no memory any more when its socket is closed, so there is no user stack. Its program and
/// the names of its functions are known only if the tool has read `/proc` in time.
fn die(bed: &mut Bed, this: Value, act: impl FnOnce(&mut Peer) -> Result<()>) -> Result<Vec<Value>> {
    let program = json!({"exe": one_of(&[json!(null), json!(bed.peer(Side::Client).exe()?)])});
    let gone = json!({
        "process": program,
        "opener": {"process": program, "stack": known()},
        "stack": one_of(&[json!(null), json!({"user": null, "kernel": null})]),
    });
    in_order(bed, Side::Client, |peer| act(peer).map(|()| json!({})), but(gone, this))
}

fn client_replaces_descriptor(bed: &mut Bed) -> Result<Vec<Value>> {
    in_order(bed, Side::Client, order("dup2-over"), in_function("dup", "peer_replaces_socket_outer"))
}

fn client_closes_range(bed: &mut Bed) -> Result<Vec<Value>> {
    in_order(bed, Side::Client, order("close-range"), in_function("close_range", "peer_closes_range_outer"))
}

/// When the kernel closes the socket, the process already has the name and the registers of the new program.
/// Its stack, if there is one, is the entry point of that program. The functions in which the old program
/// connected are known only if the tool has read its mappings before.
fn client_becomes_another_program(bed: &mut Bed) -> Result<Vec<Value>> {
    let name = bed.peer(Side::Client).name()?;
    let this = json!({
        "trigger": "exec",
        "process": {"comm": one_of(&[json!(name), json!("peer")])},
        "opener": {"stack": known()},
        "stack": one_of(&[json!(null), json!({"user": [{"inlined": false}], "kernel": null})]),
    });
    in_order(bed, Side::Client, order("exec"), this)
}

fn client_closes_on_thread(bed: &mut Bed) -> Result<Vec<Value>> {
    let close = |peer: &mut Peer| {
        let facts = peer.ask("thread-close")?;
        Ok(json!({"process": {"tid": facts.get::<u32>("tid")?, "thread": facts.get::<String>("name")?}}))
    };
    in_order(bed, Side::Client, close, in_function("close", "peer_closes_socket_outer"))
}

/// The server's own `close()` does not end the connection, because its child still holds it.
fn child_of_server_closes(bed: &mut Bed) -> Result<Vec<Value>> {
    let close = |peer: &mut Peer| {
        let child: u32 = peer.ask("fork-close")?.get("child")?;
        Ok(json!({"process": {"pid": child, "tid": child}}))
    };
    in_order(bed, Side::Server, close, in_function("close", "peer_closes_socket_outer"))
}

fn client_closes_with_unread_data(bed: &mut Bed) -> Result<Vec<Value>> {
    close_with_unread_data(bed, Side::Client)
}

fn server_closes_with_unread_data(bed: &mut Bed) -> Result<Vec<Value>> {
    close_with_unread_data(bed, Side::Server)
}

/// The other end is idle, and its owner must still be known. Its late `close()` causes no line.
fn close_with_unread_data(bed: &mut Bed, side: Side) -> Result<Vec<Value>> {
    let mut connection = bed.established()?;
    bed.send(&mut connection, side.other(), 200)?;
    bed.peer(side).ask("await-data 200")?;
    bed.peer(side).ask("close")?;
    let reason = reason(json!("TCP_ABORT_ON_CLOSE"));
    let sender = json!({"cause": "unread_data", "reason": reason, "unread_bytes": 200});
    // The ACK of the data may be delayed, and the RST comes before it then.
    let receiver = json!({"unacked_bytes": one_of(&[json!(0), json!(200)])});
    let lines = reset_lines(bed, &connection, side, &sender, &receiver)?;
    bed.peer(side.other()).ask("await-error")?;
    bed.peer(side.other()).ask("close")?;
    Ok(lines)
}

fn client_lingers_not(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    aborted(bed, &connection, Side::Client)
}

fn server_lingers_not(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    aborted(bed, &connection, Side::Server)
}

/// Makes the client shut down its write direction, and waits until that is acknowledged.
fn half_closed(bed: &mut Bed) -> Result<Connection> {
    let connection = bed.established()?;
    bed.peer(Side::Client).ask("shutdown-write")?;
    sockets::wait_until_in(bed, &connection, Side::Client, FIN_WAIT2)?;
    Ok(connection)
}

/// The FIN has been acknowledged, so the close only waits for the peer: it causes no line and no RST.
fn client_closes_what_it_shut_down(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = half_closed(bed)?;
    bed.peer(Side::Client).ask("close")?;
    let acts = json!({"acts": bed.shut_and_closed()});
    let this = but(in_function("shutdown", "peer_shuts_socket_outer"), acts);
    orderly_lines(bed, &connection, Side::Client, this)
}

fn client_lingers_not_after_shutdown(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = half_closed(bed)?;
    for order in ["linger0", "close"] {
        bed.peer(Side::Client).ask(order)?;
    }
    bed.peer(Side::Server).ask("await-error")?;
    let stack = user_stack("peer_shuts_socket_outer");
    let close = json!({
        "closed_by": "local",
        "ended": "reset_sent",
        "trigger": "shutdown",
        "cause": "linger_zero",
        "states": path(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]),
        "stack": stack,
        "acts": bed.shut_and_closed(),
    });
    let stack = user_stack("peer_closes_socket_outer");
    let reset = json!({"direction": "sent", "cause": "linger_zero", "state": "FIN_WAIT2", "stack": stack});
    let mut lines = vec![
        bed.close_line(&connection, Side::Client, close)?,
        bed.reset_line(&connection, Side::Client, reset)?,
    ];
    lines.extend(reset_in_close_wait(bed, &connection, Side::Server)?);
    Ok(lines)
}

/// There is nothing to linger for, because the peer answers.
fn client_lingers_without_need(bed: &mut Bed) -> Result<Vec<Value>> {
    const SECONDS: u32 = 60;
    let this = in_function("close", "peer_closes_socket_outer");
    let lingers = |peer: &mut Peer| {
        peer.ask(&format!("linger {SECONDS}"))?;
        peer.ask("close").map(|_| json!({}))
    };
    in_order(bed, Side::Client, lingers, this)
}

/// The peer's FIN arrives first, after data.
fn client_closes_with_unread_data_and_end(bed: &mut Bed) -> Result<Vec<Value>> {
    let mut connection = bed.established()?;
    bed.send(&mut connection, Side::Server, 200)?;
    bed.peer(Side::Server).ask("shutdown-write")?;
    sockets::wait_until_in(bed, &connection, Side::Server, FIN_WAIT2)?;
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("await-error")?;
    let stack = user_stack("peer_closes_socket_outer");
    let close = json!({
        "closed_by": "peer",
        "ended": "reset_sent",
        "trigger": "close",
        "cause": "unread_data",
        "unread_bytes": 200,
        "close_wait_ms": known(),
        "states": path(&["ESTABLISHED", "CLOSE_WAIT", "CLOSE"]),
        "stack": stack,
    });
    let sent = json!({
        "direction": "sent",
        "cause": "unread_data",
        "reason": reason(json!("TCP_ABORT_ON_CLOSE")),
        "state": "CLOSE_WAIT",
        "unread_bytes": 200,
        "stack": stack,
    });
    let suffered = json!({
        "closed_by": "local",
        "ended": "reset_received",
        "trigger": "shutdown",
        "cause": "peer_reset",
        "states": path(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]),
        "stack": user_stack("peer_shuts_socket_outer"),
    });
    let received =
        json!({"direction": "received", "cause": "peer_reset", "state": "FIN_WAIT2", "stack": null});
    Ok(vec![
        bed.close_line(&connection, Side::Client, close)?,
        bed.reset_line(&connection, Side::Client, sent)?,
        bed.close_line(&connection, Side::Server, suffered)?,
        bed.reset_line(&connection, Side::Server, received)?,
    ])
}

/// A program that has migrated the connection to another host does this. Nothing is sent, and the peer learns
/// nothing.
fn client_closes_under_repair(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    for order in ["repair", "close"] {
        bed.peer(Side::Client).ask(order)?;
    }
    let this = json!({
        "closed_by": "local",
        "ended": null,
        "cause": "unknown",
        "states": path(&["ESTABLISHED", "CLOSE"]),
    });
    let this = but(in_function("close", "peer_closes_socket_outer"), this);
    let mut lines = vec![bed.close_line(&connection, Side::Client, this)?];
    lines.extend(fin_without_socket(bed, &connection)?);
    Ok(lines)
}

/// The client's data is sent with its SYN.
fn client_connects_with_data(bed: &mut Bed) -> Result<Vec<Value>> {
    const BYTES: u64 = 10;
    /// Allows both sides TCP Fast Open without a cookie (`Documentation/networking/ip-sysctl.rst`).
    const WITHOUT_COOKIE: &str = "519";
    let server = bed.listen()?;
    for side in [Side::Client, Side::Server] {
        bed.namespace(side).set_sysctl("net/ipv4/tcp_fastopen", WITHOUT_COOKIE)?;
    }
    bed.peer(Side::Server).ask("accept-fast 16")?;
    let connect = format!("connect-fast {} {} {BYTES}", server.ip(), server.port());
    let facts = bed.peer(Side::Client).ask(&connect)?;
    let mut connection = Connection::new(facts.get("local")?, server);
    connection.note_sent(Side::Client, BYTES);
    bed.peer(Side::Server).ask("accept")?;
    bed.peer(Side::Server).ask(&format!("receive {BYTES}"))?;
    bed.peer(Side::Client).ask("close")?;
    let this = in_function("close", "peer_closes_socket_outer");
    let mut lines = orderly_lines(bed, &connection, Side::Client, this)?;
    lines[0]["opener"]["stack"] = user_stack("peer_connects_fast_outer");
    Ok(lines)
}

/// Both ends of the connection are the same socket.
fn client_connects_to_itself(bed: &mut Bed) -> Result<Vec<Value>> {
    let address = bed.route().written(bed.route().address(Side::Client));
    let facts = bed.peer(Side::Client).ask(&format!("connect-to-itself {address} 0"))?;
    let mut connection = Connection::new(facts.get("local")?, facts.get("local")?);
    for (order, side) in [("send 10", Side::Client), ("receive 10", Side::Server)] {
        bed.peer(Side::Client).ask(order)?;
        connection.note_sent(side, 10);
    }
    bed.peer(Side::Client).ask("close")?;
    let states = ["SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT1", "CLOSING", "CLOSE"];
    let this = json!({"closed_by": "both", "ended": "fin", "states": path(&states)});
    let this = but(in_function("close", "peer_closes_socket_outer"), this);
    Ok(vec![bed.close_line(&connection, Side::Client, this)?])
}

/// Each FIN is in flight when the other is sent.
fn both_close_at_once(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    for side in [Side::Client, Side::Server] {
        bed.hold(side)?;
    }
    for side in [Side::Client, Side::Server] {
        bed.peer(side).ask("close")?;
    }
    for side in [Side::Client, Side::Server] {
        bed.release(side)?;
    }
    let this = json!({
        "closed_by": "both",
        "ended": "fin",
        "states": path(&["ESTABLISHED", "FIN_WAIT1", "CLOSING", "CLOSE"]),
    });
    let this = but(in_function("close", "peer_closes_socket_outer"), this);
    Ok(vec![
        bed.close_line(&connection, Side::Client, this.clone())?,
        bed.close_line(&connection, Side::Server, this)?,
    ])
}

/// `connect()` is not one of the triggers, although this process acted.
fn client_disconnects(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    bed.peer(Side::Client).ask("disconnect")?;
    bed.peer(Side::Client).ask("close")?;
    let stack = user_stack("peer_disconnects_socket_outer");
    let sender = json!({
        "trigger": null,
        "cause": "disconnect",
        "reason": reason(known()),
        "process": {"attribution": "syscall"},
        "stack": stack,
    });
    reset_lines(bed, &connection, Side::Client, &sender, &json!({}))
}

/// The client has shut down its read direction, so its host answers data with a RST. The tracepoint of
/// received RSTs fires as well, but there is only one RST.
fn data_comes_after_shutdown(bed: &mut Bed) -> Result<Vec<Value>> {
    let mut connection = bed.established()?;
    bed.peer(Side::Client).ask("shutdown-both")?;
    bed.peer(Side::Server).ask("receive-end")?;
    let before = connection.clone();
    bed.send(&mut connection, Side::Server, 50)?;
    bed.peer(Side::Server).ask("await-error")?;
    let acted = but(
        in_function("shutdown", "peer_shuts_socket_outer"),
        json!({
            "closed_by": "local",
            "ended": "reset_sent",
            "cause": "data_after_close",
            "states": path(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]),
        }),
    );
    let mut lines = vec![
        // Data that arrives too late does not count as received.
        bed.close_line(&before, Side::Client, acted)?,
        bed.reset_line(
            &before,
            Side::Client,
            json!({
                "direction": "sent",
                "cause": "data_after_close",
                "reason": reason(json!("TCP_ABORT_ON_DATA")),
            }),
        )?,
    ];
    let lost = json!({"unacked_bytes": 50});
    let server = reset_in_close_wait(bed, &connection, Side::Server)?;
    lines.extend(server.into_iter().map(|line| but(line, lost.clone())));
    Ok(lines)
}

/// The RST that refuses has no socket and hence no process; the refused end has both.
fn nobody_listens(bed: &mut Bed) -> Result<Vec<Value>> {
    const PORT: u16 = 7;
    let attempt = bed.connect_and_fail(bed.route().address(Side::Server), PORT, "ECONNREFUSED")?;
    let refused = json!({
        "closed_by": "peer",
        "ended": "reset_received",
        "cause": "refused",
        "process": {"attribution": one_of(&[json!("connect"), json!("syscall")])},
        "connection": {
            "opened": null,
            "age_ms": null,
            "bytes_sent": one_of(&[json!(null), json!(0)]),
            "bytes_received": one_of(&[json!(null), json!(0)]),
            "rtt_us": null,
        },
        "states": path(&["SYN_SENT", "CLOSE"]),
    });
    let received = json!({
        "direction": "received",
        "cause": "refused",
        "state": "SYN_SENT",
        "connection": {"opened": null},
    });
    let sent = json!({
        "direction": "sent",
        "cause": "no_listener",
        "reason": reason(json!("NO_SOCKET")),
        "state": null,
        "process": null,
        "opener": null,
        "stack": null,
        "unread_bytes": null,
        "unacked_bytes": null,
        "connection": {"role": null, "opened": null, "bytes_sent": null, "cookie": null},
    });
    Ok(vec![
        bed.close_line(&attempt, Side::Client, refused)?,
        bed.reset_line(&attempt, Side::Client, received)?,
        bed.reset_line(&attempt, Side::Server, sent)?,
    ])
}

/// No process has ever had a descriptor of the server's end.
fn listener_closes_before_accepting(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.connect()?;
    bed.peer(Side::Server).ask("await-client")?;
    bed.peer(Side::Server).ask("close-listener")?;
    let sender = json!({
        "cause": "listener_closed",
        "reason": reason(known()),
        "process": {"attribution": one_of(&[json!("syscall"), json!("listener")])},
        "opener": null,
    });
    reset_lines(bed, &connection, Side::Server, &sender, &json!({}))
}

/// `ss` acts on the socket, but the socket belongs to the client.
fn somebody_destroys_it(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    let port = connection.address(Side::Client).port().to_string();
    destroy(bed, Side::Client, &["sport", "=", &port])?;
    bed.peer(Side::Client).ask("await-error")?;
    reset_lines(bed, &connection, Side::Client, &destroyed_by_ss(), &json!({}))
}

/// `ss` destroys the listener. The connection in its accept queue is destroyed with it, and belongs to the
/// listener's process.
fn somebody_destroys_listener(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.connect()?;
    bed.peer(Side::Server).ask("await-client")?;
    let port = connection.address(Side::Server).port().to_string();
    destroy(bed, Side::Server, &["--listening", "sport", "=", &port])?;
    bed.peer(Side::Client).ask("await-error")?;
    let server = bed.owner(Side::Server)?;
    let unaccepted = json!({
        "process": {"tid": one_of(&[json!(null), server["tid"].clone()]), "attribution": "listener"},
        "opener": null,
    });
    reset_lines(bed, &connection, Side::Server, &but(destroyed_by_ss(), unaccepted), &json!({}))
}

/// What the close line of the side whose socket `ss` has destroyed says of that.
fn destroyed_by_ss() -> Value {
    json!({
        "closed_by": "admin",
        "ended": one_of(&[json!("destroyed"), json!("reset_sent")]),
        "trigger": null,
        "cause": "destroyed",
        "destroyed_by": {"comm": "ss", "thread": "ss"},
        "reason": reason(known()),
        "stack": null,
    })
}

/// Destroys sockets of this kind on a side's host with `ss`.
fn destroy(bed: &Bed, side: Side, what: &[&str]) -> Result<()> {
    let mut ss = std::process::Command::new("ss");
    ss.args(["--kill", "--tcp", "--numeric"]).args(what);
    bed.namespace(side).enter(&mut ss)?;
    netns::run(&mut ss).map(drop)
}

fn older_connection_closes(bed: &mut Bed, connection: &Connection) -> Result<Vec<Value>> {
    bed.peer(Side::Client).ask("close")?;
    let this = in_function("close", "peer_closes_socket_outer");
    Ok(unseen(orderly_lines(bed, connection, Side::Client, this)?))
}

/// The close changes no state, but it shows the owner, and where in its code. Times that began before the trace
/// are not known.
fn older_half_closed_connection_closes(bed: &mut Bed, connection: &Connection) -> Result<Vec<Value>> {
    bed.peer(Side::Client).ask("close")?;
    let this = in_function("close", "peer_closes_socket_outer");
    let mut lines = unseen(orderly_lines(bed, connection, Side::Client, this)?);
    for line in &mut lines {
        for time in ["idle_ms", "since_sent_ms", "since_received_ms", "close_wait_ms"] {
            line[time] = Value::Null;
        }
    }
    lines[0]["states"] = path(&["FIN_WAIT2", "CLOSE"]);
    lines[0]["acts"][0]["at_ms"] = Value::Null;
    lines[1]["states"] = path(&["CLOSE_WAIT", "LAST_ACK", "CLOSE"]);
    Ok(lines)
}

/// The server is idle; only `/proc` shows that it owns the socket.
fn older_connection_is_reset(bed: &mut Bed, connection: &Connection) -> Result<Vec<Value>> {
    let mut lines = unseen(aborted(bed, connection, Side::Client)?);
    for line in &mut lines[2..] {
        line["process"]["attribution"] = json!("descriptors");
    }
    Ok(lines)
}

/// The tool has not seen the process before, and the thread that is left has a name of its own. The main
/// thread is a zombie by then. Its name can be read at that moment only with the kernel's types.
fn older_connection_dies_with_a_thread(bed: &mut Bed, connection: &Connection) -> Result<Vec<Value>> {
    let mut names = vec![json!(bed.peer(Side::Client).name()?)];
    names.extend((!Feature::Types.is_here()).then_some(json!("peer-last")));
    let this = json!({
        "trigger": "signal",
        "signal": "SIGKILL",
        "signal_from": itself(bed)?,
        "process": {
            "tid": known(), "thread": "peer-last", "comm": one_of(&names),
            "exe": one_of(&[json!(null), known()]),
        },
        "stack": one_of(&[json!(null), json!({"user": null, "kernel": null})]),
    });
    bed.peer(Side::Client).end_by("die-in-thread SIGKILL")?;
    Ok(unseen(orderly_lines(bed, connection, Side::Client, this)?))
}

/// The lines of a connection whose handshake precedes the trace. Its role may be inferred from the ports.
fn unseen(lines: Vec<Value>) -> Vec<Value> {
    let mut lines: Vec<Value> = lines
        .into_iter()
        .map(|line| {
            let role = one_of(&[json!(null), line["connection"]["role"].clone()]);
            but(line, json!({"connection": {"opened": null, "age_ms": null, "role": role}, "opener": null}))
        })
        .collect();
    for line in lines.iter_mut().filter(|line| line["event"] == "close") {
        line["states"] = path(&["CLOSE"]);
    }
    lines
}
