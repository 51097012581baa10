//! A line → a log record of OpenTelemetry.
//!
//! The body is the whole line as a map, and not text: a collector's users address it by name
//! (`body["cause"]` in the collector's own language), and collectors that write a map as text, into files,
//! Kafka or Loki, write the JSON object that `-o json` writes. So a pipeline is the same whether it reads
//! lines from a file or records from here. Attributes are those for which OpenTelemetry has a convention
//! (<https://opentelemetry.io/docs/specs/semconv/>), by which logs of different programs are searched
//! together. As in the line, what is not known is null in the body; an attribute is left out.

use std::{fmt, path::Path};

use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, ArrayValue, KeyValue, KeyValueList, any_value::Value},
    logs::v1::{LogRecord, SeverityNumber},
    resource::v1::Resource,
};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};

use super::queue::QueuedLine;
use crate::event::{Connection, Event, Process, Program, Remote, Role, Time};

/// The name of the service, of the scope, and of the namespace of event names.
pub const NAME: &str = "tcpclose";

/// What all records of this trace have in common; `further` attributes win over those found here.
pub fn resource(host: Option<String>, instance: Option<String>, further: &[(String, String)]) -> Resource {
    let mut attributes = Attributes::default();
    attributes.text("service.name", Some(NAME));
    attributes.text("service.version", Some(env!("CARGO_PKG_VERSION")));
    // With the number of a line it identifies the line, also if it arrives twice.
    attributes.text("service.instance.id", instance);
    attributes.text("host.name", host);
    let mut attributes = attributes.0;
    for (name, text) in further {
        attributes.retain(|attribute| attribute.key != *name);
        attributes.push(KeyValue { key: name.clone(), value: Some(string(text)), ..KeyValue::default() });
    }
    Resource { attributes, ..Resource::default() }
}

/// The record of a line.
///
/// # Errors
/// It is not a line of `-o json`.
pub fn of_line(line: &QueuedLine) -> serde_json::Result<LogRecord> {
    let event: Event = serde_json::from_slice(&line.json)?;
    let Body(body) = serde_json::from_slice(&line.json)?;
    let severity = severity(&event);
    let (kind, time) = kind_and_time(&event);
    Ok(LogRecord {
        time_unix_nano: u64::try_from(time.0.as_nanosecond()).unwrap_or(0),
        observed_time_unix_nano: line.observed,
        severity_number: severity.into(),
        severity_text: severity.as_str_name().trim_start_matches("SEVERITY_NUMBER_").to_owned(),
        event_name: format!("{NAME}.{kind}"),
        body: Some(body),
        attributes: attributes(&event),
        ..LogRecord::default()
    })
}

/// A warning if something did not end in order, by the tool's own judgement.
fn severity(event: &Event) -> SeverityNumber {
    let is_orderly = match event {
        Event::Close(close) => close.cause.is_none(),
        Event::Reset(reset) => reset.cause.is_none(),
        Event::Lingering(_) | Event::Lost(_) | Event::Finding(_) => false,
    };
    if is_orderly { SeverityNumber::Info } else { SeverityNumber::Warn }
}

fn kind_and_time(event: &Event) -> (&'static str, Time) {
    match event {
        Event::Close(close) => ("close", close.time),
        Event::Reset(reset) => ("reset", reset.time),
        Event::Lingering(lingering) => ("lingering", lingering.time),
        Event::Lost(lost) => ("lost", lost.time),
        Event::Finding(finding) => ("finding", finding.time),
    }
}

fn attributes(event: &Event) -> Vec<KeyValue> {
    let mut found = Attributes::default();
    match event {
        Event::Close(close) => {
            found.connection(&close.connection);
            found.text("error.type", close.cause.map(|cause| cause.to_string()));
        }
        Event::Reset(reset) => {
            found.connection(&reset.connection);
            found.text("error.type", reset.cause.map(|cause| cause.to_string()));
        }
        Event::Lingering(lingering) => {
            found.connection(&lingering.connection);
            found.text("error.type", Some(lingering.kind.to_string()));
        }
        Event::Lost(_) => {}
        Event::Finding(finding) => {
            found.text("error.type", Some(finding.kind.to_string()));
            if let Some(program) = &finding.process {
                found.program(program);
            }
            if let Some(Remote { address, port, .. }) = &finding.remote {
                found.text("network.peer.address", address.map(|address| address.to_string()));
                found.number("network.peer.port", *port);
            }
        }
    }
    if let Some(process) = event.process() {
        found.process(process);
    }
    found.0
}

