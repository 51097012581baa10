//! Text for a person in an outage.
//!
//! An event is one aligned line: when, what and why, which process, and which connection. Further facts
//! follow below it, indented. With IPv4 addresses, no line is wider than 100 columns. Time, process and two
//! endpoints leave room for one verdict: the cause or, if there is none, who closed and how.

use std::borrow::Cow;
use std::fmt::{self, Display, Write as _};
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;

use anstyle::{AnsiColor, Style};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::event::{
    Attribution, Cause, Close, ClosedBy, Connection, Ended, Endpoint, Event, Finding, Frame, LastData,
    Lingering, Lost, Opener, Process, Reset, SignalFrom, Stack, Time, Trigger, shown_pid,
};
use crate::sink::Sink;

/// No line is wider than this, except with IPv6 addresses or long names of functions.
pub(crate) const COLUMNS: usize = 99;
/// The event and the verdict.
const WHAT: usize = 24;
/// Process id and name together: the longer the id, the shorter the name.
const PROCESS: usize = 17;
/// The widest IPv4 address and port.
const ENDPOINT: usize = 21;
/// The indentation of the lines that belong to an event.
const INDENT: usize = 4;

/// The colours of the text.
#[derive(Clone, Copy, Debug)]
pub struct Palette {
    /// What went wrong.
    pub(crate) alarm: Style,
    /// What the peer did.
    pub(crate) peer: Style,
    /// Names of columns.
    pub(crate) header: Style,
    /// Details.
    pub(crate) dim: Style,
}

impl Palette {
    /// No colours at all.
    pub const PLAIN: Self =
        Self { alarm: Style::new(), peer: Style::new(), header: Style::new(), dim: Style::new() };

    /// For a terminal.
    pub const COLOUR: Self = Self {
        alarm: AnsiColor::Red.on_default(),
        peer: AnsiColor::Yellow.on_default(),
        header: Style::new().bold(),
        dim: Style::new().dimmed(),
    };
}

/// Writes text.
pub struct TextSink<W: Write> {
    writer: BufWriter<W>,
    palette: Palette,
    zone: TimeZone,
    /// Whether to write the indented lines below an event's first line.
    details: bool,
    header_due: bool,
}

impl<W: Write> TextSink<W> {
    /// Writes to `writer`, through a buffer, with times in the time zone of the system. Without `details`, an
    /// event is a single line.
    pub fn new(writer: W, palette: Palette, details: bool) -> Self {
        Self { details, ..Self::in_zone(writer, palette, TimeZone::system()) }
    }

    /// Writes with times in `zone`.
    pub fn in_zone(writer: W, palette: Palette, zone: TimeZone) -> Self {
        Self {
            writer: BufWriter::with_capacity(1 << 16, writer),
            palette,
            zone,
            details: true,
            header_due: true,
        }
    }

    fn write_header(&mut self) -> io::Result<()> {
        if !self.header_due {
            return Ok(());
        }
        self.header_due = false;
        let Palette { header, .. } = self.palette;
        let zone = Timestamp::now().to_zoned(self.zone.clone()).strftime("%Z").to_string();
        // Zones without a name are shown as their offset; all fit in seven columns.
        let line = format!(
            "TIME {zone:<7.7} {:<WHAT$} {:>5} {:<11} {:<ENDPOINT$} REMOTE",
            "WHAT", "PID", "COMM", "LOCAL"
        );
        writeln!(self.writer, "{header}{line}{header:#}")
    }
}

impl<W: Write> Sink for TextSink<W> {
    fn write(&mut self, event: &Event) -> io::Result<()> {
        self.write_header()?;
        let mut page = EventLines { text: String::new(), palette: self.palette, zone: &self.zone };
        match event {
            Event::Close(close) => page.close(close),
            Event::Reset(reset) => page.reset(reset),
            Event::Lingering(lingering) => page.lingering(lingering),
            Event::Lost(lost) => page.lost(lost),
            Event::Finding(finding) => page.finding(finding),
        }
        let end = if self.details { page.text.len() } else { page.text.find('\n').map_or(0, |end| end + 1) };
        self.writer.write_all(&page.text.as_bytes()[..end])
    }

    fn flush(&mut self) -> io::Result<()> {
        // This shows a person at a terminal that the tool runs while nothing happens.
        self.write_header()?;
        self.writer.flush()
    }
}

