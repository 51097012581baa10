//! The output contract: checks every line that the tool writes.
//!
//! The shape of a line comes from `docs/schema.json`, which is generated from the tool's types and reviewed
//! as a diff. This module adds what a schema cannot express: relations between the fields of a line, and
//! between lines.

use std::{
    collections::{BTreeMap, HashMap},
    sync::LazyLock,
};

use jsonschema::{ValidationError, Validator, error::ValidationErrorKind};
use serde_json::{Map, Value, json};

static SCHEMA: LazyLock<Value> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../../docs/schema.json")).expect("docs/schema.json is JSON")
});

/// One compiled validator for each kind of event. Choosing it by the event's name rather than with `oneOf`
/// keeps the complaints readable and the cost low.
static VALIDATORS: LazyLock<BTreeMap<&str, Validator>> = LazyLock::new(|| {
    let mut definitions = SCHEMA["$defs"].clone();
    definitions
        .as_object_mut()
        .into_iter()
        .flatten()
        .for_each(|(_, definition)| forbid_other_fields(definition));
    let validators = variants().map(|(event, name, tag)| {
        let mut definitions = definitions.clone();
        definitions[name]["properties"]["event"] = tag.clone();
        let schema =
            json!({"$schema": SCHEMA["$schema"], "$defs": definitions, "$ref": format!("#/$defs/{name}")});
        let validator = jsonschema::validator_for(&schema).expect("docs/schema.json is a JSON Schema");
        (event, validator)
    });
    validators.collect()
});

/// Each kind of event: its name in JSON, the name of its definition in the schema, and the schema of the
/// field `event`.
fn variants() -> impl Iterator<Item = (&'static str, &'static str, &'static Value)> {
    SCHEMA["oneOf"].as_array().expect("the schema is one of several events").iter().map(|variant| {
        let tag = &variant["properties"]["event"];
        let event = tag["const"].as_str().expect("an event has a constant name");
        let reference = variant["$ref"].as_str().expect("an event refers to its definition");
        (event, reference.trim_start_matches("#/$defs/"), tag)
    })
}

/// The published schema permits fields that it does not describe, because fields may be added to the output.
/// Here such a field is an error: the schema has to describe everything that is written.
fn forbid_other_fields(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.contains_key("properties") {
                fields.insert("additionalProperties".to_owned(), json!(false));
            }
            fields.values_mut().for_each(forbid_other_fields);
        }
        Value::Array(items) => items.iter_mut().for_each(forbid_other_fields),
        _ => {}
    }
}

/// The names of all causes.
pub fn causes() -> Vec<&'static str> {
    let causes = SCHEMA["$defs"]["Cause"]["oneOf"].as_array().into_iter().flatten();
    causes.filter_map(|cause| cause["const"].as_str()).collect()
}

/// Whether the lines of an event have this field at their top level.
pub fn has_field(event: &str, field: &str) -> bool {
    variants()
        .filter(|(name, ..)| *name == event)
        .any(|(_, definition, _)| SCHEMA["$defs"][definition]["properties"].get(field).is_some())
}

/// Checks the lines of one run of the tool, in the order in which they were written.
#[derive(Debug, Default)]
pub struct Checker {
    lines: u64,
    ends: HashMap<String, ReportedEnd>,
}

/// What the lines so far report about one end of a connection.
#[derive(Debug, Default)]
struct ReportedEnd {
    closes: usize,
    resets_received: usize,
    /// The close line reports that this end was reset by its own host.
    is_reset_sent: bool,
}

impl Checker {
    /// Returns every violation of the contract by the next line.
    pub fn check(&mut self, line: &Value) -> Vec<String> {
        self.lines += 1;
        let mut found = Vec::new();
        match line["event"].as_str().and_then(|event| VALIDATORS.get(event)) {
            Some(validator) => validator.iter_errors(line).for_each(|error| explain(&error, &mut found)),
            None => found.push(format!("unknown event: {}", line["event"])),
        }
        if line["seq"] != self.lines {
            found.push(format!("seq of line {} is {}", self.lines, line["seq"]));
        }
        check_text(&mut Vec::new(), line, &mut found);
        check_relations(line, &mut found);
        self.check_end(line, &mut found);
        for complaint in &mut found {
            complaint.insert_str(0, &format!("line {}: ", self.lines));
        }
        found
    }

