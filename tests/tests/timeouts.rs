//! Connections that the kernel ends by itself, and connection attempts that fail. The shortest timers of the
//! kernel expire here, which takes one to three seconds; no duration is asserted.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Connection, Side, user_stack},
    expect::{but, known, one_of, path},
    features::reason,
    scenario::{ended_by_icmp, never_established, orderly_lines, reset_in_close_wait, run, shut_window},
    scenarios,
    snmp::Counters,
    sockets::{self, FIN_WAIT2, TIMER_OF_REMNANT},
};

scenarios! {
    run on [veth_ipv4 veth_ipv6]:
    nobody_answers_connect
    client_gives_up_connecting
    no_way_to_server
    nobody_acknowledges_data
    user_timeout_runs_out
    nobody_answers_connect_within_user_timeout
    window_stays_shut
    window_stays_shut_for_user_timeout
    nobody_answers_keepalive
    nobody_acknowledges_fin
}

scenarios! {
    run on [loopback_ipv4 loopback_ipv6 veth_ipv4 veth_ipv6]:
    client_does_not_wait_for_fin
    client_does_not_wait_for_fin_once_acknowledged
    client_has_no_more_time_for_fin
    client_waits_long_for_fin
}

fn nobody_answers_connect(bed: &mut Bed) -> Result<Vec<Value>> {
    bed.namespace(Side::Client).set_sysctl("net/ipv4/tcp_syn_retries", "1")?;
    bed.lose(bed.route().unused_address())?;
    let attempt = bed.connect_and_fail(bed.route().unused_address(), 7, "ETIMEDOUT")?;
    let this = json!({"closed_by": "kernel", "ended": "timeout", "cause": "connect_timeout"});
    Ok(vec![bed.close_line(&attempt, Side::Client, but(never_established(), this))?])
}

fn nobody_answers_connect_within_user_timeout(bed: &mut Bed) -> Result<Vec<Value>> {
    let unused = SocketAddr::new(bed.route().unused_address(), 7);
    bed.lose(unused.ip())?;
    let facts = bed.peer(Side::Client).ask(&format!("begin-connect {} {}", unused.ip(), unused.port()))?;
    let attempt = Connection::new(facts.get("local")?, unused);
    bed.peer(Side::Client).ask("user-timeout 500")?;
    await_timeout(bed)?;
    let this = json!({"closed_by": "kernel", "ended": "timeout", "cause": "connect_timeout"});
    Ok(vec![bed.close_line(&attempt, Side::Client, but(never_established(), this))?])
}

fn client_gives_up_connecting(bed: &mut Bed) -> Result<Vec<Value>> {
    let unused = SocketAddr::new(bed.route().unused_address(), 7);
    bed.lose(unused.ip())?;
    let facts = bed.peer(Side::Client).ask(&format!("begin-connect {} {}", unused.ip(), unused.port()))?;
    let attempt = Connection::new(facts.get("local")?, unused);
    bed.peer(Side::Client).ask("close")?;
    let this = json!({
        "closed_by": "local",
        "ended": one_of(&[json!(null), json!("destroyed")]),
        "trigger": "close",
        "cause": "connect_abandoned",
        "stack": user_stack("peer_closes_socket_outer"),
        "connection": {"retransmits": 0},
    });
    Ok(vec![bed.close_line(&attempt, Side::Client, but(never_established(), this))?])
}

/// The client sends by way of the server, which answers that it has no route.
fn no_way_to_server(bed: &mut Bed) -> Result<Vec<Value>> {
    let router = bed.route().address(Side::Server);
    let nowhere = bed.route().unreachable_address();
    bed.namespace(Side::Client).ip(&[format!("route add default via {router}")])?;
    for forwarding in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        bed.namespace(Side::Server).set_sysctl(forwarding, "1")?;
    }
    let attempt = bed.connect_and_fail(nowhere, 7, "ENETUNREACH")?;
    let this = json!({
        "closed_by": one_of(&[json!("kernel"), json!("peer")]),
        "ended": ended_by_icmp(),
        "cause": "host_unreachable",
    });
    Ok(vec![bed.close_line(&attempt, Side::Client, but(never_established(), this))?])
}

