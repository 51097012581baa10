//! Places where less is allowed than root on a host has.

use anyhow::{Result, ensure};
use serde_json::json;
use tcpclose_tests::{
    bed::{Bed, Connection, Side, user_stack},
    expect::{differences, known},
    features::Feature,
    scenario::routes,
    tool::{Capability, Launch},
};

/// The client resets a connection.
fn one_reset(bed: &mut Bed) -> Result<Connection> {
    let connection = bed.established()?;
    for order in ["linger0", "close"] {
        bed.peer(Side::Client).ask(order)?;
    }
    Ok(connection)
}

/// Two capabilities are all it takes, as the README says; what root's processes keep to root is then not known.
#[test]
fn two_capabilities_are_enough() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let launch = || Launch::new()?.trace(bed.namespaces()).as_nobody(&[Capability::Bpf, Capability::Perfmon]);
    if !Feature::UnlockedMaps.is_here() {
        let ended = launch()?.run()?.with_code(1)?;
        ensure!(ended.stderr.contains("RLIMIT_MEMLOCK"), "stderr does not name the limit\n{ended}");
        return Ok(());
    }
    let tool = launch()?.start()?;
    let connection = one_reset(&mut bed)?;
    tool.wait_until(|lines| lines.len() >= 4);
    let ended = tool.stop()?;
    let expected = json!({
        "event": "close",
        "closed_by": "local",
        "cause": "linger_zero",
        "trigger": "close",
        "connection": {"local": {"port": connection.address(Side::Client).port()}, "bytes_sent": 1000},
        "process": {"pid": bed.peer(Side::Client).pid(), "exe": null},
        "stack": {"user": known()},
    });
    let found = ended.lines.iter().any(|line| differences(line, &expected).is_empty());
    ensure!(found, "no line is like {expected}\n{ended}");
    ensure!(ended.stderr.contains("CAP_SYS_PTRACE"), "stderr does not say what is lost without it\n{ended}");
    Ok(())
}

/// Processes in a pid namespace of their own, as in a container, have the pids that the host gives them.
#[test]
fn pids_are_those_of_the_host() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let tool = Launch::new()?.trace(bed.namespaces()).start()?;
    let server = bed.listen()?;
    bed.peer(Side::Client).ask("new-pids")?;
    let child = bed.peer(Side::Client).fork()?;
    let connect = format!("connect {} {}", server.ip(), server.port());
    for order in [connect.as_str(), "linger0", "close"] {
        bed.peer(Side::Client).ask_child(child, order)?;
    }
    tool.wait_until(|lines| lines.len() >= 4);
    let ended = tool.stop()?;
    let process = json!({"pid": child, "tid": child, "exe": bed.peer(Side::Client).exe()?});
    let expected = json!({
        "event": "close",
        "trigger": "close",
        "connection": {"role": "client"},
        "process": process,
        "stack": user_stack("peer_closes_socket_outer"),
        "opener": {"process": process},
    });
    let found = ended.lines.iter().any(|line| differences(line, &expected).is_empty());
    ensure!(found, "no line is like {expected}\n{ended}");
    Ok(())
}
