//! Connection attempts that failed: they were refused or not answered, or the accept queue was full.

use super::{Draft, rounded, times};
use crate::{
    diagnose::{Diagnosis, end::ServiceKey, services::Service, statistics::ENOUGH},
    event::{Confidence, FindingKind},
};

impl Diagnosis {
    pub(super) fn overflow(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        let (dropped, waiting) = (&service.overflow, &service.unaccepted);
        if dropped.count < ENOUGH && waiting.count < ENOUGH {
            return None;
        }
        let mut marks = dropped.clone();
        marks.merge(waiting);
        let mut draft = self.draft(FindingKind::AcceptOverflow, key, service, &marks);
        draft.confidence = Confidence::Proven;
        draft.evidence.extend([
            ("reset_connections", dropped.count.into()),
            ("waiting_connections", waiting.count.into()),
        ]);
        let server = self.service_name(key, service);
        let stayed =
            format!("{} stayed in its accept queue after their clients had closed them", waiting.count);
        let reset = format!("{} were reset because the queue was full", dropped.count);
        let what = match (waiting.count, dropped.count) {
            (_, 0) => stayed,
            (0, _) => reset,
            _ => format!("{stayed}, and {reset}"),
        };
        draft.summary = format!("{server} does not accept connections as fast as they arrive: {what}.");
        draft.advice = format!(
            "Find out what keeps {server} from calling accept(). If connections arrive in bursts, raise its \
             backlog and net.core.somaxconn."
        );
        Some(draft)
    }

    pub(super) fn refused(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        if service.refused.count < ENOUGH {
            return None;
        }
        let mut draft = self.draft(FindingKind::Refused, key, service, &service.refused);
        draft.confidence = Confidence::Proven;
        draft.evidence.push(("connected", service.ends.into()));
        let (client, server) = (self.name(key.who), self.service_name(key, service));
        let (when, others) = match service.ends {
            0 => ("listens there", "None succeeded".to_owned()),
            ends => ("listened there at the time", format!("{ends} others succeeded")),
        };
        draft.summary = format!(
            "{} connection attempts of {client} to {server} were refused, because nothing {when}. {others}.",
            service.refused.count
        );
        draft.advice = format!("Start the service at {server}, or correct the address that {client} uses.");
        Some(draft)
    }

    pub(super) fn no_answer(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        let spread = service.no_answer.sample.spread().filter(|spread| spread.count >= ENOUGH)?;
        let mut draft = self.draft(FindingKind::ConnectUnanswered, key, service, &service.no_answer.marks);
        draft.confidence = Confidence::Proven;
        draft.evidence.extend(times("wait", &spread));
        draft
            .evidence
            .extend([("connected", service.ends.into()), ("unreachable", service.unreachable.into())]);
        let (client, server) = (self.name(key.who), self.service_name(key, service));
        draft.summary = format!(
            "{} connection attempts of {client} to {server} were not answered within {}. {} others \
             succeeded.",
            spread.count,
            rounded(spread.median),
            service.ends
        );
        draft.advice = format!(
            "Check that {server} is up, that no firewall drops the SYN, and that its accept queue is not \
             full (`nstat TcpExtListenDrops` there)."
        );
        Some(draft)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::{
        diagnose::tests::{assert_near, client, many, none, number, only, server, steps},
        event::FindingKind,
    };

    /// The RST of a listener whose accept queue is full, and the end of its client.
    fn overflowed(at: f64, port: u16) -> [Value; 2] {
        let mut reset = server(
            at,
            port,
            &json!({
                "event": "reset", "direction": "sent", "reason": "INVALID_SYN", "cause": "accept_overflow",
                "state": "LISTEN", "connection": {"role": null}, "last_data": null, "idle_ms": null,
            }),
        );
        for field in ["closed_by", "ended", "trigger", "states"] {
            reset[field] = Value::Null;
        }
        let end = client(
            at,
            port,
            &json!({
                "closed_by": "peer", "ended": "reset_received", "cause": "peer_reset", "trigger": null,
                "last_data": "sent", "since_sent_ms": 0.0, "since_received_ms": null,
                "connection": {"bytes_received": 0}, "states": steps(&["ESTABLISHED", "CLOSE"]),
            }),
        );
        [reset, end]
    }

    #[test]
    fn a_full_accept_queue_resets_connections() {
        let lines = |count| -> Vec<[Value; 2]> {
            (0..count).map(|number: u16| overflowed(f64::from(number), 40_000 + number)).collect()
        };
        let answered = || many(6, |at, port| client(50.0 + at, 10_000 + port % 1_000, &json!({})));
        // The server's host, its client's, and both, whichever line comes first.
        let sides = |side: usize| lines(5).into_iter().map(|pair| pair[side].clone()).collect::<Vec<_>>();
        let both = |order: [usize; 2]| -> Vec<Value> {
            lines(5).into_iter().flat_map(|pair| order.map(|side| pair[side].clone())).collect()
        };
        for mut lines in [sides(0), both([0, 1]), both([1, 0])] {
            lines.extend(answered());
            let finding = only(lines, FindingKind::AcceptOverflow);
            assert_near(number(&finding, "reset_connections"), 5.0);
            assert_eq!(finding.process.expect("known").comm, "backend");
        }
        let mut seen_by_clients = sides(1);
        seen_by_clients.extend(answered());
        let finding = only(seen_by_clients, FindingKind::BackendDied);
        assert!(finding.advice.contains("TcpExtListenOverflows"), "{}", finding.advice);
        none(lines(4).into_iter().flatten().chain(answered()).collect());
    }

    #[test]
    fn connections_wait_to_be_accepted() {
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
    fn refused_and_unanswered_connects() {
        let refused = json!({
            "closed_by": "peer", "ended": "reset_received", "cause": "refused",
            "idle_ms": null, "last_data": null,
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
}
