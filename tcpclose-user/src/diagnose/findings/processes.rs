//! Processes that ended while clients were connected: restarts, crashes and kills.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{Draft, counted, millis, times_in_words};
use crate::{
    diagnose::{
        Diagnosis,
        chains::{Chain, Route},
        deaths::{EndedProcess, LostAnswers},
        end::{Death, ServiceKey},
        marks::SECOND,
        names::Who,
        services::Single,
        statistics::ENOUGH,
    },
    event::{Confidence, FindingKind, Remote},
};

impl Diagnosis {
    pub(super) fn deaths(&self, chains: &BTreeMap<Route, Chain>) -> Vec<Draft> {
        let mut drafts = Vec::new();
        // All crashes of a program together are one finding. Each restart is a finding by itself.
        let mut crashes: BTreeMap<(Option<Who>, Death), Vec<&EndedProcess>> = BTreeMap::new();
        let mut exits: BTreeMap<Option<Who>, Vec<&EndedProcess>> = BTreeMap::new();
        for process in self.deaths.all() {
            let at_once = process.ends.count >= ENOUGH && process.ends.last - process.ends.first <= SECOND;
            let is_restart = match process.death {
                Death::Stopped => at_once,
                Death::Killed => {
                    let was_needed = was_needed(process.who, process.death, chains);
                    at_once && !was_needed && self.lost(process, chains).marks.count == 0
                }
                Death::OutOfMemory | Death::Crashed(_) => false,
            };
            match process.death {
                _ if is_restart => drafts.push(self.deploy(process, chains)),
                Death::Stopped => exits.entry(process.who).or_default().push(process),
                death => crashes.entry((process.who, death)).or_default().push(process),
            }
        }
        for ((who, death), processes) in crashes {
            drafts.extend(self.died(who, death, &processes, 1, chains));
        }
        for (who, processes) in exits {
            // If most processes exit just after the last data of their clients, the others exit for the same
            // reason, only later.
            let farewells = processes.iter().map(|process| process.farewells).sum::<u64>();
            drafts.extend(self.died(who, Death::Stopped, &processes, ENOUGH.max(farewells), chains));
        }
        drafts
    }

    /// The connections with a pending request. A server that never sends anything (it receives logs or
    /// metrics) owes no answer, unless a client was seen to need one. But a crash is a fault of any server.
    fn lost(&self, process: &EndedProcess, chains: &BTreeMap<Route, Chain>) -> LostAnswers {
        let mut lost = process.lost.clone();
        let answers = process.port.get().is_none_or(|port| {
            let key = ServiceKey { who: process.who, is_server: true, address: None, port };
            self.services.all.get(&key).is_none_or(|service| service.answered > 0)
        });
        if answers || was_needed(process.who, process.death, chains) {
            return lost;
        }
        lost.is_one_way = true;
        if matches!(process.death, Death::Stopped | Death::Killed) {
            lost.undecided.merge(&std::mem::take(&mut lost.marks));
        }
        lost
    }

    fn deploy(&self, process: &EndedProcess, chains: &BTreeMap<Route, Chain>) -> Draft {
        let name = self.name(process.who);
        let LostAnswers { marks, undecided, .. } = self.lost(process, chains);
        let (lost, undecided) = (marks.count, undecided.count);
        let mut summary = format!(
            "{name} (pid {}) {} with {} connections open: a restart",
            process.pid,
            process.death.verb(),
            process.ends.count
        );
        let advice = if lost > 0 {
            let _ = write!(summary, "; {} under way.", between(lost, undecided));
            format!(
                "Before {name} exits, have it stop accepting connections and answer the requests that it has."
            )
        } else if undecided > 0 {
            let _ = write!(summary, "; whether requests were under way on {undecided} of them is not known.");
            "Nothing, if somebody restarted it. The logs of its clients show whether requests were lost."
                .to_owned()
        } else {
            summary.push_str(", and nothing was lost.");
            "Nothing: a restart looks like this.".to_owned()
        };
        Draft {
            kind: FindingKind::Deploy,
            class: u8::from(lost > 0),
            who: process.who,
            pid: Some(process.pid),
            remote: self.clients(process),
            count: process.ends.count,
            marks: process.ends.clone(),
            confidence: Confidence::Proven,
            evidence: vec![
                ("local_port", process.port.get().map(u64::from).into()),
                ("requests_lost", lost.into()),
                ("undecided_connections", undecided.into()),
                ("within_ms", millis(process.ends.last - process.ends.first).into()),
            ],
            summary,
            advice,
        }
    }

