//! RSTs and ends of connections that no application caused: segments that belong to no socket, overflowing
//! queues, and firewalls that answer in place of a host.

use std::{net::SocketAddr, process::Command};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Connection, Route, Side, endpoint, user_stack},
    expect::{but, known, one_of, path},
    features::reason,
    netns,
    packet::{self, Segment},
    scenario::{
        Trace, ended_by_icmp, fin_without_socket, never_established, reset_in_close_wait, reset_lines,
        reset_without_socket, run,
    },
    scenarios,
    snmp::Counters,
    sockets::{self, FIN_WAIT2},
    until,
};

scenarios! {
    run on [loopback_ipv4 loopback_ipv6 loopback_mapped veth_ipv4 veth_ipv6 veth_mapped]:
    ack_comes_to_listener
}

scenarios! {
    run on [loopback_ipv4 loopback_ipv6 veth_ipv4 veth_ipv6]:
    ack_comes_without_listener
    data_comes_to_time_wait
    data_comes_after_time_wait
    data_comes_to_orphan
    accept_queue_overflows
    accept_queue_overflows_silently
    listener_dies_before_accepting
    client_resets_before_accepting
}

scenarios! {
    run on [loopback_ipv4 loopback_ipv6 veth_ipv4 veth_ipv6]:
    firewall_refuses_connection
    firewall_resets_connection
    firewall_says_unreachable
}

scenarios! {
    run_older on [loopback_ipv4 veth_ipv6]:
    ack_comes_to_older_listener
}

/// Runs a scenario on a listener that is older than the trace.
fn run_older(route: Route, scenario: fn(&mut Bed, SocketAddr) -> Result<Vec<Value>>) -> Result<()> {
    let mut bed = Bed::new(route)?;
    let listener = bed.listen()?;
    let trace = Trace::alone(&bed, &[])?;
    let expected = scenario(&mut bed, listener)?;
    trace.verify(&bed, expected)
}

/// The source port of a segment that no socket has sent.
const STRAY_PORT: u16 = 9;

/// Sends a bare ACK from the client's host to a port of the server.
fn send_stray_ack(bed: &Bed, port: u16) -> Result<Connection> {
    let from = SocketAddr::new(bed.route().address(Side::Client), STRAY_PORT);
    let to = SocketAddr::new(bed.route().address(Side::Server), port);
    let segment = Segment { from, to, flags: packet::ACK, sequence: 1000, ttl: None };
    packet::send(bed.namespace(Side::Client), segment)?;
    Ok(Connection::new(from, to))
}

/// The line of a RST that the server's host sent outside any connection.
fn answer(bed: &Bed, connection: &Connection, this: Value) -> Result<Value> {
    let nothing = one_of(&[json!(null), json!(0)]);
    let line = json!({
        "direction": "sent",
        "connection": {
            "role": one_of(&[json!(null), json!("server")]),
            "opened": null,
            "age_ms": null,
            "bytes_sent": nothing,
            "bytes_received": nothing,
        },
        "idle_ms": null,
        "last_data": null,
        "unread_bytes": nothing,
        "unacked_bytes": nothing,
        "opener": null,
        "stack": null,
    });
    bed.reset_line(connection, Side::Server, but(line, this))
}

/// Same as [`answer`], for a RST that the listener's socket sent.
fn answer_of_listener(bed: &Bed, connection: &Connection, this: Value) -> Result<Value> {
    let tid = bed.owner(Side::Server)?["tid"].clone();
    let listener = json!({
        "state": "LISTEN",
        "process": {"tid": one_of(&[json!(null), tid]), "attribution": "listener"},
    });
    answer(bed, connection, but(listener, this))
}

fn ack_comes_to_listener(bed: &mut Bed) -> Result<Vec<Value>> {
    let listener = bed.listen()?;
    ack_comes_to_older_listener(bed, listener)
}

