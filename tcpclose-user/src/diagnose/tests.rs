//! Lines for the tests of findings, and tests of what all findings have in common.

use serde_json::{Value, json};

use crate::{
    diagnose::{Diagnosis, input::Input},
    event::{Evidence, Finding, FindingKind},
};

/// A time, in seconds after the beginning, in the format of the output.
pub(super) fn at(seconds: f64) -> String {
    let start: jiff::Timestamp = "2026-03-01T12:00:00Z".parse().expect("a time");
    let time = start + jiff::SignedDuration::from_secs_f64(seconds);
    format!("{time:.9}")
}

/// The client's end of a connection to port 9000 of 10.0.0.2, with some fields replaced by `fields`.
pub(super) fn client(seconds: f64, port: u16, fields: &Value) -> Value {
    let mut line = json!({
        "event": "close", "time": at(seconds), "seq": 0,
        "connection": {
            "local": {"address": "10.0.0.1", "port": port}, "remote": {"address": "10.0.0.2", "port": 9000},
            "netns": 1, "role": "client", "age_ms": 9000.0, "bytes_sent": 100, "bytes_received": 200,
        },
        "process": {"pid": 10, "tid": 10, "comm": "app", "exe": "/bin/app", "container": null},
        "closed_by": "local", "ended": "fin", "trigger": "close", "cause": null,
        "idle_ms": 1.0, "last_data": "received",
        "states": steps(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]),
    });
    merge(&mut line, fields);
    line
}

/// The other end of the same connection.
pub(super) fn server(seconds: f64, port: u16, fields: &Value) -> Value {
    let mut line = client(
        seconds,
        port,
        &json!({
            "connection": {
                "local": {"address": "10.0.0.2", "port": 9000},
                "remote": {"address": "10.0.0.1", "port": port},
                "role": "server", "bytes_sent": 200, "bytes_received": 100,
            },
            "process": {"pid": 20, "tid": 20, "comm": "backend", "exe": "/bin/backend"},
            "closed_by": "peer", "last_data": "sent",
            "states": steps(&["ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSE"]),
        }),
    );
    merge(&mut line, fields);
    line
}

pub(super) fn steps(states: &[&str]) -> Value {
    states
        .iter()
        .zip(0_u32..)
        .map(|(state, at)| json!({"state": state, "at_ms": f64::from(at) * 0.1}))
        .collect()
}

pub(super) fn closed_by_peer(idle: f64) -> Value {
    json!({
        "closed_by": "peer", "idle_ms": idle,
        "states": steps(&["ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSE"]),
    })
}

pub(super) fn merge(line: &mut Value, fields: &Value) {
    match (line, fields) {
        (Value::Object(line), Value::Object(fields)) => {
            for (name, value) in fields {
                merge(line.entry(name).or_insert(Value::Null), value);
            }
        }
        (line, value) => *line = value.clone(),
    }
}

pub(super) fn text(lines: &mut [Value]) -> String {
    for (seq, line) in (1..).zip(lines.iter_mut()) {
        line["seq"] = Value::from(seq);
    }
    let mut text = lines.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    text.push('\n');
    text
}

pub(super) fn findings(mut lines: Vec<Value>) -> Vec<Finding> {
    findings_of_files(&[&text(&mut lines)])
}

pub(super) fn findings_of_files(texts: &[&str]) -> Vec<Finding> {
    let mut input = Input::of(texts);
    let mut diagnosis = Diagnosis::new(input.names());
    input.read(|observation, source| diagnosis.add(observation, source)).expect("memory");
    assert_eq!(input.broken.count, 0, "{:?}", input.broken);
    diagnosis.findings(true)
}

pub(super) fn kinds(findings: &[Finding]) -> Vec<FindingKind> {
    findings.iter().map(|finding| finding.kind).collect()
}

#[track_caller]
pub(super) fn only(lines: Vec<Value>, kind: FindingKind) -> Finding {
    let mut findings = findings(lines);
    assert_eq!(kinds(&findings), [kind], "{findings:#?}");
    findings.remove(0)
}

#[track_caller]
pub(super) fn none(lines: Vec<Value>) {
    let findings = findings(lines);
    assert!(findings.is_empty(), "{findings:#?}");
}

pub(super) fn number(finding: &Finding, name: &str) -> f64 {
    match finding.evidence.get(name) {
        #[expect(clippy::cast_precision_loss, reason = "small in tests")]
        Some(Evidence::Count(count)) => *count as f64,
        Some(Evidence::Number(number)) => *number,
        other => panic!("{name} is {other:?} in {finding:#?}"),
    }
}

#[track_caller]
pub(super) fn assert_near(value: f64, expected: f64) {
    assert!((value - expected).abs() < 0.01, "{value} is not {expected}");
}

