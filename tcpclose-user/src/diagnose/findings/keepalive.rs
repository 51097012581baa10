//! Idle connections that one end closes while the other end still uses them.

use super::{Draft, confidence, counted, rounded, times};
use crate::{
    diagnose::{Diagnosis, end::ServiceKey, services::Service},
    event::FindingKind,
};

impl Diagnosis {
    pub(super) fn keepalive(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        if key.is_server {
            return self.keepalive_of_server(key, service);
        }
        let spread = service.idle_by_peer.sample.regular()?;
        let own = service.idle_own.sample.regular().map(|own| own.median);
        let mut draft = self.draft(FindingKind::KeepaliveMismatch, key, service, &service.idle_by_peer.marks);
        let raced = service.raced.count;
        draft.confidence = confidence(spread.count, Some(&spread));
        if raced > 0 {
            draft.marks.put_first(&service.raced);
        } else {
            draft.class = 1;
        }
        draft.evidence.extend(times("peer_timeout", &spread));
        draft.evidence.extend([
            ("raced_requests", raced.into()),
            ("own_timeout_ms", own.into()),
            (
                "longest_idle_ms",
                spread.most.max(service.idle_own.sample.spread().map_or(0.0, |own| own.most)).into(),
            ),
        ]);
        let (client, server) = (self.name(key.who), self.service_name(key, service));
        let after = rounded(spread.median);
        let kept = own.filter(|own| *own > spread.median);
        let kept = kept.map_or_else(|| "longer".to_owned(), |own| format!("for {}", rounded(own)));
        draft.summary = format!(
            "{server} closes connections that have been idle for {after}, but {client} keeps them {kept}: {} \
             were closed, and {}.",
            spread.count,
            counted(raced, "request was lost", "requests were lost")
        );
        draft.advice = format!(
            "Have {client} close idle connections after less than {after}, or have {server} keep them longer \
             than {client} does."
        );
        Some(draft)
    }

