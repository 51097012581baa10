//! Devices between the two ends that forget connections, or that forge RSTs.

use super::Draft;
use crate::{
    diagnose::{
        Diagnosis,
        end::ServiceKey,
        marks::Series,
        services::{Lived, Service},
        statistics::{ENOUGH, Spread, TICKS_MS},
    },
    event::FindingKind,
    sink::human_millis,
};

impl Diagnosis {
    pub(super) fn cut(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        let died = cut_after(&service.cut, service.lived)?;
        let lived = service.lived;
        let mut draft = self.draft(FindingKind::IdleCut, key, service, &service.cut.marks);
        draft.evidence.extend([
            ("shortest_idle_that_died_ms", died.least.into()),
            ("longest_idle_that_lived_ms", lived.longest_ms.into()),
            ("lived_connections", lived.count.into()),
        ]);
        let (client, server) = (self.name(key.who), self.service_name(key, service));
        draft.summary = format!(
            "Something between {client} and {server} forgets idle connections: {} failed when they were used \
             again after {} or more, and all that had been idle for at most {} still worked.",
            died.count,
            human_millis(died.least),
            human_millis(lived.longest_ms)
        );
        draft.advice = format!(
            "Have {client} close connections that have been idle for more than {}, or turn on TCP keepalives \
             with a shorter TCP_KEEPIDLE.",
            human_millis(lived.longest_ms)
        );
        Some(draft)
    }

    pub(super) fn half_closed_cut(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        let died = cut_after(&service.half_closed_cut, service.half_closed_lived)?;
        let lived = service.half_closed_lived;
        let mut draft = self.draft(FindingKind::IdleCut, key, service, &service.half_closed_cut.marks);
        draft.evidence.extend([
            ("shortest_half_closed_that_died_ms", died.least.into()),
            ("longest_half_closed_that_lived_ms", lived.longest_ms.into()),
            ("lived_connections", lived.count.into()),
        ]);
        let (client, server) = (self.client_name(key, service), self.service_name(key, service));
        draft.summary = format!(
            "Something between {client} and {server} forgets connections whose client has shut down sending: \
             on {} of them the answer, which came after {} or more, was never acknowledged; all that were \
             answered within {} still worked.",
            died.count,
            human_millis(died.least),
            human_millis(lived.longest_ms)
        );
        draft.advice = format!(
            "Have {client} shut down sending only after the answer, or have the firewall keep half-closed \
             connections for longer than {server} takes to answer (nf_conntrack_tcp_timeout_close_wait and \
             _fin_wait in Linux)."
        );
        Some(draft)
    }

    pub(super) fn forged(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        if service.forged.count < ENOUGH {
            return None;
        }
        let mut draft = self.draft(FindingKind::Forged, key, service, &service.forged);
        draft.evidence.push(("connections", service.ends.into()));
        let (client, server) = (self.name(key.who), self.service_name(key, service));
        draft.summary = format!(
            "{} connections between {client} and {server} ended with a RST whose TTL differs from that of \
             the handshake. A device on the path has probably sent it.",
            service.forged.count
        );
        draft.advice = format!(
            "Ask those who run the firewalls between {client} and {server} which rule resets connections."
        );
        Some(draft)
    }
}