/// The lines of one event.
struct EventLines<'a> {
    text: String,
    palette: Palette,
    zone: &'a TimeZone,
}

impl EventLines<'_> {
    fn close(&mut self, close: &Close) {
        let style = match (close.ended, close.closed_by) {
            (Some(Ended::ResetSent | Ended::ResetReceived | Ended::Timeout), _) => self.palette.alarm,
            (_, Some(ClosedBy::Peer)) => self.palette.peer,
            _ => Style::new(),
        };
        let (by, how) = (or_dash(close.closed_by), or_dash(close.ended));
        let mut facts = Facts::default();
        // A cause is more informative than who closed and how, so it is shown if there is one.
        let what = if let Some(cause) = close.cause.filter(|cause| *cause != Cause::Unknown) {
            facts.add("by", by);
            facts.add("how", how);
            format!("close {cause}")
        } else {
            facts.add_some("why", close.cause);
            format!("close {by} {how}")
        };
        self.head(close.time, &what, style, close.process.as_deref(), &close.connection);

        facts.add(
            "trigger",
            or_dash(triggered(close.trigger, close.signal.as_deref(), close.signal_from.as_ref())),
        );
        let later = close.acts.get(1..).unwrap_or_default();
        if let (Some(first), false) = (close.acts.first().and_then(|act| act.at_ms), later.is_empty()) {
            for act in later {
                let since = act.at_ms.map(|at| human_millis(at - first));
                facts.add("then", format!("{} after {}", or_dash(act.trigger), or_dash(since)));
            }
        }
        if let Some(process) = &close.destroyed_by {
            facts.add("destroyed by", format!("{} {}", process.shown_pid(), escape(&process.comm)));
        }
        facts.add("age", or_dash(close.connection.age_ms.map(human_millis)));
        facts.idle(close.idle_ms, close.since_sent_ms, close.since_received_ms);
        facts.add_some("close_wait", close.close_wait_ms.map(human_millis));
        facts.traffic(&close.connection);
        facts.lost(close.unread_bytes, close.unacked_bytes);
        facts.process(close.process.as_deref());
        self.facts(facts);
        self.stack(close.stack.as_ref(), INDENT);
        for act in later {
            if let Some(stack) = act.stack.as_ref().filter(|stack| has_frames(stack)) {
                let Palette { dim, .. } = self.palette;
                self.line(format_args!("{:INDENT$}{dim}then {} at{dim:#}", "", or_dash(act.trigger)));
                self.stack(Some(stack), 2 * INDENT);
            }
        }
        self.opener(close.opener.as_ref(), close.process.as_deref());
    }

    fn reset(&mut self, reset: &Reset) {
        let mut facts = Facts::default();
        let what = if let Some(cause) = reset.cause.filter(|cause| *cause != Cause::Unknown) {
            facts.add("direction", reset.direction);
            format!("reset {cause}")
        } else {
            facts.add_some("why", reset.cause);
            format!("reset {}", reset.direction)
        };
        self.head(reset.time, &what, self.palette.alarm, reset.process.as_deref(), &reset.connection);

        facts.add("reason", reset.reason.as_ref().map_or("-".into(), |reason| escape(reason)));
        facts.add("state", or_dash(reset.state));
        facts.add("age", or_dash(reset.connection.age_ms.map(human_millis)));
        facts.idle(reset.idle_ms, reset.since_sent_ms, reset.since_received_ms);
        facts.lost(reset.unread_bytes, reset.unacked_bytes);
        facts.add_some("ttl", reset.ttl);
        facts.add_some("handshake_ttl", reset.handshake_ttl);
        facts.process(reset.process.as_deref());
        self.facts(facts);
        self.stack(reset.stack.as_ref(), INDENT);
        self.opener(reset.opener.as_ref(), reset.process.as_deref());
    }

    fn lingering(&mut self, lingering: &Lingering) {
        let what = format!("lingering {}", lingering.kind);
        let process = lingering.process.as_deref();
        self.head(lingering.time, &what, self.palette.peer, process, &lingering.connection);

        let mut facts = Facts::default();
        facts.add("state", lingering.state);
        facts.add("for", bounds(lingering.for_ms, lingering.for_ms_at_most));
        facts.add("unread", or_dash(lingering.unread_bytes.map(|bytes| format!("{bytes}B"))));
        let unsent = lingering.unsent_bytes.filter(|bytes| *bytes > 0);
        facts.add_some("unsent", unsent.map(|bytes| format!("{bytes}B")));
        let (signal, from) = (lingering.signal.as_deref(), lingering.signal_from.as_ref());
        facts.add_some("trigger", triggered(lingering.trigger, signal, from));
        facts.process(process);
        if lingering.holders.is_none() {
            facts.add("held by", "-");
        }
        for holder in lingering.holders.iter().flatten() {
            facts.add(
                "held by",
                format!("{} {} fd {}", shown_pid(holder.pid), escape(&holder.comm), holder.fd),
            );
        }
        self.facts(facts);
        self.stack(lingering.stack.as_ref(), INDENT);
        self.opener(lingering.opener.as_ref(), process);
    }

    fn lost(&mut self, lost: &Lost) {
        let Palette { alarm, .. } = self.palette;
        let time = self.clock(lost.time);
        self.line(format_args!("{time} {alarm}lost {} ({}){alarm:#}", lost.count, lost.place));
    }

    fn finding(&mut self, finding: &Finding) {
        let Palette { alarm, .. } = self.palette;
        let (time, kind, count) = (self.clock(finding.time), finding.kind, finding.count);
        self.line(format_args!("{time} {alarm}finding {kind}{alarm:#} {count} ({})", finding.confidence));
        for text in [finding.summary.clone(), format!("→ {}", finding.advice)] {
            for line in wrap(&escape(&text), COLUMNS - INDENT) {
                self.line(format_args!("{:INDENT$}{line}", ""));
            }
        }
    }

    fn head(
        &mut self,
        time: Time,
        what: &str,
        style: Style,
        process: Option<&Process>,
        connection: &Connection,
    ) {
        let time = self.clock(time);
        // If the verdict is long, the name of the process is cut, so that the addresses stay aligned.
        let room = PROCESS.saturating_sub(what.len().saturating_sub(WHAT));
        let process = match process {
            Some(process) => {
                let pid = format!("{:>5}", process.shown_pid());
                let comm = escape(&process.comm);
                format!("{pid} {}", cut(&comm, room.saturating_sub(pid.len() + 1)))
            }
            None => format!("{:>5} -", "-"),
        };
        let local = endpoint(connection.local);
        let remote = endpoint(connection.remote);
        let line =
            format!("{time} {style}{what:<WHAT$}{style:#} {process:<room$} {local:<ENDPOINT$} {remote}");
        self.line(line);
    }

    fn facts(&mut self, facts: Facts) {
        let Palette { dim, .. } = self.palette;
        for line in facts.lines {
            self.line(format_args!("{:INDENT$}{dim}{line}{dim:#}", ""));
        }
    }

    fn stack(&mut self, stack: Option<&Stack>, indent: usize) {
        let Palette { dim, .. } = self.palette;
        let Some(stack) = stack else { return };
        for (name, frames) in [("user", &stack.user), ("kernel", &stack.kernel)] {
            for (position, frame) in frames.iter().flat_map(|frames| frames.iter()).enumerate() {
                let name = if position == 0 { name } else { "" };
                let frame = frame_text(frame);
                self.line(format_args!("{:indent$}{dim}{name:<6} {frame}{dim:#}", ""));
            }
        }
    }

    fn opener(&mut self, opener: Option<&Opener>, owner: Option<&Process>) {
        let Palette { dim, .. } = self.palette;
        let Some(opener) = opener else { return };
        let identity = |process: &Process| (process.host_pid.or(process.pid), process.comm.clone());
        let other =
            opener.process.as_deref().filter(|process| owner.map(identity) != Some(identity(process)));
        let stack = opener.stack.as_ref().filter(|stack| has_frames(stack));
        match other {
            Some(process) => {
                let (pid, comm) = (process.shown_pid(), escape(&process.comm));
                self.line(format_args!("{:INDENT$}{dim}opened by {pid} {comm}{dim:#}", ""));
            }
            None if stack.is_some() => self.line(format_args!("{:INDENT$}{dim}opened at{dim:#}", "")),
            None => {}
        }
        self.stack(stack, 2 * INDENT);
    }

    fn clock(&self, time: Time) -> String {
        time.0.to_zoned(self.zone.clone()).strftime("%H:%M:%S.%3f").to_string()
    }

    fn line(&mut self, line: impl Display) {
        writeln!(self.text, "{line}").expect("a String takes everything");
    }
}

