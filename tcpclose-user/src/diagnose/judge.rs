//! Turns the tables into findings: the threshold for each kind, its numbers, its sentence and its advice.
//!
//! The threshold is five connections, unless the kernel itself reports the fault (a process that crashed). If
//! a finding is about a time, the times must also agree ([`Reservoir::regular`]).

use std::fmt::Write as _;

use std::{collections::BTreeMap, net::IpAddr};

use crate::{
    diagnose::{
        Diagnosis,
        chains::{Chain, Route},
        deaths::{EndedProcess, LostAnswers},
        end::{Death, ServiceKey},
        leaks::Leak,
        marks::{Marks, SECOND, Series},
        names::Who,
        services::{Lived, Service, Single},
        statistics::{ENOUGH, Spread},
        time_wait::{self, Destination, Ports},
    },
    event::{Confidence, Evidence, Finding, FindingKind, Program, Remote, Time},
    sink::human_millis,
};

/// The shortest irregular wait that counts as a user who gave up; shorter ones are races.
const PATIENCE_MS: f64 = 1_000.0;

/// The largest difference between the same waits seen from both ends.
const SAME: f64 = 0.15;

/// The usual limit on descriptors, `ulimit -n`.
const DESCRIPTORS: u64 = 1_024;

/// A finding and its sort key.
pub(crate) struct Ranked {
    /// Lost requests and exhausted resources come first, then risks, then what is in order.
    pub(crate) class: u8,
    pub(crate) finding: Finding,
}

/// The data for the sentences.
struct Draft {
    kind: FindingKind,
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
    pub(crate) fn judge(&self) -> Vec<Ranked> {
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
        let mut ranked: Vec<Ranked> = drafts.into_iter().map(|draft| self.finish(draft)).collect();
        ranked.sort_by_key(|ranked| std::cmp::Reverse((ranked.class, ranked.finding.count)));
        ranked
    }

    fn finish(&self, draft: Draft) -> Ranked {
        let several = self.sources.len() > 1;
        let files = several.then(|| {
            let name = |source: u16| self.sources.get(usize::from(source)).cloned().unwrap_or_default();
            draft.marks.lines.iter().map(|place| name(place.source)).collect()
        });
        let finding = Finding {
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
        };
        Ranked { class: draft.class, finding }
    }

    fn name(&self, who: Option<Who>) -> String {
        who.map_or_else(|| "a program that is not known".to_owned(), |who| self.names.get(who).comm.clone())
    }