fn ack_comes_to_older_listener(bed: &mut Bed, listener: SocketAddr) -> Result<Vec<Value>> {
    let stray = send_stray_ack(bed, listener.port())?;
    let this = json!({"cause": "invalid_segment", "reason": reason(json!("TCP_FLAGS"))});
    Ok(vec![answer_of_listener(bed, &stray, this)?])
}

fn ack_comes_without_listener(bed: &mut Bed) -> Result<Vec<Value>> {
    let stray = send_stray_ack(bed, 7)?;
    let this = json!({
        "cause": "no_listener",
        "reason": reason(json!("NO_SOCKET")),
        "state": null,
        "process": null,
    });
    Ok(vec![answer(bed, &stray, this)?])
}

/// Makes the client close, waits until its end has reached the given state, and then makes the server send.
/// Returns the connection including the data sent.
fn server_sends_late(
    bed: &mut Bed,
    before: &Connection,
    wait: impl FnOnce(&Bed) -> Result<()>,
) -> Result<Connection> {
    let mut connection = before.clone();
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("receive-end")?;
    wait(bed)?;
    bed.send(&mut connection, Side::Server, LATE)?;
    bed.peer(Side::Server).ask("await-error")?;
    Ok(connection)
}

/// How many bytes a server sends to a client that has closed.
const LATE: u64 = 50;

/// The lines of that server's end.
fn late_sender_is_reset(bed: &Bed, connection: &Connection) -> Result<Vec<Value>> {
    let lines = reset_in_close_wait(bed, connection, Side::Server)?.into_iter();
    Ok(lines.map(|line| but(line, json!({"unacked_bytes": LATE}))).collect())
}

/// The server sends although the client has closed and only a `TIME_WAIT` entry remains of its socket.
fn data_comes_to_time_wait(bed: &mut Bed) -> Result<Vec<Value>> {
    let before = bed.established()?;
    // The server's host may delay the acknowledgement of the FIN.
    let connection =
        server_sends_late(bed, &before, |bed| sockets::wait_until_in(bed, &before, Side::Client, FIN_WAIT2))?;
    // The entry has the addresses, but not the owner of the socket, unless the tool has remembered it.
    let owner = bed.owner(Side::Client)?;
    let answer = json!({
        "event": "reset",
        "direction": "sent",
        "cause": one_of(&[json!("timewait"), json!("data_after_close")]),
        "reason": reason(json!("TCP_TIMEWAIT_SOCKET")),
        "state": "TIME_WAIT",
        "process": one_of(&[json!(null), owner]),
        "connection": {
            "local": endpoint(connection.address(Side::Client)),
            "remote": endpoint(connection.address(Side::Server)),
            "netns": bed.namespace(Side::Client).inode(),
            "role": one_of(&[json!(null), json!("client")]),
            "bytes_sent": one_of(&[json!(null), json!(1000)]),
            "bytes_received": one_of(&[json!(null), json!(300)]),
        },
        "stack": null,
    });
    let mut lines = vec![bed.close_line(&before, Side::Client, closed_by_client("fin", None))?, answer];
    lines.extend(late_sender_is_reset(bed, &connection)?);
    Ok(lines)
}

/// The client has closed, and its `TIME_WAIT` entry has expired when the server sends.
fn data_comes_after_time_wait(bed: &mut Bed) -> Result<Vec<Value>> {
    let before = bed.established()?;
    bed.peer(Side::Client).ask("fin-wait2 1")?;
    let connection = server_sends_late(bed, &before, |bed| {
        sockets::wait_for(bed, &before, Side::Client, "nothing is left of the client's end", <[_]>::is_empty)
    })?;
    let mut lines = vec![
        bed.close_line(&before, Side::Client, closed_by_client("fin", None))?,
        reset_without_socket(bed, &before, Side::Client),
    ];
    lines.extend(late_sender_is_reset(bed, &connection)?);
    Ok(lines)
}