/// Names and values, with as many on each line as fit.
#[derive(Default)]
struct Facts {
    lines: Vec<String>,
}

impl Facts {
    fn add(&mut self, name: &str, value: impl Display) {
        let fact = format!("{name} {value}");
        match self.lines.last_mut() {
            Some(line) if INDENT + width(line) + 2 + width(&fact) <= COLUMNS => {
                line.push_str("  ");
                line.push_str(&fact);
            }
            _ => self.lines.push(fact),
        }
    }

    fn add_some(&mut self, name: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            self.add(name, value);
        }
    }

    /// The silence of both directions, the shorter one first: after a farewell, such as `close_notify` of
    /// TLS, the longer one is the silence that matters. Within a tick of the kernel's clock, the directions
    /// cannot be distinguished.
    fn idle(&mut self, idle_ms: Option<f64>, sent_ms: Option<f64>, received_ms: Option<f64>) {
        let since = |millis: f64, way: LastData| format!("{} since {way}", human_millis(millis));
        let idle = match (sent_ms, received_ms) {
            (Some(sent), Some(received)) if sent < received => {
                format!("{}, {}", since(sent, LastData::Sent), since(received, LastData::Received))
            }
            (Some(sent), Some(received)) if received < sent => {
                format!("{}, {}", since(received, LastData::Received), since(sent, LastData::Sent))
            }
            (Some(sent), None) => since(sent, LastData::Sent),
            (None, Some(received)) => since(received, LastData::Received),
            _ => or_dash(idle_ms.map(human_millis)),
        };
        self.add("idle", idle);
    }

    /// The payload that was lost: received and never read, or written and never acknowledged.
    fn lost(&mut self, unread: Option<u64>, unacked: Option<u64>) {
        for (name, bytes) in [("unread", unread), ("unacked", unacked)] {
            self.add_some(name, bytes.filter(|bytes| *bytes > 0).map(|bytes| format!("{bytes}B")));
        }
    }

    fn traffic(&mut self, connection: &Connection) {
        let bytes = |count: Option<u64>| or_dash(count.map(|count| format!("{count}B")));
        if connection.bytes_sent.is_some() || connection.bytes_received.is_some() {
            let (sent, received) = (bytes(connection.bytes_sent), bytes(connection.bytes_received));
            self.add("out", format!("{sent} in {received}"));
        }
        self.add_some("retransmits", connection.retransmits.filter(|count| *count > 0));
    }

    fn process(&mut self, process: Option<&Process>) {
        let Some(process) = process else { return };
        let thread = process.thread.as_deref().filter(|thread| *thread != process.comm);
        self.add_some("thread", thread.map(escape));
        // Other owners acted on this socket or obtained it themselves; these were only found to have it.
        if matches!(
            process.attribution,
            Attribution::Listener | Attribution::Descriptors | Attribution::Procfs
        ) {
            self.add("owner from", process.attribution);
        }
        // The length that `docker ps` shows.
        let short = |id: &str| escape(id).chars().take(12).collect::<String>();
        self.add_some("container", process.container.as_deref().map(short));
        let pod = process.pod.as_ref();
        self.add_some("pod", pod.map(|pod| format!("{}/{}", escape(&pod.namespace), escape(&pod.name))));
    }
}

