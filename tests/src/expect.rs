//! Comparison of lines with expectations. An expectation is JSON that names some fields of a line; each value
//! in it is either literal or one of the marks defined here: [`known`], [`at_least`], [`one_of`], [`path`],
//! [`calls`].

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

const KNOWN: &str = "$known";
const AT_LEAST: &str = "$at_least";
const ONE_OF: &str = "$one_of";
const PATH: &str = "$path";
const CALLS: &str = "$calls";

/// Matches anything but null.
pub fn known() -> Value {
    json!({ KNOWN: true })
}

/// Matches a number that is not smaller.
pub fn at_least(number: impl Into<f64>) -> Value {
    json!({ AT_LEAST: number.into() })
}

/// Matches any of several expectations.
pub fn one_of(expectations: &[Value]) -> Value {
    json!({ ONE_OF: expectations })
}

/// Matches a path that ends with these states. It may begin earlier, with the handshake.
pub fn path(states: &[&str]) -> Value {
    json!({ PATH: states })
}

/// Matches frames of which one is in a function with this name: its name ends with it, or has it as the last
/// part before a hash.
pub fn calls(function: &str) -> Value {
    json!({ CALLS: function })
}

/// Replaces parts of an expectation: objects are merged, and any other value is replaced.
pub fn but(expectation: Value, changes: Value) -> Value {
    match (expectation, changes) {
        (Value::Object(mut fields), Value::Object(changes))
            if mark(&fields).is_none() && mark(&changes).is_none() =>
        {
            for (key, change) in changes {
                let before = fields.remove(&key).unwrap_or(Value::Null);
                fields.insert(key, but(before, change));
            }
            Value::Object(fields)
        }
        (_, changes) => changes,
    }
}

/// The differences between a value and its expectation, one complaint each.
pub fn differences(actual: &Value, expected: &Value) -> Vec<String> {
    let mut found = Vec::new();
    compare("", actual, expected, &mut found);
    found
}

/// Pairs every line with an expectation, and lists the lines and expectations that remain; empty if none do.
pub fn mismatches(lines: &[Value], expected: &[Value]) -> String {
    let mut alone: Vec<&Value> = lines.iter().collect();
    let mut complaint = String::new();
    for expectation in expected {
        if let Some(index) = alone.iter().position(|line| differences(line, expectation).is_empty()) {
            alone.remove(index);
            continue;
        }
        let _ = writeln!(complaint, "no line is as expected: {expectation}");
        let nearest = alone.iter().map(|line| (differences(line, expectation), line));
        if let Some((differences, line)) = nearest.min_by_key(|(differences, _)| differences.len()) {
            let _ = writeln!(
                complaint,
                "  the nearest is {}\n  but {}",
                shortened(line),
                differences.join("\n  and ")
            );
        }
    }
    if lines.len() != expected.len() {
        let _ = writeln!(complaint, "{} lines came, {} were expected", lines.len(), expected.len());
    }
    complaint
}

/// A line in which names of functions replace the frames, for readers of a failed test.
pub fn shortened(line: &Value) -> Value {
    match line {
        Value::Array(items) => items.iter().map(shortened).collect(),
        Value::Object(fields) => match fields.get("symbol") {
            Some(Value::Null) => fields.get("address").cloned().unwrap_or_default(),
            Some(symbol) => symbol.clone(),
            None => fields.iter().map(|(key, value)| (key.clone(), shortened(value))).collect(),
        },
        _ => line.clone(),
    }
}

fn compare(place: &str, actual: &Value, expected: &Value, found: &mut Vec<String>) {
    match expected {
        Value::Object(fields) => match mark(fields) {
            Some((mark, what)) => {
                if let Some(complaint) = compare_mark(mark, actual, what) {
                    found.push(format!("{place} {complaint}"));
                }
            }
            None => {
                for (key, expected) in fields {
                    let place = if place.is_empty() { key.clone() } else { format!("{place}.{key}") };
                    match actual.get(key) {
                        Some(actual) => compare(&place, actual, expected, found),
                        None => found.push(format!("{place} is not there")),
                    }
                }
            }
        },
        Value::Array(expected) if items(actual).len() == expected.len() && actual.is_array() => {
            for (index, (actual, expected)) in items(actual).iter().zip(expected).enumerate() {
                compare(&format!("{place}[{index}]"), actual, expected, found);
            }
        }
        _ if actual == expected => {}
        _ => found.push(format!("{place} is {actual}, not {expected}")),
    }
}