/// Attributes so far. What is not known is not added.
#[derive(Default)]
struct Attributes(Vec<KeyValue>);

impl Attributes {
    fn add(&mut self, name: &str, value: AnyValue) {
        self.0.push(KeyValue { key: name.to_owned(), value: Some(value), ..KeyValue::default() });
    }

    fn text(&mut self, name: &str, text: Option<impl Into<String>>) {
        if let Some(text) = text {
            self.add(name, string(text));
        }
    }

    fn number(&mut self, name: &str, number: Option<impl Into<i64>>) {
        if let Some(number) = number {
            self.add(name, AnyValue { value: Some(Value::IntValue(number.into())) });
        }
    }

    fn connection(&mut self, connection: &Connection) {
        let Connection { local, remote, role, family, .. } = connection;
        self.text("network.transport", Some("tcp"));
        self.text("network.type", family.map(|family| family.to_string()));
        let mut ends = vec![("network.local", *local), ("network.peer", *remote)];
        match role {
            Some(Role::Client) => ends.extend([("client", *local), ("server", *remote)]),
            Some(Role::Server) => ends.extend([("client", *remote), ("server", *local)]),
            None => {}
        }
        for (end, endpoint) in ends {
            self.text(&format!("{end}.address"), endpoint.map(|end| end.address.to_string()));
            self.number(&format!("{end}.port"), endpoint.map(|end| end.port));
        }
    }

    fn process(&mut self, process: &Process) {
        self.number("process.pid", process.pid);
        self.executable(process.exe.as_deref());
        self.number("process.real_user.id", process.uid);
        self.number("thread.id", process.tid);
        self.text("thread.name", process.thread.as_deref());
        self.text("container.id", process.container.as_deref());
        self.text("container.name", process.container_name.as_deref());
        if let Some(pod) = &process.pod {
            self.text("k8s.pod.name", Some(pod.name.as_str()));
            self.text("k8s.namespace.name", Some(pod.namespace.as_str()));
        }
    }

    fn program(&mut self, program: &Program) {
        self.number("process.pid", program.pid);
        self.executable(program.exe.as_deref());
        self.text("container.id", program.container.as_deref());
    }

    /// There is no convention for `comm`: the name of an executable is that of its file.
    fn executable(&mut self, path: Option<&str>) {
        self.text("process.executable.path", path);
        let name = path.and_then(|path| Path::new(path).file_name()?.to_str());
        self.text("process.executable.name", name);
    }
}

fn string(text: impl Into<String>) -> AnyValue {
    AnyValue { value: Some(Value::StringValue(text.into())) }
}

/// A JSON value as OpenTelemetry has it.
struct Body(AnyValue);

impl<'de> Deserialize<'de> for Body {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = deserializer.deserialize_any(BodyVisitor)?;
        Ok(Self(AnyValue { value }))
    }
}

struct BodyVisitor;

impl<'de> Visitor<'de> for BodyVisitor {
    type Value = Option<Value>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Some(Value::BoolValue(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Some(Value::IntValue(value)))
    }

