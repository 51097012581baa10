//! Sockets that the kernel destroys because it has too many orphans. The limit applies to the whole host, so
//! these tests run only on machines that belong to the tests.

use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Connection, Side, user_stack},
    expect::{but, known, one_of, path},
    features::{Feature, reason},
    scenario::{reset_in_close_wait, routes, run},
    sockets::{self, FIN_WAIT1, FIN_WAIT2},
};

/// The limit on sockets without a descriptor, for the whole host.
const LIMIT: &str = "/proc/sys/net/ipv4/tcp_max_orphans";

/// A limit that is always exceeded.
const NONE: &str = "-1";

/// A changed limit; restored on drop.
struct Limited(String);

impl Limited {
    fn to_none() -> Result<Self> {
        let before = fs::read_to_string(LIMIT).context(LIMIT)?;
        fs::write(LIMIT, NONE).with_context(|| format!("writing {NONE} to {LIMIT}"))?;
        Ok(Self(before))
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        if let Err(error) = fs::write(LIMIT, &self.0) {
            eprintln!("{LIMIT} stays changed: {error}");
        }
    }
}

/// The scenarios run in sequence, because each changes the limit for all.
#[test]
fn too_many_orphans() -> Result<()> {
    if Feature::OwnMachine.is_missed() {
        return Ok(());
    }
    for route in [routes::veth_ipv4(), routes::veth_ipv6()] {
        for scenario in [client_closes, client_closes_last, client_has_closed] {
            run(route, scenario)?;
        }
    }
    Ok(())
}

/// The lines of a client's end that the kernel destroyed in this state.
fn given_up(bed: &Bed, connection: &Connection, state: &str, this: Value) -> Result<Vec<Value>> {
    let close = json!({
        "ended": "reset_sent",
        "trigger": "close",
        "cause": "out_of_memory",
        "stack": user_stack("peer_closes_socket_outer"),
        "connection": {"retransmits": known()},
    });
    let reset = json!({
        "direction": "sent",
        "cause": "out_of_memory",
        "reason": reason(json!("TCP_ABORT_ON_MEMORY")),
        "state": state,
        "stack": one_of(&[json!(null), user_stack("peer_closes_socket_outer")]),
    });
    Ok(vec![
        bed.close_line(connection, Side::Client, but(close, this))?,
        bed.reset_line(connection, Side::Client, reset)?,
    ])
}

fn in_fin_wait1(bed: &Bed, connection: &Connection) -> Result<Vec<Value>> {
    let this = json!({"closed_by": "local", "states": path(&["ESTABLISHED", "FIN_WAIT1", "CLOSE"])});
    given_up(bed, connection, "FIN_WAIT1", this)
}

/// The FIN is sent, and a RST immediately after it.
fn client_closes(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    let limited = Limited::to_none()?;
    bed.peer(Side::Client).ask("close")?;
    drop(limited);
    bed.peer(Side::Server).ask("await-error")?;
    let mut lines = in_fin_wait1(bed, &connection)?;
    lines.extend(reset_in_close_wait(bed, &connection, Side::Server)?);
    Ok(lines)
}

/// Same, after the server has closed.
fn client_closes_last(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    bed.peer(Side::Server).ask("shutdown-write")?;
    bed.peer(Side::Client).ask("receive-end")?;
    // The server then has nothing to retransmit to a client that is gone.
    sockets::wait_until_in(bed, &connection, Side::Server, FIN_WAIT2)?;
    // The ACK of the FIN would end the connection in order.
    bed.hold(Side::Client)?;
    let limited = Limited::to_none()?;
    bed.peer(Side::Client).ask("close")?;
    drop(limited);
    let this = json!({
        "closed_by": "peer",
        "close_wait_ms": known(),
        "states": path(&["ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSE"]),
    });
    given_up(bed, &connection, "LAST_ACK", this)
}

/// The retransmission timer of the FIN finds that there are too many orphans.
fn client_has_closed(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    bed.lose(bed.route().address(Side::Server))?;
    bed.peer(Side::Client).ask("close")?;
    sockets::wait_until_in(bed, &connection, Side::Client, FIN_WAIT1)?;
    let limited = Limited::to_none()?;
    sockets::wait_for(bed, &connection, Side::Client, "the client's socket is given up", <[_]>::is_empty)?;
    drop(limited);
    in_fin_wait1(bed, &connection)
}
