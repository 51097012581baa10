//! `tcpclose list`: sockets that lingered before the tool was started, each brought into its state by two
//! processes; and the count of all others, compared with the kernel's own list.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Connection, Route, Side},
    expect::{at_least, but, known, mismatches},
    fewer,
    scenario::{Scenario, routes, shut_window},
    scenarios,
    sockets::{self, CLOSE_WAIT, FIN_WAIT1, FIN_WAIT2, LAST_ACK, TIME_WAIT},
    tool::{Ended, Launch},
};

scenarios! {
    run on [loopback_ipv4 veth_ipv6 veth_mapped]:
    server_forgets_to_close
    server_does_not_read
    server_does_not_accept
    child_has_it_open_too
    client_closes_its_half
}

scenarios! {
    run on [veth_ipv4 veth_ipv6]:
    server_does_not_read_what_is_before_the_fin
    nobody_acknowledges_shutdown
    nobody_acknowledges_close
    nobody_acknowledges_last_fin
}

/// Runs a scenario, lists the sockets, and expects these lines and no others.
fn run(route: Route, scenario: Scenario) -> Result<()> {
    let mut bed = Bed::new(route)?;
    let expected = scenario(&mut bed)?;
    let ended = list(&bed, &[])?;
    let mismatches = mismatches(&ended.lines, &expected);
    ensure!(mismatches.is_empty(), "{mismatches}\n{ended}");
    ensure!(ended.stderr.is_empty(), "root can see everything\n{ended}");
    Ok(())
}

/// The lines about the sockets of a bed.
fn list(bed: &Bed, args: &[&str]) -> Result<Ended> {
    let launch = Launch::new()?.args(["list"]).trace(bed.namespaces()).args(args);
    launch.run()?.with_code(0)
}

/// Waits until the kernel shows a side's socket in this state.
fn await_state(bed: &Bed, connection: &Connection, side: Side, state: u8) -> Result<()> {
    let (local, remote) = (connection.address(side), connection.address(side.other()));
    sockets::wait_until(bed.namespace(side), &format!("the {side} is in state {state}"), |all| {
        all.iter().any(|one| (one.local, one.remote, one.state) == (local, remote, state))
    })
}

/// One line for each end after the client has closed and the server has not.
fn abandoned(bed: &Bed, connection: &Connection, server: Value) -> Result<Vec<Value>> {
    await_state(bed, connection, Side::Server, CLOSE_WAIT)?;
    await_state(bed, connection, Side::Client, FIN_WAIT2)?;
    // The kernel keeps only a remnant, which has no queues.
    let client = json!({
        "process": null,
        "holders": [],
        "state": "FIN_WAIT2",
        "kind": "half_closed",
        "unsent_bytes": null,
        "connection": {"role": null},
    });
    let waits = json!({"state": "CLOSE_WAIT", "for_ms": known(), "for_ms_at_most": known()});
    Ok(vec![
        bed.listed_line(connection, Side::Client, client)?,
        bed.listed_line(connection, Side::Server, but(waits, server))?,
    ])
}

/// The holders of a socket, each with one descriptor, whatever its number.
fn held_by(holders: &[(u32, &str)]) -> Value {
    holders.iter().map(|(pid, comm)| json!({"pid": pid, "comm": comm, "fd": known()})).collect()
}

fn server_forgets_to_close(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("receive-end")?;
    let server = json!({
        "kind": "leaked",
        "unread_bytes": 0,
        "holders": held_by(&[(bed.peer(Side::Server).pid(), "peer-server")]),
        "connection": {"bytes_sent": 300, "bytes_received": 1000, "retransmits": 0, "rtt_us": known()},
    });
    abandoned(bed, &connection, server)
}

