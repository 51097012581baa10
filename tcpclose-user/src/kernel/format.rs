//! Reads the `format` files of tracefs, which describe the layout of a tracepoint's record. Layouts differ
//! between kernels, and distributions backport changes, so they cannot be derived from the kernel's version.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use tcpclose_common::offsets::{ABSENT, RecordOffsets};

/// One field of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// The name alone, without type and array brackets.
    pub name: String,
    /// Offset in bytes from the start of the record, including the 8 bytes common to all records.
    pub offset: u32,
    /// Size in bytes.
    pub size: u32,
    /// Whether it is a signed number.
    pub signed: bool,
}

/// A parsed `format` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracepointFormat {
    /// Fields in the order of the file; the common ones, `common_type` and so on, come first.
    pub fields: Vec<Field>,
    /// The C expression with which the kernel prints a record.
    print: String,
}

impl TracepointFormat {
    /// Parses the text of a `format` file.
    ///
    /// # Errors
    /// A line cannot be parsed, or there is no field.
    pub fn parse(text: &str) -> Result<Self> {
        let mut fields = Vec::new();
        let mut print = String::new();
        for line in text.lines().map(str::trim) {
            if let Some(field) = line.strip_prefix("field:") {
                fields.push(
                    parse_field(field)
                        .with_context(|| format!("cannot parse the field of a tracepoint: {line:?}"))?,
                );
            } else if let Some(rest) = line.strip_prefix("print fmt:") {
                rest.clone_into(&mut print);
            }
        }
        ensure!(!fields.is_empty(), "the format file of a tracepoint has no fields");
        Ok(Self { fields, print })
    }

    /// The field of that name, if it has that size: a field of another size has another meaning than its
    /// reader expects.
    pub fn field(&self, name: &str, size: u32) -> Option<&Field> {
        self.fields.iter().find(|field| field.name == name && field.size == size)
    }

    /// The offsets for reading a record of one of the tracepoints in [`HOOKS`](crate::kernel::hooks::HOOKS).
    /// A field that this tracepoint does not have, or has in another size, is [`ABSENT`].
    pub fn record_offsets(&self) -> RecordOffsets {
        let offset = |name, size| {
            let found = self.field(name, size).and_then(|field| u16::try_from(field.offset).ok());
            found.unwrap_or(ABSENT)
        };
        // From 6.10 on, `saddr` of `tcp_send_reset` is a `struct sockaddr_in6`; elsewhere it has 4 bytes:
        // https://git.kernel.org/torvalds/c/19822a980e19
        let sockaddr_in6 = 28;
        RecordOffsets {
            skaddr: offset("skaddr", 8),
            skbaddr: offset("skbaddr", 8),
            oldstate: offset("oldstate", 4),
            newstate: offset("newstate", 4),
            // One byte before 5.6: https://git.kernel.org/torvalds/c/bf9765145b85
            protocol: offset("protocol", 2),
            reason: offset("reason", 4),
            sport: offset("sport", 2),
            dport: offset("dport", 2),
            family: offset("family", 2),
            saddr_v6: offset("saddr_v6", 16),
            daddr_v6: offset("daddr_v6", 16),
            local_sockaddr: offset("saddr", sockaddr_in6),
            remote_sockaddr: offset("daddr", sockaddr_in6),
            child_pid: offset("child_pid", 4),
            ..RecordOffsets::ABSENT
        }
    }

    /// The names of a field's values, from `__print_symbolic(REC->field, { 14, "TCP_STATE" }, …)` in the
    /// print format.
    ///
    /// Values that are not numbers, such as the states of `tcp_send_reset`, are left out. Empty if the field
    /// is not printed this way.
    pub fn value_names(&self, field: &str) -> BTreeMap<i64, String> {
        let start = format!("__print_symbolic(REC->{field},");
        let Some((_, mut rest)) = self.print.split_once(&start) else { return BTreeMap::new() };
        let mut names = BTreeMap::new();
        while let Some((value, name, after)) = next_pair(rest) {
            if let Some(value) = parse_number(value) {
                names.entry(value).or_insert_with(|| name.to_owned());
            }
            rest = after.trim_start().strip_prefix(',').unwrap_or_default();
        }
        names
    }
}

/// Parses the text after `field:`, such as `__u8 saddr[4]; offset:32; size:4; signed:0;` (with tabs).
fn parse_field(text: &str) -> Option<Field> {
    let mut parts = text.split(';').map(str::trim);
    let declaration = parts.next()?;
    // The brackets may contain spaces, as in `saddr[sizeof(struct sockaddr_in6)]`, and need not be at the
    // end, as in `__data_loc char[] name`.
    let name = match declaration.strip_suffix(']') {
        Some(array) => array.split_once('[')?.0,
        None => declaration,
    };
    let name = name.trim_end().rsplit([' ', '*']).next().filter(|name| !name.is_empty())?.to_owned();
    let (mut offset, mut size, mut signed) = (None, None, false);
    for part in parts {
        match part.split_once(':') {
            Some(("offset", value)) => offset = value.parse().ok(),
            Some(("size", value)) => size = value.parse().ok(),
            Some(("signed", value)) => signed = value != "0",
            _ => {}
        }
    }
    Some(Field { name, offset: offset?, size: size?, signed })
}