/// The act of this side as one value; `None` if it never acted.
fn triggered(trigger: Option<Trigger>, signal: Option<&str>, from: Option<&SignalFrom>) -> Option<String> {
    let mut text = trigger?.to_string();
    if let Some(signal) = signal {
        let _ = write!(text, " {}", escape(signal));
    }
    let _ = match from {
        Some(SignalFrom::Process { pid, comm, .. }) => {
            write!(text, " from {} {}", shown_pid(*pid), escape(comm))
        }
        Some(SignalFrom::Kernel { .. }) => write!(text, " from the OOM killer"),
        None => Ok(()),
    };
    Some(text)
}

fn has_frames(stack: &Stack) -> bool {
    stack.user.iter().chain(&stack.kernel).any(|frames| !frames.is_empty())
}

/// Lines of at most `room` columns, broken between words.
pub(crate) fn wrap(text: &str, room: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() && width(line) + 1 + width(word) > room {
                lines.push(word.to_owned());
                continue;
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

/// Milliseconds for a person, cut off and not rounded: `350us`, `1.2s`, `3h12m`.
pub fn human_millis(millis: f64) -> String {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a cast of a float saturates; there are no negative times"
    )]
    let micros = (millis * 1000.0).round() as u64;
    let tenths = |unit: u64, name: &str| match micros % unit * 10 / unit {
        0 => format!("{}{name}", micros / unit),
        tenth => format!("{}.{tenth}{name}", micros / unit),
    };
    let pair = |large: u64, large_name: &str, small: u64, small_name: &str| {
        format!("{}{large_name}{}{small_name}", micros / large, micros % large / small)
    };
    match micros {
        0 => "0s".into(),
        1..1_000 => format!("{micros}us"),
        1_000..10_000 => tenths(1_000, "ms"),
        10_000..SECOND => format!("{}ms", micros / 1_000),
        SECOND..MINUTE => tenths(SECOND, "s"),
        MINUTE..HOUR => pair(MINUTE, "m", SECOND, "s"),
        HOUR..DAY => pair(HOUR, "h", MINUTE, "m"),
        _ => pair(DAY, "d", HOUR, "h"),
    }
}