fn nobody_acknowledges_data(bed: &mut Bed) -> Result<Vec<Value>> {
    bed.namespace(Side::Client).set_sysctl("net/ipv4/tcp_retries2", "1")?;
    send_into_nothing(bed, "retransmit_timeout", None)
}

fn user_timeout_runs_out(bed: &mut Bed) -> Result<Vec<Value>> {
    send_into_nothing(bed, "user_timeout", Some("user-timeout 500"))
}

fn send_into_nothing(bed: &mut Bed, cause: &str, setting: Option<&str>) -> Result<Vec<Value>> {
    let mut connection = bed.established()?;
    if let Some(order) = setting {
        bed.peer(Side::Client).ask(order)?;
    }
    bed.lose(bed.route().address(Side::Server))?;
    bed.send(&mut connection, Side::Client, 100)?;
    await_timeout(bed)?;
    let this = but(timed_out(cause), json!({"unacked_bytes": 100, "connection": {"retransmits": known()}}));
    Ok(vec![bed.close_line(&connection, Side::Client, this)?])
}

/// The server stops reading, and then becomes unreachable.
fn window_stays_shut(bed: &mut Bed) -> Result<Vec<Value>> {
    bed.namespace(Side::Client).set_sysctl("net/ipv4/tcp_retries2", "1")?;
    probe_nothing(bed, "retransmit_timeout", None)
}

fn window_stays_shut_for_user_timeout(bed: &mut Bed) -> Result<Vec<Value>> {
    probe_nothing(bed, "user_timeout", Some("user-timeout 500"))
}

fn probe_nothing(bed: &mut Bed, cause: &str, setting: Option<&str>) -> Result<Vec<Value>> {
    let (connection, _) = shut_window(bed)?;
    bed.lose(bed.route().address(Side::Server))?;
    if let Some(order) = setting {
        bed.peer(Side::Client).ask(order)?;
    }
    await_timeout(bed)?;
    // How much fits into the window is not the subject of this test.
    let this = json!({
        "idle_ms": known(),
        "last_data": "sent",
        "since_sent_ms": known(),
        "unacked_bytes": known(),
        "connection": {"bytes_sent": known()},
    });
    Ok(vec![bed.close_line(&connection, Side::Client, but(timed_out(cause), this))?])
}

/// The kernel gives up and sends a RST, in case the peer is still there.
fn nobody_answers_keepalive(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    bed.lose(bed.route().address(Side::Server))?;
    bed.peer(Side::Client).ask("keepalive 1 1 1")?;
    await_timeout(bed)?;
    let reset = json!({
        "direction": "sent",
        "cause": "keepalive_timeout",
        "reason": reason(json!("TCP_KEEPALIVE_TIMEOUT")),
        "stack": null,
    });
    // A timer expired and a RST was sent: both are correct for `ended`.
    let ended = json!({"ended": one_of(&[json!("timeout"), json!("reset_sent")])});
    Ok(vec![
        bed.close_line(&connection, Side::Client, but(timed_out("keepalive_timeout"), ended))?,
        bed.reset_line(&connection, Side::Client, reset)?,
    ])
}

/// The application has closed, and only the kernel sees that no ACK arrives.
fn nobody_acknowledges_fin(bed: &mut Bed) -> Result<Vec<Value>> {
    bed.namespace(Side::Client).set_sysctl("net/ipv4/tcp_orphan_retries", "1")?;
    let connection = bed.established()?;
    bed.lose(bed.route().address(Side::Server))?;
    bed.peer(Side::Client).ask("close")?;
    let this = json!({
        "closed_by": "local",
        "ended": "timeout",
        "trigger": "close",
        "cause": "fin_timeout",
        "states": path(&["ESTABLISHED", "FIN_WAIT1", "CLOSE"]),
        "stack": user_stack("peer_closes_socket_outer"),
        "connection": {"retransmits": known()},
    });
    Ok(vec![bed.close_line(&connection, Side::Client, this)?])
}

