//! Converts a `reset` or `lingering` event of this process into the observation that a diagnosis would read
//! from its line. Ends of connections are far more frequent, and are converted directly
//! ([`End::of_event`](super::end::End::of_event)).

use std::borrow::Cow;

use serde_json::value::to_raw_value;

use crate::{
    diagnose::observation::{
        ConnectionFields, Line, Observation, ProcessFields, SignalFromFields, Text, to_nanoseconds,
    },
    event::{self, Endpoint, Lingering, Reset, Time},
};

impl<'a> From<&'a Reset> for Observation<'a> {
    fn from(reset: &'a Reset) -> Self {
        Self {
            cause: reset.cause,
            idle_ms: reset.idle_ms,
            last_data: reset.last_data,
            since_sent_ms: reset.since_sent_ms,
            since_received_ms: reset.since_received_ms,
            unread_bytes: reset.unread_bytes,
            state: reset.state,
            direction: Some(reset.direction),
            ..of_socket(Line::Reset, reset.time, &reset.connection, reset.process.as_deref())
        }
    }
}

impl<'a> From<&'a Lingering> for Observation<'a> {
    fn from(lingering: &'a Lingering) -> Self {
        let Lingering { time: at, connection, process, .. } = lingering;
        Self {
            state: Some(lingering.state),
            kind: Some(lingering.kind),
            trigger: lingering.trigger,
            signal: lingering.signal.as_deref().map(text),
            signal_from: lingering.signal_from.as_ref().map(SignalFromFields::from),
            since: lingering.since.map(time),
            for_ms: lingering.for_ms,
            unread_bytes: lingering.unread_bytes,
            highest_fd: lingering.holders.iter().flatten().map(|holder| holder.fd).max(),
            // There are few of these lines, and the opener of each is read only once.
            opener: lingering.opener.as_ref().and_then(|opener| to_raw_value(opener).ok()).map(Cow::Owned),
            ..of_socket(Line::Lingering, *at, connection, process.as_deref())
        }
    }
}

/// The facts that all lines about a socket have.
fn of_socket<'a>(
    event: Line,
    at: Time,
    of: &event::Connection,
    owner: Option<&'a event::Process>,
) -> Observation<'a> {
    Observation {
        event: Some(event),
        time: time(at),
        connection: connection(of),
        process: owner.map(ProcessFields::from),
        ..Observation::default()
    }
}

fn connection(connection: &event::Connection) -> ConnectionFields {
    let address = |end: Endpoint| std::net::SocketAddr::new(end.address, end.port);
    ConnectionFields {
        local: connection.local.map(address),
        remote: connection.remote.map(address),
        netns: connection.netns,
        role: connection.role,
        age_ms: connection.age_ms,
        bytes_sent: connection.bytes_sent,
        bytes_received: connection.bytes_received,
        retransmits: connection.retransmits,
    }
}

impl<'a> From<&'a event::SignalFrom> for SignalFromFields<'a> {
    fn from(from: &'a event::SignalFrom) -> Self {
        match from {
            event::SignalFrom::Process { comm, .. } => Self { comm: Some(text(comm)), oom: None },
            event::SignalFrom::Kernel { oom } => Self { comm: None, oom: Some(*oom) },
        }
    }
}

impl<'a> From<&'a event::Process> for ProcessFields<'a> {
    fn from(process: &'a event::Process) -> Self {
        Self {
            pid: process.pid.unwrap_or_default(),
            tid: process.tid,
            comm: text(&process.comm),
            exe: process.exe.as_deref().map(text),
            container: process.container.as_deref().map(text),
        }
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
    use crate::{
        diagnose::{end::End, names::Names},
        event::{Event, examples},
    };

    #[test]
    fn an_event_is_what_its_line_says() {
        let mut compared = 0;
        for event in examples::all() {
            let line = serde_json::to_string(&event).expect("serializable");
            let mut read: Observation<'_> = serde_json::from_str(&line).expect("readable");
            let made = match &event {
                Event::Close(close) => {
                    let mut names = Names::default();
                    let made = End::of_event(close, 1, &mut names);
                    assert_eq!(made, End::of_line(&read, 0, &mut names), "{line}");
                    continue;
                }
                Event::Reset(reset) => Observation::from(&**reset),
                Event::Lingering(lingering) => Observation::from(&**lingering),
                Event::Lost(_) | Event::Finding(_) => continue,
            };
            // Only the HTML page uses stacks, and only lingering lines the opener.
            read.stack = None;
            if read.event != Some(Line::Lingering) {
                read.opener = None;
            }
            assert_eq!(format!("{:?}", Observation { seq: 1, ..made }), format!("{read:?}"), "{line}");
            compared += 1;
        }
        assert!(compared >= 3, "{compared}");
    }
}