    /// The name of the service, which is the same from both sides.
    fn service_name(&self, key: &ServiceKey, service: &Service) -> String {
        let at = match key.address {
            Some(address) => std::net::SocketAddr::new(address, key.port).to_string(),
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

    /// The server's end of the same connections, if it was traced too.
    fn server_of(&self, key: &ServiceKey, service: &Service) -> Option<&Service> {
        let who = service.peer.get()?;
        let server = ServiceKey { who: Some(who), is_server: true, address: None, port: key.port };
        self.services.all.get(&server)
    }

    fn keepalive(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
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
        let after = human_millis(spread.median);
        draft.summary = format!(
            "{client} keeps idle connections to {server} longer than the {after} after which they are closed there: \
             {} closed, {}.",
            spread.count,
            counted(raced, "request lost to it", "requests lost to it")
        );
        draft.advice = format!(
            "Have {client} drop idle connections before {after} have passed, or have {server} keep them longer than \
             {client} does."
        );
        Some(draft)
    }

    /// From the server's lines alone. The client's lines, if there are any, have more facts.
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
        let (server, after) = (self.service_name(key, service), human_millis(spread.median));
        draft.summary = format!(
            "{server} closes connections that have been idle for {after}, and its clients still use them: {} closed, {}.",
            spread.count,
            counted(raced, "request came too late", "requests came too late")
        );
        draft.advice = format!(
            "Have {server} keep idle connections longer than its clients do, or have these drop them earlier."
        );
        Some(draft)
    }

    fn gave_up(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        let series = &service.gave_up;
        let spread = series.sample.spread().filter(|_| series.marks.count >= ENOUGH)?;
        // A client that never receives anything may not expect an answer: logs and metrics are sent in one
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
        let median = human_millis(spread.median);
        let count = spread.count;
        if regular.is_some() {
            draft.summary = format!(
                "{clients} gave up on {server} after {median} without an answer, {count} times: a timeout of {clients}."
            );
            draft.advice = format!(
                "Find out why {server} takes longer than {median}, or raise the timeout of {clients} above what it takes."
            );
        } else {
            draft.summary = format!(
                "{clients} left {server} without an answer {count} times, after {} to {} (half of them within {median}): \
                 no timeout, people who left.",
                human_millis(spread.least),
                human_millis(spread.most)
            );
            draft.advice = format!("Find out why {server} takes so long.");
        }
        let passed_on = self.passed_on(key, &spread);
        if passed_on > 0 {
            draft.evidence.push(("upstream_dropped", passed_on.into()));
            let proxy = self.name(key.who);
            let _ = write!(
                draft.summary,
                " {proxy} dropped {} of its own for that.",
                counted(passed_on, "request", "requests")
            );
        }
        Some(draft)
    }

    /// Whether other lines show the same with more facts: the server's end of these connections, or the
    /// client's own client, which gave up first.
    fn is_seen_better(&self, key: &ServiceKey, service: &Service, spread: &Spread) -> bool {
        let peer = service.peer.get();
        let (client, server) = if key.is_server { (peer, key.who) } else { (key.who, peer) };
        let in_the_wake = self.services.all.iter().any(|(other, front)| {
            // The server's end of these connections; a program may be its own client.
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

    /// The number of requests that a proxy dropped because its own clients had closed.
    fn passed_on(&self, key: &ServiceKey, spread: &Spread) -> u64 {
        if !key.is_server || key.who.is_none() {
            return 0;
        }
        let upstream = self.services.all.iter().filter(|(other, service)| {
            // The client's end of these connections; a program may be its own client.
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

    fn unanswered(
        &self,
        key: &ServiceKey,
        service: &Service,
        chains: &BTreeMap<Route, Chain>,
    ) -> Option<Draft> {
        let faults = service.unanswered.faults(service.context());
        let most = faults.iter().max_by_key(|part| part.count())?;
        // A chain explains its own.
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
            "how is not known from these lines"
        };
        draft.summary = format!(
            "{server} ended {count} of {} connections of {client} before it had answered; {how}.",
            service.ends
        );
        draft.advice = format!("Look at the log of {server} at these moments, and trace its host as well.");
        Some(draft)
    }

    /// Whether these lost answers are part of a chain that has a finding.
    fn is_a_link(&self, key: &ServiceKey, chains: &BTreeMap<Route, Chain>) -> bool {
        chains.iter().any(|(route, chain)| {
            self.is_chain(route, chain)
                && (route.through.iter().any(|(_, port)| *port == key.port) || route.root.2 == key.port)
        })
    }

    fn unread(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
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
            "{server} closed {} connections with data unread, so that the kernel sent a RST after the answer; clients \
             may lose the answer.",
            service.unread.count
        );
        draft.advice = format!(
            "Have {server} read the request to its end, or shut down sending and read until the client closes, before \
             it closes."
        );
        Some(draft)
    }

    fn overflow(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
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
        draft.summary = format!(
            "{server} does not accept connections as fast as they come: {} waited in its queue long enough to be \
             noticed, {} were reset because the queue was full.",
            waiting.count, dropped.count
        );
        draft.advice = format!(
            "Find out what keeps {server} from calling accept(), and if it is bursts, raise its backlog and \
             net.core.somaxconn."
        );
        Some(draft)
    }

    fn cut(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
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
            "Something between {client} and {server} forgets idle connections: {} died when they were used again, the \
             first after {}; none that was idle for up to {} did.",
            died.count,
            human_millis(died.least),
            human_millis(lived.longest_ms)
        );
        draft.advice = format!(
            "Have {client} drop connections before they have been idle for {}, or turn on keepalives with a shorter \
             TCP_KEEPIDLE.",
            human_millis(died.least)
        );
        Some(draft)
    }

    fn half_closed_cut(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
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
            "Something between {client} and {server} forgets connections whose client has shut down sending: the answer \
             was never acknowledged on {} of them, the first after {}; none that waited for up to {} died.",
            died.count,
            human_millis(died.least),
            human_millis(lived.longest_ms)
        );
        draft.advice = format!(
            "Have {client} shut down sending only after the answer, or have the firewall keep half-closed connections \
             longer than {server} takes (nf_conntrack_tcp_timeout_close_wait and _fin_wait in Linux)."
        );
        Some(draft)
    }

    fn refused(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        if service.refused.count < ENOUGH {
            return None;
        }
        let mut draft = self.draft(FindingKind::Refused, key, service, &service.refused);
        draft.confidence = Confidence::Proven;
        draft.evidence.push(("connected", service.ends.into()));
        let (client, server) = (self.name(key.who), self.service_name(key, service));
        let (when, others) = match service.ends {
            0 => ("listens there", "none got through".to_owned()),
            ends => ("listened there at the time", format!("{ends} got through")),
        };
        draft.summary = format!(
            "{} connects of {client} to {server} were refused: nothing {when}; {others}.",
            service.refused.count
        );
        draft.advice =
            format!("Start what should listen at {server}, or correct the address that {client} uses.");
        Some(draft)
    }

    fn no_answer(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        let spread = service.no_answer.sample.spread().filter(|spread| spread.count >= ENOUGH)?;
        let mut draft = self.draft(FindingKind::ConnectUnanswered, key, service, &service.no_answer.marks);
        draft.confidence = Confidence::Proven;
        draft.evidence.extend(times("wait", &spread));
        draft
            .evidence
            .extend([("connected", service.ends.into()), ("unreachable", service.unreachable.into())]);
        let (client, server) = (self.name(key.who), self.service_name(key, service));
        draft.summary = format!(
            "{} connects of {client} to {server} had no answer within {}; {} got through.",
            spread.count,
            human_millis(spread.median),
            service.ends
        );
        draft.advice = format!(
            "Check that {server} is up, that no firewall drops the SYN, and that its accept queue is not full (`nstat \
             TcpExtListenDrops` there)."
        );
        Some(draft)
    }

    fn forged(&self, key: &ServiceKey, service: &Service) -> Option<Draft> {
        if service.forged.count < ENOUGH {
            return None;
        }
        let mut draft = self.draft(FindingKind::Forged, key, service, &service.forged);
        draft.evidence.push(("connections", service.ends.into()));
        let (client, server) = (self.name(key.who), self.service_name(key, service));
        draft.summary = format!(
            "{} connections between {client} and {server} ended by a RST whose TTL is not that of the handshake: it came \
             from somebody on the way.",
            service.forged.count
        );
        draft.advice =
            format!("Ask whoever runs the firewalls between {client} and {server} which rule resets them.");
        Some(draft)
    }

    fn deaths(&self, chains: &BTreeMap<Route, Chain>) -> Vec<Draft> {
        let mut drafts = Vec::new();
        // All crashes of a program are one finding; each restart is a finding of its own.
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
            // If most exit just after their clients' last word, the others are slow to.
            let farewells = processes.iter().map(|process| process.farewells).sum::<u64>();
            drafts.extend(self.died(who, Death::Stopped, &processes, ENOUGH.max(farewells), chains));
        }
        drafts
    }

    /// The connections with a pending request. A server that never sends anything (logs, metrics) owes no
    /// answer, unless a client is seen to have needed it; but a crash is a fault of any server.
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
            format!("Have {name} stop accepting and finish what it has begun before it exits.")
        } else if undecided > 0 {
            let _ = write!(summary, "; whether requests were under way on {undecided} of them is not known.");
            "Nothing, if somebody restarted it; the logs of its clients tell whether requests were lost."
                .to_owned()
        } else {
            summary.push_str(", and nothing was lost.");
            "Nothing: this is how a restart looks.".to_owned()
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
        // The end of the process is certain, unless it was asked to terminate.
        let is_told = lost.count >= bar || death != Death::Stopped && !is_one_way && undecided.count > 0;
        if !is_told {
            return None;
        }
        let name = self.name(who);
        let what = if is_one_way {
            let sent_nothing = "connected that it had sent nothing";
            counted(lost.count, &format!("client {sent_nothing}"), &format!("clients {sent_nothing}"))
        } else {
            format!("{} unanswered", between(lost.count, undecided.count))
        };
        let times = counted(processes.len() as u64, "time", "times");
        let mut killer = Single::None;
        processes.iter().filter_map(|process| process.killer.get()).for_each(|who| killer.add(who));
        let killer = killer.get().map(|who| self.name(Some(who)));
        let marks = if lost.count > 0 { lost.clone() } else { undecided.clone() };
        let by = killer.as_ref().map(|killer| format!(" by {killer}")).unwrap_or_default();
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
                    format!("Give {name} more memory, or find what takes it: the kernel log has the numbers.")
                }
                Death::Crashed(_) => {
                    format!("Look at the core dump of {name} (`coredumpctl info {}`).", one.pid)
                }
                Death::Killed => match killer {
                    Some(killer) => format!("Find out why {killer} kills {name}."),
                    None => format!("Find out who kills {name}: its supervisor's log may say so."),
                },
                Death::Stopped => format!("Have {name} answer what it has taken on before it exits."),
            },
            marks,
        })
    }

    fn leak(&self, leak: &Leak) -> Draft {
        let name = self.name(leak.key.who);
        let count = leak.marks.count;
        let spread_ms = millis(leak.last_since - leak.first_since);
        #[expect(clippy::cast_precision_loss, reason = "at most 65,536")]
        let per_minute = (spread_ms >= 1_000.0).then(|| (count - 1) as f64 * 60_000.0 / spread_ms);
        let used = leak.highest_fd.map(u64::from);
        let left = used.and_then(|used| DESCRIPTORS.checked_sub(used));
        #[expect(clippy::cast_precision_loss, reason = "at most 1,024")]
        let minutes_left = per_minute.zip(left).map(|(rate, left)| left as f64 / rate);
        let mut summary =
            format!("{name} (pid {}) holds {count} connections that its peers have closed", leak.key.pid);
        if let Some(rate) = per_minute {
            let _ = write!(summary, ", {rate:.1} more a minute");
        }
        if let Some(minutes) = minutes_left {
            let _ = write!(
                summary,
                "; at that rate {DESCRIPTORS} descriptors, the usual limit, are used up in {}",
                human_millis(minutes * 60_000.0)
            );
        }
        if let Some((opener, times)) = &leak.opener {
            let _ = write!(summary, "; {times} of them were opened in {opener}");
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
                "Close the connection on every way out of the code that opened it, error paths included; `tcpclose list \
                 --pid {}` shows each.",
                leak.key.pid
            ),
            marks: leak.marks.clone(),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "numbers of ports")]
    fn ports(&self, at: &Destination, ports: &Ports) -> Draft {
        let who = ports.who.get();
        let name = who.map(|who| self.name(Some(who)));
        let subject = name.as_deref().unwrap_or("Something on this host");
        let object = name.as_deref().unwrap_or("it");
        let server = std::net::SocketAddr::new(at.address, at.port);
        let until_all = ports.seconds_to_all();
        let run_out = match until_all {
            Some(seconds) => {
                format!("at that rate all are after {}, and connects fail", human_millis(seconds * 1_000.0))
            }
            None => "connects fail when all are, which this rate does not lead to".to_owned(),
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
                "{subject} opens a connection to {server} for each request and closes first: {} ports were in TIME_WAIT at \
                 once, {share:.0} % of the {} that Linux gives out by default; {run_out}.",
                ports.peak,
                time_wait::PORTS
            ),
            advice: format!("Have {object} keep connections to {server} open and use them again."),
            marks: ports.marks.clone(),
        }
    }

    /// Whether a chain began with a process that was not terminated on request; or occurred often enough, and
    /// began with a server whose answers were needed.
    fn is_chain(&self, route: &Route, chain: &Chain) -> bool {
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

    fn chain(&self, route: &Route, chain: &Chain) -> Option<Draft> {
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
                " → {} lost its connection and closed its client's at port {own_port}",
                self.name(*who)
            );
        }
        let victim = route.victim.map_or_else(|| "clients".to_owned(), |who| self.name(Some(who)));
        let missed = if chain.unanswered > 0 { "got no answer" } else { "lost its connection" };
        let _ = write!(sentence, " → {victim} {missed}, {}.", counted(chain.marks.count, "time", "times"));
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
                "Begin with {root_name}: what came after is its consequence, and needs no fix of its own but a retry."
            ),
        })
    }
}

