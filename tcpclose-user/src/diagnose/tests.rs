//! Each kind of finding, from lines written for it, and its absence below the threshold.

use serde_json::{Value, json};

use crate::{
    diagnose::{Diagnosis, input::Input},
    event::{Confidence, Evidence, Finding, FindingKind},
};

/// A time, in seconds after the beginning, in the format of the output.
fn at(seconds: f64) -> String {
    let start: jiff::Timestamp = "2026-03-01T12:00:00Z".parse().expect("a time");
    let time = start + jiff::SignedDuration::from_secs_f64(seconds);
    format!("{time:.9}")
}

/// The client's end of a connection to port 9000 of 10.0.0.2, with some fields replaced by `fields`.
fn client(seconds: f64, port: u16, fields: &Value) -> Value {
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
fn server(seconds: f64, port: u16, fields: &Value) -> Value {
    let mut line = client(
        seconds,
        port,
        &json!({
            "connection": {
                "local": {"address": "10.0.0.2", "port": 9000}, "remote": {"address": "10.0.0.1", "port": port},
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

fn steps(states: &[&str]) -> Value {
    states
        .iter()
        .zip(0_u32..)
        .map(|(state, at)| json!({"state": state, "at_ms": f64::from(at) * 0.1}))
        .collect()
}

fn closed_by_peer(idle: f64) -> Value {
    json!({
        "closed_by": "peer", "idle_ms": idle,
        "states": steps(&["ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSE"]),
    })
}

fn merge(line: &mut Value, fields: &Value) {
    match (line, fields) {
        (Value::Object(line), Value::Object(fields)) => {
            for (name, value) in fields {
                merge(line.entry(name).or_insert(Value::Null), value);
            }
        }
        (line, value) => *line = value.clone(),
    }
}

fn text(lines: &mut [Value]) -> String {
    for (seq, line) in (1..).zip(lines.iter_mut()) {
        line["seq"] = Value::from(seq);
    }
    let mut text = lines.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    text.push('\n');
    text
}

fn findings(mut lines: Vec<Value>) -> Vec<Finding> {
    findings_of_files(&[&text(&mut lines)])
}

fn findings_of_files(texts: &[&str]) -> Vec<Finding> {
    let mut input = Input::of(texts);
    let mut diagnosis = Diagnosis::new(input.names());
    input.read(|observation, source| diagnosis.add(observation, source)).expect("memory");
    assert_eq!(input.broken.count, 0, "{:?}", input.broken);
    diagnosis.findings(true)
}

fn kinds(findings: &[Finding]) -> Vec<FindingKind> {
    findings.iter().map(|finding| finding.kind).collect()
}

#[track_caller]
fn only(lines: Vec<Value>, kind: FindingKind) -> Finding {
    let mut findings = findings(lines);
    assert_eq!(kinds(&findings), [kind], "{findings:#?}");
    findings.remove(0)
}

#[track_caller]
fn none(lines: Vec<Value>) {
    let findings = findings(lines);
    assert!(findings.is_empty(), "{findings:#?}");
}

fn number(finding: &Finding, name: &str) -> f64 {
    match finding.evidence.get(name) {
        #[expect(clippy::cast_precision_loss, reason = "small in tests")]
        Some(Evidence::Count(count)) => *count as f64,
        Some(Evidence::Number(number)) => *number,
        other => panic!("{name} is {other:?} in {finding:#?}"),
    }
}

#[track_caller]
fn assert_near(value: f64, expected: f64) {
    assert!((value - expected).abs() < 0.01, "{value} is not {expected}");
}

/// This many ends, each a second and a port after the one before.
fn many(count: u16, mut end: impl FnMut(f64, u16) -> Value) -> Vec<Value> {
    (0..count).map(|number| end(f64::from(number), 40_000 + number)).collect()
}

#[test]
fn keepalive_mismatch() {
    let mut lines = many(37, |at, port| client(at, port, &closed_by_peer(5000.0 + at)));
    // Three of them were used again before the program noticed.
    for line in &mut lines[..3] {
        line["ended"] = "reset_received".into();
        line["cause"] = "peer_reset".into();
        line["states"] = steps(&["ESTABLISHED", "CLOSE_WAIT", "CLOSE"]);
    }
    lines.extend((0..9).map(|n: u16| client(50.0 + f64::from(n), 50_000 + n, &json!({"idle_ms": 60_000.0}))));
    let finding = only(lines, FindingKind::KeepaliveMismatch);
    assert_eq!(finding.count, 37);
    assert_near(number(&finding, "peer_timeout_ms"), 5018.0);
    assert_near(number(&finding, "own_timeout_ms"), 60_000.0);
    assert_near(number(&finding, "raced_requests"), 3.0);
    assert_eq!(finding.confidence, Confidence::Strong);
    assert_eq!(&finding.lines[..3], [1, 2, 3], "the lost requests first");
    assert!(finding.summary.contains("37 closed, 3 requests lost"), "{}", finding.summary);
    assert_eq!(finding.process.expect("known").comm, "app");
}

#[test]
fn a_farewell_does_not_hide_the_silence() {
    // A close_notify: data arrived just before the FIN, but this side had sent nothing for five seconds. Then
    // a request that crossed with the FIN.
    let mut lines = many(6, |at, port| {
        let mut line = client(at, port, &closed_by_peer(0.0));
        merge(&mut line, &json!({"last_data": "sent", "since_sent_ms": 2.0, "since_received_ms": 5002.0}));
        merge(&mut line, &json!({"ended": "reset_received", "cause": "peer_reset", "unacked_bytes": 180}));
        line
    });
    let finding = only(lines.clone(), FindingKind::KeepaliveMismatch);
    assert_near(number(&finding, "peer_timeout_ms"), 5000.0);
    assert_near(number(&finding, "raced_requests"), 6.0);
    none(lines[..4].to_vec());
    // The program answered the server's farewell with its own.
    for line in &mut lines {
        line["unacked_bytes"] = 24.into();
    }
    let finding = only(lines, FindingKind::KeepaliveMismatch);
    assert_near(number(&finding, "raced_requests"), 0.0);
}

/// A pool of aiohttp drops an idle TLS connection: it sends a `close_notify` and waits, so that the server
/// closes first.
#[test]
fn a_client_that_waits_for_the_answer_to_its_farewell() {
    none(many(6, |at, port| {
        let mut line = client(at, port, &closed_by_peer(0.0));
        merge(&mut line, &json!({"last_data": "sent", "since_sent_ms": 0.0, "since_received_ms": 600.0}));
        line
    }));
}

#[test]
fn a_server_that_resets_idle_connections() {
    let mut reset = closed_by_peer(2000.0);
    merge(&mut reset, &json!({"ended": "reset_received", "cause": "peer_reset", "last_data": null}));
    reset["states"] = steps(&["ESTABLISHED", "CLOSE"]);
    let finding = only(many(6, |at, port| client(at, port, &reset)), FindingKind::KeepaliveMismatch);
    assert_near(number(&finding, "peer_timeout_ms"), 2000.0);
    assert_near(number(&finding, "raced_requests"), 0.0);
    // The last message was one that needs no answer, such as MySQL's COM_STMT_CLOSE.
    reset["last_data"] = "sent".into();
    none(many(6, |at, port| client(at, port, &reset)));
    // The RST came instead of an answer.
    only(
        many(6, |at, port| {
            reset["idle_ms"] = (700.0 * (at + 1.0)).into();
            client(at, port, &reset)
        }),
        FindingKind::BackendDied,
    );
}

#[test]
fn no_keepalive_mismatch_below_the_bar() {
    none(many(4, |at, port| client(at, port, &closed_by_peer(5000.0))));
    // Irregular, or immediately after the answer.
    none(many(20, |at, port| client(at, port, &closed_by_peer(1000.0 * (at + 1.0)))));
    none(many(20, |at, port| client(at, port, &closed_by_peer(3.0))));
    // The client itself closed.
    none(many(20, |at, port| client(at, port, &json!({"idle_ms": 60_000.0}))));
    // A server that closes idle clients, none of which sent a request too late.
    let idle = json!({"closed_by": "local", "idle_ms": 5000.0, "states": steps(&["ESTABLISHED", "FIN_WAIT1", "CLOSE"])});
    none(many(20, |at, port| server(at, port, &idle)));
}

#[test]
fn keepalive_mismatch_seen_from_the_server_alone() {
    let idle = json!({"closed_by": "local", "idle_ms": 5000.0, "states": steps(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"])});
    let mut lines = many(8, |at, port| server(at, port, &idle));
    let reset = |at: f64, port: u16| {
        let mut line = server(
            at,
            port,
            &json!({"process": null, "event": "reset", "direction": "sent", "cause": "timewait"}),
        );
        line["connection"]["role"] = Value::Null;
        line
    };
    lines.extend([reset(9.0, 40_001), reset(9.5, 40_007), reset(10.0, 1)]);
    let finding = only(lines, FindingKind::KeepaliveMismatch);
    assert_near(number(&finding, "own_timeout_ms"), 5000.0);
    assert_near(number(&finding, "raced_requests"), 2.0);
    assert_near(number(&finding, "local_port"), 9000.0);
}

#[test]
fn client_gave_up_at_its_timeout() {
    let mut lines = many(6, |at, port| server(at, port, &unanswered(3000.0)));
    lines.push(server(10.0, 50_000, &json!({})));
    let finding = only(lines, FindingKind::ClientGaveUp);
    assert_near(number(&finding, "timeout_ms"), 3000.0);
    assert_eq!(finding.count, 6);
    assert_eq!(finding.lines, [1, 2, 3, 4, 5, 6]);
}

/// A server's end whose client closed after this wait for its first answer.
fn unanswered(wait: f64) -> Value {
    json!({"connection": {"bytes_sent": 0}, "last_data": "received", "idle_ms": wait})
}

/// A client of HTTP/2 returns a window 100 ms after its answer, and closes a second later: a request that it
/// did not wait for looks the same.
#[test]
fn what_follows_an_answer_may_be_no_request() {
    let mut at_server = json!({"last_data": "received", "idle_ms": 1000.0, "since_sent_ms": 1100.0, "since_received_ms": 1000.0});
    let mut at_client =
        json!({"last_data": "sent", "idle_ms": 1000.0, "since_sent_ms": 1000.0, "since_received_ms": 1100.0});
    none(many(20, |at, port| server(at, port, &at_server)));
    none(many(20, |at, port| client(at, port, &at_client)));
    none(
        (0..20)
            .flat_map(|n: u16| {
                let (at, port) = (f64::from(n), 40_000 + n);
                [server(at, port, &at_server), client(at, port, &at_client)]
            })
            .collect(),
    );
    // The answer to it came after the client had closed.
    let teardown = |names: [&str; 3]| json!([{"state": names[0], "at_ms": 0.0}, {"state": names[1], "at_ms": 5000.0}, {"state": names[2], "at_ms": 5400.0}]);
    merge(&mut at_server, &json!({"ended": "reset_received", "cause": "peer_reset", "close_wait_ms": 400.0}));
    at_server["states"] = teardown(["ESTABLISHED", "CLOSE_WAIT", "CLOSE"]);
    merge(&mut at_client, &json!({"ended": "reset_sent", "cause": "data_after_close"}));
    at_client["states"] = teardown(["ESTABLISHED", "FIN_WAIT1", "CLOSE"]);
    only(many(6, |at, port| server(at, port, &at_server)), FindingKind::ClientGaveUp);
    only(many(6, |at, port| client(at, port, &at_client)), FindingKind::ClientGaveUp);
    // So soon after that it may be the answer to a farewell, or to nothing.
    at_server["states"][2]["at_ms"] = 5001.0.into();
    at_client["states"][2]["at_ms"] = 5001.0.into();
    none(many(20, |at, port| server(at, port, &at_server)));
    none(many(20, |at, port| client(at, port, &at_client)));
}

/// The two ends of a proxy whose client gave up after three seconds: the client's second request came in the
/// same tick as the answer before it, so that its own end does not show that it waited.
fn client_of_a_proxy_gave_up(at: f64, port: u16) -> [Value; 2] {
    let front = json!({
        "connection": {"local": {"port": 8080}, "bytes_sent": 250, "bytes_received": 110},
        "process": {"pid": 15, "tid": 15, "comm": "proxy", "exe": "/bin/proxy"},
        "last_data": null, "idle_ms": 3000.0, "since_sent_ms": 3000.0, "since_received_ms": 3000.0,
    });
    let upstream = json!({
        "connection": {"local": {"port": port + 10_000}}, "process": {"pid": 15, "tid": 15, "comm": "proxy", "exe": "/bin/proxy"},
        "last_data": "sent", "idle_ms": 2999.0, "since_sent_ms": 2999.0, "since_received_ms": 3100.0,
    });
    [server(at, port, &front), client(at + 0.001, port, &upstream)]
}

#[test]
fn a_client_of_a_proxy_gave_up_in_the_tick_of_its_first_answer() {
    let lines: Vec<Value> =
        (0..6).flat_map(|n: u16| client_of_a_proxy_gave_up(f64::from(n), 40_000 + n)).collect();
    let finding = only(lines.clone(), FindingKind::ClientGaveUp);
    assert_near(number(&finding, "timeout_ms"), 2999.0);
    assert_near(number(&finding, "local_port"), 8080.0);
    assert_near(number(&finding, "upstream_dropped"), 6.0);
    let changed = |of: &str, fields: &Value| {
        let mut lines = lines.clone();
        let ends = lines.iter_mut().filter(|line| line["connection"]["role"] == of);
        ends.for_each(|line| merge(line, fields));
        lines
    };
    // The proxy had answered after all, and had then been idle: the client only closed an idle connection.
    none(changed("client", &json!({"last_data": "received"})));
    // It may forward bytes without knowing requests, of a client that returned a window,
    let forwarded = json!({"connection": {"bytes_sent": 200, "bytes_received": 100}});
    none(changed("server", &forwarded));
    // or end TLS for a client that said farewell.
    let farewell = json!({"last_data": "received", "since_received_ms": 0.0, "idle_ms": 0.0});
    none(changed("server", &farewell));
    // But such a proxy has no connections that are older than its clients'.
    let older = json!([{"state": "ESTABLISHED", "at_ms": 0.0}, {"state": "CLOSE", "at_ms": 9000.0}]);
    for fields in [forwarded, farewell] {
        let mut lines = changed("server", &fields);
        for line in lines.iter_mut().filter(|line| line["connection"]["role"] == "client") {
            line["states"] = older.clone();
        }
        only(lines, FindingKind::ClientGaveUp);
    }
    // And what was asked first is a request.
    only(
        changed("client", &json!({"connection": {"bytes_received": 0}, "since_received_ms": null})),
        FindingKind::ClientGaveUp,
    );
}

#[test]
fn people_who_left() {
    let waits = [1200.0, 9000.0, 2500.0, 17_000.0, 4000.0, 30_000.0];
    let gone = |at: f64, port| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
        let wait = waits[at as usize];
        server(at, port, &unanswered(wait))
    };
    let mut lines = many(6, gone);
    lines.push(server(10.0, 50_000, &json!({})));
    let finding = only(lines, FindingKind::ClientGaveUp);
    assert!(finding.summary.contains("people who left"), "{}", finding.summary);
    assert!(!finding.evidence.contains_key("timeout_ms"));
}

#[test]
fn nobody_gave_up_below_the_bar() {
    let answered = || server(10.0, 50_000, &json!({}));
    let mut four = many(4, |at, port| server(at, port, &unanswered(3000.0)));
    four.push(answered());
    none(four);
    // The end of a benchmark: pending requests were a fraction of a second old.
    let mut benchmark = many(50, |at, port| server(1.0, port, &unanswered(at)));
    benchmark.push(answered());
    none(benchmark);
    // Logs are sent in one direction.
    none(many(20, |at, port| server(at, port, &unanswered(3000.0))));
}

#[test]
fn both_views_of_a_wait_are_one_finding() {
    let mut lines = Vec::new();
    for number in 0..6_u16 {
        let (time, port) = (f64::from(number), 40_000 + number);
        let asked = json!({"connection": {"bytes_received": 0}, "last_data": "sent", "idle_ms": 3000.0});
        lines.push(client(time, port, &asked));
        lines.push(server(time, port, &unanswered(3000.0)));
    }
    lines.extend([server(9.0, 50_000, &json!({})), client(9.0, 50_000, &json!({}))]);
    let finding = only(lines, FindingKind::ClientGaveUp);
    assert_eq!(finding.process.expect("known").comm, "backend");
    assert_eq!(finding.remote.expect("known").comm.as_deref(), Some("app"));
}

/// Two programs that have the same name, as interpreters do.
#[test]
fn a_client_and_a_server_of_one_name() {
    let mut lines = vec![client(9.0, 50_000, &json!({})), server(9.0, 50_000, &json!({}))];
    for number in 0..6_u16 {
        let (time, port) = (f64::from(number), 40_000 + number);
        let asked = json!({"connection": {"bytes_received": 0}, "last_data": "sent", "idle_ms": 3000.0});
        lines.extend([client(time, port, &asked), server(time, port, &unanswered(3000.0))]);
    }
    let python = json!({"process": {"comm": "python3", "exe": "/usr/bin/python3"}});
    for line in &mut lines {
        merge(line, &python);
    }
    let finding = only(lines, FindingKind::ClientGaveUp);
    assert!(!finding.summary.contains("of its own"), "{}", finding.summary);
}

#[test]
fn a_server_that_crashes_is_a_finding_at_the_first_request_lost() {
    let crash = json!({
        "closed_by": "local", "trigger": "signal", "signal": "SIGSEGV", "last_data": "received",
        "since_received_ms": 900.0,
    });
    let finding = only(vec![server(1.0, 40_000, &crash)], FindingKind::BackendDied);
    assert_eq!(finding.confidence, Confidence::Proven);
    assert!(
        finding.summary.contains("crashed (SIGSEGV) 1 time, with 1 request unanswered"),
        "{}",
        finding.summary
    );
    let idle = json!({"closed_by": "local", "trigger": "signal", "signal": "SIGSEGV", "last_data": "sent"});
    none(vec![server(1.0, 40_000, &idle)]);
    let mut killed = crash.clone();
    merge(&mut killed, &json!({"signal": "SIGKILL", "signal_from": {"pid": 1, "comm": "monit", "uid": 0}}));
    let finding = only(vec![server(1.0, 40_000, &killed)], FindingKind::BackendDied);
    assert!(finding.summary.contains("was killed (SIGKILL) by monit"), "{}", finding.summary);
    let mut oom = crash;
    merge(&mut oom, &json!({"signal": "SIGKILL", "signal_from": {"oom": true}}));
    let finding = only(vec![server(1.0, 40_000, &oom)], FindingKind::BackendDied);
    assert!(finding.summary.contains("OOM killer"), "{}", finding.summary);
}

/// Ends of clients, of which the server has closed six this long after their last data, and of which it has
/// answered others.
fn closed_instead_of_an_answer(wait: impl Fn(f64) -> f64, others: u16) -> Vec<Value> {
    let mut lines = many(6, |at, port| {
        let mut gone = closed_by_peer(wait(at));
        merge(&mut gone, &json!({"last_data": "sent"}));
        client(at, port, &gone)
    });
    lines.extend((0..others).map(|number: u16| client(20.0, 50_000 + number, &json!({}))));
    lines
}

#[test]
fn servers_that_close_before_they_answer() {
    let wait = |at: f64| 90.0 + 40.0 * at;
    // A protocol that ends with a message of the client looks the same.
    none(closed_instead_of_an_answer(wait, 0));
    let finding = only(closed_instead_of_an_answer(wait, 20), FindingKind::BackendDied);
    assert_near(number(&finding, "wait_ms"), 190.0);
    assert_near(number(&finding, "connections"), 26.0);
}

#[test]
fn what_a_client_says_last_need_not_be_a_request() {
    // A farewell, such as memcached's `quit`, to which most servers answer at once.
    none(closed_instead_of_an_answer(|at| at, 20));
    let mut lines = closed_instead_of_an_answer(|at| at, 60);
    let slow = closed_instead_of_an_answer(|at| 60.0 + 70.0 * at, 0);
    lines.extend(slow.into_iter().take(5).zip(60_000_u16..).map(|(mut line, port)| {
        merge(&mut line, &json!({"connection": {"local": {"port": port}}}));
        line
    }));
    none(lines);
    // The server closes a while after it: an idle timeout.
    none(closed_instead_of_an_answer(|at| 5000.0 + at, 20));
    // Clients that are never answered, which send logs, whatever their server does. Its end is known as well.
    let mut logs = closed_instead_of_an_answer(|at| 5000.0 * (at + 1.0), 20);
    for line in &mut logs {
        merge(line, &json!({"connection": {"bytes_received": 0}}));
    }
    let ends: Vec<Value> = logs
        .iter()
        .filter(|line| line["closed_by"] == "peer")
        .map(|line| {
            let port = line["connection"]["local"]["port"].as_u64().and_then(|port| port.try_into().ok());
            let closed = json!({
                "connection": {"bytes_sent": 0}, "closed_by": "local", "last_data": "received", "idle_ms": line["idle_ms"],
                "states": steps(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]), "time": line["time"],
            });
            server(0.0, port.expect("a port"), &closed)
        })
        .collect();
    logs.extend(ends);
    none(logs);
}

/// What a proxy passes on may be a farewell: the server ends its connection, and the proxy the client's.
#[test]
fn a_farewell_through_a_proxy_is_no_chain() {
    let through_a_proxy = |wait: f64| {
        (0..6_u16).flat_map(move |number| {
            let (at, port) = (f64::from(number), 40_000 + number);
            let proxy = json!({"process": {"pid": 15, "tid": 15, "comm": "proxy", "exe": "/bin/proxy"}, "idle_ms": wait});
            let mut upstream = closed_by_peer(wait);
            merge(&mut upstream, &proxy);
            merge(&mut upstream, &json!({"last_data": "sent", "connection": {"local": {"port": port + 10_000}}}));
            let mut front = json!({
                "connection": {"local": {"port": 8080}}, "closed_by": "local", "last_data": "received",
                "states": steps(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]),
            });
            merge(&mut front, &proxy);
            [client(at, port, &upstream), server(at + 0.001, port, &front)]
        })
    };
    none(through_a_proxy(2.0).collect());
    only(through_a_proxy(300.0).collect(), FindingKind::Chain);
}

/// The end of a process that had these connections.
fn died(signal: &str, ends: &[Value]) -> Vec<Value> {
    let died = json!({"closed_by": "local", "trigger": "signal", "signal": signal});
    let ends = ends.iter().zip(40_000_u16..).map(|(end, port)| {
        let mut line = server(1.0, port, &died);
        merge(&mut line, end);
        line
    });
    ends.collect()
}

/// The client's last data, and how long after the server's it came.
fn asked(since_ms: f64, after_ms: f64) -> Value {
    json!({
        "last_data": "received", "idle_ms": since_ms, "since_received_ms": since_ms,
        "since_sent_ms": since_ms + after_ms,
    })
}

/// After an earlier answer, what a client says last need not be a request; in the tick of the answer, it is not
/// even known to be the last.
#[test]
fn requests_that_may_have_been_lost_are_not_counted_but_told() {
    let first = json!({"last_data": "received", "idle_ms": 40.0, "since_received_ms": 40.0});
    let idle = json!({"last_data": null, "idle_ms": 40.0, "since_received_ms": 40.0, "since_sent_ms": 40.0});
    let mut ends = vec![first, asked(300.0, 2000.0), asked(90.0, 4.0)];
    ends.extend(vec![idle; 5]);
    let finding = only(died("SIGKILL", &ends), FindingKind::BackendDied);
    let text = "with at least 1 and at most 8 requests unanswered.";
    assert!(finding.summary.ends_with(text), "{}", finding.summary);
    assert_near(number(&finding, "requests_lost"), 1.0);
    assert_near(number(&finding, "undecided_connections"), 7.0);
    let finding = only(died("SIGTERM", &ends), FindingKind::Deploy);
    let text = "at least 1 and at most 8 requests under way.";
    assert!(finding.summary.ends_with(text), "{}", finding.summary);
}

/// Clients that acknowledge the answer (HTTP/2's `WINDOW_UPDATE`) and are then silent; and clients and a server
/// that send heartbeats (AMQP), each at a time of its own.
#[test]
fn the_last_word_on_an_idle_connection_is_no_request() {
    let acknowledged: Vec<_> = (0..8_u32).map(|n| asked(200.0 + 900.0 * f64::from(n), 4.0)).collect();
    let heartbeats: Vec<_> = (1..9_u32).map(|n| asked(220.0 * f64::from(n), 310.0 * f64::from(n))).collect();
    for ends in [acknowledged, heartbeats] {
        let finding = only(died("SIGKILL", &ends), FindingKind::Deploy);
        assert!(finding.summary.ends_with("under way on 8 of them is not known."), "{}", finding.summary);
        assert_near(number(&finding, "undecided_connections"), 8.0);
        // A crash is a fault all the same.
        let finding = only(died("SIGSEGV", &ends), FindingKind::BackendDied);
        assert!(finding.summary.ends_with("with at most 8 requests unanswered."), "{}", finding.summary);
        assert_near(number(&finding, "requests_lost"), 0.0);
    }
}

/// The ends of the clients of a broker that is killed on another host, ten seconds after it has closed a few
/// connections in order.
#[test]
fn heartbeats_to_a_server_that_ends_elsewhere_are_no_requests() {
    let mut lines: Vec<_> =
        (0..12_u16).map(|n| client(f64::from(n) / 10.0, 50_000 + n, &json!({}))).collect();
    lines.extend((0..8_u32).zip(40_000_u16..).map(|(n, port)| {
        let waited = 90.0 + 40.0 * f64::from(n);
        let mut end = closed_by_peer(waited);
        merge(&mut end, &json!({"ended": "reset_received", "cause": "peer_reset", "last_data": "sent"}));
        merge(&mut end, &json!({"since_sent_ms": waited, "since_received_ms": 900.0}));
        end["states"] = steps(&["ESTABLISHED", "CLOSE"]);
        client(10.0 + f64::from(n) / 1e3, port, &end)
    }));
    none(lines.clone());
    // The same, one after the other: the server fails again and again.
    for (line, seconds) in lines.iter_mut().skip(12).zip(10_u32..) {
        line["time"] = at(f64::from(seconds)).into();
    }
    only(lines, FindingKind::BackendDied);
}

/// A broker resets a consumer that has sent no heartbeat for six seconds. It sent the last of its own a second
/// before, which is no time of silence.
#[test]
fn missed_heartbeats_are_no_idle_timeout() {
    let mut reset = closed_by_peer(1000.0);
    merge(&mut reset, &json!({"ended": "reset_received", "cause": "peer_reset", "last_data": "received"}));
    merge(&mut reset, &json!({"since_received_ms": 1000.0, "since_sent_ms": 6000.0}));
    reset["states"] = steps(&["ESTABLISHED", "CLOSE"]);
    none(many(6, |at, port| client(at, port, &reset)));
    merge(&mut reset, &json!({"since_sent_ms": 1010.0}));
    only(many(6, |at, port| client(at, port, &reset)), FindingKind::KeepaliveMismatch);
}

/// A library that connects to itself, to wake up its event loop (pika), in a program that is killed. And in one
/// that closes such a connection because its server was killed.
#[test]
fn a_connection_of_a_process_with_itself_has_no_client() {
    let woken = json!({
        "last_data": "received", "since_received_ms": 3000.0, "idle_ms": 3000.0,
        "process": {"pid": 10, "comm": "app", "exe": "/bin/app"},
    });
    let mut lines = died("SIGKILL", &vec![woken.clone(); 6]);
    let mut waking: Vec<_> = (0..6_u16)
        .map(|n| {
            let mut end = closed_by_peer(3000.0);
            merge(&mut end, &json!({"last_data": "sent", "trigger": "signal", "signal": "SIGKILL"}));
            client(1.0, 40_000 + n, &end)
        })
        .collect();
    lines.append(&mut waking);
    none(lines);

    let mut lines = database_killed(6);
    for line in &mut lines {
        if line["process"]["comm"] == "proxy" {
            merge(line, &json!({"process": {"pid": 20, "comm": "backend", "exe": "/bin/backend"}}));
        }
    }
    only(lines, FindingKind::BackendDied);
}

/// A server that receives logs has none to answer; that it crashes is a fault all the same.
#[test]
fn a_process_that_answers_nobody() {
    let mut end = asked(300.0, 0.0);
    merge(&mut end, &json!({"since_sent_ms": null, "connection": {"bytes_sent": 0}}));
    let ends = vec![end; 4];
    none(died("SIGKILL", &ends));
    none(died("SIGTERM", &ends));
    let finding = only(died("SIGSEGV", &ends), FindingKind::BackendDied);
    assert!(finding.summary.contains("4 clients connected that it had sent nothing"), "{}", finding.summary);
    assert_eq!(finding.evidence["requests_lost"], Evidence::Unknown);
}

/// A server with a process for each connection, as PostgreSQL, which exits when its client says goodbye.
#[test]
fn processes_that_exit_when_they_are_asked_to() {
    let exits = |after_ms: f64| {
        many(20, |at, port| {
            let exit = json!({
                "closed_by": "local", "trigger": "exit", "last_data": "received", "since_received_ms": after_ms,
                "process": {"pid": u32::from(port)},
            });
            server(at, port, &exit)
        })
    };
    none(exits(0.0));
    none(exits(4.0));
    only(exits(500.0), FindingKind::BackendDied);
    // Some are slow to.
    let mut mixed = exits(4.0);
    mixed.extend(exits(25.0).into_iter().take(8).map(|mut line| {
        let port = line["connection"]["remote"]["port"].as_u64().unwrap_or_default() + 100;
        merge(&mut line, &json!({"process": {"pid": port}, "connection": {"remote": {"port": port}}}));
        line
    }));
    none(mixed);
}

/// The signal ends a request however young it is.
#[test]
fn a_restart_loses_what_has_just_been_asked() {
    let stopped = json!({
        "closed_by": "local", "trigger": "signal", "signal": "SIGTERM", "last_data": "received",
        "since_received_ms": 0.5,
    });
    let finding = only(many(20, |at, port| server(at / 100.0, port, &stopped)), FindingKind::Deploy);
    assert_near(number(&finding, "requests_lost"), 20.0);
}

#[test]
fn a_restart_is_no_fault() {
    let stopped = json!({"closed_by": "local", "trigger": "signal", "signal": "SIGTERM"});
    let finding = only(
        (0..7).map(|number: u16| server(1.0 + f64::from(number) * 0.1, 40_000 + number, &stopped)).collect(),
        FindingKind::Deploy,
    );
    assert_near(number(&finding, "requests_lost"), 0.0);
    assert!(finding.summary.contains("nothing was lost"), "{}", finding.summary);
    none((0..4).map(|number: u16| server(1.0, 40_000 + number, &stopped)).collect());
    none(many(7, |at, port| server(at, port, &stopped)));
    // The end of a client, such as a benchmark.
    none((0..50).map(|number: u16| client(1.0, 40_000 + number, &json!({"trigger": "exit"}))).collect());
}

fn lingering(seconds: f64, port: u16, kind: &str) -> Value {
    let mut line = client(
        seconds,
        port,
        &json!({
            "event": "lingering", "state": "CLOSE_WAIT", "kind": kind, "since": at(seconds - 10.0), "for_ms": 10_000.0,
            "holders": [{"pid": 10, "comm": "app", "fd": port - 40_000 + 10}],
            "opener": {"process": null, "stack": {"kernel": null, "user": [
                {"symbol": "__connect", "module": "/lib/x86_64-linux-gnu/libc.so.6", "file": null, "line": null},
                {"symbol": "app::fetch", "module": "/bin/app", "file": "fetch.rs", "line": 12},
            ]}},
        }),
    );
    line["closed_by"] = Value::Null;
    line
}

#[test]
fn leak() {
    let mut lines = many(13, |at, port| lingering(at * 6.0, port, "leaked"));
    // Two are closed later.
    let mut closed = closed_by_peer(1.0);
    merge(&mut closed, &json!({"close_wait_ms": 15_000.0}));
    lines.extend([client(80.0, 40_000, &closed), client(80.0, 40_001, &closed)]);
    let finding = only(lines, FindingKind::Leak);
    assert_eq!(finding.count, 11);
    assert_near(number(&finding, "per_minute"), 10.0);
    assert_near(number(&finding, "highest_descriptor"), 22.0);
    assert_near(number(&finding, "minutes_to_1024_descriptors"), 100.2);
    assert_eq!(finding.evidence["opened_in"], Evidence::Text("app::fetch (fetch.rs:12)".to_owned()));
}

#[test]
fn no_leak_below_the_bar() {
    none(many(4, |at, port| lingering(at, port, "leaked")));
    // Idle connections of a pool, which it will drop at their next use.
    let old = json!({"connection": {"age_ms": 60_000.0}});
    let mut pool = many(9, |at, port| lingering(at, port, "unread"));
    for line in &mut pool {
        merge(line, &old);
    }
    none(pool.clone());
    // Five that were opened after the first had been closed by the peer, to the same address.
    for line in &mut pool {
        merge(line, &json!({"connection": {"age_ms": 10_100.0}}));
    }
    only(pool.clone(), FindingKind::Leak);
    for (line, port) in pool.iter_mut().zip(1..) {
        merge(line, &json!({"connection": {"remote": {"port": port}}}));
    }
    none(pool);
    let mut lines = many(9, |at, port| lingering(at, port, "leaked"));
    let mut closed = closed_by_peer(1.0);
    merge(&mut closed, &json!({"close_wait_ms": 15_000.0}));
    lines.extend((0..5).map(|number: u16| client(80.0, 40_000 + number, &closed)));
    none(lines);
}

#[test]
fn time_wait_pressure() {
    let template = client(0.0, 7, &json!({})).to_string();
    let short = |count: u32, seconds: f64| -> Vec<Finding> {
        let lines: String = (1..=count)
            .map(|number| {
                let time = at(f64::from(number) * seconds / f64::from(count));
                let line = template
                    .replace(&at(0.0), &time)
                    .replace("\"port\":7", &format!("\"port\":{}", 1024 + number));
                line + "\n"
            })
            .collect();
        findings_of_files(&[&lines])
    };
    let pressed = short(17_000, 50.0);
    assert_eq!(kinds(&pressed), [FindingKind::TimeWaitPressure]);
    assert_near(number(&pressed[0], "time_wait_peak"), 17_000.0);
    assert_near(number(&pressed[0], "ports_used_percent"), 60.215);
    assert!(short(17_000, 100.0).is_empty(), "60 s after, a port is free");
    // 340 a second never take all of 28,232 ports.
    assert_eq!(pressed[0].evidence["seconds_to_all_ports"], Evidence::Unknown);
    assert_near(number(&pressed[0], "connections_per_second"), 333.333);
    let quick = short(17_000, 16.5);
    assert_near(number(&quick[0], "connections_per_second"), 1000.0);
    assert_near(number(&quick[0], "seconds_to_all_ports"), 28.232);
    assert!(quick[0].summary.contains("at that rate all are after 28.2s"), "{}", quick[0].summary);
    assert!(short(10_000, 10.0).is_empty());
}

#[test]
fn unread_close() {
    let unread =
        json!({"closed_by": "local", "ended": "reset_sent", "cause": "unread_data", "unread_bytes": 70});
    let finding = only(many(5, |at, port| server(at, port, &unread)), FindingKind::UnreadClose);
    assert_near(number(&finding, "unread_bytes"), 350.0);
    none(many(4, |at, port| server(at, port, &unread)));
    // The farewell of TLS, which a server leaves unread that was asked to close before it.
    let farewell = json!({
        "closed_by": "local", "ended": "reset_sent", "cause": "unread_data", "unread_bytes": 24,
    });
    none(many(50, |at, port| server(at, port, &farewell)));
    // A client that gives up loses only its own answer.
    none(many(50, |at, port| client(at, port, &unread)));
}

#[test]
fn accept_overflow() {
    let full = json!({"closed_by": "kernel", "ended": "reset_sent", "cause": "accept_overflow"});
    only(many(5, |at, port| server(at, port, &full)), FindingKind::AcceptOverflow);
    none(many(4, |at, port| server(at, port, &full)));
    let waiting = |at: f64, port| {
        let mut line = server(
            at,
            port,
            &json!({"event": "lingering", "state": "CLOSE_WAIT", "kind": "unaccepted", "for_ms": 1.0}),
        );
        line["closed_by"] = Value::Null;
        line
    };
    let finding = only(many(5, waiting), FindingKind::AcceptOverflow);
    assert_near(number(&finding, "waiting_connections"), 5.0);
}

#[test]
fn idle_cut() {
    let cut = |at: f64, port| {
        client(
            at,
            port,
            &json!({
                "closed_by": "peer", "ended": "reset_received", "cause": "peer_reset", "last_data": "sent", "idle_ms": 1.0,
                "since_sent_ms": 1.0, "since_received_ms": 350_001.0 + at * 1000.0,
                "states": steps(&["ESTABLISHED", "CLOSE"]),
            }),
        )
    };
    let lived = |at: f64, port| client(at, port, &json!({"idle_ms": 300_000.0 + at}));
    let mut lines = many(6, cut);
    none(lines.clone());
    lines.extend((0..6).map(|number: u16| lived(10.0 + f64::from(number), 50_000 + number)));
    let finding = only(lines.clone(), FindingKind::IdleCut);
    assert_near(number(&finding, "shortest_idle_that_died_ms"), 350_000.0);
    assert_near(number(&finding, "longest_idle_that_lived_ms"), 300_015.0);
    // One that lived longer: idle time is not the cause.
    lines.push(client(30.0, 60_000, &json!({"idle_ms": 400_000.0})));
    none(lines);
}

#[test]
fn idle_cut_of_half_closed_connections() {
    let half_closed = |at: f64, port, waited: f64, fields: &Value| {
        let mut line = server(
            at,
            port,
            &json!({
                "idle_ms": 0.0, "last_data": "received", "since_sent_ms": null, "since_received_ms": 0.0,
                "unacked_bytes": 0, "close_wait_ms": waited,
            }),
        );
        merge(&mut line, fields);
        line
    };
    let timeout = json!({"ended": "timeout", "cause": "retransmit_timeout", "unacked_bytes": 200});
    let cut = |at: f64, port| half_closed(at, port, 60_500.0 + at, &timeout);
    let lived = |at: f64, port: u16| half_closed(at, 10_000 + port % 1_000, 40_000.0 + at, &json!({}));
    let mut lines = many(6, cut);
    none(lines.clone());
    lines.extend(many(6, lived));
    let finding = only(lines.clone(), FindingKind::IdleCut);
    assert_eq!(finding.process.as_ref().expect("known").comm, "backend");
    assert!((60_500.0..60_501.0).contains(&number(&finding, "shortest_half_closed_that_died_ms")));
    let longest = number(&finding, "longest_half_closed_that_lived_ms");
    assert!((40_000.0..60_000.0).contains(&longest), "{longest}");
    // Some of the answer has arrived, so that the time of the silence is not known.
    let partly = json!({"ended": "timeout", "cause": "retransmit_timeout", "unacked_bytes": 100});
    let mut others = many(6, |at, port| half_closed(at, port, 60_500.0, &partly));
    others.extend(many(6, lived));
    none(others);
    // One that lived longer.
    lines.push(half_closed(30.0, 60_000, 90_000.0, &json!({})));
    none(lines);
}

#[test]
fn refused_and_unanswered_connects() {
    let refused = json!({
        "closed_by": "peer", "ended": "reset_received", "cause": "refused", "idle_ms": null, "last_data": null,
        "states": steps(&["SYN_SENT", "CLOSE"]),
    });
    let finding = only(many(5, |at, port| client(at, port, &refused)), FindingKind::Refused);
    assert_eq!(finding.remote.expect("known").port, Some(9000));
    none(many(4, |at, port| client(at, port, &refused)));
    let attempt = |cause: &str, took: f64| {
        json!({
            "closed_by": "kernel", "ended": "timeout", "cause": cause, "last_data": null,
            "states": [{"state": "SYN_SENT", "at_ms": 0.0}, {"state": "CLOSE", "at_ms": took}],
        })
    };
    let timeout = attempt("connect_timeout", 127_000.0);
    only(many(5, |at, port| client(at, port, &timeout)), FindingKind::ConnectUnanswered);
    let given_up = attempt("connect_abandoned", 2000.0);
    only(many(5, |at, port| client(at, port, &given_up)), FindingKind::ConnectUnanswered);
    // Another address of the same name answered first.
    let lost_the_race = attempt("connect_abandoned", 250.0);
    none(many(50, |at, port| client(at, port, &lost_the_race)));
}

#[test]
fn forged() {
    let reset = json!({"closed_by": "peer", "ended": "reset_received", "cause": "suspected_injection"});
    only(many(5, |at, port| client(at, port, &reset)), FindingKind::Forged);
    none(many(4, |at, port| client(at, port, &reset)));
}

/// A database that is killed, an application that therefore loses its answer, and the proxy in front of it.
fn database_killed(requests: u16) -> Vec<Value> {
    let mut lines = Vec::new();
    for number in 0..requests {
        let (database, front) = (41_000 + number, 40_000 + number);
        let to_database = json!({"connection": {"local": {"address": "10.0.0.2"}, "remote": {"address": "10.0.0.3", "port": 5432}}});
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
                "connection": {"local": {"address": "10.0.0.3", "port": 5432}, "remote": {"address": "10.0.0.2"}},
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
fn chain_from_cause_to_victim() {
    let found = findings(database_killed(6));
    assert_eq!(kinds(&found), [FindingKind::Chain, FindingKind::BackendDied], "{found:#?}");
    let chain = &found[0];
    assert_eq!((chain.count, chain.confidence), (6, Confidence::Proven));
    let order: Vec<_> =
        ["database", "SIGKILL", "backend", "proxy"].iter().map(|name| chain.summary.find(name)).collect();
    assert!(order.is_sorted() && order[0].is_some(), "{}", chain.summary);
    let mut lines = chain.lines.clone();
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), chain.lines.len(), "each is named once: {:?}", chain.lines);
    assert_eq!(found[1].process.as_ref().expect("known").comm, "database");
    assert_eq!(chain.process.as_ref().expect("known").comm, "database");
}

#[test]
fn what_only_happened_at_the_same_time_is_no_chain() {
    let mut lines = database_killed(6);
    // The application's clients had received their answers.
    for line in &mut lines {
        if line["connection"]["local"]["port"] == 9000 {
            merge(line, &json!({"last_data": "sent", "idle_ms": 1.0}));
        } else if line["process"]["comm"] == "proxy" {
            merge(line, &json!({"last_data": "received", "idle_ms": 1.0}));
        }
    }
    assert_eq!(kinds(&findings(lines)), [FindingKind::BackendDied]);
    // Or it closed their connections much later.
    let mut lines = database_killed(6);
    for line in &mut lines {
        if line["connection"]["local"]["port"] == 9000 {
            line["time"] = at(7.0).into();
        }
    }
    assert!(!kinds(&findings(lines)).contains(&FindingKind::Chain));
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
    // SO_LINGER 0 after the handshake.
    let check = json!({
        "connection": {"bytes_sent": 0, "bytes_received": 0}, "ended": "reset_received", "cause": "peer_reset",
        "trigger": null, "last_data": null, "idle_ms": null, "states": steps(&["ESTABLISHED", "CLOSE"]),
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
