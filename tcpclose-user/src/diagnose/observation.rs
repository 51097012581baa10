//! One line of `-o json`, reduced to what a diagnosis needs.
//!
//! It relies only on the contract of the output: unknown fields are skipped, every field may be null or
//! absent, and a value that a later version has added to a closed list is read as unknown.

use std::{borrow::Cow, net::SocketAddr};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, IntoDeserializer as _, value::StrDeserializer},
};
use serde_json::value::RawValue;

use crate::event::{Cause, ClosedBy, Direction, Ended, LastData, LingeringKind, Role, State, Trigger};

/// A line of output.
#[derive(Debug, Default, Deserialize)]
pub struct Observation<'a> {
    /// The kind of the line.
    #[serde(default, deserialize_with = "lenient")]
    pub event: Option<Line>,
    /// Nanoseconds since 1970.
    #[serde(default, deserialize_with = "nanoseconds_of")]
    pub time: i64,
    /// The line's number.
    #[serde(default)]
    pub seq: u64,
    /// The connection, seen from the host that traced.
    #[serde(default)]
    pub connection: ConnectionFields,
    /// The owner of the socket.
    #[serde(borrow, default)]
    pub process: Option<ProcessFields<'a>>,
    /// `closed_by`.
    #[serde(default, deserialize_with = "lenient")]
    pub closed_by: Option<ClosedBy>,
    /// `ended`.
    #[serde(default, deserialize_with = "lenient")]
    pub ended: Option<Ended>,
    /// `trigger`.
    #[serde(default, deserialize_with = "lenient")]
    pub trigger: Option<Trigger>,
    /// `signal`.
    #[serde(borrow, default)]
    pub signal: Option<Text<'a>>,
    /// `signal_from`.
    #[serde(borrow, default)]
    pub signal_from: Option<SignalFromFields<'a>>,
    /// `cause`.
    #[serde(default, deserialize_with = "lenient")]
    pub cause: Option<Cause>,
    /// `idle_ms`.
    #[serde(default)]
    pub idle_ms: Option<f64>,
    /// `last_data`.
    #[serde(default, deserialize_with = "lenient")]
    pub last_data: Option<LastData>,
    /// `since_sent_ms`.
    #[serde(default)]
    pub since_sent_ms: Option<f64>,
    /// `since_received_ms`.
    #[serde(default)]
    pub since_received_ms: Option<f64>,
    /// `unread_bytes`.
    #[serde(default)]
    pub unread_bytes: Option<u64>,
    /// `unacked_bytes`.
    #[serde(default)]
    pub unacked_bytes: Option<u64>,
    /// `close_wait_ms`.
    #[serde(default)]
    pub close_wait_ms: Option<f64>,
    /// `states`, reduced.
    #[serde(default)]
    pub states: StatesSeen,
    /// `stack`, as it was written.
    #[serde(borrow, default, deserialize_with = "raw")]
    pub stack: Option<Cow<'a, RawValue>>,
    /// `opener`, as it was written.
    #[serde(borrow, default, deserialize_with = "raw")]
    pub opener: Option<Cow<'a, RawValue>>,
    /// `direction` of a RST.
    #[serde(default, deserialize_with = "lenient")]
    pub direction: Option<Direction>,
    /// `state` of a lingering socket, or of the socket of a RST.
    #[serde(default, deserialize_with = "lenient")]
    pub state: Option<State>,
    /// `kind` of a lingering socket. A finding has a kind as well, which is none of these.
    #[serde(default, deserialize_with = "lenient")]
    pub kind: Option<LingeringKind>,
    /// `since` of a lingering socket.
    #[serde(default, deserialize_with = "some_nanoseconds")]
    pub since: Option<i64>,
    /// `for_ms`.
    #[serde(default)]
    pub for_ms: Option<f64>,
    /// The highest descriptor in `holders`.
    #[serde(default, rename = "holders", deserialize_with = "highest_fd")]
    pub highest_fd: Option<u32>,
    /// `count` of a `lost` line.
    #[serde(default)]
    pub count: Option<u64>,
}

/// The kinds of lines that a diagnosis uses. It ignores findings of an earlier run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// The end of a connection.
    Close,
    /// A RST.
    Reset,
    /// A socket that stays in a teardown state.
    Lingering,
    /// Events that were lost.
    Lost,
}

