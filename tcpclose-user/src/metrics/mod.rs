//! `--metrics`: the counts of a trace, in the format that Prometheus collects (OpenMetrics).
//!
//! Names of processes come from outside, so the number of time series is bounded: the first names have series
//! of their own, and the rest are counted together as `other`.

mod server;

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::fd::RawFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64},
    },
    time::Duration,
};

use nix::sys::resource::{UsageWho, getrusage};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _, text::encode},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};

pub use server::Server;

use crate::event::{Close, Connection, Endpoint, Event, Lingering};

/// The number of combinations of process, cause and `closed_by` that have a series of their own.
const MAX_SERIES: usize = 1024;

/// The number of names of processes that have series of their own.
const MAX_NAMES: usize = 128;

/// How many lingering sockets are kept track of. When there are more, the rest are not counted.
const MAX_LINGERING: usize = 65_536;

/// The label for the rest.
const OTHER: &str = "other";

/// The label for a fact that is not known or does not apply.
const NONE: &str = "none";

/// Upper bounds of the buckets of both histograms, seconds.
const BUCKETS: [f64; 12] = [0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 86_400.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CloseLabels {
    process: String,
    cause: String,
    closed_by: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResetLabels {
    direction: String,
    cause: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LingeringLabels {
    state: String,
    kind: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LostLabels {
    r#where: String,
}

/// What identifies a socket that lingers: its namespace and its ends. Its cookie cannot be used, because the
/// kernel makes one only on request, which may be when the socket ends.
type SocketKey = (Option<u32>, Option<Endpoint>, Option<Endpoint>);

/// The counts of a trace.
pub struct Metrics {
    registry: Registry,
    closes: Family<CloseLabels, Counter<u64, AtomicU64>>,
    resets: Family<ResetLabels, Counter<u64, AtomicU64>>,
    lingering: Family<LingeringLabels, Gauge<i64, AtomicI64>>,
    lifetimes: Histogram,
    close_waits: Histogram,
    lost: Family<LostLabels, Counter<u64, AtomicU64>>,
    names: HashSet<String>,
    series: HashSet<CloseLabels>,
    sockets: HashMap<SocketKey, LingeringLabels>,
}

/// The metrics of a trace, shared with the server that hands them out.
pub type SharedMetrics = Arc<Mutex<Metrics>>;

impl Metrics {
    /// Nothing counted yet. `programs` are descriptors of the loaded BPF programs, whose running time is
    /// reported.
    pub fn new(programs: Vec<RawFd>) -> Self {
        let mut registry = Registry::with_prefix("tcpclose");
        let closes = Family::default();
        let resets = Family::default();
        let lingering = Family::default();
        let lost = Family::default();
        let (lifetimes, close_waits) = (Histogram::new(BUCKETS), Histogram::new(BUCKETS));
        registry.register("closes", "Ends of connections", closes.clone());
        registry.register("resets", "RSTs sent and received", resets.clone());
        registry.register(
            "lingering_sockets",
            "Sockets that have been in a teardown state for longer than --linger",
            lingering.clone(),
        );
        registry.register_with_unit(
            "connection_duration",
            "Time from the establishment of a connection to its end",
            Unit::Seconds,
            lifetimes.clone(),
        );
        registry.register_with_unit(
            "close_wait",
            "Time that ended connections have spent in CLOSE_WAIT",
            Unit::Seconds,
            close_waits.clone(),
        );
        registry.register("lost", "Events that could not be reported, by where they were lost", lost.clone());
        registry.register_collector(Box::new(Cost { programs }));
        let (names, series, sockets) = Default::default();
        Self { registry, closes, resets, lingering, lifetimes, close_waits, lost, names, series, sockets }
    }

    /// Counts an event. `wanted` is whether the filters let it through; the end of a socket that lingers
    /// counts in any case.
    pub fn add(&mut self, event: &Event, wanted: bool) {
        match event {
            Event::Close(close) => {
                self.stays_no_more(&key(&close.connection));
                if wanted {
                    self.close(close);
                }
            }
            Event::Reset(reset) if wanted => {
                let labels = ResetLabels {
                    direction: reset.direction.to_string(),
                    cause: reset.cause.map_or_else(|| NONE.to_owned(), |cause| cause.to_string()),
                };
                self.resets.get_or_create(&labels).inc();
            }
            Event::Lingering(lingering) if wanted => self.stays(lingering),
            Event::Lost(lost) => {
                self.lost.get_or_create(&LostLabels { r#where: lost.place.to_string() }).inc_by(lost.count);
            }
            Event::Reset(_) | Event::Lingering(_) | Event::Finding(_) => {}
        }
    }

    fn close(&mut self, close: &Close) {
        let word = |word: Option<String>| word.unwrap_or_else(|| NONE.to_owned());
        let name = close.process.as_ref().map(|process| process.comm.as_str());
        let mut labels = CloseLabels {
            process: name.map_or_else(|| NONE.to_owned(), |name| self.name(name)),
            cause: word(close.cause.map(|cause| cause.to_string())),
            closed_by: word(close.closed_by.map(|by| by.to_string())),
        };
        if !self.series.contains(&labels) {
            if self.series.len() < MAX_SERIES {
                self.series.insert(labels.clone());
            } else {
                // Causes and `closed_by` have few values.
                OTHER.clone_into(&mut labels.process);
            }
        }
        self.closes.get_or_create(&labels).inc();
        if let Some(age) = close.connection.age_ms {
            self.lifetimes.observe(age / 1000.0);
        }
        if let Some(wait) = close.close_wait_ms {
            self.close_waits.observe(wait / 1000.0);
        }
    }

    /// The name of a process as a label: as it is, or `other` if there are too many.
    fn name(&mut self, name: &str) -> String {
        if !self.names.contains(name) {
            if self.names.len() >= MAX_NAMES {
                return OTHER.to_owned();
            }
            self.names.insert(name.to_owned());
        }
        name.to_owned()
    }

    fn stays(&mut self, lingering: &Lingering) {
        let key = key(&lingering.connection);
        self.stays_no_more(&key);
        if self.sockets.len() >= MAX_LINGERING {
            return;
        }
        let labels = LingeringLabels { state: lingering.state.to_string(), kind: lingering.kind.to_string() };
        self.lingering.get_or_create(&labels).inc();
        self.sockets.insert(key, labels);
    }

    fn stays_no_more(&mut self, key: &SocketKey) {
        if let Some(labels) = self.sockets.remove(key) {
            self.lingering.get_or_create(&labels).dec();
        }
    }

    /// All metrics as OpenMetrics text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // A `String` takes everything.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

fn key(connection: &Connection) -> SocketKey {
    (connection.netns, connection.local, connection.remote)
}

/// Locks the metrics. A thread that panicked while it held the lock has at worst counted an event in part.
pub fn lock(metrics: &SharedMetrics) -> std::sync::MutexGuard<'_, Metrics> {
    metrics.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What tracing costs, read when it is asked for.
#[derive(Debug)]
struct Cost {
    programs: Vec<RawFd>,
}

impl Collector for Cost {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut seconds = |name: &str, help: &str, value: f64| {
            let counter = ConstCounter::new(value);
            let encoder =
                encoder.encode_descriptor(name, help, Some(&Unit::Seconds), counter.metric_type())?;
            counter.encode(encoder)
        };
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let time = [usage.user_time(), usage.system_time()];
            // Exact up to 285 years.
            #[expect(clippy::cast_precision_loss, reason = "microseconds of CPU time")]
            let used = time.iter().map(|it| it.tv_sec() as f64 + it.tv_usec() as f64 / 1e6).sum();
            seconds("cpu", "CPU time of tcpclose itself", used)?;
        }
        if are_programs_timed() {
            let run: Duration = self.programs.iter().map(|program| run_time(*program)).sum();
            seconds("bpf_run", "Running time of the BPF programs of tcpclose", run.as_secs_f64())?;
        }
        Ok(())
    }
}

/// Whether the kernel measures how long BPF programs run, which costs each run some 20 ns.
fn are_programs_timed() -> bool {
    fs::read("/proc/sys/kernel/bpf_stats_enabled").is_ok_and(|text| text.first() == Some(&b'1'))
}

fn run_time(program: RawFd) -> Duration {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{program}")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("run_time_ns:"));
    Duration::from_nanos(line.and_then(|number| number.trim().parse().ok()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::examples;

    fn metrics() -> Metrics {
        Metrics::new(Vec::new())
    }

    /// The value of the first sample whose name and labels begin with `start`.
    fn value(text: &str, start: &str) -> Option<f64> {
        let line = text.lines().find(|line| line.starts_with(start))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    fn named(name: &str) -> Event {
        let Event::Close(mut close) = examples::orderly() else { panic!("a close") };
        let mut process = crate::event::Process::clone(close.process.as_ref().unwrap());
        name.clone_into(&mut process.comm);
        close.process = Some(process.into());
        Event::Close(close)
    }

    #[test]
    fn events_are_counted_by_what_they_say() {
        let mut metrics = metrics();
        for event in examples::all() {
            metrics.add(&event, true);
            metrics.add(&event, false);
        }
        let Event::Close(close) = examples::orderly() else { panic!("a close") };
        let text = metrics.text();
        let closes: f64 = text
            .lines()
            .filter(|line| line.starts_with("tcpclose_closes_total{"))
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum();
        let expected = examples::all().iter().filter(|event| matches!(event, Event::Close(_))).count();
        assert_eq!(closes.to_string(), expected.to_string(), "{text}");
        let name = &close.process.as_ref().unwrap().comm;
        assert!(text.contains(&format!("process=\"{name}\",cause=\"none\"")), "{text}");
        assert!(value(&text, "tcpclose_connection_duration_seconds_count").unwrap() >= 1.0, "{text}");
        assert!(value(&text, "tcpclose_cpu_seconds_total").unwrap() > 0.0, "{text}");
        assert!(value(&text, "tcpclose_lost_total{where=").unwrap() > 0.0, "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[test]
    fn a_socket_lingers_until_it_ends() {
        let mut metrics = metrics();
        let event = examples::lingering();
        let Event::Lingering(lingering) = &event else { panic!("a lingering socket") };
        metrics.add(&event, true);
        metrics.add(&event, true);
        let start = "tcpclose_lingering_sockets{";
        assert_eq!(value(&metrics.text(), start), Some(1.0), "reported twice, and one socket");
        let Event::Close(mut close) = examples::orderly() else { panic!("a close") };
        close.connection = Connection { cookie: None, ..lingering.connection.clone() };
        metrics.add(&Event::Close(close), false);
        assert_eq!(value(&metrics.text(), start), Some(0.0));
    }

    #[test]
    fn names_from_outside_have_a_bound_and_are_escaped() {
        let mut metrics = metrics();
        metrics.add(&named("a\"b\\c\nd\u{1b}[31m{}"), true);
        for number in 0..2 * MAX_NAMES {
            metrics.add(&named(&format!("process-{number}")), true);
        }
        let text = metrics.text();
        let lines: Vec<_> = text.lines().filter(|line| line.starts_with("tcpclose_closes_total")).collect();
        assert_eq!(lines.len(), MAX_NAMES + 1, "and one for the rest");
        assert!(text.contains("process=\"other\""));
        assert!(text.contains(r#"process="a\"b\\c\nd"#), "{}", lines[0]);
        assert!(text.len() < 1 << 20);
    }
}