fn server_does_not_read_what_is_before_the_fin(bed: &mut Bed) -> Result<Vec<Value>> {
    let mut connection = bed.established()?;
    bed.send(&mut connection, Side::Client, 5)?;
    bed.peer(Side::Client).ask("close")?;
    let server = json!({
        "kind": "unread",
        "unread_bytes": 5,
        "holders": held_by(&[(bed.peer(Side::Server).pid(), "peer-server")]),
        "connection": {"bytes_sent": 300, "bytes_received": 1005},
    });
    abandoned(bed, &connection, server)
}

/// No process holds the socket yet, so its owner is the process that should accept it.
fn server_does_not_accept(bed: &mut Bed) -> Result<Vec<Value>> {
    let mut connection = bed.connect()?;
    bed.send(&mut connection, Side::Client, 7)?;
    bed.peer(Side::Client).ask("close")?;
    let server = json!({
        "kind": "unaccepted", "unread_bytes": 7, "holders": [], "process": {"attribution": "listener"},
    });
    abandoned(bed, &connection, server)
}

/// The parent has held it longer, so it is the owner.
fn child_has_it_open_too(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    let child = bed.peer(Side::Server).fork()?;
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("receive-end")?;
    let parent = bed.peer(Side::Server).pid();
    let mut holders = [(parent, "peer-server"), (child, "peer-server")];
    // The tool lists holders in the order of their pids.
    holders.sort_unstable();
    abandoned(bed, &connection, json!({"kind": "leaked", "unread_bytes": 0, "holders": held_by(&holders)}))
}

fn client_closes_its_half(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    bed.peer(Side::Client).ask("shutdown-write")?;
    bed.peer(Side::Server).ask("receive-end")?;
    await_state(bed, &connection, Side::Client, FIN_WAIT2)?;
    let client = json!({
        "state": "FIN_WAIT2",
        "kind": "half_closed",
        "unread_bytes": 0,
        "for_ms": known(),
        "for_ms_at_most": known(),
        "holders": held_by(&[(bed.peer(Side::Client).pid(), "peer-client")]),
        "connection": {"role": null},
    });
    let server = json!({"state": "CLOSE_WAIT", "kind": "leaked"});
    Ok(vec![
        bed.listed_line(&connection, Side::Client, client)?,
        bed.listed_line(&connection, Side::Server, server)?,
    ])
}

fn nobody_acknowledges_shutdown(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    bed.lose(bed.route().address(Side::Server))?;
    bed.peer(Side::Client).ask("shutdown-write")?;
    unacked(bed, &connection, ("FIN_WAIT1", FIN_WAIT1), json!({}))
}

/// The client has filled the server's window, and its FIN waits behind what is left.
fn server_does_not_read(bed: &mut Bed) -> Result<Vec<Value>> {
    let (connection, _) = shut_window(bed)?;
    bed.peer(Side::Client).ask("shutdown-write")?;
    await_state(bed, &connection, Side::Client, FIN_WAIT1)?;
    let this = json!({
        "state": "FIN_WAIT1",
        "kind": "peer_not_reading",
        "unsent_bytes": at_least(1),
        "for_ms": null,
        "for_ms_at_most": null,
        "connection": {"role": null},
    });
    Ok(vec![bed.listed_line(&connection, Side::Client, this)?])
}

/// The application has closed it, so it has no holder.
fn nobody_acknowledges_close(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    bed.lose(bed.route().address(Side::Server))?;
    bed.peer(Side::Client).ask("close")?;
    unacked(bed, &connection, ("FIN_WAIT1", FIN_WAIT1), json!({"process": null, "holders": []}))
}

fn nobody_acknowledges_last_fin(bed: &mut Bed) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    bed.peer(Side::Server).ask("shutdown-write")?;
    bed.peer(Side::Client).ask("receive-end")?;
    // The ACK may be delayed, and must arrive before packets are lost.
    await_state(bed, &connection, Side::Server, FIN_WAIT2)?;
    bed.lose(bed.route().address(Side::Server))?;
    bed.peer(Side::Client).ask("close")?;
    let last = json!({"process": null, "holders": [], "for_ms": null, "for_ms_at_most": known()});
    let mut lines = unacked(bed, &connection, ("LAST_ACK", LAST_ACK), last)?;
    let server = json!({"state": "FIN_WAIT2", "kind": "half_closed"});
    lines.push(bed.listed_line(&connection, Side::Server, server)?);
    Ok(lines)
}

