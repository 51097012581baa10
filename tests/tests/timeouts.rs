//! Connections that the kernel ends by itself, and attempts that come to nothing. The kernel's own shortest
//! timers run out here, which takes a second or three; nothing is measured against a clock.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Connection, Side, user_stack},
    expect::{but, known, one_of, path},
    features::reason,
    scenario::{never_established, run},
    scenarios,
};

scenarios! {
    run on [veth_ipv4 veth_ipv6]:
    nobody_answers_connect
    client_gives_up_connecting
    no_way_to_server
    nobody_acknowledges_data
    user_timeout_runs_out
    nobody_answers_keepalive
    nobody_acknowledges_fin
}

fn nobody_answers_connect(bed: &mut Bed) -> Result<Vec<Value>> {
    bed.namespace(Side::Client).set_sysctl("net/ipv4/tcp_syn_retries", "1")?;
    bed.lose(bed.route().nobody())?;
    let attempt = bed.connect_in_vain(bed.route().nobody(), 7, "ETIMEDOUT")?;
    let this = json!({"closed_by": "kernel", "ended": "timeout", "cause": "connect_timeout"});
    Ok(vec![bed.close_line(&attempt, Side::Client, but(never_established(), this))?])
}

fn client_gives_up_connecting(bed: &mut Bed) -> Result<Vec<Value>> {
    let nobody = SocketAddr::new(bed.route().nobody(), 7);
    bed.lose(nobody.ip())?;
    let facts = bed.peer(Side::Client).ask(&format!("begin-connect {} {}", nobody.ip(), nobody.port()))?;
    let attempt = Connection::new(facts.get("local")?, nobody);
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

/// The server is asked to forward, and says that it cannot.
fn no_way_to_server(bed: &mut Bed) -> Result<Vec<Value>> {
    let router = bed.route().address(Side::Server).to_string();
    let nowhere = bed.route().nowhere();
    bed.namespace(Side::Client).ip(&["route", "add", "default", "via", &router])?;
    for forwarding in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        bed.namespace(Side::Server).set_sysctl(forwarding, "1")?;
    }
    let attempt = bed.connect_in_vain(nowhere, 7, "ENETUNREACH")?;
    let this = json!({
        "closed_by": one_of(&[json!("kernel"), json!("peer")]),
        "ended": "timeout",
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
    let this = but(timed_out(cause), json!({"connection": {"retransmits": known()}}));
    Ok(vec![bed.close_line(&connection, Side::Client, this)?])
}

/// The kernel gives up and says so with a RST, in case somebody is there after all.
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
    // A timer ran out and a RST was sent: either is how it ended.
    let ended = json!({"ended": one_of(&[json!("timeout"), json!("reset_sent")])});
    Ok(vec![
        bed.close_line(&connection, Side::Client, but(timed_out("keepalive_timeout"), ended))?,
        bed.reset_line(&connection, Side::Client, reset)?,
    ])
}

/// The application has closed, and the kernel alone sees that nobody answers.
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
