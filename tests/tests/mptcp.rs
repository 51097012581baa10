//! MPTCP connections: each subflow is reported as a TCP connection, and nothing else is.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Family, Route, Side, endpoint},
    expect::{differences, mismatches, one_of},
    features::Feature,
    netns::{self, DEVICE},
    scenario::Trace,
    scenarios,
    snmp::Counters,
    sockets::{self, ESTABLISHED, LISTEN, Socket, TIME_WAIT},
};

scenarios! {
    run on [veth_ipv4 veth_ipv6]:
    client_closes_first
    server_closes_first
    client_lingers_not
}

/// What each side does to end a connection, in order.
type EndingCalls = fn() -> &'static [(Side, &'static str)];

fn client_closes_first() -> &'static [(Side, &'static str)] {
    &[(Side::Client, "close"), (Side::Server, "receive-end"), (Side::Server, "close")]
}

fn server_closes_first() -> &'static [(Side, &'static str)] {
    &[(Side::Server, "close"), (Side::Client, "receive-end"), (Side::Client, "close")]
}

fn client_lingers_not() -> &'static [(Side, &'static str)] {
    &[
        (Side::Client, "linger0"),
        (Side::Client, "close"),
        (Side::Server, "await-error"),
        (Side::Server, "close"),
    ]
}

/// Ends a connection with one path, and another with two, for which the client's host gets a second address.
fn run(route: Route, ending: EndingCalls) -> Result<()> {
    if Feature::Mptcp.is_missed() {
        return Ok(());
    }
    let another = match route.family {
        Family::Ipv6 => "fd00:77::3/64",
        Family::Ipv4 | Family::Mapped => "10.77.0.3/24",
    };
    for another in [None, Some(another)] {
        let mut bed = Bed::new(route)?;
        bed.peer(Side::Client).ask("mptcp")?;
        bed.peer(Side::Server).ask("mptcp")?;
        let paths = 1 + usize::from(another.is_some());
        if let Some(address) = another {
            add_path(&bed, address)?;
        }
        let trace = Trace::start(&bed, &[])?;
        bed.established()?;
        ensure_several_paths_are_spoken(&bed)?;
        let subflows = [Side::Client, Side::Server].map(|side| subflows(&bed, side, paths));
        let mut expected = Vec::new();
        for (side, subflows) in [Side::Client, Side::Server].into_iter().zip(subflows) {
            for socket in subflows? {
                expected.push(close_of(&bed, side, socket)?);
            }
        }
        for (side, order) in ending() {
            bed.peer(*side).ask(order)?;
        }
        for namespace in bed.namespaces() {
            sockets::wait_until(namespace, "all subflows are gone", |sockets| {
                sockets.iter().all(|socket| [LISTEN, TIME_WAIT].contains(&socket.state))
            })?;
        }
        let is_close = |line: &&Value| line["event"] == "close";
        let ended = trace.finish(&bed, |lines| lines.iter().filter(is_close).count() >= expected.len())?;
        let (closes, others): (Vec<Value>, Vec<Value>) =
            ended.lines.iter().cloned().partition(|line| is_close(&line));
        let mismatches = mismatches(&closes, &expected);
        ensure!(mismatches.is_empty(), "with {paths} paths: {mismatches}\n{ended}");
        // A subflow may also have reset lines, but no others.
        for line in others {
            let known = |close: &&Value| {
                let ends = json!({
                    "local": close["connection"]["local"],
                    "remote": close["connection"]["remote"],
                });
                differences(&line["connection"], &ends).is_empty()
            };
            ensure!(
                line["event"] == "reset" && expected.iter().any(|close| known(&close)),
                "{line}\n{ended}"
            );
        }
    }
    Ok(())
}

/// Adds an address to the client's host, and makes MPTCP connect from it as well.
fn add_path(bed: &Bed, address: &str) -> Result<()> {
    const LIMITS: &str = "mptcp limits set subflow 1";
    let host = address.split('/').next().unwrap_or(address);
    bed.namespace(Side::Client).ip(&[
        // A deprecated address: otherwise the first subflow might use it as its source.
        format!("{} preferred_lft 0", netns::add_address(address)),
        format!("mptcp endpoint add {host} dev {DEVICE} subflow"),
        LIMITS.to_owned(),
    ])?;
    bed.namespace(Side::Server).ip(&[LIMITS])?;
    Ok(())
}

/// The kernel silently falls back to plain TCP when something prevents MPTCP.
fn ensure_several_paths_are_spoken(bed: &Bed) -> Result<()> {
    let made = Counters::read(bed.namespace(Side::Server))?.get("MPTcpExtMPCapableACKRX")?;
    ensure!(made == 1, "{made} connections are MPTCP");
    Ok(())
}

/// The subflows of a side, once there are as many as there are paths.
fn subflows(bed: &Bed, side: Side, paths: usize) -> Result<Vec<Socket>> {
    let namespace = bed.namespace(side);
    let established = |sockets: &[Socket]| -> Vec<Socket> {
        sockets.iter().filter(|socket| socket.state == ESTABLISHED).copied().collect()
    };
    sockets::wait_until(namespace, "every path is in use", |sockets| established(sockets).len() == paths)?;
    Ok(established(&sockets::list(namespace)?))
}

/// The close line of a subflow. The kernel itself may have opened and closed it, so its owner may be unknown;
/// if a process is named, it must be the right one.
fn close_of(bed: &Bed, side: Side, socket: Socket) -> Result<Value> {
    let process = bed.owner(side)?;
    let owner = one_of(&[json!(null), json!({"pid": process["pid"], "exe": process["exe"]})]);
    Ok(json!({
        "event": "close",
        "connection": {
            "family": if socket.local.is_ipv4() { "ipv4" } else { "ipv6" },
            "local": endpoint(socket.local),
            "remote": endpoint(socket.remote),
            "netns": bed.namespace(side).inode(),
            "role": one_of(&[json!(null), json!(side.to_string())]),
        },
        "process": owner,
        "opener": one_of(&[json!(null), json!({ "process": owner })]),
    }))
}
