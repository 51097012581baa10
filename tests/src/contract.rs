//! The shape of the tool's lines that users script against: every field there, no value of another kind than
//! promised.

use serde_json::Value;

/// What a field may hold, besides what is said of null.
enum Kind {
    Number,
    Text,
    Flag,
    /// RFC 3339, UTC, nanoseconds.
    Time,
    /// One of these names.
    Name(&'static [&'static str]),
    /// An object with these fields.
    Object(&'static [Field]),
    /// An array of objects with these fields.
    Objects(&'static [Field]),
}

/// A field's name, whether it may be null, and what it holds otherwise.
struct Field(&'static str, Null, Kind);

enum Null {
    Never,
    Allowed,
}

use Kind::{Flag, Name, Number, Object, Objects, Text, Time};
use Null::{Allowed, Never};

const CAUSES: &[&str] = &[
    "no_listener",
    "refused",
    "unread_data",
    "linger_zero",
    "data_after_close",
    "disconnect",
    "keepalive_timeout",
    "retransmit_timeout",
    "connect_timeout",
    "user_timeout",
    "fin_timeout",
    "connect_abandoned",
    "accept_overflow",
    "listener_closed",
    "timewait",
    "invalid_segment",
    "destroyed",
    "out_of_memory",
    "peer_reset",
    "suspected_injection",
    "host_unreachable",
    "unknown",
];

const STATES: &[&str] = &[
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
    "NEW_SYN_RECV",
];

const TRIGGERS: &[&str] = &["close", "shutdown", "exit", "signal", "exec", "dup", "close_range", "io_uring"];

const ENDPOINT: &[Field] = &[Field("address", Never, Text), Field("port", Never, Number)];

const CONNECTION: &[Field] = &[
    Field("family", Allowed, Name(&["ipv4", "ipv6"])),
    Field("local", Allowed, Object(ENDPOINT)),
    Field("remote", Allowed, Object(ENDPOINT)),
    Field("netns", Allowed, Number),
    Field("cookie", Allowed, Number),
    Field("role", Allowed, Name(&["client", "server"])),
    Field("opened", Allowed, Time),
    Field("age_ms", Allowed, Number),
    Field("bytes_sent", Allowed, Number),
    Field("bytes_received", Allowed, Number),
    Field("retransmits", Allowed, Number),
    Field("rtt_us", Allowed, Number),
];

const PROCESS: &[Field] = &[
    Field("pid", Never, Number),
    Field("tid", Allowed, Number),
    Field("comm", Never, Text),
    Field("exe", Allowed, Text),
    Field("uid", Allowed, Number),
    Field("container", Allowed, Text),
    Field("attribution", Never, Name(&["syscall", "accept", "connect", "listener", "procfs"])),
];

const FRAME: &[Field] = &[
    Field("address", Never, Text),
    Field("symbol", Allowed, Text),
    Field("module", Allowed, Text),
    Field("offset", Allowed, Number),
    Field("file", Allowed, Text),
    Field("line", Allowed, Number),
    Field("inlined", Never, Flag),
];

const STACK: &[Field] = &[Field("user", Allowed, Objects(FRAME)), Field("kernel", Allowed, Objects(FRAME))];

const OPENER: &[Field] =
    &[Field("process", Allowed, Object(PROCESS)), Field("stack", Allowed, Object(STACK))];

const STEP: &[Field] = &[Field("state", Never, Name(STATES)), Field("at_ms", Never, Number)];

const HOLDER: &[Field] =
    &[Field("pid", Never, Number), Field("comm", Never, Text), Field("fd", Never, Number)];

const EVERY_LINE: &[Field] = &[Field("time", Never, Time), Field("seq", Never, Number)];

const LAST_DATA: Field = Field("last_data", Allowed, Name(&["sent", "received"]));

const CLOSE: &[Field] = &[
    Field("connection", Never, Object(CONNECTION)),
    Field("process", Allowed, Object(PROCESS)),
    Field("closed_by", Allowed, Name(&["local", "peer", "both", "kernel", "admin"])),
    Field("ended", Allowed, Name(&["fin", "reset_sent", "reset_received", "timeout", "destroyed"])),
    Field("trigger", Allowed, Name(TRIGGERS)),
    Field("signal", Allowed, Text),
    Field("cause", Allowed, Name(CAUSES)),
    Field("idle_ms", Allowed, Number),
    LAST_DATA,
    Field("close_wait_ms", Allowed, Number),
    Field("states", Never, Objects(STEP)),
    Field("stack", Allowed, Object(STACK)),
    Field("opener", Allowed, Object(OPENER)),
];

const RESET: &[Field] = &[
    Field("connection", Never, Object(CONNECTION)),
    Field("process", Allowed, Object(PROCESS)),
    Field("direction", Never, Name(&["sent", "received"])),
    Field("reason", Allowed, Text),
    Field("cause", Allowed, Name(CAUSES)),
    Field("state", Allowed, Name(STATES)),
    Field("idle_ms", Allowed, Number),
    LAST_DATA,
    Field("ttl", Allowed, Number),
    Field("handshake_ttl", Allowed, Number),
    Field("stack", Allowed, Object(STACK)),
    Field("opener", Allowed, Object(OPENER)),
];

const LINGERING: &[Field] = &[
    Field("connection", Never, Object(CONNECTION)),
    Field("process", Allowed, Object(PROCESS)),
    Field("state", Never, Name(&["CLOSE_WAIT", "FIN_WAIT1", "FIN_WAIT2", "LAST_ACK", "CLOSING"])),
    Field("since", Allowed, Time),
    Field("for_ms", Allowed, Number),
    Field("for_ms_at_most", Allowed, Number),
    Field("unread_bytes", Allowed, Number),
    Field("holders", Allowed, Objects(HOLDER)),
    Field("opener", Allowed, Object(OPENER)),
    Field("kind", Never, Name(&["leaked", "unread", "unaccepted", "unacked", "half_closed", "unknown"])),
];

const LOST: &[Field] = &[
    Field("where", Never, Name(&["ring_buffer", "connections", "stacks", "output"])),
    Field("count", Never, Number),
];

/// What the contract calls a cause.
pub fn causes() -> &'static [&'static str] {
    CAUSES
}

/// Everything in which the lines are not as promised.
pub fn violations(lines: &[Value]) -> Vec<String> {
    let mut found = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let fields = match line["event"].as_str() {
            Some("close") => CLOSE,
            Some("reset") => RESET,
            Some("lingering") => LINGERING,
            Some("lost") => LOST,
            _ => {
                found.push(format!("there is no event {}", line["event"]));
                continue;
            }
        };
        check_fields("", line, EVERY_LINE, &mut found);
        check_fields("", line, fields, &mut found);
        check_meaning(line, &mut found);
        let before = index.checked_sub(1).and_then(|before| lines[before]["seq"].as_u64());
        if before.is_some_and(|before| line["seq"].as_u64() != Some(before + 1)) {
            found.push(format!("seq goes from {before:?} to {}", line["seq"]));
        }
    }
    found
}

