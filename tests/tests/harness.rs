//! The test harness without the tool: peers really connect, and the kernel counts what they do.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use tcpclose_tests::{
    bed::{Bed, Route, Side},
    scenario::routes,
    scenarios,
    snmp::Counters,
};

/// The expected growth of the kernel's counters, summed over both sides, after a scenario.
type Growth = &'static [(&'static str, i64)];

fn counted(route: Route, scenario: fn(&mut Bed) -> Result<Growth>) -> Result<()> {
    let mut bed = Bed::new(route)?;
    let read = |bed: &Bed| bed.namespaces().map(Counters::read).collect::<Result<Vec<_>>>();
    let before = read(&bed)?;
    let growth = scenario(&mut bed)?;
    let after = read(&bed)?;
    for (name, expected) in growth {
        let grown = before.iter().zip(&after).map(|(before, after)| after.since(before, name));
        let grown = grown.sum::<Result<i64>>()?;
        ensure!(grown == *expected, "{name} grew by {grown}, not by {expected}");
    }
    Ok(())
}

scenarios! {
    counted on [loopback_ipv4 loopback_ipv6 loopback_mapped veth_ipv4 veth_ipv6 veth_mapped]:
    orderly_close
    closed_with_unread_data
    refused
    killed
}

fn orderly_close(bed: &mut Bed) -> Result<Growth> {
    bed.established()?;
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("receive-end")?;
    bed.peer(Side::Server).ask("close")?;
    Ok(&[("TcpActiveOpens", 1), ("TcpPassiveOpens", 1), ("TcpOutRsts", 0), ("TcpRetransSegs", 0)])
}

fn closed_with_unread_data(bed: &mut Bed) -> Result<Growth> {
    let mut connection = bed.established()?;
    bed.send(&mut connection, Side::Server, 10)?;
    bed.peer(Side::Client).ask("await-data 10")?;
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask_and_fail("receive-end", "ECONNRESET")?;
    Ok(&[("TcpOutRsts", 1), ("TcpEstabResets", 2), ("TcpExtTCPAbortOnClose", 1)])
}

fn refused(bed: &mut Bed) -> Result<Growth> {
    let attempt = bed.connect_and_fail(bed.route().address(Side::Server), 7, "ECONNREFUSED")?;
    ensure!(attempt.address(Side::Client).port() != 0, "the port of a refused socket is not known");
    Ok(&[("TcpOutRsts", 1), ("TcpAttemptFails", 1)])
}

fn killed(bed: &mut Bed) -> Result<Growth> {
    bed.established()?;
    bed.peer(Side::Client).kill(Signal::SIGKILL)?;
    bed.peer(Side::Server).ask("receive-end")?;
    bed.peer(Side::Server).ask("close")?;
    Ok(&[("TcpOutRsts", 0)])
}

/// Every order that ends a connection does so, and leaves the peer able to execute the next one.
#[test]
fn every_order_ends_the_connection() -> Result<()> {
    for order in ["close", "shutdown-write", "dup2-over", "close-range", "exec", "thread-close", "fork-close"]
    {
        let mut bed = Bed::new(routes::loopback_ipv4())?;
        bed.established()?;
        bed.peer(Side::Client).ask(order)?;
        bed.peer(Side::Server).ask("receive-end")?;
        bed.established()?;
    }
    for (order, status) in [("exit 3", "exit status: 3"), ("raise SIGSEGV", "signal: 11 (SIGSEGV)")] {
        let mut bed = Bed::new(routes::loopback_ipv4())?;
        bed.established()?;
        let ended = bed.peer(Side::Client).end_by(order)?;
        ensure!(ended.to_string().starts_with(status), "after `{order}`: {ended}");
        bed.peer(Side::Server).ask("receive-end")?;
    }
    Ok(())
}

/// A prerequisite of the tests of timeouts: a connection attempt to a lost address gets no answer and times
/// out.
#[test]
fn a_lost_address_swallows_everything() -> Result<()> {
    for route in [routes::veth_ipv4(), routes::veth_ipv6()] {
        let mut bed = Bed::new(route)?;
        bed.established()?;
        bed.lose(route.address(Side::Server))?;
        bed.peer(Side::Client).ask("user-timeout 300")?;
        bed.peer(Side::Client).ask("send 10")?;
        let error = bed.peer(Side::Client).ask("await-error")?.get::<String>("errno")?;
        ensure!(error == "ETIMEDOUT", "sending to a lost address: {error}");
    }
    Ok(())
}

/// A prerequisite of the tests of load: a burst has as many connections as requested, and at most half of
/// them are reset.
#[test]
fn burst_connects_as_often_as_told() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let address = bed.listen()?;
    bed.peer(Side::Server).tell("serve 10")?;
    let facts = bed.peer(Side::Client).ask(&format!("burst {} {} 10", address.ip(), address.port()))?;
    let served = bed.peer(Side::Server).finish("serve 10")?;
    ensure!(facts.get::<String>("ports")?.split(',').count() == 10, "{facts:?}");
    ensure!(served.get::<u32>("orderly")? >= 5, "{served:?}");
    Ok(())
}