/// A connection.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct ConnectionFields {
    /// This end.
    #[serde(default, deserialize_with = "endpoint")]
    pub local: Option<SocketAddr>,
    /// The other end.
    #[serde(default, deserialize_with = "endpoint")]
    pub remote: Option<SocketAddr>,
    /// Network namespace.
    #[serde(default)]
    pub netns: Option<u32>,
    /// Who opened it.
    #[serde(default, deserialize_with = "lenient")]
    pub role: Option<Role>,
    /// How long it was established.
    #[serde(default)]
    pub age_ms: Option<f64>,
    /// Payload sent.
    #[serde(default)]
    pub bytes_sent: Option<u64>,
    /// Payload received.
    #[serde(default)]
    pub bytes_received: Option<u64>,
    /// Segments sent again.
    #[serde(default)]
    pub retransmits: Option<u32>,
}

/// A number, or 0 instead of null: a process outside the pid namespace of the trace has no id in it.
fn or_zero<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// The owner of a socket.
#[derive(Clone, Debug, Deserialize)]
pub struct ProcessFields<'a> {
    /// Process id; 0 if there is none.
    #[serde(default, deserialize_with = "or_zero")]
    pub pid: u32,
    /// Thread id.
    #[serde(default)]
    pub tid: Option<u32>,
    /// Name of the program.
    #[serde(borrow, default)]
    pub comm: Text<'a>,
    /// Its file.
    #[serde(borrow, default)]
    pub exe: Option<Text<'a>>,
    /// Container.
    #[serde(borrow, default)]
    pub container: Option<Text<'a>>,
}

/// A string, which is borrowed if it contains no escapes.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Text<'a>(#[serde(borrow)] pub Cow<'a, str>);

/// The sender of a signal: a process, or the kernel's OOM killer.
#[derive(Clone, Debug, Deserialize)]
pub struct SignalFromFields<'a> {
    /// The program's name.
    #[serde(borrow, default)]
    pub comm: Option<Text<'a>>,
    /// Whether it was the OOM killer.
    #[serde(default)]
    pub oom: Option<bool>,
}

/// The facts that follow from the path of states.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct StatesSeen {
    /// The handshake was completed.
    pub established: bool,
    /// The peer's FIN came first.
    pub close_wait: bool,
    /// The peer acknowledged our FIN, or sent its own at the same time.
    pub fin_acknowledged: bool,
    /// Our FIN came first.
    pub fin_wait: bool,
    /// From the first state to the first of the teardown.
    pub until_teardown_ms: Option<f64>,
    /// From the first state to the last.
    pub length_ms: f64,
}

impl StatesSeen {
    /// Adds the next state.
    pub fn add(&mut self, state: State, at_ms: f64) {
        match state {
            State::Established => self.established = true,
            State::CloseWait => self.close_wait = true,
            State::FinWait1 => self.fin_wait = true,
            State::FinWait2 | State::TimeWait | State::Closing => self.fin_acknowledged = true,
            _ => {}
        }
        let opening = matches!(
            state,
            State::SynSent | State::SynRecv | State::NewSynRecv | State::Established | State::Listen
        );
        if !opening && self.until_teardown_ms.is_none() {
            self.until_teardown_ms = Some(at_ms);
        }
        self.length_ms = self.length_ms.max(at_ms);
    }
}

impl<'de> Deserialize<'de> for StatesSeen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct StepFields {
            #[serde(default, deserialize_with = "lenient")]
            state: Option<State>,
            #[serde(default)]
            at_ms: f64,
        }
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = StatesSeen;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a list of states")
            }

            fn visit_unit<E>(self) -> Result<StatesSeen, E> {
                Ok(StatesSeen::default())
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut steps: A) -> Result<StatesSeen, A::Error> {
                let mut path = StatesSeen::default();
                while let Some(step) = steps.next_element::<StepFields>()? {
                    if let Some(state) = step.state {
                        path.add(state, step.at_ms);
                    }
                }
                Ok(path)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A value of a closed list; `None` for null and for a value that a later version has added.
fn lenient<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<Option<T>, D::Error> {
    let text = Option::<Text<'de>>::deserialize(deserializer)?;
    Ok(text.and_then(|text| {
        let name: StrDeserializer<'_, serde::de::value::Error> = text.0.as_ref().into_deserializer();
        T::deserialize(name).ok()
    }))
}

fn highest_fd<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    #[derive(Deserialize)]
    struct HolderFields {
        #[serde(default)]
        fd: Option<u32>,
    }
    let holders = Option::<Vec<HolderFields>>::deserialize(deserializer)?;
    Ok(holders.iter().flatten().filter_map(|holder| holder.fd).max())
}

