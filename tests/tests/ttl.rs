//! TTLs: a RST that came along the path of the connection, and one that a third party sent with the peer's
//! address.
//!
//! Each end has a TTL of its own, so that no packet can be mistaken for another's.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Connection, Route, Side, endpoint},
    expect::differences,
    features::Feature,
    netns::DEVICE,
    packet::{self, Segment},
    scenario::{Trace, routes},
    scenarios,
};

/// The TTL of a middlebox's packets.
const FORGED: u8 = 200;

scenarios! {
    run on [veth_ipv4 veth_ipv6]:
    client_gets_a_forged_reset
    server_gets_a_forged_reset
    client_gets_a_genuine_reset
    server_gets_a_genuine_reset
}

fn run(route: Route, scenario: fn(&mut Bed, &Connection) -> Result<Vec<Value>>) -> Result<()> {
    let mut bed = Bed::new(route)?;
    for side in [Side::Client, Side::Server] {
        let ttl = ttl(side).to_string();
        let namespace = bed.namespace(side);
        namespace.set_sysctl("net/ipv4/ip_default_ttl", &ttl)?;
        namespace.set_sysctl(&format!("net/ipv6/conf/{DEVICE}/hop_limit"), &ttl)?;
    }
    let trace = Trace::start(&bed, &["--ttl"])?;
    let connection = bed.established()?;
    let expected = scenario(&mut bed, &connection)?;
    let like = |lines: &[Value], expected: &Value| {
        lines.iter().filter(|line| differences(line, expected).is_empty()).count()
    };
    let ended = trace.finish(&bed, |lines| expected.iter().all(|line| like(lines, line) > 0))?;
    for line in &expected {
        let count = like(&ended.lines, line);
        ensure!(count == 1, "{count} lines match {line}\n{ended}");
    }
    Ok(())
}

/// The TTL of a side's packets.
fn ttl(of: Side) -> u8 {
    match of {
        Side::Client => 40,
        Side::Server => 50,
    }
}

fn client_gets_a_forged_reset(bed: &mut Bed, connection: &Connection) -> Result<Vec<Value>> {
    forged(bed, connection, Side::Client)
}

fn server_gets_a_forged_reset(bed: &mut Bed, connection: &Connection) -> Result<Vec<Value>> {
    forged(bed, connection, Side::Server)
}

fn client_gets_a_genuine_reset(bed: &mut Bed, connection: &Connection) -> Result<Vec<Value>> {
    genuine(bed, connection, Side::Client)
}

fn server_gets_a_genuine_reset(bed: &mut Bed, connection: &Connection) -> Result<Vec<Value>> {
    genuine(bed, connection, Side::Server)
}

/// A third party on the path (here in the peer's namespace) sends a RST to one side with the address of the
/// other.
fn forged(bed: &mut Bed, connection: &Connection, victim: Side) -> Result<Vec<Value>> {
    let peer = victim.other();
    let sequence = bed.peer(peer).ask("next-sequence")?.get("sequence")?;
    let segment = Segment {
        from: connection.address(peer),
        to: connection.address(victim),
        flags: packet::RST | packet::ACK,
        sequence,
        ttl: Some(FORGED),
    };
    packet::send(bed.namespace(peer), segment)?;
    bed.peer(victim).ask("await-error")?;
    Ok(lines(connection, victim, FORGED, "suspected_injection"))
}

/// The peer resets the connection.
fn genuine(bed: &mut Bed, connection: &Connection, victim: Side) -> Result<Vec<Value>> {
    for order in ["linger0", "close"] {
        bed.peer(victim.other()).ask(order)?;
    }
    bed.peer(victim).ask("await-error")?;
    Ok(lines(connection, victim, ttl(victim.other()), "peer_reset"))
}

/// The lines of the side that was reset.
fn lines(connection: &Connection, victim: Side, ttl_of_reset: u8, cause: &str) -> Vec<Value> {
    let ends = json!({
        "local": endpoint(connection.address(victim)),
        "remote": endpoint(connection.address(victim.other())),
    });
    vec![
        json!({
            "event": "reset",
            "connection": ends,
            "direction": "received",
            "cause": cause,
            "ttl": ttl_of_reset,
            "handshake_ttl": ttl(victim.other()),
        }),
        json!({
            "event": "close",
            "connection": ends,
            "closed_by": "peer",
            "ended": "reset_received",
            "cause": cause,
        }),
    ]
}

/// Where the kernel supports fentry, the option is not needed; elsewhere TTLs are null without it.
#[test]
fn fentry_makes_the_option_unnecessary() -> Result<()> {
    let mut bed = Bed::new(routes::veth_ipv4())?;
    let ttl = ttl(Side::Server);
    bed.namespace(Side::Server).set_sysctl("net/ipv4/ip_default_ttl", &ttl.to_string())?;
    let trace = Trace::start(&bed, &[])?;
    let connection = bed.established()?;
    genuine(&mut bed, &connection, Side::Client)?;
    let is_it = |line: &Value| line["event"] == "reset" && line["direction"] == "received";
    let ended = trace.finish(&bed, |lines| lines.iter().any(is_it))?;
    let line = ended
        .lines
        .iter()
        .find(|line| is_it(line))
        .with_context(|| format!("no RST was reported\n{ended}"))?;
    let expected = if Feature::PacketOfReset.is_here() { json!(ttl) } else { Value::Null };
    for field in ["ttl", "handshake_ttl"] {
        ensure!(line[field] == expected, "{field} is not {expected}\n{ended}");
    }
    Ok(())
}
