//! Requests that were not answered, and answers that may be lost.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{Draft, confidence, counted, rounded, times};
use crate::{
    diagnose::{
        Diagnosis,
        chains::{Chain, Route},
        end::ServiceKey,
        marks::Marks,
        services::Service,
        statistics::{ENOUGH, Spread},
    },
    event::{Confidence, FindingKind},
};

/// The shortest wait, among irregular ones, that counts as a user who gave up. Shorter ones are races.
const PATIENCE_MS: f64 = 1_000.0;

/// The largest relative difference between two waits for the same answer.
const SAME: f64 = 0.15;

impl Diagnosis {
    pub(super) fn gave_up(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        let series = &service.gave_up;
        let spread = series.sample.spread().filter(|_| series.marks.count >= ENOUGH)?;
        // Clients that never receive anything may not expect an answer: logs and metrics are sent in one
        // direction.
        if service.answered == 0 || self.is_seen_better(key, service, &spread) {
            return None;
        }
        let regular = series.sample.regular();
        if regular.is_none() && (spread.median < PATIENCE_MS || !series.marks.are_spread()) {
            return None;
        }
        let mut draft = self.draft(FindingKind::ClientGaveUp, key, service, &series.marks);
        draft.confidence = confidence(spread.count, regular.as_ref());
        draft.evidence.extend(times(if regular.is_some() { "timeout" } else { "wait" }, &spread));
        draft.evidence.push(("connections", service.ends.into()));
        let server = self.service_name(key, service);
        let clients = self.client_name(key, service);
        let median = rounded(spread.median);
        let count = spread.count;
        if regular.is_some() {
            draft.summary = format!(
                "{clients} gave up on {server} after {median} without an answer, {count} times. All waits \
                 are alike: this is a timeout of {clients}."
            );
            draft.advice = format!(
                "Find out why {server} takes longer than {median}, or raise the timeout of {clients} above \
                 the time that it takes."
            );
        } else {
            draft.summary = format!(
                "{clients} gave up on {server} {count} times before it had answered, after {} to {} (half of \
                 them within {median}). The waits differ: this is no timeout, but people who left.",
                rounded(spread.least),
                rounded(spread.most)
            );
            draft.advice = format!("Find out why {server} takes so long.");
        }
        let passed_on = self.passed_on(key, &spread);
        if passed_on > 0 {
            draft.evidence.push(("upstream_dropped", passed_on.into()));
            let proxy = self.name(key.who);
            let _ = write!(
                draft.summary,
                " {proxy} therefore dropped {} of its own.",
                counted(passed_on, "request", "requests")
            );
        }
        Some(draft)
    }

    /// Whether other lines show the same with more facts: those of the server's ends of these connections, or
    /// those of the client's own client, which gave up first.
    fn is_seen_better(&self, key: &ServiceKey, service: &Service, spread: &Spread) -> bool {
        let peer = service.peer.get();
        let (client, server) = if key.is_server { (peer, key.who) } else { (key.who, peer) };
        let in_the_wake = self.services.all.iter().any(|(other, front)| {
            // These are the server's ends of the same connections. A program may be its own client.
            let is_other_end = other.who == server && other.port == key.port;
            other.is_server
                && !is_other_end
                && client.is_some()
                && other.who == client
                && front.gave_up.marks.count >= ENOUGH
                && front.answered > 0
                && follows(spread, front)
        });
        let server_tells = !key.is_server
            && self
                .server_of(key, service)
                .is_some_and(|server| server.gave_up.marks.count * 2 >= spread.count);
        in_the_wake || server_tells
    }

    /// The server's end of the same connections, if it was traced too.
    fn server_of(&self, key: &ServiceKey, service: &Service) -> Option<&Service> {
        let who = service.peer.get()?;
        let server = ServiceKey { who: Some(who), is_server: true, address: None, port: key.port };
        self.services.all.get(&server)
    }

    /// The number of requests that a proxy dropped because its own clients had closed.
    fn passed_on(&self, key: &ServiceKey, spread: &Spread) -> u64 {
        if !key.is_server || key.who.is_none() {
            return 0;
        }
        let upstream = self.services.all.iter().filter(|(other, service)| {
            // These are the client's ends of the same connections. A program may be its own client.
            let is_other_end = service.peer.get() == key.who && other.port == key.port;
            !other.is_server
                && !is_other_end
                && other.who == key.who
                && service
                    .gave_up
                    .sample
                    .spread()
                    .is_some_and(|own| (own.median - spread.median).abs() <= SAME * spread.median)
        });
        upstream.map(|(_, service)| service.gave_up.marks.count).sum()
    }