/// Whether an object represents a mark.
pub(crate) fn is_mark(fields: &Map<String, Value>) -> bool {
    mark(fields).is_some()
}

/// The mark that an object represents, if it is one.
fn mark(fields: &Map<String, Value>) -> Option<(&str, &Value)> {
    let (key, what) = fields.iter().next()?;
    key.starts_with('$').then_some((key, what))
}

fn compare_mark(mark: &str, actual: &Value, what: &Value) -> Option<String> {
    let good = match mark {
        KNOWN => !actual.is_null(),
        AT_LEAST => actual.as_f64() >= what.as_f64() && actual.is_number(),
        ONE_OF => items(what).iter().any(|expected| differences(actual, expected).is_empty()),
        PATH => {
            let states: Vec<&Value> = items(actual).iter().map(|step| &step["state"]).collect();
            states.ends_with(&items(what).iter().collect::<Vec<_>>())
        }
        CALLS => items(actual).iter().filter_map(|frame| frame["symbol"].as_str()).any(|symbol| {
            what.as_str().is_some_and(|function| symbol.split("::").any(|part| part == function))
        }),
        _ => false,
    };
    (!good).then(|| format!("is {}, not {} {what}", shortened(actual), mark.trim_start_matches('$')))
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{at_least, but, calls, differences, known, mismatches, one_of, path};

    fn agree(actual: &Value, expected: &Value) -> bool {
        differences(actual, expected).is_empty()
    }

    #[test]
    fn marks_accept_what_they_name_and_nothing_else() {
        let states = json!([{"state": "SYN_SENT"}, {"state": "ESTABLISHED"}, {"state": "CLOSE"}]);
        let frames = json!([{"symbol": "close"}, {"symbol": "peer::calls::outer::h0123"}, {"symbol": null}]);
        let cases = [
            (json!(0), known(), true),
            (Value::Null, known(), false),
            (json!(2), at_least(2), true),
            (json!(1.9), at_least(2), false),
            (Value::Null, at_least(0), false),
            (json!("a"), one_of(&[Value::Null, json!("a")]), true),
            (json!("b"), one_of(&[Value::Null, json!("a")]), false),
            (states.clone(), path(&["ESTABLISHED", "CLOSE"]), true),
            (states.clone(), path(&["SYN_SENT", "CLOSE"]), false),
            (states, path(&["ESTABLISHED"]), false),
            (frames.clone(), calls("outer"), true),
            (frames, calls("out"), false),
            (Value::Null, calls("outer"), false),
        ];
        for (actual, expected, good) in cases {
            assert_eq!(agree(&actual, &expected), good, "{actual} and {expected}");
        }
    }

    #[test]
    fn a_missing_field_is_not_a_null_field() {
        assert!(agree(&json!({"a": null, "b": 1}), &json!({"a": null})));
        assert!(!agree(&json!({"b": 1}), &json!({"a": null})));
    }

    #[test]
    fn arrays_agree_item_by_item() {
        assert!(agree(&json!([{"pid": 1, "fd": 3}]), &json!([{"pid": 1}])));
        assert!(!agree(&json!([{"pid": 1}, {"pid": 1}]), &json!([{"pid": 1}])));
        assert!(!agree(&Value::Null, &json!([])));
    }

    #[test]
    fn changes_reach_into_objects_and_replace_marks() {
        let base = json!({"process": {"pid": 1, "tid": 1}, "cause": known()});
        let changed = but(base.clone(), json!({"process": {"tid": 2}, "cause": null}));
        assert_eq!(changed, json!({"process": {"pid": 1, "tid": 2}, "cause": null}));
        assert_eq!(but(base, json!({"process": null})), json!({"process": null, "cause": known()}));
    }

    #[test]
    fn every_line_needs_an_expectation_of_its_own() {
        let line = json!({"event": "close", "cause": null});
        let expected = json!({"event": "close"});
        assert_eq!(mismatches(std::slice::from_ref(&line), std::slice::from_ref(&expected)), "");
        assert!(!mismatches(&[line.clone(), line.clone()], std::slice::from_ref(&expected)).is_empty());
        assert!(!mismatches(std::slice::from_ref(&line), &[expected.clone(), expected]).is_empty());
        let complaint = mismatches(&[line], &[json!({"event": "reset"})]);
        assert!(complaint.contains(r#"event is "close", not "reset""#), "{complaint}");
    }
}