/// Splits `{ value, "name" } and the rest` into three.
fn next_pair(text: &str) -> Option<(&str, &str, &str)> {
    let (value, rest) = text.trim_start().strip_prefix('{')?.split_once(',')?;
    let (name, rest) = rest.trim_start().strip_prefix('"')?.split_once('"')?;
    Some((value.trim(), name, rest.trim_start().strip_prefix('}')?))
}

fn parse_number(text: &str) -> Option<i64> {
    match text.strip_prefix("0x") {
        Some(hex) => i64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a `format` file like the kernel's: `(type and name, offset, size)`.
    fn format_of(fields: &[(&str, u32, u32)]) -> TracepointFormat {
        let lines = fields.iter().map(|(declaration, offset, size)| {
            format!("\tfield:{declaration};\toffset:{offset};\tsize:{size};\tsigned:0;\n")
        });
        let text =
            format!("name: test\nID: 1\nformat:\n{}\nprint fmt: \"\", REC->x\n", lines.collect::<String>());
        TracepointFormat::parse(&text).unwrap()
    }

    /// The kernels whose files are in `fixtures/format`, with the parsed file of one event.
    macro_rules! fixtures {
        ($event:literal) => {
            [
                ("5.10", include_str!(concat!("../../fixtures/format/5.10/", $event))),
                ("6.1", include_str!(concat!("../../fixtures/format/6.1/", $event))),
                ("6.12", include_str!(concat!("../../fixtures/format/6.12/", $event))),
                ("6.18", include_str!(concat!("../../fixtures/format/6.18/", $event))),
                ("7.2", include_str!(concat!("../../fixtures/format/7.2/", $event))),
            ]
            .map(|(kernel, text)| (kernel, TracepointFormat::parse(text).unwrap()))
        };
    }

    const SET_STATE: RecordOffsets = RecordOffsets {
        skaddr: 8,
        oldstate: 16,
        newstate: 20,
        sport: 24,
        dport: 26,
        family: 28,
        protocol: 30,
        saddr_v6: 40,
        daddr_v6: 56,
        ..RecordOffsets::ABSENT
    };
    const SEND_RESET: RecordOffsets = RecordOffsets { skbaddr: 8, skaddr: 16, ..RecordOffsets::ABSENT };
    const RECEIVE_RESET: RecordOffsets =
        RecordOffsets { skaddr: 8, sport: 16, dport: 18, ..RecordOffsets::ABSENT };

    #[test]
    fn set_state() {
        for (kernel, format) in fixtures!("inet_sock_set_state") {
            assert_eq!(format.record_offsets(), SET_STATE, "{kernel}");
        }
        // 4.16 to 5.4: TRACE_EVENT of include/trace/events/sock.h, compiled. The protocol is one byte.
        let old = format_of(&[
            ("const void * skaddr", 8, 8),
            ("int oldstate", 16, 4),
            ("int newstate", 20, 4),
            ("__u16 sport", 24, 2),
            ("__u16 dport", 26, 2),
            ("__u16 family", 28, 2),
            ("__u8 protocol", 30, 1),
            ("__u8 saddr[4]", 31, 4),
            ("__u8 daddr[4]", 35, 4),
            ("__u8 saddr_v6[16]", 39, 16),
            ("__u8 daddr_v6[16]", 55, 16),
        ]);
        let expected = RecordOffsets { protocol: ABSENT, saddr_v6: 39, daddr_v6: 55, ..SET_STATE };
        assert_eq!(old.record_offsets(), expected);
    }

    #[test]
    fn send_reset() {
        let v5_4 = RecordOffsets { sport: 28, dport: 30, saddr_v6: 40, daddr_v6: 56, ..SEND_RESET };
        let v5_13 = RecordOffsets { family: 32, saddr_v6: 42, daddr_v6: 58, ..v5_4 };
        let v6_10 = RecordOffsets { reason: 28, local_sockaddr: 32, remote_sockaddr: 60, ..SEND_RESET };
        for (kernel, format) in fixtures!("tcp_send_reset") {
            let expected = match kernel {
                "5.10" => v5_4,
                "6.1" => v5_13,
                _ => v6_10,
            };
            assert_eq!(format.record_offsets(), expected, "{kernel}");
        }
        // 4.16 and 4.19: class tcp_event_sk_skb of include/trace/events/tcp.h, compiled.
        let v4_16 = format_of(&[
            ("const void * skbaddr", 8, 8),
            ("const void * skaddr", 16, 8),
            ("__u16 sport", 24, 2),
            ("__u16 dport", 26, 2),
            ("__u8 saddr[4]", 28, 4),
            ("__u8 daddr[4]", 32, 4),
            ("__u8 saddr_v6[16]", 36, 16),
            ("__u8 daddr_v6[16]", 52, 16),
        ]);
        let expected = RecordOffsets { sport: 24, dport: 26, saddr_v6: 36, daddr_v6: 52, ..SEND_RESET };
        assert_eq!(v4_16.record_offsets(), expected);
        // 6.10 on kernels that do not evaluate the size in the text.
        let unsized_array = format_of(&[
            ("const void * skbaddr", 8, 8),
            ("const void * skaddr", 16, 8),
            ("int state", 24, 4),
            ("enum sk_rst_reason reason", 28, 4),
            ("__u8 saddr[sizeof(struct sockaddr_in6)]", 32, 28),
            ("__u8 daddr[sizeof(struct sockaddr_in6)]", 60, 28),
        ]);
        assert_eq!(unsized_array.record_offsets(), v6_10);
    }

    #[test]
    fn receive_reset_and_destroy_sock() {
        let v4_16 = RecordOffsets { saddr_v6: 28, daddr_v6: 44, ..RECEIVE_RESET };
        let v5_13 = RecordOffsets { family: 20, saddr_v6: 30, daddr_v6: 46, ..RECEIVE_RESET };
        for (kernel, format) in
            fixtures!("tcp_receive_reset").into_iter().chain(fixtures!("tcp_destroy_sock"))
        {
            let expected = if kernel == "5.10" { v4_16 } else { v5_13 };
            assert_eq!(format.record_offsets(), expected, "{kernel}");
            assert_eq!(format.field("sock_cookie", 8).map(|field| field.offset), Some(64), "{kernel}");
        }
    }

    #[test]
    fn fields() {
        let [(_, format), ..] = fixtures!("inet_sock_set_state");
        let names: Vec<_> = format.fields.iter().map(|field| field.name.as_str()).collect();
        assert_eq!(
            names[..5],
            ["common_type", "common_flags", "common_preempt_count", "common_pid", "skaddr"]
        );
        assert_eq!(names.len(), 15);
        let oldstate = Field { name: "oldstate".to_owned(), offset: 16, size: 4, signed: true };
        assert_eq!(format.field("oldstate", 4), Some(&oldstate));
        assert_eq!(format.field("oldstate", 8), None);

        let odd = format_of(&[("__data_loc char[] dev_name", 8, 4), ("const char *pointer", 16, 8)]);
        assert!(odd.field("dev_name", 4).is_some());
        assert!(odd.field("pointer", 8).is_some());
    }

    #[test]
    fn reset_reasons() {
        for (kernel, format) in fixtures!("tcp_send_reset") {
            let names = format.value_names("reason");
            let reason = |value| names.get(&value).map(String::as_str);
            if ["5.10", "6.1"].contains(&kernel) {
                assert!(names.is_empty(), "{kernel}");
                continue;
            }
            assert_eq!(names.len(), 26, "{kernel}");
            assert_eq!(reason(0), Some("NOT_SPECIFIED"), "{kernel}");
            assert_eq!(reason(14), Some("TCP_STATE"), "{kernel}");
            assert_eq!(reason(23), Some("MPTCP_RST_EMIDDLEBOX"), "{kernel}");
            assert_eq!(reason(25), Some("MAX"), "{kernel}");
            // Printed as `{ TCP_CLOSE, "TCP_CLOSE" }`: not numbers.
            assert!(format.value_names("state").is_empty(), "{kernel}");
        }
        let states = fixtures!("inet_sock_set_state")[0].1.value_names("newstate");
        assert_eq!(states.get(&7).map(String::as_str), Some("TCP_CLOSE"));

        // 6.10 had other numbers from 11 on.
        let v6_10 = "field:int reason;offset:28;size:4;signed:0;\nprint fmt: \"reason=%s\", \
                     __print_symbolic(REC->reason, { 10, \"INVALID_SYN\" }, { 11, \"MPTCP_RST_EUNSPEC\" }, { \
                     0x12, \"ERROR\" })";
        let names = TracepointFormat::parse(v6_10).unwrap().value_names("reason");
        let expected = [(10, "INVALID_SYN"), (11, "MPTCP_RST_EUNSPEC"), (18, "ERROR")];
        assert_eq!(names, expected.map(|(value, name)| (value, name.to_owned())).into());
    }

    #[test]
    fn rejects_malformed_text() {
        let refusal = |text: &str| format!("{:#}", TracepointFormat::parse(text).unwrap_err());
        assert_eq!(refusal(""), "the format file of a tracepoint has no fields");
        assert_eq!(
            refusal("\tfield:int x;\toffset:eight;\tsize:4;"),
            "cannot parse the field of a tracepoint: \"field:int x;\\toffset:eight;\\tsize:4;\""
        );
        assert!(TracepointFormat::parse("field:;offset:8;size:4;").is_err());
        assert!(TracepointFormat::parse("field:[4];offset:8;size:4;").is_err());
    }

    #[test]
    fn survives_every_truncation() {
        let text = include_str!("../../fixtures/format/6.18/tcp_send_reset");
        for length in 0..=text.len() {
            if let Ok(format) = TracepointFormat::parse(&text[..length]) {
                format.record_offsets();
                format.value_names("reason");
            }
        }
    }
}
