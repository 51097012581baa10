//! Chains: one lost connection that led to others.

use std::{fmt::Write as _, net::IpAddr};

use super::{Draft, confidence, millis, times_in_words};
use crate::{
    diagnose::{
        Diagnosis,
        chains::{Chain, Route},
        end::Death,
        statistics::ENOUGH,
    },
    event::{Confidence, FindingKind, Remote},
};

impl Diagnosis {
    /// Whether this chain is a finding: it began with a process that was not asked to terminate, or it
    /// occurred often enough and began with a server whose answers were needed.
    pub(super) fn is_chain(&self, route: &Route, chain: &Chain) -> bool {
        let (_, death, port) = route.root;
        if death.is_some_and(|death| death != Death::Stopped) {
            return true;
        }
        let first = route.through.first().and_then(|(who, _)| *who);
        let may_be_a_cause = || {
            self.services.all.iter().any(|(key, service)| {
                !key.is_server
                    && key.who == first
                    && key.port == port
                    && service.unanswered.may_be_a_cause(service.context())
            })
        };
        chain.marks.count >= ENOUGH && (death.is_some() || may_be_a_cause())
    }

    pub(super) fn chain(&self, route: &Route, chain: &Chain) -> Option<Draft> {
        if !self.is_chain(route, chain) {
            return None;
        }
        let (root, death, port) = route.root;
        let root_name = match root {
            Some(who) => format!("{} at port {port}", self.name(Some(who))),
            None => format!("the server at port {port}"),
        };
        let mut sentence = match death {
            Some(death) => format!("{root_name} {}", death.verb()),
            None => format!("{root_name} ended connections before it had answered"),
        };
        for (who, own_port) in &route.through {
            let _ = write!(
                sentence,
                " → {} lost its connection and closed that of its client at port {own_port}",
                self.name(*who)
            );
        }
        let victim = route.victim.map_or_else(|| "clients".to_owned(), |who| self.name(Some(who)));
        let missed = if chain.unanswered > 0 { "got no answer" } else { "lost its connection" };
        let _ = write!(sentence, " → {victim} {missed}, {}.", times_in_words(chain.marks.count));
        let last = route.through.last().copied();
        Some(Draft {
            kind: FindingKind::Chain,
            class: 4,
            who: root,
            pid: None,
            remote: Some(Remote {
                address: None::<IpAddr>,
                port: None,
                comm: route.victim.map(|who| self.names.get(who).comm.clone()),
            }),
            count: chain.marks.count,
            marks: chain.marks.clone(),
            confidence: if death.is_some() {
                Confidence::Proven
            } else {
                confidence(chain.marks.count, None)
            },
            evidence: vec![
                ("root_port", u64::from(port).into()),
                ("victim_port", last.map(|(_, port)| u64::from(port)).into()),
                ("processes", (route.through.len() as u64 + 1).into()),
                ("resets", chain.resets.into()),
                ("longest_ms", millis(chain.took_ns).into()),
                ("how", death.map(Death::verb).into()),
                (
                    "through",
                    route
                        .through
                        .iter()
                        .map(|(who, port)| format!("{}:{port}", self.name(*who)))
                        .collect::<Vec<_>>()
                        .join(" → ")
                        .into(),
                ),
            ],
            summary: sentence,
            advice: format!(
                "Begin with {root_name}. What followed is a consequence, which needs no fix of its own \
                 except a retry."
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::{
        diagnose::tests::{
            at, client, closed_by_peer, database_killed, findings, kinds, merge, none, only, server, steps,
        },
        event::{Confidence, FindingKind},
    };

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
        // The application closed the connections of its clients much later.
        let mut lines = database_killed(6);
        for line in &mut lines {
            if line["connection"]["local"]["port"] == 9000 {
                line["time"] = at(7.0).into();
            }
        }
        assert!(!kinds(&findings(lines)).contains(&FindingKind::Chain));
    }

    /// A proxy may forward a farewell. Then the server ends its connection, and the proxy that of its client.
    #[test]
    fn a_farewell_through_a_proxy_is_no_chain() {
        let through_a_proxy = |wait: f64| {
            (0..6_u16).flat_map(move |number| {
                let (at, port) = (f64::from(number), 40_000 + number);
                let process = json!({"pid": 15, "tid": 15, "comm": "proxy", "exe": "/bin/proxy"});
                let proxy = json!({"process": process, "idle_ms": wait});
                let mut upstream = closed_by_peer(wait);
                merge(&mut upstream, &proxy);
                let connection = json!({"local": {"port": port + 10_000}});
                merge(&mut upstream, &json!({"last_data": "sent", "connection": connection}));
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
}