fn unacked(bed: &Bed, connection: &Connection, state: (&str, u8), this: Value) -> Result<Vec<Value>> {
    await_state(bed, connection, Side::Client, state.1)?;
    let line = json!({"state": state.0, "kind": "unacked", "connection": {"role": null}});
    Ok(vec![bed.listed_line(connection, Side::Client, but(line, this))?])
}

/// Both bounds hold for both sides, also when data and ACKs have continued in the open direction. The
/// reported bounds are compared with times that the age surely exceeds or surely does not reach.
#[test]
fn ages_are_bounds() -> Result<()> {
    let mut bed = Bed::new(routes::veth_ipv4())?;
    let mut connection = bed.established()?;
    let before = Instant::now();
    bed.peer(Side::Client).ask("shutdown-write")?;
    bed.peer(Side::Server).ask("receive-end")?;
    await_state(&bed, &connection, Side::Client, FIN_WAIT2)?;
    let after = Instant::now();
    for _ in 0..3 {
        bed.transfer(&mut connection, Side::Server, 10)?;
        let surely = after.elapsed();
        let ended = list(&bed, &[])?;
        let perhaps = before.elapsed();
        ensure!(ended.lines.len() == 2, "2 lines were expected\n{ended}");
        for line in &ended.lines {
            let bound = |name: &str| line[name].as_f64().with_context(|| format!("no {name}: {line}"));
            ensure!(bound("for_ms")? <= perhaps.as_secs_f64() * 1000.0, "it is younger: {perhaps:?} {line}");
            ensure!(
                bound("for_ms_at_most")? >= surely.as_secs_f64() * 1000.0,
                "it is older: {surely:?} {line}"
            );
        }
    }
    Ok(())
}

#[test]
fn filters_leave_out_what_does_not_match() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let expected = client_closes_its_half(&mut bed)?;
    let (client, server) = (&expected[..1], &expected[1..]);
    let pid = bed.peer(Side::Server).pid().to_string();
    let port = expected[1]["connection"]["local"]["port"].to_string();
    for (args, lines) in [
        (["--pid", &pid], server),
        (["--comm", "peer-client"], client),
        (["--local-port", &port], server),
        (["--remote-port", &port], client),
        (["--address", "127.0.0.0/8"], &expected),
        (["--address", "10.0.0.0/8"], &[]),
        // Both have an upper bound that is less than this.
        (["--linger", "1h"], &[]),
    ] {
        let ended = list(&bed, &args)?;
        let mismatches = mismatches(&ended.lines, lines);
        ensure!(mismatches.is_empty(), "{args:?}: {mismatches}\n{ended}");
    }
    Ok(())
}

/// Number of destinations. Each gets an equal share of the ports.
const DESTINATIONS: u16 = 6;

/// Number of connections to each destination.
fn connections() -> u16 {
    10_000 / fewer()
}