const SECOND: u64 = 1_000_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// Input from outside may contain anything, and a terminal interprets control characters.
pub(crate) fn escape(text: &str) -> Cow<'_, str> {
    // Of the characters that `escape_debug` escapes, only quotes are harmless.
    let harmless = |character: char| matches!(character, '"' | '\'') || character.escape_debug().len() == 1;
    if text.chars().all(harmless) {
        return text.into();
    }
    let mut escaped = String::new();
    for character in text.chars() {
        if harmless(character) {
            escaped.push(character);
        } else {
            escaped.extend(character.escape_debug());
        }
    }
    escaped.into()
}

/// At most `room` characters of a name; a `+` at its end stands for the rest, as in `ps`.
pub(crate) fn cut(text: &str, room: usize) -> Cow<'_, str> {
    if width(text) <= room {
        return text.into();
    }
    let mut short: String = text.chars().take(room.saturating_sub(1)).collect();
    short.push('+');
    short.into()
}

pub(crate) fn width(text: &str) -> usize {
    text.chars().count()
}

/// A duration, or the bounds of one that is not known exactly: `3s`, `2s..5s`, `2s..`.
pub(crate) fn bounds(at_least: Option<f64>, at_most: Option<f64>) -> String {
    let (least, most) = (at_least.map(human_millis), at_most.map(human_millis));
    match (least, most) {
        (Some(least), Some(most)) if least == most => least,
        (None, None) => "-".into(),
        (least, most) => format!("{}..{}", least.unwrap_or_default(), most.unwrap_or_default()),
    }
}

pub(crate) fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

pub(crate) fn endpoint(endpoint: Option<Endpoint>) -> String {
    or_dash(endpoint.map(|endpoint| SocketAddr::new(endpoint.address, endpoint.port)))
}