    fn clients(&self, process: &EndedProcess) -> Option<Remote> {
        let comm = process.peer.get().map(|who| self.names.get(who).comm.clone())?;
        Some(Remote { address: None, port: None, comm: Some(comm) })
    }

    fn died(
        &self,
        who: Option<Who>,
        death: Death,
        processes: &[&EndedProcess],
        bar: u64,
        chains: &BTreeMap<Route, Chain>,
    ) -> Option<Draft> {
        let mut lost = LostAnswers::default();
        for process in processes {
            lost.merge(&self.lost(process, chains));
        }
        let LostAnswers { marks: lost, undecided, is_one_way } = lost;
        let one = processes.first()?;
        // Unless the process was asked to terminate, its end is a fault by itself.
        let is_fault = death != Death::Stopped && !is_one_way && undecided.count > 0;
        if lost.count < bar && !is_fault {
            return None;
        }
        let name = self.name(who);
        let what = if is_one_way {
            let clients = counted(lost.count, "connected client", "connected clients");
            format!("{clients} to which it had sent nothing")
        } else {
            format!("{} unanswered", between(lost.count, undecided.count))
        };
        let times = times_in_words(processes.len() as u64);
        let mut killer = Single::None;
        processes.iter().filter_map(|process| process.killer.get()).for_each(|who| killer.add(who));
        let killer = killer.get().map(|who| self.name(Some(who)));
        let by = killer.as_ref().map(|killer| format!(" by {killer}")).unwrap_or_default();
        let marks = if lost.count > 0 { lost.clone() } else { undecided.clone() };
        Some(Draft {
            kind: FindingKind::BackendDied,
            class: 3,
            who,
            pid: (processes.len() == 1).then_some(one.pid),
            remote: self.clients(one),
            count: marks.count,
            confidence: Confidence::Proven,
            evidence: vec![
                ("local_port", one.port.get().map(u64::from).into()),
                ("deaths", (processes.len() as u64).into()),
                ("requests_lost", Some(lost.count).filter(|_| !is_one_way).into()),
                ("undecided_connections", undecided.count.into()),
                ("connections", processes.iter().map(|process| process.ends.count).sum::<u64>().into()),
                ("how", death.verb().into()),
                ("killed_by", killer.clone().into()),
            ],
            summary: format!("{name} {}{by} {times}, with {what}.", death.verb()),
            advice: match death {
                Death::OutOfMemory => {
                    format!(
                        "Give {name} more memory, or find out what uses it: the kernel log has the numbers."
                    )
                }
                Death::Crashed(_) => {
                    format!("Look at the core dump of {name} (`coredumpctl info {}`).", one.pid)
                }
                Death::Killed => match killer {
                    Some(killer) => format!("Find out why {killer} kills {name}."),
                    None => format!("Find out who kills {name}: its supervisor's log may say so."),
                },
                Death::Stopped => format!("Before {name} exits, have it answer the requests that it has."),
            },
            marks,
        })
    }
}

/// Whether a chain began with such a process, so that a client is known to have needed it.
fn was_needed(who: Option<Who>, death: Death, chains: &BTreeMap<Route, Chain>) -> bool {
    chains.keys().any(|route| route.root.0 == who && route.root.1 == Some(death))
}