/// What no field says alone.
fn check_meaning(line: &Value, found: &mut Vec<String>) {
    if line["connection"]["cookie"] == 0 {
        found.push("0 is no cookie".to_owned());
    }
    if let (Some(least), Some(most)) = (line["for_ms"].as_f64(), line["for_ms_at_most"].as_f64())
        && least > most
    {
        found.push(format!("at least {least} ms and at most {most}"));
    }
    if line["event"] != "close" {
        return;
    }
    if (line["trigger"] == "signal") == line["signal"].is_null() {
        found.push(format!("trigger is {}, and signal {}", line["trigger"], line["signal"]));
    }
    let steps = line["states"].as_array().map_or(&[][..], Vec::as_slice);
    let times: Vec<f64> = steps.iter().filter_map(|step| step["at_ms"].as_f64()).collect();
    if times.first().is_some_and(|first| *first != 0.0) || !times.is_sorted() {
        found.push(format!("states do not count up from 0: {}", line["states"]));
    }
}

fn check_fields(place: &str, value: &Value, fields: &[Field], found: &mut Vec<String>) {
    for Field(name, null, kind) in fields {
        let place = format!("{place}.{name}");
        match value.get(name) {
            None => found.push(format!("{place} is missing")),
            Some(Value::Null) if matches!(null, Never) => found.push(format!("{place} is null")),
            Some(Value::Null) => {}
            Some(value) => check(&place, value, kind, found),
        }
    }
}

fn check(place: &str, value: &Value, kind: &Kind, found: &mut Vec<String>) {
    let good = match kind {
        Number => value.is_number(),
        Text => value.as_str().is_some_and(|text| !text.is_empty()),
        Flag => value.is_boolean(),
        Time => value.as_str().is_some_and(is_time),
        Name(names) => value.as_str().is_some_and(|name| names.contains(&name)),
        Object(fields) => {
            check_fields(place, value, fields, found);
            value.is_object()
        }
        Objects(fields) => {
            for item in value.as_array().into_iter().flatten() {
                check_fields(place, item, fields, found);
            }
            value.is_array()
        }
    };
    if !good {
        found.push(format!("{place} is {value}"));
    }
}

/// Whether a text has the form `2026-01-31T12:34:56.123456789Z`.
fn is_time(text: &str) -> bool {
    const FORM: &[u8] = b"0000-00-00T00:00:00.000000000Z";
    text.len() == FORM.len()
        && text
            .bytes()
            .zip(FORM)
            .all(|(byte, form)| if *form == b'0' { byte.is_ascii_digit() } else { byte == *form })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{is_time, violations};

    #[test]
    fn times_have_nanoseconds_and_are_utc() {
        assert!(is_time("2026-01-31T12:34:56.123456789Z"));
        assert!(!is_time("2026-01-31T12:34:56.123Z"));
        assert!(!is_time("2026-01-31T12:34:56.123456789+00:00"));
    }

    #[test]
    fn missing_null_and_foreign_values_are_told() {
        let lost = |seq: u64| {
            json!({"event": "lost", "time": "2026-01-31T12:34:56.123456789Z", "seq": seq,
            "where": "stacks", "count": 3})
        };
        assert_eq!(violations(&[lost(1), lost(2)]), [""; 0]);
        assert_eq!(violations(&[lost(1), lost(3)]).len(), 1);
        let mut bad = lost(1);
        bad["where"] = json!("elsewhere");
        bad["count"] = json!(null);
        assert_eq!(violations(&[bad]), [r#".where is "elsewhere""#, ".count is null"]);
        assert_eq!(violations(&[json!({"event": "lost"})]).len(), 4);
        assert_eq!(violations(&[json!({"event": "other"})]).len(), 1);
    }
}