/// The client has closed, and the kernel keeps its full socket, because it may wait for the server longer
/// than `TIME_WAIT` lasts.
fn data_comes_to_orphan(bed: &mut Bed) -> Result<Vec<Value>> {
    bed.namespace(Side::Client).set_sysctl("net/ipv4/tcp_fin_timeout", "120")?;
    let before = bed.established()?;
    let connection =
        server_sends_late(bed, &before, |bed| sockets::wait_until_in(bed, &before, Side::Client, FIN_WAIT2))?;
    let sent = json!({
        "direction": "sent",
        "cause": "data_after_close",
        "reason": reason(json!("TCP_ABORT_ON_DATA")),
        "state": "FIN_WAIT2",
        "stack": null,
    });
    let mut lines = vec![
        bed.close_line(&before, Side::Client, closed_by_client("reset_sent", Some("data_after_close")))?,
        bed.reset_line(&before, Side::Client, sent)?,
    ];
    lines.extend(late_sender_is_reset(bed, &connection)?);
    Ok(lines)
}

/// The close of a client's end that was closed by the client and whose FIN was acknowledged.
fn closed_by_client(ended: &str, cause: Option<&str>) -> Value {
    json!({
        "closed_by": "local",
        "ended": ended,
        "trigger": "close",
        "cause": cause,
        "states": path(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]),
        "stack": user_stack("peer_closes_socket_outer"),
    })
}

/// The lines of the client's end of a connection that the server's host has reset.
fn client_is_reset(bed: &Bed, connection: &Connection, child: Option<u32>) -> Result<Vec<Value>> {
    let process =
        child.map_or(json!({}), |pid| json!({"pid": pid, "tid": one_of(&[json!(null), json!(pid)])}));
    let opener = child.map_or(json!({}), |pid| json!({"pid": pid, "tid": pid}));
    let both = json!({"cause": "peer_reset", "process": process, "opener": {"process": opener}});
    let close = json!({
        "closed_by": "peer",
        "ended": "reset_received",
        "states": path(&["ESTABLISHED", "CLOSE"]),
    });
    let reset = json!({"direction": "received", "state": "ESTABLISHED", "stack": null});
    Ok(vec![
        bed.close_line(connection, Side::Client, but(both.clone(), close))?,
        bed.reset_line(connection, Side::Client, but(both, reset))?,
    ])
}

/// Two connections that the server defers until the clients send data. Then there is room for only one in the
/// accept queue. Returns that one, the other, and the child of the client that holds the other.
fn overflowing(bed: &mut Bed) -> Result<(Connection, Connection, u32)> {
    const SECONDS: u32 = 60;
    let second = bed.peer(Side::Client).fork()?;
    let server = bed.listen()?;
    bed.peer(Side::Server).ask(&format!("defer-accept {SECONDS}"))?;
    let connect = format!("connect {} {}", server.ip(), server.port());
    let local = bed.peer(Side::Client).ask(&connect)?.get("local")?;
    let mut queued = Connection::new(local, server);
    let local = bed.peer(Side::Client).ask_child(second, &connect)?.get("local")?;
    let refused = Connection::new(local, server);

    bed.peer(Side::Server).ask("backlog 0")?;
    bed.send(&mut queued, Side::Client, 10)?;
    bed.peer(Side::Server).ask("await-client")?;
    bed.peer(Side::Client).ask_child(second, "send 10")?;
    Ok((queued, refused, second))
}

/// The lines of a client's end that has sent data to a server which never had the connection.
fn client_sent_and_is_reset(bed: &Bed, connection: &Connection, child: u32) -> Result<Vec<Value>> {
    let sent =
        json!({"idle_ms": known(), "last_data": "sent", "since_sent_ms": known(), "unacked_bytes": 10});
    let sent_bytes = but(sent.clone(), json!({"connection": {"bytes_sent": one_of(&[json!(0), json!(10)])}}));
    let lines = client_is_reset(bed, connection, Some(child))?.into_iter();
    let expected = lines.map(|line| {
        let more = if line["event"] == "close" { &sent_bytes } else { &sent };
        but(line, more.clone())
    });
    Ok(expected.collect())
}