/// A number of requests: `known`, and perhaps as many as `undecided` in addition.
fn between(known: u64, undecided: u64) -> String {
    let most = counted(known + undecided, "request", "requests");
    match (known, undecided) {
        (_, 0) => most,
        (0, _) => format!("at most {most}"),
        (known, _) => format!("at least {known} and at most {most}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::{
        diagnose::tests::{
            assert_near, client, closed_by_peer, database_killed, many, merge, none, number, only, server,
        },
        event::{Confidence, Evidence, FindingKind},
    };

    #[test]
    fn a_server_that_crashes_is_a_finding_at_the_first_request_lost() {
        let crash = json!({
            "closed_by": "local", "trigger": "signal", "signal": "SIGSEGV", "last_data": "received",
            "since_received_ms": 900.0,
        });
        let finding = only(vec![server(1.0, 40_000, &crash)], FindingKind::BackendDied);
        assert_eq!(finding.confidence, Confidence::Proven);
        assert!(
            finding.summary.contains("crashed (SIGSEGV) once, with 1 request unanswered"),
            "{}",
            finding.summary
        );
        let idle =
            json!({"closed_by": "local", "trigger": "signal", "signal": "SIGSEGV", "last_data": "sent"});
        none(vec![server(1.0, 40_000, &idle)]);
        let mut killed = crash.clone();
        merge(
            &mut killed,
            &json!({"signal": "SIGKILL", "signal_from": {"pid": 1, "comm": "monit", "uid": 0}}),
        );
        let finding = only(vec![server(1.0, 40_000, &killed)], FindingKind::BackendDied);
        assert!(finding.summary.contains("was killed (SIGKILL) by monit"), "{}", finding.summary);
        let mut oom = crash;
        merge(&mut oom, &json!({"signal": "SIGKILL", "signal_from": {"oom": true}}));
        let finding = only(vec![server(1.0, 40_000, &oom)], FindingKind::BackendDied);
        assert!(finding.summary.contains("OOM killer"), "{}", finding.summary);
    }

    /// The lines of a process that ended with these connections.
    fn died(signal: &str, ends: &[Value]) -> Vec<Value> {
        let died = json!({"closed_by": "local", "trigger": "signal", "signal": signal});
        let ends = ends.iter().zip(40_000_u16..).map(|(end, port)| {
            let mut line = server(1.0, port, &died);
            merge(&mut line, end);
            line
        });
        ends.collect()
    }

    /// The client sent the last data `since_ms` ago, `after_ms` after that of the server.
    fn asked(since_ms: f64, after_ms: f64) -> Value {
        json!({
            "last_data": "received", "idle_ms": since_ms, "since_received_ms": since_ms,
            "since_sent_ms": since_ms + after_ms,
        })
    }

    /// After an earlier answer, the last data of a client may not be a request. If it came in the tick of the
    /// answer, it is not even known to be the last.
    #[test]
    fn requests_that_may_have_been_lost_are_reported_apart() {
        let first = json!({"last_data": "received", "idle_ms": 40.0, "since_received_ms": 40.0});
        let idle =
            json!({"last_data": null, "idle_ms": 40.0, "since_received_ms": 40.0, "since_sent_ms": 40.0});
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

    /// Clients acknowledge the answer (HTTP/2's `WINDOW_UPDATE`) and then send nothing more; or both ends
    /// send heartbeats (AMQP), each at times of its own.
    #[test]
    fn the_last_data_on_an_idle_connection_is_no_request() {
        let acknowledged: Vec<_> = (0..8_u32).map(|n| asked(200.0 + 900.0 * f64::from(n), 4.0)).collect();
        let heartbeats: Vec<_> =
            (1..9_u32).map(|n| asked(220.0 * f64::from(n), 310.0 * f64::from(n))).collect();
        for ends in [acknowledged, heartbeats] {
            let finding = only(died("SIGKILL", &ends), FindingKind::Deploy);
            assert!(finding.summary.ends_with("under way on 8 of them is not known."), "{}", finding.summary);
            assert_near(number(&finding, "undecided_connections"), 8.0);
            // A crash is a fault nevertheless.
            let finding = only(died("SIGSEGV", &ends), FindingKind::BackendDied);
            assert!(finding.summary.ends_with("with at most 8 requests unanswered."), "{}", finding.summary);
            assert_near(number(&finding, "requests_lost"), 0.0);
        }
    }

    /// A library connects to itself to wake up its event loop (pika), in a program that is killed; and in one
    /// that closes such a connection because its server was killed.
    #[test]
    fn a_connection_of_a_process_to_itself_has_no_client() {
        let woken = json!({
            "last_data": "received", "since_received_ms": 3000.0, "idle_ms": 3000.0,
            "process": {"pid": 10, "comm": "app", "exe": "/bin/app"},
        });
        let mut lines = died("SIGKILL", &vec![woken; 6]);
        lines.extend((0..6_u16).map(|n| {
            let mut end = closed_by_peer(3000.0);
            merge(&mut end, &json!({"last_data": "sent", "trigger": "signal", "signal": "SIGKILL"}));
            client(1.0, 40_000 + n, &end)
        }));
        none(lines);
        let mut lines = database_killed(6);
        for line in lines.iter_mut().filter(|line| line["process"]["comm"] == "proxy") {
            merge(line, &json!({"process": {"pid": 20, "comm": "backend", "exe": "/bin/backend"}}));
        }
        only(lines, FindingKind::BackendDied);
    }

    /// A server that receives logs answers no client. A crash of it is a fault nevertheless.
    #[test]
    fn a_process_that_answers_nobody() {
        let mut end = asked(300.0, 0.0);
        merge(&mut end, &json!({"since_sent_ms": null, "connection": {"bytes_sent": 0}}));
        let ends = vec![end; 4];
        none(died("SIGKILL", &ends));
        none(died("SIGTERM", &ends));
        let finding = only(died("SIGSEGV", &ends), FindingKind::BackendDied);
        assert!(
            finding.summary.contains("4 connected clients to which it had sent nothing"),
            "{}",
            finding.summary
        );
        assert_eq!(finding.evidence["requests_lost"], Evidence::Unknown);
    }

    /// A server such as PostgreSQL has a process for each connection, which exits when its client asks for
    /// it.
    #[test]
    fn processes_that_exit_when_they_are_asked_to() {
        let exits = |after_ms: f64| {
            many(20, |at, port| {
                let exit = json!({
                    "closed_by": "local", "trigger": "exit",
                    "last_data": "received", "since_received_ms": after_ms,
                    "process": {"pid": u32::from(port)},
                });
                server(at, port, &exit)
            })
        };
        none(exits(0.0));
        none(exits(4.0));
        only(exits(500.0), FindingKind::BackendDied);
        // Some of them take longer.
        let mut mixed = exits(4.0);
        mixed.extend(exits(25.0).into_iter().take(8).map(|mut line| {
            let port = line["connection"]["remote"]["port"].as_u64().unwrap_or_default() + 100;
            merge(&mut line, &json!({"process": {"pid": port}, "connection": {"remote": {"port": port}}}));
            line
        }));
        none(mixed);
    }

    /// A signal ends requests of any age.
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
            (0..7)
                .map(|number: u16| server(1.0 + f64::from(number) * 0.1, 40_000 + number, &stopped))
                .collect(),
            FindingKind::Deploy,
        );
        assert_near(number(&finding, "requests_lost"), 0.0);
        assert!(finding.summary.contains("nothing was lost"), "{}", finding.summary);
        none((0..4).map(|number: u16| server(1.0, 40_000 + number, &stopped)).collect());
        none(many(7, |at, port| server(at, port, &stopped)));
        // A client with many connections exits, such as a benchmark.
        none((0..50).map(|number: u16| client(1.0, 40_000 + number, &json!({"trigger": "exit"}))).collect());
    }
}
