//! Resources that run out: descriptors, through sockets that are never closed, and local ports.

use std::fmt::Write as _;

use super::{Draft, confidence, millis};
use crate::{
    diagnose::{
        Diagnosis,
        leaks::Leak,
        time_wait::{self, Destination, Ports},
    },
    event::{Confidence, FindingKind, Remote},
    sink::human_millis,
};

/// The usual limit on descriptors, `ulimit -n`.
const DESCRIPTORS: u64 = 1_024;

impl Diagnosis {
    pub(super) fn leak(&self, leak: &Leak) -> Draft {
        let name = self.name(leak.key.who);
        let count = leak.marks.count;
        let spread_ms = millis(leak.last_since - leak.first_since);
        #[expect(clippy::cast_precision_loss, reason = "at most 65,536")]
        let per_minute = (spread_ms >= 1_000.0).then(|| (count - 1) as f64 * 60_000.0 / spread_ms);
        let used = leak.highest_fd.map(u64::from);
        let left = used.and_then(|used| DESCRIPTORS.checked_sub(used)).filter(|_| !leak.has_ended);
        #[expect(clippy::cast_precision_loss, reason = "at most 1,024")]
        let minutes_left = per_minute.zip(left).map(|(rate, left)| left as f64 / rate);
        let held = if leak.has_ended { "held until it ended" } else { "holds" };
        let mut summary =
            format!("{name} (pid {}) {held} {count} connections that its peers have closed", leak.key.pid);
        if let Some(rate) = per_minute {
            let _ = write!(summary, ", and {rate:.1} more every minute");
        }
        if let Some(minutes) = minutes_left {
            let _ = write!(
                summary,
                "; at this rate it reaches {DESCRIPTORS} descriptors, the usual limit, in {}",
                human_millis(minutes * 60_000.0)
            );
        }
        if let Some((opener, times)) = &leak.opener {
            let _ = write!(summary, "; {times} of the connections were opened in {opener}");
        }
        summary.push('.');
        Draft {
            kind: FindingKind::Leak,
            class: 3,
            who: leak.key.who,
            pid: Some(leak.key.pid),
            remote: None,
            count,
            confidence: confidence(count, None),
            evidence: vec![
                ("open_sockets", count.into()),
                ("told_of_the_end", leak.told_of_end.into()),
                ("opened_later", leak.opened_later.into()),
                ("closed_after_all", leak.closed.into()),
                ("per_minute", per_minute.into()),
                ("longest_ms", leak.longest_ms.into()),
                ("highest_descriptor", used.into()),
                ("minutes_to_1024_descriptors", minutes_left.into()),
                ("opened_in", leak.opener.as_ref().map(|(name, _)| name.clone()).into()),
            ],
            summary,
            advice: format!(
                "Close the connection on every path through the code that opened it, error paths included. \
                 `tcpclose list --pid {}` shows each of them.",
                leak.key.pid
            ),
            marks: leak.marks.clone(),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "numbers of ports")]
    pub(super) fn ports(&self, at: &Destination, ports: &Ports) -> Draft {
        let who = ports.who.get();
        let name = who.map(|who| self.name(Some(who)));
        let subject = name.as_deref().unwrap_or("Something on this host");
        let object = name.as_deref().unwrap_or("it");
        let server = std::net::SocketAddr::new(at.address, at.port);
        let until_all = ports.seconds_to_all();
        let run_out = match until_all {
            Some(seconds) => {
                format!(
                    "at this rate all of them are in use after {}, and connect() fails",
                    human_millis(seconds * 1_000.0)
                )
            }
            None => {
                "connect() fails once all of them are in use, which does not happen at this rate".to_owned()
            }
        };
        let share = ports.share() * 100.0;
        Draft {
            kind: FindingKind::TimeWaitPressure,
            class: 3,
            who,
            pid: ports.pid.get(),
            remote: Some(Remote { address: Some(at.address), port: Some(at.port), comm: None }),
            count: ports.marks.count,
            confidence: Confidence::Proven,
            evidence: vec![
                ("time_wait_peak", ports.peak.into()),
                ("ports", time_wait::PORTS.into()),
                ("ports_used_percent", share.into()),
                ("connections_per_second", ports.rate().into()),
                ("connections_per_second_limit", (time_wait::PORTS as f64 / time_wait::LASTS as f64).into()),
                ("seconds_to_all_ports", until_all.into()),
            ],
            summary: format!(
                "{subject} opens a connection to {server} for each request and closes first: {} ports were \
                 in TIME_WAIT at the same time, {share:.0} % of the {} that Linux assigns by default; \
                 {run_out}.",
                ports.peak,
                time_wait::PORTS
            ),
            advice: format!("Have {object} keep connections to {server} open and reuse them."),
            marks: ports.marks.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::{
        diagnose::tests::{
            assert_near, at, client, closed_by_peer, findings_of_files, kinds, many, merge, none, number,
            only,
        },
        event::{Evidence, Finding, FindingKind},
    };

    fn lingering(seconds: f64, port: u16, kind: &str) -> Value {
        let mut line = client(
            seconds,
            port,
            &json!({
                "event": "lingering", "state": "CLOSE_WAIT", "kind": kind,
                "since": at(seconds - 10.0), "for_ms": 10_000.0,
                "holders": [{"pid": 10, "comm": "app", "fd": port - 40_000 + 10}],
                "opener": {"process": null, "stack": {"kernel": null, "user": [
                    {"symbol": "__connect", "module": "/lib/libc.so.6", "file": null, "line": null},
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

    /// A leak is one also if somebody restarts the process before its descriptors run out.
    #[test]
    fn leak_of_a_process_that_ended() {
        let mut lines = many(13, |at, port| lingering(at * 6.0, port, "leaked"));
        let mut killed = closed_by_peer(1.0);
        let death = json!({"close_wait_ms": 15_000.0, "trigger": "signal", "signal": "SIGTERM"});
        merge(&mut killed, &death);
        lines.extend((0..13).map(|number: u16| client(80.0, 40_000 + number, &killed)));
        let finding = only(lines, FindingKind::Leak);
        assert_eq!((finding.count, &finding.evidence["closed_after_all"]), (13, &Evidence::Count(0)));
        assert_eq!(finding.evidence["minutes_to_1024_descriptors"], Evidence::Unknown);
        assert!(finding.summary.contains("held until it ended 13 connections"), "{}", finding.summary);
    }

    #[test]
    fn no_leak_below_the_bar() {
        none(many(4, |at, port| lingering(at, port, "leaked")));
        // They are idle connections of a pool, which closes them at their next use.
        let old = json!({"connection": {"age_ms": 60_000.0}});
        let mut pool = many(9, |at, port| lingering(at, port, "unread"));
        for line in &mut pool {
            merge(line, &old);
        }
        none(pool.clone());
        // They were opened to the same address after the peer had closed the first one.
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
        // 340 connections per second never use all of 28,232 ports.
        assert_eq!(pressed[0].evidence["seconds_to_all_ports"], Evidence::Unknown);
        assert_near(number(&pressed[0], "connections_per_second"), 333.333);
        let quick = short(17_000, 16.5);
        assert_near(number(&quick[0], "connections_per_second"), 1000.0);
        assert_near(number(&quick[0], "seconds_to_all_ports"), 28.232);
        let summary = &quick[0].summary;
        assert!(summary.contains("at this rate all of them are in use after 28.2s"), "{summary}");
        assert!(short(10_000, 10.0).is_empty());
    }
}