/// The silences after which connections failed, if they are longer than those after which connections still
/// worked.
fn cut_after(cut: &Series, lived: Lived) -> Option<Spread> {
    let died = cut.sample.spread().filter(|died| died.count >= ENOUGH && lived.count >= ENOUGH)?;
    // The shortest silence after which a connection failed must be longer than the longest one after which a
    // connection worked. If they are alike, the silence is not the cause: a client that closes connections
    // after a fixed time also closes those to a host that has failed. Nor may all have failed at the same
    // time, as when the host of the peer restarts.
    (lived.longest_ms + TICKS_MS < died.least && cut.marks.are_spread()).then_some(died)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::{
        diagnose::tests::{assert_near, client, many, merge, none, number, only, server, steps},
        event::FindingKind,
    };

    #[test]
    fn idle_cut() {
        let cut = |at: f64, port| {
            client(
                at,
                port,
                &json!({
                    "closed_by": "peer", "ended": "reset_received", "cause": "peer_reset",
                    "last_data": "sent", "idle_ms": 1.0,
                    "since_sent_ms": 1.0, "since_received_ms": 350_001.0 + at * 1000.0,
                    "states": steps(&["ESTABLISHED", "CLOSE"]), "connection": {"retransmits": 0},
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
        // The peer has acknowledged the data before the RST, or the RST came after it had been sent again.
        for other in [json!({"unacked_bytes": 0}), json!({"connection": {"retransmits": 1}})] {
            let mut others = lines.clone();
            others
                .iter_mut()
                .filter(|line| line["cause"] == "peer_reset")
                .for_each(|line| merge(line, &other));
            none(others);
        }
        // One connection worked after a silence of the same length, so the silence is not the cause.
        lines.push(client(30.0, 60_000, &json!({"idle_ms": 350_000.0})));
        none(lines);
    }

    #[test]
    fn idle_cut_by_a_device_that_drops_packets() {
        // A silence, and then the time for which the kernel sent the data again; `last` is how long it waited
        // after it had done so for the last time.
        let timeout = |cause: &str, silence: f64, resent: f64, last: f64| {
            let fields = json!({
                "closed_by": "kernel", "ended": "timeout", "cause": cause, "trigger": null,
                "last_data": "sent", "idle_ms": last,
                "since_sent_ms": last, "since_received_ms": silence + resent + last,
                "states": steps(&["ESTABLISHED", "CLOSE"]), "connection": {"retransmits": 9},
            });
            many(6, |at, port| client(at, port, &fields))
        };
        let with_others = |mut lines: Vec<Value>, idle: f64| {
            lines.extend(many(6, |at, port| {
                client(10.0 + at, 10_000 + port % 1_000, &json!({"idle_ms": idle + at}))
            }));
            lines
        };
        // 0.2, 0.4, … 25.6, 51.2 s.
        let lines = with_others(timeout("retransmit_timeout", 350_000.0, 51_000.0, 51_200.0), 300_000.0);
        let finding = only(lines, FindingKind::IdleCut);
        let died = number(&finding, "shortest_idle_that_died_ms");
        assert!((349_000.0..=350_000.0).contains(&died), "{died}");
        assert!(finding.advice.contains("5m"), "{}", finding.advice);
        // By default, the kernel goes on for 15 minutes, and at last every two minutes.
        let lines = with_others(timeout("retransmit_timeout", 3_600_000.0, 804_600.0, 120_000.0), 300_000.0);
        only(lines, FindingKind::IdleCut);
        // The host of the server fails while its clients wait for answers. The longest time without an answer
        // that does no harm is shorter than the time for which the kernel has sent the requests again.
        for (cause, resent, last) in [
            ("retransmit_timeout", 51_000.0, 51_200.0),
            ("retransmit_timeout", 804_600.0, 120_000.0),
            ("user_timeout", 25_400.0, 4_600.0),
            ("keepalive_timeout", 0.0, 75_000.0),
        ] {
            none(with_others(timeout(cause, 200.0, resent, last), 2_000.0));
        }
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
        // A part of the answer has arrived, so that the length of the silence is not known.
        let partly = json!({"ended": "timeout", "cause": "retransmit_timeout", "unacked_bytes": 100});
        let mut others = many(6, |at, port| half_closed(at, port, 60_500.0, &partly));
        others.extend(many(6, lived));
        none(others);
        // One connection worked after a longer silence.
        lines.push(half_closed(30.0, 60_000, 90_000.0, &json!({})));
        none(lines);
    }

    #[test]
    fn forged() {
        let reset = json!({"closed_by": "peer", "ended": "reset_received", "cause": "suspected_injection"});
        only(many(5, |at, port| client(at, port, &reset)), FindingKind::Forged);
        none(many(4, |at, port| client(at, port, &reset)));
    }
}