fn accept_queue_overflows(bed: &mut Bed) -> Result<Vec<Value>> {
    bed.namespace(Side::Server).set_sysctl("net/ipv4/tcp_abort_on_overflow", "1")?;
    let (queued, refused, second) = overflowing(bed)?;
    bed.peer(Side::Client).ask_child(second, "await-error")?;

    let overflow = json!({"cause": "accept_overflow", "reason": reason(json!("INVALID_SYN"))});
    let mut lines = vec![answer_of_listener(bed, &refused, overflow)?];
    lines.extend(client_sent_and_is_reset(bed, &refused, second)?);

    bed.peer(Side::Server).ask("accept")?;
    for order in ["receive 10", "linger0", "close"] {
        bed.peer(Side::Server).ask(order)?;
    }
    let by_server = json!({"cause": "linger_zero"});
    lines.extend(reset_lines(bed, &queued, Side::Server, &by_server, &json!({}))?);
    Ok(lines)
}

/// By default the kernel drops what does not fit into the queue, and the client continues as long as the
/// listener exists.
fn accept_queue_overflows_silently(bed: &mut Bed) -> Result<Vec<Value>> {
    let before = Counters::read(bed.namespace(Side::Server))?;
    let (queued, refused, second) = overflowing(bed)?;
    until("the kernel has dropped what there is no room for", || {
        let dropped = Counters::read(bed.namespace(Side::Server))?.since(&before, "TcpExtListenOverflows")?;
        Ok((dropped > 0).then_some(()))
    })?;
    bed.peer(Side::Server).ask("close-listener")?;
    bed.peer(Side::Client).ask_child(second, "await-error")?;
    let closed = json!({
        "cause": "listener_closed",
        "process": {"attribution": one_of(&[json!("syscall"), json!("listener")])},
        "opener": null,
        "unread_bytes": 10,
    });
    let mut lines = reset_lines(bed, &queued, Side::Server, &closed, &json!({}))?;
    lines.push(reset_without_socket(bed, &refused, Side::Server));
    lines.extend(client_sent_and_is_reset(bed, &refused, second)?);
    Ok(lines)
}

/// When the listening process dies, all connections that it has not accepted are reset.
fn listener_dies_before_accepting(bed: &mut Bed) -> Result<Vec<Value>> {
    let second = bed.peer(Side::Client).fork()?;
    let server = bed.listen()?;
    let connect = format!("connect {} {}", server.ip(), server.port());
    let local = bed.peer(Side::Client).ask(&connect)?.get("local")?;
    let first_connection = Connection::new(local, server);
    let local = bed.peer(Side::Client).ask_child(second, &connect)?.get("local")?;
    let second_connection = Connection::new(local, server);
    bed.peer(Side::Server).ask("await-client")?;
    bed.peer(Side::Server).kill(Signal::SIGKILL)?;
    bed.peer(Side::Client).ask("await-error")?;
    bed.peer(Side::Client).ask_child(second, "await-error")?;

    let exe = one_of(&[json!(null), bed.owner(Side::Server)?["exe"].clone()]);
    let attribution = one_of(&[json!("syscall"), json!("listener")]);
    let died = json!({
        "cause": "listener_closed",
        "process": {"exe": exe, "attribution": attribution},
        "opener": null,
        "stack": one_of(&[json!(null), json!({"user": null, "kernel": null})]),
    });
    let close = json!({
        "closed_by": "local",
        "ended": "reset_sent",
        "trigger": "signal",
        "signal": "SIGKILL",
        "signal_from": {"pid": std::process::id()},
        "states": path(&["ESTABLISHED", "CLOSE"]),
    });
    let mut lines = Vec::new();
    for (connection, child) in [(first_connection, None), (second_connection, Some(second))] {
        lines.push(bed.close_line(&connection, Side::Server, but(died.clone(), close.clone()))?);
        let reset = json!({"direction": "sent", "reason": reason(known())});
        lines.push(bed.reset_line(&connection, Side::Server, but(died.clone(), reset))?);
        lines.extend(client_is_reset(bed, &connection, child)?);
    }
    Ok(lines)
}