    /// OpenTelemetry has no unsigned numbers; text keeps every digit.
    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Some(i64::try_from(value).map_or_else(|_| Value::StringValue(value.to_string()), Value::IntValue)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Some(Value::DoubleValue(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Some(Value::StringValue(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Self::Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Body(value)) = elements.next_element()? {
            values.push(value);
        }
        Ok(Some(Value::ArrayValue(ArrayValue { values })))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut values = Vec::new();
        while let Some((key, Body(value))) = entries.next_entry()? {
            values.push(KeyValue { key, value: Some(value), ..KeyValue::default() });
        }
        Ok(Some(Value::KvlistValue(KeyValueList { values })))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::{Value as Json, json};

    use super::*;
    use crate::{
        event::{Attribution, Pod, examples},
        sink::append_json,
    };

    fn line(event: &Event) -> QueuedLine {
        let mut json = Vec::new();
        append_json(&mut json, event).unwrap();
        QueuedLine { json, observed: 7 }
    }

    /// A value of OpenTelemetry as JSON.
    fn json_of(value: &AnyValue) -> Json {
        let list = |pairs: &[KeyValue]| {
            pairs.iter().map(|it| (it.key.clone(), json_of(it.value.as_ref().unwrap()))).collect()
        };
        match &value.value {
            None => Json::Null,
            Some(Value::StringValue(text)) => json!(text),
            Some(Value::BoolValue(value)) => json!(value),
            Some(Value::IntValue(number)) => json!(number),
            Some(Value::DoubleValue(number)) => json!(number),
            Some(Value::ArrayValue(array)) => array.values.iter().map(json_of).collect(),
            Some(Value::KvlistValue(map)) => Json::Object(list(&map.values)),
            Some(other) => panic!("{other:?}"),
        }
    }

    fn attributes_of(record: &LogRecord) -> BTreeMap<&str, Json> {
        let pairs = record.attributes.iter();
        let found: BTreeMap<_, _> =
            pairs.map(|it| (it.key.as_str(), json_of(it.value.as_ref().unwrap()))).collect();
        assert_eq!(found.len(), record.attributes.len(), "{:?}", record.attributes);
        found
    }

    #[test]
    fn the_body_is_the_line() {
        for event in examples::all() {
            let line = line(&event);
            let record = of_line(&line).unwrap();
            let expected: Json = serde_json::from_slice(&line.json).unwrap();
            assert_eq!(json_of(record.body.as_ref().unwrap()), expected);
            assert_eq!(record.event_name, format!("tcpclose.{}", expected["event"].as_str().unwrap()));
            let time: jiff::Timestamp = expected["time"].as_str().unwrap().parse().unwrap();
            assert_eq!(i128::from(record.time_unix_nano), time.as_nanosecond());
            assert_eq!(record.observed_time_unix_nano, 7);
        }
    }

    #[test]
    fn what_does_not_end_in_order_is_a_warning() {
        let severities = [
            (examples::orderly(), "INFO", 9),
            (examples::unknown_owner(), "INFO", 9),
            (examples::unread_data(), "WARN", 13),
            (examples::reset_sent(), "WARN", 13),
            (examples::lingering(), "WARN", 13),
            (examples::lost(), "WARN", 13),
        ];
        for (event, text, number) in severities {
            let record = of_line(&line(&event)).unwrap();
            assert_eq!((record.severity_text.as_str(), record.severity_number), (text, number), "{event:?}");
        }
    }

    #[test]
    fn attributes_have_the_names_of_the_conventions() {
        let Event::Close(mut close) = examples::unread_data() else { unreachable!() };
        let mut process = (*examples::process(4312, "nginx", Attribution::Accept)).clone();
        process.thread = Some("worker".into());
        process.container = Some("3f4ac1".into());
        process.container_name = Some("web".into());
        process.pod = Some(Pod { name: "web-0".into(), namespace: "shop".into() });
        close.process = Some(process.into());
        let record = of_line(&line(&Event::Close(close))).unwrap();
        let expected = json!({
            "network.transport": "tcp",
            "network.type": "ipv4",
            "network.local.address": "192.168.100.101",
            "network.local.port": 65535,
            "network.peer.address": "203.100.113.222",
            "network.peer.port": 54321,
            "server.address": "192.168.100.101",
            "server.port": 65535,
            "client.address": "203.100.113.222",
            "client.port": 54321,
            "error.type": "unread_data",
            "process.pid": 4312,
            "process.executable.path": "/usr/sbin/nginx",
            "process.executable.name": "nginx",
            "process.real_user.id": 33,
            "thread.id": 4312,
            "thread.name": "worker",
            "container.id": "3f4ac1",
            "container.name": "web",
            "k8s.pod.name": "web-0",
            "k8s.namespace.name": "shop",
        });
        assert_eq!(json!(attributes_of(&record)), expected);
        let unknown = of_line(&line(&examples::unknown_owner())).unwrap();
        assert_eq!(json!(attributes_of(&unknown)), json!({"network.transport": "tcp"}));
    }

    #[test]
    fn numbers_keep_every_digit() {
        let text = format!("[{}, {}, {}, 0.001, 1e300]", u64::MAX, i64::MAX, i64::MIN);
        let Body(value) = serde_json::from_str(&text).unwrap();
        let expected = json!([u64::MAX.to_string(), i64::MAX, i64::MIN, 0.001, 1e300]);
        assert_eq!(json_of(&value), expected);
    }

    #[test]
    fn the_user_names_the_resource() {
        let further = [("host.name".to_owned(), "n1".to_owned()), ("team".to_owned(), "net".to_owned())];
        let resource = resource(Some("found".to_owned()), None, &further);
        let pairs = resource.attributes.iter();
        let found: BTreeMap<_, _> =
            pairs.map(|it| (it.key.as_str(), json_of(it.value.as_ref().unwrap()))).collect();
        let version = env!("CARGO_PKG_VERSION");
        let expected =
            json!({"service.name": "tcpclose", "service.version": version, "host.name": "n1", "team": "net"});
        assert_eq!(json!(found), expected);
    }
}
