//! Derives findings from the tables: the threshold for each kind, and its numbers, sentence and advice.
//!
//! The threshold is five connections, unless the kernel itself reports the fault (a process that crashed). If
//! a finding is about a time, the times must also agree ([`regular`](super::statistics::Reservoir::regular)).

mod chains;
mod connects;
mod keepalive;
mod middleboxes;
mod processes;
mod requests;
mod resources;

use std::{cmp::Reverse, net::SocketAddr};

use crate::{
    diagnose::{Diagnosis, end::ServiceKey, marks::Marks, names::Who, services::Service, statistics::Spread},
    event::{Confidence, Evidence, Finding, FindingKind, Program, Remote, Time},
    sink::human_millis,
};

/// A finding whose program is not named yet.
struct Draft {
    kind: FindingKind,
    /// The order of findings: lost requests and exhausted resources come first, then risks, then what is in
    /// order.
    class: u8,
    who: Option<Who>,
    pid: Option<u32>,
    remote: Option<Remote>,
    count: u64,
    marks: Marks,
    confidence: Confidence,
    evidence: Vec<(&'static str, Evidence)>,
    summary: String,
    advice: String,
}

impl Diagnosis {
    /// All findings, the most costly first.
    pub(super) fn all_findings(&self) -> Vec<Finding> {
        let mut drafts = Vec::new();
        let chains = self.chains.all();
        let mut services: Vec<_> = self.services.all.iter().collect();
        services.sort_unstable_by_key(|(key, _)| **key);
        for (key, service) in services {
            drafts.extend(self.keepalive(key, service));
            drafts.extend(self.gave_up(key, service));
            drafts.extend(self.unanswered(key, service, &chains));
            drafts.extend(self.unread(key, service));
            drafts.extend(self.overflow(key, service));
            drafts.extend(self.cut(key, service));
            drafts.extend(self.half_closed_cut(key, service));
            drafts.extend(self.refused(key, service));
            drafts.extend(self.no_answer(key, service));
            drafts.extend(self.forged(key, service));
        }
        drafts.extend(self.deaths(&chains));
        drafts.extend(self.leaks.all().iter().map(|leak| self.leak(leak)));
        drafts.extend(self.time_wait.pressed().into_iter().map(|(at, ports)| self.ports(at, ports)));
        drafts.extend(chains.iter().filter_map(|(route, chain)| self.chain(route, chain)));
        drafts.sort_by_key(|draft| Reverse((draft.class, draft.count)));
        drafts.into_iter().map(|draft| self.finding(draft)).collect()
    }

    fn finding(&self, draft: Draft) -> Finding {
        let several = self.sources.len() > 1;
        let files = several.then(|| {
            let name = |source: u16| self.sources.get(usize::from(source)).cloned().unwrap_or_default();
            draft.marks.lines.iter().map(|place| name(place.source)).collect()
        });
        Finding {
            time: time(self.latest),
            seq: 0,
            kind: draft.kind,
            process: draft.who.map(|who| {
                let name = self.names.get(who);
                Program {
                    pid: draft.pid,
                    comm: name.comm.clone(),
                    exe: name.exe.clone(),
                    container: name.container.clone(),
                }
            }),
            remote: draft.remote,
            count: draft.count,
            first: time(draft.marks.first),
            last: time(draft.marks.last),
            confidence: draft.confidence,
            evidence: draft.evidence.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
            summary: draft.summary,
            advice: draft.advice,
            lines: draft.marks.lines.iter().map(|place| place.seq).collect(),
            files,
        }
    }

    fn name(&self, who: Option<Who>) -> String {
        who.map_or_else(|| "an unknown program".to_owned(), |who| self.names.get(who).comm.clone())
    }

    /// The name of the service, which is the same in the lines of both ends.
    fn service_name(&self, key: &ServiceKey, service: &Service) -> String {
        let at = match key.address {
            Some(address) => SocketAddr::new(address, key.port).to_string(),
            None => format!("port {}", key.port),
        };
        let server = if key.is_server { key.who } else { service.peer.get() };
        server.map_or_else(|| at.clone(), |who| format!("{} at {at}", self.name(Some(who))))
    }