/// The lines of a client that has closed and does not wait for the server's FIN.
fn not_waited_for_fin(
    bed: &Bed,
    connection: &Connection,
    this: &Value,
    reset_by: Value,
    reason_name: Value,
) -> Result<Vec<Value>> {
    let close = json!({
        "closed_by": "local",
        "ended": "reset_sent",
        "cause": "fin_timeout",
        "states": path(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]),
    });
    let reset = json!({
        "direction": "sent",
        "cause": "fin_timeout",
        "state": "FIN_WAIT2",
        "reason": reason(reason_name),
        "stack": one_of(&[json!(null), reset_by]),
    });
    let mut lines = vec![
        bed.close_line(connection, Side::Client, but(close, this.clone()))?,
        bed.reset_line(connection, Side::Client, reset)?,
    ];
    lines.extend(reset_in_close_wait(bed, connection, Side::Server)?);
    Ok(lines)
}

fn by_close() -> Value {
    json!({"trigger": "close", "stack": user_stack("peer_closes_socket_outer")})
}

/// `TCP_LINGER2` makes the client not wait, which is a different option from `SO_LINGER`.
fn client_does_not_wait_for_fin(bed: &mut Bed) -> Result<Vec<Value>> {
    let before = Counters::read(bed.namespace(Side::Client))?;
    let connection = bed.established()?;
    for order in ["fin-wait2 -1", "shutdown-write"] {
        bed.peer(Side::Client).ask(order)?;
    }
    sockets::wait_until_in(bed, &connection, Side::Client, FIN_WAIT2)?;
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("await-error")?;
    let aborted = Counters::read(bed.namespace(Side::Client))?.since(&before, "TcpExtTCPAbortOnLinger")?;
    ensure!(aborted == 1, "TCPAbortOnLinger grew by {aborted}");
    let this = json!({
        "trigger": "shutdown",
        "stack": user_stack("peer_shuts_socket_outer"),
        "acts": bed.shut_and_closed(),
    });
    let reset_by = user_stack("peer_closes_socket_outer");
    not_waited_for_fin(bed, &connection, &this, reset_by, json!("TCP_ABORT_ON_LINGER"))
}

/// The server's ACK ends the connection, and is answered with a RST as data would be.
fn client_does_not_wait_for_fin_once_acknowledged(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    for order in ["fin-wait2 -1", "close"] {
        bed.peer(Side::Client).ask(order)?;
    }
    bed.peer(Side::Server).ask("await-error")?;
    not_waited_for_fin(
        bed,
        &connection,
        &by_close(),
        user_stack("peer_closes_socket_outer"),
        json!("TCP_ABORT_ON_DATA"),
    )
}

/// The timer for the time that exceeds `TIME_WAIT` finds no time left.
fn client_has_no_more_time_for_fin(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = waits_longer_than_time_wait(bed)?;
    bed.namespace(Side::Client).set_sysctl("net/ipv4/tcp_fin_timeout", "5")?;
    bed.peer(Side::Server).ask("await-error")?;
    not_waited_for_fin(
        bed,
        &connection,
        &by_close(),
        user_stack("peer_closes_socket_outer"),
        json!("TCP_STATE"),
    )
}

/// The same timer leaves the rest of the time to the `TIME_WAIT` entry.
fn client_waits_long_for_fin(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = waits_longer_than_time_wait(bed)?;
    sockets::wait_for(bed, &connection, Side::Client, "the client's socket is replaced", |sockets| {
        sockets.iter().any(|socket| socket.timer == TIMER_OF_REMNANT)
    })?;
    orderly_lines(bed, &connection, Side::Client, by_close())
}

/// Makes the client close, with a FIN timeout that exceeds the length of `TIME_WAIT` by a second, and waits
/// for the ACK.
fn waits_longer_than_time_wait(bed: &mut Bed) -> Result<Connection> {
    bed.namespace(Side::Client).set_sysctl("net/ipv4/tcp_fin_timeout", "61")?;
    let connection = bed.established()?;
    bed.peer(Side::Client).ask("close")?;
    sockets::wait_until_in(bed, &connection, Side::Client, FIN_WAIT2)?;
    Ok(connection)
}

fn timed_out(cause: &str) -> Value {
    json!({
        "closed_by": "kernel",
        "ended": "timeout",
        "cause": cause,
        "states": path(&["ESTABLISHED", "CLOSE"]),
    })
}

fn await_timeout(bed: &mut Bed) -> Result<()> {
    let error: String = bed.peer(Side::Client).ask("await-error")?.get("errno")?;
    ensure!(error == "ETIMEDOUT", "the client's socket ended with {error}");
    Ok(())
}
