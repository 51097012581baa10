//! `--otlp`: log records that a receiver gets, while it is away, busy, or refuses some.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Side},
    scenario::routes,
    tool::{Ended, Launch},
    until,
};

use crate::{
    CONNECTIONS, end_connections,
    receiver::{Receiver, Reply, Taken},
};

/// The tool on a bed, beside the receiver.
pub fn launch(receiver: &Receiver, bed: &Bed) -> Result<Launch> {
    Ok(Launch::new()?.inside(receiver.namespace())?.trace(bed.namespaces()))
}

/// The number of a line.
fn seq(line: &Value) -> Result<u64> {
    line["seq"].as_u64().with_context(|| format!("a line without a number: {line}"))
}

/// The records by number. Those that arrived several times are counted.
pub fn by_number(taken: Vec<Taken>) -> Result<BTreeMap<u64, (Taken, usize)>> {
    let mut found: BTreeMap<u64, (Taken, usize)> = BTreeMap::new();
    for record in taken {
        let (known, times) = found.entry(seq(&record.body)?).or_insert_with(|| (record.clone(), 0));
        ensure!(*known == record, "two records have one number: {known:?}, {record:?}");
        *times += 1;
    }
    Ok(found)
}

/// Checks that every line has arrived, and as it was written.
pub fn is_complete(lines: &[Value], taken: Vec<Taken>) -> Result<BTreeMap<u64, (Taken, usize)>> {
    let found = by_number(taken)?;
    ensure!(lines.len() == found.len(), "{} lines, and {} records", lines.len(), found.len());
    for line in lines {
        let (record, _) = found.get(&seq(line)?).with_context(|| format!("it is missing: {line}"))?;
        ensure!(record.body == *line, "the body is not the line:\n{}\n{line}", record.body);
    }
    Ok(found)
}

/// How many lines the tool says are lost to the collector.
fn lost(lines: &[Value]) -> u64 {
    let lost = lines.iter().filter(|line| line["event"] == "lost" && line["where"] == "export");
    lost.filter_map(|line| line["count"].as_u64()).sum()
}

/// The number of lines that did not arrive. What the tool writes after it has sent the last line is not
/// among them.
fn missing(ended: &Ended, taken: Vec<Taken>) -> Result<u64> {
    let found = by_number(taken)?;
    let mut lines = ended.lines.as_slice();
    if let [before @ .., last] = lines
        && last["where"] == "export"
        && !found.contains_key(&seq(last)?)
    {
        lines = before;
    }
    let numbers: Vec<_> = lines.iter().map(seq).collect::<Result<_>>()?;
    Ok(numbers.iter().filter(|number| !found.contains_key(number)).count() as u64)
}

#[test]
fn records_are_the_lines_and_say_what_the_processes_did() -> Result<()> {
    let receiver = Receiver::new()?;
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let launch = launch(&receiver, &bed)?.args(["--otlp", &Receiver::url(), "--stack", "both"]);
    let launch = launch.variable("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=a%20test");
    let tool = launch.variable("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a%3Db").start()?;
    let mut connections = end_connections(&mut bed)?;
    connections.push(bed.established()?);
    for order in ["linger0", "close"] {
        bed.peer(Side::Client).ask(order)?;
    }
    until("records arrive", || Ok((!receiver.taken()?.is_empty()).then_some(())))?;
    let tasks = fs::read_dir(format!("/proc/{}/task", tool.pid()))?;
    let statuses = tasks.map(|task| Ok(fs::read_to_string(task?.path().join("status"))?));
    let statuses = statuses.collect::<Result<Vec<_>>>()?;
    ensure!(statuses.iter().all(|status| status.contains("Seccomp:\t2")), "{statuses:?}");
    let exporter = statuses.iter().find(|status| status.starts_with("Name:\totlp\n"));
    ensure!(exporter.is_some_and(|status| status.contains("CapPrm:\t0000000000000000")), "{exporter:?}");
    let ended = tool.stop()?;

    let found = is_complete(&ended.lines, receiver.taken()?)?;
    ensure!(found.values().all(|(_, times)| *times == 1), "some arrived twice");
    let reset = connections.len() - 1;
    for (number, connection) in connections.iter().enumerate() {
        for side in [Side::Client, Side::Server] {
            let [local, peer] = [side, side.other()].map(|side| connection.address(side));
            let mut expected = json!({
                "network.transport": "tcp",
                "network.type": "ipv4",
                "network.local.address": local.ip().to_string(),
                "network.local.port": local.port(),
                "network.peer.address": peer.ip().to_string(),
                "network.peer.port": peer.port(),
                "client.address": connection.address(Side::Client).ip().to_string(),
                "client.port": connection.address(Side::Client).port(),
                "server.address": connection.address(Side::Server).ip().to_string(),
                "server.port": connection.address(Side::Server).port(),
                "process.pid": bed.peer(side).pid(),
                "process.executable.path": bed.peer(side).exe()?,
            });
            if number == reset {
                expected["error.type"] =
                    if side == Side::Client { "linger_zero" } else { "peer_reset" }.into();
            }
            let matches = |record: &Taken| {
                let mut expected = expected.as_object().into_iter().flatten();
                let severity = if number == reset { "WARN" } else { "INFO" };
                record.name == "tcpclose.close"
                    && record.severity == severity
                    && expected.all(|(name, value)| record.attributes.get(name) == Some(value))
            };
            let count = found.values().filter(|(record, _)| matches(record)).count();
            ensure!(count == 1, "{count} records say that {expected} has ended");
        }
    }
    for (record, _) in found.values() {
        let time: Timestamp = record.body["time"].as_str().context("no time")?.parse()?;
        ensure!(i128::from(record.time) == time.as_nanosecond(), "{record:?}");
        let resource = &record.resource;
        ensure!(resource["service.name"] == "tcpclose", "{resource}");
        ensure!(resource["service.version"].is_string(), "{resource}");
        ensure!(resource["service.instance.id"].as_str().is_some_and(|id| id.len() == 36), "{resource}");
        ensure!(resource["deployment.environment.name"] == "a test", "{resource}");
        let host = fs::read_to_string("/proc/sys/kernel/hostname")?;
        ensure!(resource["host.name"] == host.trim(), "{resource}");
    }
    for head in receiver.heads() {
        ensure!(head.starts_with("post /v1/logs http/1.1\r\n"), "{head}");
        for header in ["content-type: application/x-protobuf", "api-key: a=b", "host: 127.0.0.1:4318"] {
            ensure!(head.lines().any(|line| line == header), "{header} is not there: {head}");
        }
    }
    Ok(())
}

