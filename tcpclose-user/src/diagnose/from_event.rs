//! An event of this process as a diagnosis reads it: what its line would say, without the line.

use std::borrow::Cow;

use serde_json::value::to_raw_value;

use crate::{
    diagnose::observation::{Connection, Holder, Line, Observation, Path, Process, Text, to_nanoseconds},
    event::{self, Close, Endpoint, Event, Lingering, Reset, Time},
};

impl<'a> From<&'a Event> for Observation<'a> {
    /// Stacks are left out: only the page of a file's lines shows them.
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
        event: Some(Line::Close),
        time: time(close.time),
        seq: close.seq,
        connection: connection(&close.connection),
        process: close.process.as_ref().map(process),
        closed_by: close.closed_by,
        ended: close.ended,
        trigger: close.trigger,
        signal: close.signal.as_deref().map(text),
        cause: close.cause,
        idle_ms: close.idle_ms,
        last_data: close.last_data,
        close_wait_ms: close.close_wait_ms,
        states,
        ..Observation::default()
    }
}

fn of_reset(reset: &Reset) -> Observation<'_> {
    Observation {
        event: Some(Line::Reset),
        time: time(reset.time),
        seq: reset.seq,
        connection: connection(&reset.connection),
        process: reset.process.as_ref().map(process),
        cause: reset.cause,
        idle_ms: reset.idle_ms,
        last_data: reset.last_data,
        state: reset.state,
        direction: Some(reset.direction),
        ..Observation::default()
    }
}

fn of_lingering(lingering: &Lingering) -> Observation<'_> {
    let holders = lingering.holders.as_ref();
    Observation {
        event: Some(Line::Lingering),
        time: time(lingering.time),
        seq: lingering.seq,
        connection: connection(&lingering.connection),
        process: lingering.process.as_ref().map(process),
        state: Some(lingering.state),
        kind: Some(lingering.kind),
        since: lingering.since.map(time),
        for_ms: lingering.for_ms,
        unread_bytes: lingering.unread_bytes,
        holders: holders.map(|all| all.iter().map(|holder| Holder { fd: Some(holder.fd) }).collect()),
        // These lines are few, and where their sockets were opened is read once for each.
        opener: lingering.opener.as_ref().and_then(|opener| to_raw_value(opener).ok()).map(Cow::Owned),
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
            // The page's part, and what is only read once more.
            read.stack = None;
            if read.event != Some(Line::Lingering) {
                read.opener = None;
            }
            assert_eq!(format!("{made:?}"), format!("{read:?}"), "{line}");
        }
    }
}