/// The silences after which connections died, if they are longer than those after which they lived.
fn cut_after(cut: &Series, lived: Lived) -> Option<Spread> {
    let died = cut.sample.spread().filter(|died| died.count >= ENOUGH && lived.count >= ENOUGH)?;
    // One bound must be above the other, apart from clock ticks; and they must not have died at the same
    // time, as when the peer's host restarts.
    (lived.longest_ms <= died.least * 1.05 && cut.marks.are_spread()).then_some(died)
}

/// Whether the waits of a proxy for its server equal those of the proxy's own clients.
fn follows(spread: &Spread, front: &Service) -> bool {
    front.gave_up.sample.spread().is_some_and(|front| {
        (front.median - spread.median).abs() <= SAME * front.median
            && spread.count <= front.count + front.count / 5
    })
}

fn confidence(count: u64, spread: Option<&Spread>) -> Confidence {
    let close = spread.is_none_or(|spread| spread.deviation <= 0.05 * spread.median);
    if count >= 20 && close { Confidence::Strong } else { Confidence::Fair }
}

/// The numbers of a series, under names with a prefix.
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

/// Whether a chain began with these processes: then a client is known to have waited for them.
fn was_needed(who: Option<Who>, death: Death, chains: &BTreeMap<Route, Chain>) -> bool {
    chains.keys().any(|route| route.root.0 == who && route.root.1 == Some(death))
}

/// A number of requests, of which it is known of some, and not known of others.
fn between(known: u64, undecided: u64) -> String {
    let most = counted(known + undecided, "request", "requests");
    match (known, undecided) {
        (_, 0) => most,
        (0, _) => format!("at most {most}"),
        (known, _) => format!("at least {known} and at most {most}"),
    }
}

fn counted(count: u64, one: &str, many: &str) -> String {
    match count {
        0 => format!("no {one}"),
        1 => format!("1 {one}"),
        _ => format!("{count} {many}"),
    }
}

#[expect(clippy::cast_precision_loss, reason = "52 bits of nanoseconds are two months")]
fn millis(nanoseconds: i64) -> f64 {
    nanoseconds as f64 / 1e6
}

fn time(nanoseconds: i64) -> Time {
    Time(jiff::Timestamp::from_nanosecond(i128::from(nanoseconds)).unwrap_or_default())
}