    /// The finding from the lines of the server alone. The lines of the client, if there are any, have more
    /// facts.
    fn keepalive_of_server(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        let spread = service.idle_own.sample.regular()?;
        let raced = service.raced.count;
        if raced == 0 || service.peer.get().is_some() {
            return None;
        }
        let mut draft = self.draft(FindingKind::KeepaliveMismatch, key, service, &service.raced);
        draft.count = spread.count;
        draft.confidence = confidence(spread.count, Some(&spread));
        draft.evidence.extend(times("own_timeout", &spread));
        draft.evidence.push(("raced_requests", raced.into()));
        let (server, after) = (self.service_name(key, service), rounded(spread.median));
        draft.summary = format!(
            "{server} closes connections that have been idle for {after}, while its clients still use them: \
             {} were closed, and {}.",
            spread.count,
            counted(raced, "request came too late", "requests came too late")
        );
        draft.advice = format!(
            "Have {server} keep idle connections longer than its clients do, or have the clients close them \
             earlier."
        );
        Some(draft)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::{
        diagnose::tests::{
            assert_near, client, closed_by_peer, many, merge, none, number, only, server, steps,
        },
        event::{Confidence, FindingKind},
    };

    #[test]
    fn keepalive_mismatch() {
        let mut lines = many(37, |at, port| client(at, port, &closed_by_peer(5000.0 + at)));
        // The program sent requests on three of them before it noticed.
        for line in &mut lines[..3] {
            line["ended"] = "reset_received".into();
            line["cause"] = "peer_reset".into();
            line["states"] = steps(&["ESTABLISHED", "CLOSE_WAIT", "CLOSE"]);
        }
        lines.extend(
            (0..9).map(|n: u16| client(50.0 + f64::from(n), 50_000 + n, &json!({"idle_ms": 60_000.0}))),
        );
        let finding = only(lines, FindingKind::KeepaliveMismatch);
        assert_eq!(finding.count, 37);
        assert_near(number(&finding, "peer_timeout_ms"), 5018.0);
        assert_near(number(&finding, "own_timeout_ms"), 60_000.0);
        assert_near(number(&finding, "raced_requests"), 3.0);
        assert_eq!(finding.confidence, Confidence::Strong);
        assert_eq!(&finding.lines[..3], [1, 2, 3], "the lost requests first");
        let sentence = "idle for 5s, but app keeps them for 1m0s: 37 were closed, and 3 requests were lost";
        assert!(finding.summary.contains(sentence), "{}", finding.summary);
        assert_eq!(finding.process.expect("known").comm, "app");
    }

    #[test]
    fn a_farewell_does_not_hide_the_silence() {
        // This end had received nothing for five seconds. It sent a request just before the FIN arrived, and
        // the request was answered with a RST.
        let mut lines = many(6, |at, port| {
            let mut line = client(at, port, &closed_by_peer(0.0));
            merge(
                &mut line,
                &json!({"last_data": "sent", "since_sent_ms": 2.0, "since_received_ms": 5002.0}),
            );
            merge(
                &mut line,
                &json!({"ended": "reset_received", "cause": "peer_reset", "unacked_bytes": 180}),
            );
            line
        });
        let finding = only(lines.clone(), FindingKind::KeepaliveMismatch);
        assert_near(number(&finding, "peer_timeout_ms"), 5000.0);
        assert_near(number(&finding, "raced_requests"), 6.0);
        none(lines[..4].to_vec());
        // The program replied to the server's close_notify with its own.
        for line in &mut lines {
            line["unacked_bytes"] = 24.into();
        }
        let finding = only(lines, FindingKind::KeepaliveMismatch);
        assert_near(number(&finding, "raced_requests"), 0.0);
    }

    /// When aiohttp's pool drops an idle TLS connection, it sends a `close_notify` and waits, so that the
    /// server closes first.
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
        // The last message of the client needs no answer, as MySQL's COM_STMT_CLOSE.
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

    /// A broker resets a consumer that has sent no heartbeat for six seconds. It sent its own last heartbeat
    /// one second before, which is not the time for which the connection was idle.
    #[test]
    fn missed_heartbeats_are_no_idle_timeout() {
        let mut reset = closed_by_peer(1000.0);
        merge(
            &mut reset,
            &json!({"ended": "reset_received", "cause": "peer_reset", "last_data": "received"}),
        );
        merge(&mut reset, &json!({"since_received_ms": 1000.0, "since_sent_ms": 6000.0}));
        reset["states"] = steps(&["ESTABLISHED", "CLOSE"]);
        none(many(6, |at, port| client(at, port, &reset)));
        merge(&mut reset, &json!({"since_sent_ms": 1010.0}));
        only(many(6, |at, port| client(at, port, &reset)), FindingKind::KeepaliveMismatch);
    }

    #[test]
    fn no_keepalive_mismatch_below_the_bar() {
        none(many(4, |at, port| client(at, port, &closed_by_peer(5000.0))));
        // The times are irregular, or the peer closed immediately after the answer.
        none(many(20, |at, port| client(at, port, &closed_by_peer(1000.0 * (at + 1.0)))));
        none(many(20, |at, port| client(at, port, &closed_by_peer(3.0))));
        // The client itself closed.
        none(many(20, |at, port| client(at, port, &json!({"idle_ms": 60_000.0}))));
        // A server that closes idle clients, none of which sent a request too late.
        let states = steps(&["ESTABLISHED", "FIN_WAIT1", "CLOSE"]);
        let idle = json!({"closed_by": "local", "idle_ms": 5000.0, "states": states});
        none(many(20, |at, port| server(at, port, &idle)));
    }

    #[test]
    fn keepalive_mismatch_seen_from_the_server_alone() {
        let states = steps(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]);
        let idle = json!({"closed_by": "local", "idle_ms": 5000.0, "states": states});
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
}