    /// The name of the clients of a service.
    fn client_name(&self, key: &ServiceKey, service: &Service) -> String {
        match (key.is_server, service.peer.get()) {
            (false, _) => self.name(key.who),
            (true, Some(who)) => self.name(Some(who)),
            (true, None) => "clients".to_owned(),
        }
    }

    fn draft(&self, kind: FindingKind, key: &ServiceKey, service: &Service, marks: &Marks) -> Draft {
        let peer = service.peer.get().map(|who| self.names.get(who).comm.clone());
        let remote = if key.is_server {
            Remote { address: service.remote.get(), port: None, comm: peer }
        } else {
            Remote { address: key.address, port: Some(key.port), comm: peer }
        };
        let mut evidence = Vec::new();
        if key.is_server {
            evidence.push(("local_port", Evidence::from(u64::from(key.port))));
        }
        Draft {
            kind,
            class: 2,
            who: key.who,
            pid: service.pid.get(),
            remote: Some(remote),
            count: marks.count,
            marks: marks.clone(),
            confidence: confidence(marks.count, None),
            evidence,
            summary: String::new(),
            advice: String::new(),
        }
    }
}

/// How sure a finding is that rests on this many connections and, if it is about a time, on these times.
fn confidence(count: u64, spread: Option<&Spread>) -> Confidence {
    let close = spread.is_none_or(|spread| spread.deviation <= 0.05 * spread.median);
    if count >= 20 && close { Confidence::Strong } else { Confidence::Fair }
}

/// The numbers of a series of times as evidence, under names that begin with `of`.
fn times(of: &str, spread: &Spread) -> Vec<(&'static str, Evidence)> {
    let names = match of {
        "peer_timeout" => ["peer_timeout_ms", "peer_timeout_deviation_ms"],
        "own_timeout" => ["own_timeout_ms", "own_timeout_deviation_ms"],
        "timeout" => ["timeout_ms", "timeout_deviation_ms"],
        _ => ["wait_ms", "wait_deviation_ms"],
    };
    vec![
        (names[0], spread.median.into()),
        (names[1], spread.deviation.into()),
        ("samples", spread.count.into()),
    ]
}

/// A time that was measured, rounded to as many digits as are shown.
fn rounded(milliseconds: f64) -> String {
    let digit = match milliseconds {
        ..10.0 => 0.1,
        ..1_000.0 => 1.0,
        ..60_000.0 => 100.0,
        ..3_600_000.0 => 1_000.0,
        _ => 60_000.0,
    };
    human_millis((milliseconds / digit).round() * digit)
}

/// `no request`, `1 request`, `2 requests`.
fn counted(count: u64, one: &str, many: &str) -> String {
    match count {
        0 => format!("no {one}"),
        1 => format!("1 {one}"),
        _ => format!("{count} {many}"),
    }
}

/// `once`, `2 times`.
fn times_in_words(count: u64) -> String {
    if count == 1 { "once".to_owned() } else { format!("{count} times") }
}

#[expect(clippy::cast_precision_loss, reason = "52 bits of nanoseconds are two months")]
fn millis(nanoseconds: i64) -> f64 {
    nanoseconds as f64 / 1e6
}

fn time(nanoseconds: i64) -> Time {
    Time(jiff::Timestamp::from_nanosecond(i128::from(nanoseconds)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::rounded;

    #[test]
    fn times_are_rounded_to_what_is_shown() {
        let shown = [1.26, 999.6, 1494.0, 3004.0, 59_960.0, 90_400.0, 899_700.0, 7_199_000.0].map(rounded);
        assert_eq!(shown, ["1.3ms", "1s", "1.5s", "3s", "1m0s", "1m30s", "15m0s", "2h0m"]);
    }
}