#[test]
fn a_receiver_that_is_away_or_busy_misses_nothing() -> Result<()> {
    let mut receiver = Receiver::new()?;
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let launch = launch(&receiver, &bed)?.args(["--otlp"]);
    let tool = launch.variable("OTEL_EXPORTER_OTLP_ENDPOINT", Receiver::url()).start()?;
    end_connections(&mut bed)?;
    until("records arrive", || Ok((!receiver.taken()?.is_empty()).then_some(())))?;
    receiver.stop()?;
    end_connections(&mut bed)?;
    until("the tool says so", || Ok(tool.said_so_far().stderr.contains("Connection refused").then_some(())))?;
    receiver.reply([
        Reply::Refuse("503 Service Unavailable", &["Retry-After: 1"]),
        Reply::Refuse("429 Too Many Requests", &[]),
        Reply::HangUp,
        Reply::TakeAndHangUp,
    ]);
    receiver.start()?;
    receiver.wait_for_replies()?;
    let busy = by_number(receiver.taken()?)?;
    end_connections(&mut bed)?;
    let count = 6 * CONNECTIONS;
    until("every record arrives", || Ok((by_number(receiver.taken()?)?.len() >= count).then_some(())))?;
    let ended = tool.stop()?;
    let found = is_complete(&ended.lines, receiver.taken()?)?;
    let twice: Vec<_> = found.iter().filter(|(_, (_, times))| *times > 1).collect();
    ensure!(!twice.is_empty(), "what was taken without an answer was not sent again");
    ensure!(twice.iter().all(|(number, (_, times))| busy.contains_key(number) && *times == 2), "{twice:?}");
    ensure!(lost(&ended.lines) == 0 && ended.stderr.contains(" answers again"), "{ended}");
    Ok(())
}

#[test]
fn what_is_refused_is_counted() -> Result<()> {
    let receiver = Receiver::new()?;
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    receiver.reply([Reply::Refuse("400 Bad Request", &[])]);
    let tool = launch(&receiver, &bed)?.args(["--otlp", &Receiver::url()]).start()?;
    end_connections(&mut bed)?;
    receiver.wait_for_replies()?;
    receiver.reply([Reply::TakeAllBut(3)]);
    end_connections(&mut bed)?;
    receiver.wait_for_replies()?;
    let ended = tool.stop()?;
    let refused = receiver.refused() as u64;
    ensure!(refused > 3, "only {refused} were refused");
    ensure!(lost(&ended.lines) == refused, "{refused} were refused\n{ended}");
    ensure!(missing(&ended, receiver.taken()?)? == refused, "{refused} were refused\n{ended}");
    ensure!(ended.stderr.contains(&format!(", export {refused}\n")), "{ended}");
    ensure!(ended.stderr.contains("400 Bad Request"), "{ended}");
    Ok(())
}

#[test]
fn what_finds_no_room_is_counted_and_the_end_does_not_wait_for_ever() -> Result<()> {
    let mut receiver = Receiver::new()?;
    receiver.stop()?;
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let launch = launch(&receiver, &bed)?.args(["--otlp", &Receiver::url()]);
    let tool = launch.variable("OTEL_BLRP_MAX_QUEUE_SIZE", "10").start()?;
    end_connections(&mut bed)?;
    let is_lost = |lines: &[Value]| lost(lines) + 10 >= 2 * CONNECTIONS as u64;
    ensure!(tool.wait_until(is_lost), "it does not say what is lost\n{}", tool.said_so_far());
    receiver.start()?;
    until("records arrive", || Ok((receiver.taken()?.len() >= 10).then_some(())))?;
    receiver.stop()?;
    end_connections(&mut bed)?;
    let ended = tool.stop()?;
    let (told, missing) = (lost(&ended.lines), missing(&ended, receiver.taken()?)?);
    ensure!(told == missing, "{told} lines are said to be lost, and {missing} are\n{ended}");
    ensure!(ended.lines.len() >= 4 * CONNECTIONS, "{ended}");
    Ok(())
}

#[test]
fn what_is_no_endpoint_is_refused() -> Result<()> {
    for (url, needed) in [("https://collector:4318", "TLS"), ("4318", "URL of a collector")] {
        let ended = Launch::new()?.args(["--otlp", url]).run()?.with_code(1)?;
        ensure!(ended.stderr.contains(url) && ended.stderr.contains(needed), "{ended}");
    }
    Ok(())
}