    /// One end of a connection has one close line, and a RST has one line although the tracepoint of received
    /// RSTs also fires when this host aborts the connection itself.
    fn check_end(&mut self, line: &Value, found: &mut Vec<String>) {
        let connection = &line["connection"];
        // The time of the handshake, in nanoseconds, distinguishes successive connections between the same
        // ports.
        if connection["opened"].is_null() {
            return;
        }
        let key = ["netns", "local", "remote", "opened"].map(|field| connection[field].to_string()).join(" ");
        let end = self.ends.entry(key).or_default();
        match (line["event"].as_str(), line["direction"].as_str()) {
            (Some("close"), _) => {
                end.closes += 1;
                end.is_reset_sent = line["ended"] == "reset_sent";
            }
            (Some("reset"), Some("received")) => end.resets_received += 1,
            _ => return,
        }
        if end.closes > 1 {
            found.push(format!("this end has {} close lines: {connection}", end.closes));
        }
        if end.resets_received > 1 {
            found.push(format!("this end received {} RSTs: {connection}", end.resets_received));
        }
        if end.is_reset_sent && end.resets_received > 0 {
            found.push(format!("this end was reset by its own host and also received a RST: {connection}"));
        }
    }
}

/// Adds a complaint for an error. For an error in one of several alternatives, it adds the complaints of the
/// alternative that matched furthest, because one alternative of almost every field is null.
fn explain(error: &ValidationError, found: &mut Vec<String>) {
    let depth = |error: &ValidationError| error.instance_path().as_str().len();
    if let ValidationErrorKind::AnyOf { context } | ValidationErrorKind::OneOfNotValid { context } =
        error.kind()
    {
        let deepest = |errors: &&Vec<ValidationError>| errors.iter().map(depth).max();
        let best = context.iter().max_by_key(deepest);
        if let Some(errors) = best.filter(|errors| deepest(errors) > Some(depth(error))) {
            return errors.iter().for_each(|error| explain(error, found));
        }
    }
    found.push(format!("{}: {error}", error.instance_path().as_str()));
}

/// An unknown text is null; an empty text is an error. `place` has the names of the fields that lead to the
/// value.
fn check_text<'a>(place: &mut Vec<&'a str>, value: &'a Value, found: &mut Vec<String>) {
    match value {
        Value::String(text) if text.is_empty() => found.push(format!("/{}: empty text", place.join("/"))),
        Value::Object(fields) => {
            for (name, value) in fields {
                place.push(name);
                check_text(place, value, found);
                place.pop();
            }
        }
        Value::Array(items) => items.iter().for_each(|item| check_text(place, item, found)),
        _ => {}
    }
}

/// Checks relations between the fields of a line.
fn check_relations(line: &Value, found: &mut Vec<String>) {
    let connection = &line["connection"];
    let mut ensure = |holds: bool, complaint: &str, fields: &[&str]| {
        if !holds {
            let values: Map<_, _> = fields
                .iter()
                .filter_map(|field| {
                    Some(((*field).to_owned(), line.get(field).or(connection.get(field))?.clone()))
                })
                .collect();
            found.push(format!("{complaint}: {}", Value::Object(values)));
        }
    };
    ensure(connection["cookie"] != 0, "0 is not a cookie", &["cookie"]);
    ensure(
        connection["opened"].is_null() == connection["age_ms"].is_null(),
        "the age is known exactly when the time of the handshake is",
        &["opened", "age_ms"],
    );
    for earlier in [&connection["opened"], &line["since"]] {
        // Times in this format sort as text.
        let is_past = earlier.as_str().is_none_or(|earlier| Some(earlier) <= line["time"].as_str());
        ensure(is_past, "a time is later than that of the line", &["opened", "since", "time"]);
    }
    ensure(
        line["last_data"].is_null() || !line["idle_ms"].is_null(),
        "data went some way, but never",
        &["last_data", "idle_ms"],
    );
    let [idle, sent, received] =
        ["idle_ms", "since_sent_ms", "since_received_ms"].map(|field| line[field].as_f64());
    let shortest = [sent, received].into_iter().flatten().reduce(f64::min);
    ensure(
        idle == shortest,
        "the idle time is not the shorter one of the two directions",
        &["idle_ms", "since_sent_ms", "since_received_ms"],
    );
    match line["event"].as_str() {
        Some("close") => {
            ensure(
                (line["trigger"] == "signal") != line["signal"].is_null(),
                "the signal is known exactly when one was the trigger",
                &["trigger", "signal"],
            );
            let steps = line["states"].as_array().map_or(&[][..], Vec::as_slice);
            let times: Vec<f64> = steps.iter().filter_map(|step| step["at_ms"].as_f64()).collect();
            let counts_up = times.first().is_none_or(|first| *first == 0.0) && times.is_sorted();
            ensure(counts_up, "the times of the states do not count up from 0", &["states"]);
            // A socket that is older than the trace may have been in its first state for longer than is
            // known.
            let waited = steps.iter().skip(1).any(|step| step["state"] == "CLOSE_WAIT");
            ensure(
                !waited || !line["close_wait_ms"].is_null(),
                "the time spent in CLOSE_WAIT is missing",
                &["states", "close_wait_ms"],
            );
        }
        Some("reset") => ensure(
            line["direction"] == "received" || (line["ttl"].is_null() && line["handshake_ttl"].is_null()),
            "only RSTs that were received have a time to live",
            &["direction", "ttl", "handshake_ttl"],
        ),
        Some("lingering") => {
            const LINGERING: [&str; 5] = ["CLOSE_WAIT", "FIN_WAIT1", "FIN_WAIT2", "LAST_ACK", "CLOSING"];
            let state = line["state"].as_str();
            ensure(
                state.is_some_and(|state| LINGERING.contains(&state)),
                "no state of a teardown",
                &["state"],
            );
            let (least, most) = (line["for_ms"].as_f64(), line["for_ms_at_most"].as_f64());
            let is_range = least.zip(most).is_none_or(|(least, most)| least <= most);
            ensure(is_range, "the bounds of the age are reversed", &["for_ms", "for_ms_at_most"]);
        }
        Some("finding") => check_finding(line, &mut ensure),
        _ => {}
    }
}