/// The function and the line in it or, if there is no line, the offset and the file that it was loaded from.
fn frame_text(frame: &Frame) -> String {
    let module = frame.module.as_deref().map(|path| escape(path.rsplit('/').next().unwrap_or(path)));
    let mut text = match (&frame.symbol, &module) {
        (Some(symbol), _) => escape(symbol).into_owned(),
        (None, Some(module)) => module.clone().into_owned(),
        (None, None) => escape(&frame.address).into_owned(),
    };
    let named = frame.symbol.is_some() || module.is_some();
    let mut add = |part: fmt::Arguments<'_>| text.write_fmt(part).expect("a String takes everything");
    if let Some(file) = &frame.file {
        add(format_args!(" {}", escape(file)));
        if let Some(line) = frame.line {
            add(format_args!(":{line}"));
        }
    } else {
        if let Some(offset) = frame.offset.filter(|_| named) {
            add(format_args!("+{offset:#x}"));
        }
        if let Some(module) = module.filter(|_| frame.symbol.is_some()) {
            add(format_args!(" ({module})"));
        }
    }
    if frame.inlined {
        add(format_args!(" [inlined]"));
    }
    if let Some(why) = frame.truncated {
        add(format_args!(" [callers unknown: {why}]"));
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;
    use jiff::tz::TimeZone;

    use crate::event::{Attribution, Cause, ClosedBy, Ended, Event, Frame, Pod, Trigger, Truncated};
    use crate::sink::text::{COLUMNS, TextSink, cut, escape, frame_text, human_millis, width};
    use crate::{
        event::examples,
        sink::{Palette, Sink},
    };

    fn written(events: &[Event], palette: Palette) -> String {
        let mut bytes = Vec::new();
        let mut sink = TextSink::in_zone(&mut bytes, palette, TimeZone::UTC);
        for event in events {
            sink.write(event).expect("memory");
        }
        sink.flush().expect("memory");
        drop(sink);
        String::from_utf8(bytes).expect("UTF-8")
    }

    fn plain(event: Event) -> String {
        written(&[event], Palette::PLAIN)
    }

    #[test]
    fn golden() {
        let text = written(&examples::all(), Palette::PLAIN);
        assert_eq!(text, include_str!("golden/events.txt"), "\n{text}");
    }

    #[test]
    fn shows_the_header_before_anything_happens() {
        let text = written(&[], Palette::PLAIN);
        assert!(text.starts_with("TIME UTC "), "{text}");
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn times_are_in_the_given_zone() {
        let mut bytes = Vec::new();
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        let mut sink = TextSink::in_zone(&mut bytes, Palette::PLAIN, zone);
        sink.write(&examples::orderly()).expect("memory");
        sink.flush().expect("memory");
        drop(sink);
        assert!(String::from_utf8_lossy(&bytes).contains("\n14:01:02.123 close peer fin "));
    }

    #[test]
    fn the_widest_ipv4_fits() {
        let triggers = [Trigger::Signal, Trigger::CloseRange];
        for cause in Cause::value_variants().iter().copied().map(Some).chain([None]) {
            for (by, ended, trigger) in [ClosedBy::Local, ClosedBy::Kernel]
                .into_iter()
                .flat_map(|by| [Ended::ResetSent, Ended::ResetReceived].map(|ended| (by, ended)))
                .flat_map(|(by, ended)| triggers.map(|trigger| (by, ended, trigger)))
            {
                let Event::Close(mut close) = examples::unread_data() else { unreachable!() };
                close.cause = cause;
                close.closed_by = Some(by);
                close.ended = Some(ended);
                close.trigger = Some(trigger);
                close.close_wait_ms = Some(300.0 * 86_400_000.0);
                close.connection.bytes_sent = Some(u64::MAX);
                close.connection.bytes_received = Some(u64::MAX);
                close.connection.retransmits = Some(u32::MAX);
                let process = close.process.as_mut().expect("known");
                process.attribution = Attribution::Procfs;
                process.container = Some("0123456789abcdef".repeat(4));
                let text = plain(Event::Close(close));
                for line in text.lines() {
                    assert!(width(line) <= COLUMNS, "{} columns:\n{line}", width(line));
                }
            }
            let Event::Reset(mut reset) = examples::injected() else { unreachable!() };
            reset.cause = cause;
            reset.reason = Some("TCP_RFC7323_PAWS_TSECR_AND_MORE".to_owned().into());
            for line in plain(Event::Reset(reset)).lines() {
                assert!(width(line) <= COLUMNS, "{} columns:\n{line}", width(line));
            }
        }
    }

    #[test]
    fn addresses_stay_aligned() {
        let text =
            written(&[examples::orderly(), examples::unread_data(), examples::injected()], Palette::PLAIN);
        let mut lines = text.lines().filter(|line| !line.starts_with(' '));
        let header = lines.next().expect("a header");
        let column = header.find("REMOTE").expect("a column");
        for line in lines {
            assert_eq!(&line[column - 1..column], " ", "{line}");
            assert_ne!(&line[column..=column], " ", "{line}");
            assert!(!line[column..].contains(' '), "{line}");
        }
    }

    #[test]
    fn colours_only_when_told() {
        assert!(!written(&examples::all(), Palette::PLAIN).contains('\x1b'));
        let text = written(&examples::all(), Palette::COLOUR);
        assert!(text.contains("\x1b[33mclose peer fin "), "{text}");
        assert!(text.contains("\x1b[31mclose unread_data "), "{text}");
        assert!(text.contains("\x1b[31mlost 17 (ring_buffer)\x1b[0m\n"), "{text}");
        assert!(text.contains("    \x1b[2muser   close+0x14 (libc.so.6)\x1b[0m\n"), "{text}");
        let stripped = anstream::adapter::strip_str(&text).to_string();
        assert_eq!(stripped, written(&examples::all(), Palette::PLAIN), "colours take no room");
    }

    #[test]
    fn what_comes_from_outside_cannot_steer_the_terminal() {
        let evil = "\x1b[2J\nfake\u{202e}\u{9b}\r";
        let Event::Close(mut close) = examples::orderly() else { unreachable!() };
        close.process.as_mut().expect("known").comm = evil.into();
        let process = close.process.as_mut().expect("known");
        process.container = Some(evil.into());
        process.pod = Some(Pod { name: evil.into(), namespace: evil.into() });
        close.trigger = Some(Trigger::Signal);
        close.signal = Some(evil.into());
        let stack = close.stack.as_mut().expect("taken");
        let mut frames = stack.user.as_deref().expect("taken").clone();
        for frame in &mut frames {
            frame.symbol = Some(evil.into());
            frame.module = Some(evil.into());
            frame.file = frame.file.as_ref().map(|_| evil.into());
        }
        stack.user = Some(frames.into());
        close.opener.as_mut().expect("known").process.as_mut().expect("known").comm = evil.into();
        let text = plain(Event::Close(close));
        assert!(text.lines().all(|line| !line.starts_with("fake")), "{text}");
        assert_eq!(text.lines().filter(|line| !line.starts_with(' ')).count(), 2, "{text}");
        assert!(!text.contains(|character: char| character != '\n' && character.is_control()), "{text:?}");
        assert!(!text.contains('\u{202e}'), "{text:?}");

        let Event::Reset(mut reset) = examples::reset_sent() else { unreachable!() };
        reset.reason = Some(evil.to_owned().into());
        assert!(!plain(Event::Reset(reset)).contains('\x1b'));

        let Event::Lingering(mut lingering) = examples::lingering() else { unreachable!() };
        lingering.holders.as_mut().expect("known")[0].comm = evil.into();
        assert!(!plain(Event::Lingering(lingering)).contains('\x1b'));
    }

    #[test]
    fn escapes_only_what_it_must() {
        assert_eq!(
            escape("<T as core::ops::FnOnce<'a>>::call \"x\""),
            "<T as core::ops::FnOnce<'a>>::call \"x\""
        );
        assert_eq!(escape("grüße"), "grüße");
        assert_eq!(escape("a\tb\\"), "a\\tb\\\\");
        assert_eq!(escape("\u{1b}"), "\\u{1b}");
    }

    #[test]
    fn cuts_names_visibly() {
        assert_eq!(cut("nginx", 5), "nginx");
        assert_eq!(cut("nginx", 4), "ngi+");
        assert_eq!(cut("größer", 4), "grö+");
        assert_eq!(cut("nginx", 0), "+");
    }

    #[test]
    fn frames_say_what_is_known() {
        let bare = Frame::nameless(0x40_1000);
        assert_eq!(frame_text(&bare), "0x401000");
        let module = Frame { module: Some("/opt/app/libx.so".into()), offset: Some(0x1234), ..bare.clone() };
        assert_eq!(frame_text(&module), "libx.so+0x1234");
        let file = Frame { symbol: Some("f".into()), file: Some("a.c".into()), ..module };
        assert_eq!(frame_text(&file), "f a.c");
        let line = Frame { line: Some(3), inlined: true, ..file };
        assert_eq!(frame_text(&line), "f a.c:3 [inlined]");
        let last = Frame { truncated: Some(Truncated::CopyEnded), inlined: false, ..line };
        assert_eq!(frame_text(&last), "f a.c:3 [callers unknown: the copy of the stack ends]");
    }

    #[test]
    fn durations_for_people() {
        for (millis, text) in [
            (0.0, "0s"),
            (0.35, "350us"),
            (0.999, "999us"),
            (1.0, "1ms"),
            (1.3, "1.3ms"),
            (9.999, "9.9ms"),
            (350.25, "350ms"),
            (999.999, "999ms"),
            (1_000.0, "1s"),
            (1_203.4, "1.2s"),
            (59_999.0, "59.9s"),
            (60_000.0, "1m0s"),
            (3_599_999.0, "59m59s"),
            (11_520_000.0, "3h12m"),
            (86_400_000.0, "1d0h"),
            (-1.0, "0s"),
            (f64::NAN, "0s"),
        ] {
            assert_eq!(human_millis(millis), text, "{millis}");
        }
    }
}