/// Sixty thousand entries in total, compared with the kernel's count, and per destination with the number
/// made.
#[test]
fn time_wait_is_counted_by_destination() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let namespace = bed.namespace(Side::Client);
    let (first, ports) = (2000, connections() * DESTINATIONS);
    namespace.set_sysctl("net/ipv4/ip_local_port_range", &format!("{first} {}", first + ports - 1))?;
    // The default on a small machine is lower.
    namespace.set_sysctl("net/ipv4/tcp_max_tw_buckets", "200000")?;
    // Over the loopback the kernel would reuse ports.
    namespace.set_sysctl("net/ipv4/tcp_tw_reuse", "0")?;
    let mut destinations = Vec::new();
    for _ in 0..DESTINATIONS {
        let address = bed.listen()?;
        let (serve, connect) = (
            format!("serve {}", connections()),
            format!("close-many {} {} {}", address.ip(), address.port(), connections()),
        );
        bed.peer(Side::Server).tell(&serve)?;
        bed.peer(Side::Client).ask(&connect)?;
        bed.peer(Side::Server).finish(&serve)?;
        destinations.push(address);
    }
    let counted = sockets::list(bed.namespace(Side::Client))?;
    let netns = bed.namespace(Side::Client).inode().to_string();
    let output = Launch::new()?.args(["list", "--netns", &netns]).output()?;
    ensure!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout)?;
    // The entries that expired between the two counts.
    let gone = counted.len() - sockets::list(bed.namespace(Side::Client))?.len();
    let in_time_wait = |to: Option<SocketAddr>| {
        let towards =
            counted.iter().filter(|one| one.state == TIME_WAIT && to.is_none_or(|to| one.remote == to));
        towards.count()
    };
    // Five destinations are shown, and the number of those that are not.
    let mut shown = 0;
    for line in text.lines().filter(|line| line.ends_with(&netns) && line.contains('%')) {
        let words: Vec<_> = line.split_whitespace().collect();
        let (count, percent, to) = (words[0].parse::<usize>()?, words[1], words[3].parse::<SocketAddr>()?);
        ensure!(destinations.contains(&to), "no client connected to {to}\n{text}");
        let real = in_time_wait(Some(to));
        ensure!(
            (real - gone..=real).contains(&count),
            "{real} in TIME_WAIT towards {to}, {gone} gone\n{text}"
        );
        let share = format!("{:.1}%", 100.0 * f64::from(u32::try_from(count)?) / f64::from(ports));
        ensure!(percent == share, "{count} of {ports} ports is not {percent}\n{text}");
        shown += 1;
    }
    ensure!(shown == 5, "five destinations should be shown\n{text}");
    let real = in_time_wait(None);
    ensure!(real > usize::from(ports / 6 * 5), "only {real} were made");
    let total = text.lines().find(|line| line.contains(&netns) && line.contains("TIME_WAIT "));
    let total = total.and_then(|line| line.split("TIME_WAIT ").nth(1)).context(text.clone())?;
    let total: usize = total.chars().take_while(char::is_ascii_digit).collect::<String>().parse()?;
    ensure!(
        (real - gone..=real).contains(&total),
        "{real} in TIME_WAIT, {gone} gone, {total} reported\n{text}"
    );
    Ok(())
}

#[test]
fn every_state_is_counted_at_its_owner() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    bed.established()?;
    let netns = bed.namespace(Side::Client).inode().to_string();
    let output = Launch::new()?.args(["list", "--netns", &netns]).output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success() && text.starts_with("No lingering sockets."), "{text}");
    for (side, states) in [(Side::Client, "ESTABLISHED 1"), (Side::Server, "ESTABLISHED 1, LISTEN 1")] {
        let pid = bed.peer(side).pid().to_string();
        let row = text.lines().find(|line| line.split_whitespace().next() == Some(&pid));
        ensure!(row.is_some_and(|row| row.ends_with(&format!("  {states}"))), "{side} {pid}\n{text}");
    }
    Ok(())
}

#[test]
fn a_closed_pipe_is_no_error() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    client_closes_its_half(&mut bed)?;
    Launch::new()?.args(["list"]).trace(bed.namespaces()).head(0).run()?.with_code(0)?;
    Ok(())
}

/// The tool reports what it can see and what it cannot.
#[test]
fn without_privilege_it_says_what_is_missing() -> Result<()> {
    // A socket of root, which an unprivileged user can see without its owner.
    let _listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let ended = Launch::new()?.args(["list", "-o", "json"]).as_nobody(&[])?.run()?.with_code(0)?;
    ensure!(ended.stderr.contains("processes may not be read"), "{ended}");
    Ok(())
}