/// No process has ever held the server's end; it still belongs to the listener's process.
fn client_resets_before_accepting(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.connect()?;
    bed.peer(Side::Server).ask("await-client")?;
    for order in ["linger0", "close"] {
        bed.peer(Side::Client).ask(order)?;
    }
    let tid = bed.owner(Side::Server)?["tid"].clone();
    let of_listener = json!({
        "process": {"tid": one_of(&[json!(null), tid]), "attribution": "listener"},
        "opener": null,
    });
    reset_lines(bed, &connection, Side::Client, &json!({"cause": "linger_zero"}), &of_listener)
}

/// Makes the server's host reject packets for a port.
fn reject(bed: &Bed, port: u16, with: &str) -> Result<()> {
    let hook = "type filter hook input priority 0";
    let rule = format!("tcp dport {port} reject with {with}");
    let rules = format!("table inet tests {{\n chain input {{\n {hook}\n {rule}\n }}\n }}\n");
    nft(bed, &rules)
}

fn nft(bed: &Bed, rules: &str) -> Result<()> {
    let mut nft = Command::new("nft");
    nft.arg(rules);
    bed.namespace(Side::Server).enter(&mut nft)?;
    netns::run(&mut nft).map(drop)
}

/// TCP did not send the firewall's RST, so only the receiver reports it.
fn firewall_refuses_connection(bed: &mut Bed) -> Result<Vec<Value>> {
    let port = bed.listen()?.port();
    reject(bed, port, "tcp reset")?;
    let attempt = bed.connect_and_fail(bed.route().address(Side::Server), port, "ECONNREFUSED")?;
    let this = json!({"closed_by": "peer", "ended": "reset_received", "cause": "refused"});
    let reset = json!({
        "direction": "received",
        "cause": "refused",
        "state": "SYN_SENT",
        "connection": {"opened": null},
    });
    Ok(vec![
        bed.close_line(&attempt, Side::Client, but(never_established(), this))?,
        bed.reset_line(&attempt, Side::Client, reset)?,
    ])
}

/// The server's end does not see the RST, and continues until its own FIN finds no socket.
fn firewall_resets_connection(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    let mut of_client = connection.clone();
    reject(bed, connection.address(Side::Server).port(), "tcp reset")?;
    bed.send(&mut of_client, Side::Client, 10)?;
    let error: String = bed.peer(Side::Client).ask("await-error")?.get("errno")?;
    ensure!(error == "ECONNRESET", "the client's socket ended with {error}");
    nft(bed, "delete table inet tests")?;

    let mut lines = client_is_reset(bed, &of_client, None)?;
    for line in &mut lines {
        // How much of the rejected data counts as sent is not the subject of this test.
        if line["event"] == "close" {
            line["connection"]["bytes_sent"] = one_of(&[json!(1000), json!(1010)]);
        }
        line["last_data"] = one_of(&[json!(null), json!("sent")]);
        line["unacked_bytes"] = json!(10);
    }
    lines.extend(fin_without_socket(bed, &connection)?);
    Ok(lines)
}

/// An ICMP error is not a RST, although `connect()` fails with the same error.
fn firewall_says_unreachable(bed: &mut Bed) -> Result<Vec<Value>> {
    let port = bed.listen()?.port();
    reject(bed, port, "icmpx type port-unreachable")?;
    let attempt = bed.connect_and_fail(bed.route().address(Side::Server), port, "ECONNREFUSED")?;
    let this = json!({
        "closed_by": one_of(&[json!("kernel"), json!("peer")]),
        "ended": ended_by_icmp(),
        "cause": "host_unreachable",
    });
    Ok(vec![bed.close_line(&attempt, Side::Client, but(never_established(), this))?])
}