fn raw<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Cow<'de, RawValue>>, D::Error> {
    Ok(Option::<&RawValue>::deserialize(deserializer)?.map(Cow::Borrowed))
}

/// A point in time as nanoseconds since 1970.
pub(crate) fn nanoseconds_of<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    let text = Text::deserialize(deserializer)?;
    parse_time(&text.0).map_err(serde::de::Error::custom)
}

fn some_nanoseconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    let text = Option::<Text<'de>>::deserialize(deserializer)?;
    text.map(|text| parse_time(&text.0).map_err(serde::de::Error::custom)).transpose()
}

fn parse_time(text: &str) -> Result<i64, jiff::Error> {
    let time: jiff::Timestamp = text.parse()?;
    Ok(to_nanoseconds(time))
}

/// Nanoseconds since 1970; a time outside the range of 64 bits becomes the nearest one inside.
pub(crate) fn to_nanoseconds(time: jiff::Timestamp) -> i64 {
    i64::try_from(time.as_nanosecond()).unwrap_or(i64::MAX)
}

fn endpoint<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    #[derive(Deserialize)]
    struct EndpointFields<'a> {
        #[serde(borrow)]
        address: Text<'a>,
        port: u16,
    }
    let endpoint = Option::<EndpointFields<'de>>::deserialize(deserializer)?;
    endpoint
        .map(|EndpointFields { address, port }| {
            address.0.parse().map(|address| SocketAddr::new(address, port)).map_err(serde::de::Error::custom)
        })
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::examples;

    #[test]
    fn every_line_that_is_written_is_read() {
        for event in examples::all() {
            let line = serde_json::to_string(&event).expect("serializable");
            let read: Observation<'_> = serde_json::from_str(&line).expect("readable");
            assert!(read.event.is_some() && read.seq == 1 && read.time > 0, "{line}");
        }
    }

    #[test]
    fn reads_what_a_diagnosis_needs() {
        let line = serde_json::to_string(&examples::orderly()).expect("serializable");
        let close: Observation<'_> = serde_json::from_str(&line).expect("readable");
        assert_eq!(close.event, Some(Line::Close));
        assert_eq!(close.connection.local, Some("10.0.0.1:443".parse().unwrap()));
        assert_eq!(close.connection.role, Some(Role::Server));
        assert_eq!(close.closed_by, Some(ClosedBy::Peer));
        assert_eq!(close.last_data, Some(LastData::Received));
        assert!(close.states.close_wait && close.states.established && !close.states.fin_wait);
        assert_eq!(close.states.until_teardown_ms, Some(1200.0));
        let process = close.process.expect("known");
        assert!(matches!(process.comm.0, Cow::Borrowed("nginx")));
        assert_eq!(process.pid, 4312);
    }

    #[test]
    fn what_later_versions_add_is_not_known_and_not_an_error() {
        let line = r#"{"event":"close","time":"2026-03-01T12:01:02Z","seq":1,"cause":"new_cause","ended":null,
            "closed_by":"robot","states":null,"more":{"x":[1]},"signal_from":{"pid":1,"comm":"a","uid":0}}"#;
        let close: Observation<'_> = serde_json::from_str(line).expect("readable");
        assert_eq!((close.cause, close.ended, close.closed_by), (None, None, None));
        assert_eq!(close.signal_from.expect("given").oom, None);
        let other: Observation<'_> =
            serde_json::from_str(r#"{"event":"finding","kind":"leak","seq":2}"#).expect("readable");
        assert_eq!((other.event, other.kind), (None, None));
    }

    #[test]
    fn names_with_escapes_are_read() {
        let line = r#"{"event":"close","process":{"pid":1,"comm":"a\n\"b"}}"#;
        let close: Observation<'_> = serde_json::from_str(line).expect("readable");
        assert_eq!(close.process.expect("known").comm.0, "a\n\"b");
    }
}