/// A finding is about lines that were written before it, and says how many connections show it.
fn check_finding(line: &Value, ensure: &mut impl FnMut(bool, &str, &[&str])) {
    let times = ["first", "last"].map(|field| line[field].as_str());
    ensure(times[0] <= times[1], "the first comes after the last", &["first", "last"]);
    let lines = line["lines"].as_array().map_or(&[][..], Vec::as_slice);
    let count = line["count"].as_u64().unwrap_or_default();
    let most = usize::try_from(count).unwrap_or(usize::MAX).min(10);
    ensure(
        (1..=10).contains(&lines.len()) && (most >= lines.len() || line["kind"] == "chain"),
        "not as many lines as connections, and at most ten",
        &["kind", "count", "lines"],
    );
    ensure(
        line["files"].as_array().is_none_or(|files| files.len() == lines.len()),
        "not one file for each line",
        &["lines", "files"],
    );
    let is_repeated = |index: usize| line["files"].is_null() && lines[..index].contains(&lines[index]);
    ensure(!(0..lines.len()).any(is_repeated), "a line is named twice", &["lines"]);
    let are_earlier = !line["files"].is_null()
        || lines.iter().all(|number| number.as_u64().is_some_and(|number| number > 0));
    ensure(are_earlier, "a line without a number", &["lines"]);
    let sentences = ["summary", "advice"].map(|field| line[field].as_str().unwrap_or_default());
    ensure(sentences.iter().all(|text| text.ends_with('.')), "no sentence", &["summary", "advice"]);
    let evidence = line["evidence"].as_object();
    ensure(evidence.is_some_and(|evidence| !evidence.is_empty()), "nothing shows it", &["evidence"]);
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Checker, causes, check_relations, has_field};

    fn lost() -> Value {
        let time = "2026-01-31T12:34:56.123456789Z";
        json!({"event": "lost", "time": time, "seq": 1, "where": "stacks", "count": 3})
    }

    fn reset() -> Value {
        json!({
            "event": "reset",
            "time": "2026-01-31T12:34:56.123456789Z",
            "seq": 1,
            "connection": {
                "family": "ipv4",
                "local": {"address": "10.0.0.1", "port": 1},
                "remote": {"address": "10.0.0.2", "port": 2},
                "netns": 1,
                "cookie": null,
                "role": "client",
                "opened": "2026-01-31T12:34:55.123456789Z",
                "age_ms": 1000,
                "bytes_sent": 0,
                "bytes_received": 0,
                "retransmits": 0,
                "rtt_us": null,
            },
            "process": null,
            "direction": "received",
            "reason": null,
            "cause": "peer_reset",
            "state": "ESTABLISHED",
            "idle_ms": null,
            "last_data": null,
            "since_sent_ms": null,
            "since_received_ms": null,
            "unread_bytes": 0,
            "unacked_bytes": 0,
            "ttl": 64,
            "handshake_ttl": null,
            "stack": {"user": [], "kernel": null},
            "opener": null,
        })
    }

    /// The complaints about a line in which one value is replaced, or removed if the new value is `None`.
    fn complaints(mut line: Value, pointer: &str, value: Option<Value>) -> String {
        let (parent, name) = pointer.rsplit_once('/').expect("a pointer");
        let fields = line.pointer_mut(parent).and_then(Value::as_object_mut).expect("an object");
        fields.remove(name);
        fields.extend(value.map(|value| (name.to_owned(), value)));
        Checker::default().check(&line).join("\n")
    }

    #[test]
    fn good_lines_are_accepted() {
        assert_eq!(Checker::default().check(&lost()), [""; 0]);
        assert_eq!(Checker::default().check(&reset()), [""; 0]);
    }

    #[test]
    fn every_deviation_is_reported() {
        let frame = json!({
            "address": "1", "symbol": null, "module": null, "offset": null, "file": null, "line": null,
            "inlined": false, "truncated": null,
        });
        let cases = [
            (lost(), "/where", Some(json!("elsewhere")), "/where: \"elsewhere\""),
            (lost(), "/count", Some(Value::Null), "/count: null"),
            (lost(), "/count", None, "\"count\" is a required property"),
            (lost(), "/why", Some(json!("")), "'why' was unexpected"),
            (lost(), "/event", Some(json!("other")), "unknown event"),
            (lost(), "/seq", Some(json!(2)), "seq of line 1 is 2"),
            (lost(), "/time", Some(json!("2026-01-31T12:34:56.123Z")), "/time:"),
            (lost(), "/time", Some(json!("2026-01-31T12:34:56.123456789+00:00")), "/time:"),
            (reset(), "/connection/netns", None, "\"netns\" is a required property"),
            (reset(), "/connection/mtu", Some(json!(1500)), "'mtu' was unexpected"),
            (reset(), "/connection/local/port", Some(json!(65_536)), "/connection/local/port:"),
            (reset(), "/connection/cookie", Some(json!(0)), "0 is not a cookie"),
            (reset(), "/connection/age_ms", Some(Value::Null), "the age is known exactly when"),
            (reset(), "/connection/opened", Some(json!("2026-01-31T12:34:57.123456789Z")), "later than"),
            (reset(), "/reason", Some(json!("")), "/reason: empty text"),
            (reset(), "/direction", Some(json!("sent")), "time to live"),
            (reset(), "/last_data", Some(json!("sent")), "but never"),
            (reset(), "/since_sent_ms", Some(json!(7)), "not the shorter one"),
            (reset(), "/stack/user", Some(json!([frame])), "/stack/user/0/address:"),
        ];
        for (line, pointer, value, expected) in cases {
            let found = complaints(line, pointer, value.clone());
            assert!(
                found.contains(expected),
                "{pointer} = {value:?}: {found:?} does not contain {expected:?}"
            );
        }
    }

    #[test]
    fn only_a_first_state_may_have_an_unknown_duration() {
        let complaints = |states: &[&str]| {
            let states: Vec<_> = states.iter().map(|state| json!({"state": state, "at_ms": 0.0})).collect();
            let line = json!({"event": "close", "states": states, "close_wait_ms": null, "signal": null});
            let mut found = Vec::new();
            check_relations(&line, &mut found);
            found.len()
        };
        assert_eq!(complaints(&["CLOSE_WAIT", "LAST_ACK", "CLOSE"]), 0);
        assert_eq!(complaints(&["ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSE"]), 1);
    }

    #[test]
    fn one_reset_is_one_line() {
        let mut checker = Checker::default();
        assert_eq!(checker.check(&reset()), [""; 0]);
        let mut again = reset();
        again["seq"] = json!(2);
        assert_eq!(checker.check(&again).len(), 1);
        // Another connection between the same ports.
        again["seq"] = json!(3);
        again["connection"]["opened"] = json!("2026-01-31T12:34:56.123456789Z");
        assert_eq!(checker.check(&again), [""; 0]);
    }

    #[test]
    fn names_come_from_the_schema() {
        assert!(causes().contains(&"linger_zero"));
        assert!(
            has_field("close", "trigger") && !has_field("reset", "trigger") && !has_field("other", "time")
        );
    }
}