/// This many ends, each a second and a port number after the one before.
pub(super) fn many(count: u16, mut end: impl FnMut(f64, u16) -> Value) -> Vec<Value> {
    (0..count).map(|number| end(f64::from(number), 40_000 + number)).collect()
}

/// A database that is killed, an application that therefore loses its answer, and the proxy in front of it.
pub(super) fn database_killed(requests: u16) -> Vec<Value> {
    let mut lines = Vec::new();
    for number in 0..requests {
        let (database, front) = (41_000 + number, 40_000 + number);
        let to_database = json!({"connection": {
            "local": {"address": "10.0.0.2"}, "remote": {"address": "10.0.0.3", "port": 5432},
        }});
        let mut lost = client(5.0, database, &closed_by_peer(900.0));
        merge(&mut lost, &to_database);
        merge(
            &mut lost,
            &json!({
                "last_data": "sent", "since_sent_ms": 900.0,
                "process": {"pid": 20, "comm": "backend", "exe": "/bin/backend"},
            }),
        );
        let mut killed = server(
            5.001,
            database,
            &json!({
                "connection": {
                    "local": {"address": "10.0.0.3", "port": 5432}, "remote": {"address": "10.0.0.2"},
                },
                "closed_by": "local", "trigger": "signal", "signal": "SIGKILL", "last_data": "received",
                "since_received_ms": 900.0, "process": {"pid": 30, "comm": "database"},
            }),
        );
        killed["states"] = steps(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]);
        let left = server(
            5.01,
            front,
            &json!({
                "closed_by": "local", "last_data": "received", "idle_ms": 950.0,
                "states": steps(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]),
            }),
        );
        let mut proxy = client(5.011, front, &closed_by_peer(950.0));
        merge(&mut proxy, &json!({"last_data": "sent", "process": {"pid": 10, "comm": "proxy"}}));
        lines.extend([lost, killed, left, proxy]);
    }
    lines.sort_by_key(|line| line["time"].as_str().map(str::to_owned));
    lines
}

#[test]
fn two_hosts_files_give_what_one_gives() {
    let mut lines = database_killed(6);
    lines.extend((0..9).flat_map(|number: u16| {
        let (time, port) = (10.0 + f64::from(number), 50_000 + number);
        let mut ours = closed_by_peer(5000.0);
        ours["last_data"] = "received".into();
        [
            client(time, port, &ours),
            server(time + 0.001, port, &json!({"closed_by": "local", "idle_ms": 5000.0})),
        ]
    }));
    let whole = text(&mut lines);
    let (mut one, mut other) = (String::new(), String::new());
    for line in whole.lines() {
        let value: Value = serde_json::from_str(line).expect("JSON");
        let half = if value["connection"]["local"]["address"] == "10.0.0.1" { &mut one } else { &mut other };
        half.push_str(line);
        half.push('\n');
    }
    let together = findings_of_files(&[&whole]);
    let apart = findings_of_files(&[&one, &other]);
    assert!(!together.is_empty());
    let summaries = |findings: &[Finding]| -> Vec<_> {
        findings.iter().map(|finding| (finding.kind, finding.count, finding.summary.clone())).collect()
    };
    assert_eq!(summaries(&together), summaries(&apart));
    assert!(apart[0].files.is_some() && together[0].files.is_none());
}

#[test]
fn a_load_balancers_health_checks_are_nothing() {
    // The checker closes with SO_LINGER 0 after the handshake.
    let check = json!({
        "connection": {"bytes_sent": 0, "bytes_received": 0},
        "ended": "reset_received", "cause": "peer_reset", "trigger": null,
        "last_data": null, "idle_ms": null, "states": steps(&["ESTABLISHED", "CLOSE"]),
    });
    none(many(50, |at, port| server(at, port, &check)));
    let checker = json!({
        "connection": {"bytes_sent": 0, "bytes_received": 0}, "ended": "reset_sent", "cause": "linger_zero",
        "last_data": null, "idle_ms": null, "states": steps(&["ESTABLISHED", "CLOSE"]),
    });
    none(many(50, |at, port| client(at, port, &checker)));
}

#[test]
fn findings_so_far_leave_out_ends_whose_peers_may_come() {
    let mut lines = many(9, |at, port| client(at, port, &closed_by_peer(5000.0)));
    let mut input = Input::of(&[&text(&mut lines)]);
    let mut diagnosis = Diagnosis::new(input.names());
    input.read(|observation, source| diagnosis.add(observation, source)).expect("memory");
    assert!(diagnosis.findings(false).is_empty());
    let mut later = [client(100.0, 60_000, &json!({}))];
    let mut input = Input::of(&[&text(&mut later)]);
    input.read(|observation, source| diagnosis.add(observation, source)).expect("memory");
    assert_eq!(kinds(&diagnosis.findings(false)), [FindingKind::KeepaliveMismatch]);
    assert_eq!(kinds(&diagnosis.findings(true)), [FindingKind::KeepaliveMismatch], "asking changes nothing");
}