    pub(super) fn unanswered(
        &self,
        key: &ServiceKey,
        service: &Service,
        chains: &BTreeMap<Route, Chain>,
    ) -> Option<Draft> {
        let faults = service.unanswered.faults(service.context());
        let most = faults.iter().max_by_key(|part| part.count())?;
        // The finding of the chain explains its own lost answers.
        if self.is_a_link(key, chains) {
            return None;
        }
        let spread = most.waits.sample.spread()?;
        let mut marks = Marks::default();
        for part in &faults {
            marks.merge(&part.waits.marks);
        }
        let count = marks.count;
        let closed_by_code = faults.iter().map(|part| part.closed_by_code).sum::<u64>();
        let mut draft = self.draft(FindingKind::BackendDied, key, service, &marks);
        draft.confidence =
            if closed_by_code * 2 > count { Confidence::Proven } else { confidence(count, None) };
        draft.evidence.extend(times("wait", &spread));
        draft.evidence.extend([
            ("connections", service.ends.into()),
            ("resets", service.unanswered.resets.count().into()),
            ("closed_by_its_own_code", closed_by_code.into()),
        ]);
        let (client, server) = (self.name(key.who), self.service_name(key, service));
        let how = if closed_by_code * 2 > count {
            "its own code closed them"
        } else {
            "these lines do not show how"
        };
        draft.summary = format!(
            "{server} ended {count} of {} connections of {client} before it had answered; {how}.",
            service.ends
        );
        draft.advice = format!("Look at the log of {server} for these times, and trace its host as well.");
        if service.unanswered.were_turned_away() && closed_by_code == 0 {
            draft.advice.push_str(
                " They were reset after their first request: its kernel also does that if the accept queue is \
                 full (`nstat -az TcpExtListenOverflows` there) and net.ipv4.tcp_abort_on_overflow is set.",
            );
        }
        Some(draft)
    }

    /// Whether these lost answers are part of a chain that has a finding.
    fn is_a_link(&self, key: &ServiceKey, chains: &BTreeMap<Route, Chain>) -> bool {
        chains.iter().any(|(route, chain)| {
            self.is_chain(route, chain)
                && (route.through.iter().any(|(_, port)| *port == key.port) || route.root.2 == key.port)
        })
    }

    pub(super) fn unread(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        if service.unread.count < ENOUGH {
            return None;
        }
        let mut draft = self.draft(FindingKind::UnreadClose, key, service, &service.unread);
        draft.confidence = Confidence::Proven;
        draft.evidence.extend([
            ("connections", service.ends.into()),
            ("unread_bytes", Some(service.unread_bytes).filter(|bytes| *bytes > 0).into()),
        ]);
        let server = self.service_name(key, service);
        draft.summary = format!(
            "{server} closed {} connections while there was data that it had not read, so that the kernel \
             sent a RST after the answer. Clients may lose the answer.",
            service.unread.count
        );
        draft.advice = format!(
            "Before {server} closes, have it read the request to its end, or shut down sending and read \
             until the client closes."
        );
        Some(draft)
    }
}

