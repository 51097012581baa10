//! Converts an event of this process directly into what a diagnosis would read from its line.

use std::borrow::Cow;

use serde_json::value::to_raw_value;

use crate::{
    diagnose::observation::{
        Connection, Holder, Line, Observation, Path, Process, SignalFrom, Text, to_nanoseconds,
    },
    event::{self, Close, Endpoint, Event, Lingering, Reset, Time},
};

impl<'a> From<&'a Event> for Observation<'a> {
    /// Stacks are left out, because only the HTML page shows them, and it is made from lines in files.
    fn from(event: &'a Event) -> Self {
        match event {
            Event::Close(close) => of_close(close),
            Event::Reset(reset) => of_reset(reset),
            Event::Lingering(lingering) => of_lingering(lingering),
            Event::Lost(lost) => Self {
                event: Some(Line::Lost),
                time: time(lost.time),
                seq: lost.seq,
                count: Some(lost.count),
                ..Self::default()
            },
            Event::Finding(_) => Self::default(),
        }
    }
}

fn of_close(close: &Close) -> Observation<'_> {
    let mut states = Path::default();
    for step in &close.states {
        states.add(step.state, step.at_ms);
    }
    Observation {
        closed_by: close.closed_by,
        ended: close.ended,
        trigger: close.trigger,
        signal: close.signal.as_deref().map(text),
        signal_from: close.signal_from.as_ref().map(signal_from),
        cause: close.cause,
        idle_ms: close.idle_ms,
        last_data: close.last_data,
        since_sent_ms: close.since_sent_ms,
        since_received_ms: close.since_received_ms,
        unread_bytes: close.unread_bytes,
        close_wait_ms: close.close_wait_ms,
        states,
        ..of_socket(Line::Close, close.time, close.seq, &close.connection, close.process.as_deref())
    }
}

fn of_reset(reset: &Reset) -> Observation<'_> {
    Observation {
        cause: reset.cause,
        idle_ms: reset.idle_ms,
        last_data: reset.last_data,
        since_sent_ms: reset.since_sent_ms,
        since_received_ms: reset.since_received_ms,
        unread_bytes: reset.unread_bytes,
        state: reset.state,
        direction: Some(reset.direction),
        ..of_socket(Line::Reset, reset.time, reset.seq, &reset.connection, reset.process.as_deref())
    }
}

fn of_lingering(lingering: &Lingering) -> Observation<'_> {
    let Lingering { time: at, seq, connection, process, .. } = lingering;
    let holders = lingering.holders.as_ref();
    Observation {
        state: Some(lingering.state),
        kind: Some(lingering.kind),
        trigger: lingering.trigger,
        signal: lingering.signal.as_deref().map(text),
        signal_from: lingering.signal_from.as_ref().map(signal_from),
        since: lingering.since.map(time),
        for_ms: lingering.for_ms,
        unread_bytes: lingering.unread_bytes,
        holders: holders.map(|all| all.iter().map(|holder| Holder { fd: Some(holder.fd) }).collect()),
        // There are few of these lines, and the opener of each is read only once.
        opener: lingering.opener.as_ref().and_then(|opener| to_raw_value(opener).ok()).map(Cow::Owned),
        ..of_socket(Line::Lingering, *at, *seq, connection, process.as_deref())
    }
}

/// What the lines about a socket have in common.
fn of_socket<'a>(
    event: Line,
    at: Time,
    seq: u64,
    of: &event::Connection,
    owner: Option<&'a event::Process>,
) -> Observation<'a> {
    Observation {
        event: Some(event),
        time: time(at),
        seq,
        connection: connection(of),
        process: owner.map(process),
        ..Observation::default()
    }
}

fn connection(connection: &event::Connection) -> Connection {
    let address = |end: Endpoint| std::net::SocketAddr::new(end.address, end.port);
    Connection {
        local: connection.local.map(address),
        remote: connection.remote.map(address),
        netns: connection.netns,
        role: connection.role,
        age_ms: connection.age_ms,
        bytes_sent: connection.bytes_sent,
        bytes_received: connection.bytes_received,
    }
}

fn signal_from(from: &event::SignalFrom) -> SignalFrom {
    SignalFrom { oom: matches!(from, event::SignalFrom::Kernel { oom: true }).then_some(true) }
}

fn process(process: &event::Process) -> Process<'_> {
    Process {
        pid: process.pid,
        tid: process.tid,
        comm: text(&process.comm),
        exe: process.exe.as_deref().map(text),
        container: process.container.as_deref().map(text),
    }
}

fn text(text: &str) -> Text<'_> {
    Text(Cow::Borrowed(text))
}

fn time(time: Time) -> i64 {
    to_nanoseconds(time.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::examples;

    #[test]
    fn an_event_is_what_its_line_says() {
        for event in examples::all() {
            let line = serde_json::to_string(&event).expect("serializable");
            let mut read: Observation<'_> = serde_json::from_str(&line).expect("readable");
            let made = Observation::from(&event);
            // Only the HTML page uses stacks, and only lingering lines the opener.
            read.stack = None;
            if read.event != Some(Line::Lingering) {
                read.opener = None;
            }
            assert_eq!(format!("{made:?}"), format!("{read:?}"), "{line}");
        }
    }
}