/// Whether the waits of a proxy for its server equal those of the proxy's own clients.
fn follows(spread: &Spread, front: &Service) -> bool {
    front.gave_up.sample.spread().is_some_and(|front| {
        (front.median - spread.median).abs() <= SAME * front.median
            && spread.count <= front.count + front.count / 5
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::{
        diagnose::tests::{
            assert_near, at, client, closed_by_peer, many, merge, none, number, only, server, steps,
        },
        event::FindingKind,
    };

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

    /// An HTTP/2 client sends a `WINDOW_UPDATE` 100 ms after its answer, and closes a second later. A request
    /// for which the client did not wait looks the same.
    #[test]
    fn what_follows_an_answer_may_be_no_request() {
        let mut at_server = json!({
            "last_data": "received", "idle_ms": 1000.0, "since_sent_ms": 1100.0, "since_received_ms": 1000.0,
        });
        let mut at_client = json!({
            "last_data": "sent", "idle_ms": 1000.0, "since_sent_ms": 1000.0, "since_received_ms": 1100.0,
        });
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
        let teardown = |names: [&str; 3]| -> Value {
            let steps = names.into_iter().zip([0.0, 5000.0, 5400.0]);
            steps.map(|(state, at)| json!({"state": state, "at_ms": at})).collect()
        };
        merge(
            &mut at_server,
            &json!({"ended": "reset_received", "cause": "peer_reset", "close_wait_ms": 400.0}),
        );
        at_server["states"] = teardown(["ESTABLISHED", "CLOSE_WAIT", "CLOSE"]);
        merge(&mut at_client, &json!({"ended": "reset_sent", "cause": "data_after_close"}));
        at_client["states"] = teardown(["ESTABLISHED", "FIN_WAIT1", "CLOSE"]);
        only(many(6, |at, port| server(at, port, &at_server)), FindingKind::ClientGaveUp);
        only(many(6, |at, port| client(at, port, &at_client)), FindingKind::ClientGaveUp);
        // It came so soon that it may be the reply to a closing message, or to nothing.
        at_server["states"][2]["at_ms"] = 5001.0.into();
        at_client["states"][2]["at_ms"] = 5001.0.into();
        none(many(20, |at, port| server(at, port, &at_server)));
        none(many(20, |at, port| client(at, port, &at_client)));
    }

    /// The two ends of a proxy whose client gave up after three seconds. The client's second request came in
    /// the same tick as the answer before it, so that this connection alone does not show that it waited.
    fn client_of_a_proxy_gave_up(at: f64, port: u16) -> [Value; 2] {
        let front = json!({
            "connection": {"local": {"port": 8080}, "bytes_sent": 250, "bytes_received": 110},
            "process": {"pid": 15, "tid": 15, "comm": "proxy", "exe": "/bin/proxy"},
            "last_data": null, "idle_ms": 3000.0, "since_sent_ms": 3000.0, "since_received_ms": 3000.0,
        });
        let upstream = json!({
            "connection": {"local": {"port": port + 10_000}},
            "process": {"pid": 15, "tid": 15, "comm": "proxy", "exe": "/bin/proxy"},
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
        // The server had answered, so that the client only closed an idle connection.
        none(changed("client", &json!({"last_data": "received"})));
        // The proxy may only forward bytes, for a client that sent a WINDOW_UPDATE,
        let forwarded = json!({"connection": {"bytes_sent": 200, "bytes_received": 100}});
        none(changed("server", &forwarded));
        // or it may terminate TLS, for a client that sent a close_notify.
        let farewell = json!({"last_data": "received", "since_received_ms": 0.0, "idle_ms": 0.0});
        none(changed("server", &farewell));
        // But the connections of such a proxy to its server are not older than those of its clients.
        let older = json!([{"state": "ESTABLISHED", "at_ms": 0.0}, {"state": "CLOSE", "at_ms": 9000.0}]);
        for fields in [forwarded, farewell] {
            let mut lines = changed("server", &fields);
            for line in lines.iter_mut().filter(|line| line["connection"]["role"] == "client") {
                line["states"] = older.clone();
            }
            only(lines, FindingKind::ClientGaveUp);
        }
        // And the first data on a connection is a request.
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
        // A benchmark ended while requests were pending that were a fraction of a second old.
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

    /// Client and server have the same name, as if an interpreter runs both.
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

    /// Ends of clients. The server closed six of them this long after their last data, and answered `others`.
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
        // The end of every connection in a protocol that ends with a message of the client looks the same.
        none(closed_instead_of_an_answer(wait, 0));
        let finding = only(closed_instead_of_an_answer(wait, 20), FindingKind::BackendDied);
        assert_near(number(&finding, "wait_ms"), 190.0);
        assert_near(number(&finding, "connections"), 26.0);
    }

    #[test]
    fn what_a_client_says_last_need_not_be_a_request() {
        // A farewell, such as memcached's `quit`, after which most servers close at once.
        none(closed_instead_of_an_answer(|at| at, 20));
        let mut lines = closed_instead_of_an_answer(|at| at, 60);
        let slow = closed_instead_of_an_answer(|at| 60.0 + 70.0 * at, 0);
        lines.extend(slow.into_iter().take(5).zip(60_000_u16..).map(|(mut line, port)| {
            merge(&mut line, &json!({"connection": {"local": {"port": port}}}));
            line
        }));
        none(lines);
        // The server closes after the same time on all connections, its idle timeout.
        none(closed_instead_of_an_answer(|at| 5000.0 + at, 20));
        // Clients send logs, which are never answered. The lines of the server are known as well.
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
                    "connection": {"bytes_sent": 0}, "closed_by": "local", "last_data": "received",
                    "idle_ms": line["idle_ms"], "time": line["time"],
                    "states": steps(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]),
                });
                server(0.0, port.expect("a port"), &closed)
            })
            .collect();
        logs.extend(ends);
        none(logs);
    }

    /// A broker on another host is killed, ten seconds after clients have closed other connections in order.
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
        // The server ends the same connections one after the other: it fails again and again.
        for (line, seconds) in lines.iter_mut().skip(12).zip(10_u32..) {
            line["time"] = at(f64::from(seconds)).into();
        }
        only(lines, FindingKind::BackendDied);
    }

    #[test]
    fn unread_close() {
        let unread =
            json!({"closed_by": "local", "ended": "reset_sent", "cause": "unread_data", "unread_bytes": 70});
        let finding = only(many(5, |at, port| server(at, port, &unread)), FindingKind::UnreadClose);
        assert_near(number(&finding, "unread_bytes"), 350.0);
        none(many(4, |at, port| server(at, port, &unread)));
        // A server that was asked to close does not read the close_notify that follows the request.
        let farewell = json!({
            "closed_by": "local", "ended": "reset_sent", "cause": "unread_data", "unread_bytes": 24,
        });
        none(many(50, |at, port| server(at, port, &farewell)));
        // A client that gives up only loses its own answer.
        none(many(50, |at, port| client(at, port, &unread)));
    }
}
