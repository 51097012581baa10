//! `tcpclose explain`: what each cause means, how it comes about, what to check and what to change.
//!
//! One file a cause, written as it is printed: a screenful, of which the first line is `NAME: one sentence`. The list
//! is made of these first lines. Backticks hold commands, and names and values of the output as the schema knows them.

use std::io::{self, Write};

use clap::ValueEnum as _;

use crate::event::Cause;

/// Writes the text for `cause`, or the list of all of them, to stdout.
pub fn print(cause: Option<Cause>) -> io::Result<()> {
    match write(&mut io::stdout().lock(), cause) {
        // A reader that has seen enough: `tcpclose explain | head -1`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

fn write(out: &mut impl Write, cause: Option<Cause>) -> io::Result<()> {
    out.write_all(cause.map_or_else(list, |cause| text(cause).to_owned()).as_bytes())?;
    out.flush()
}

/// Every cause with its meaning, one a line, and how to learn more.
fn list() -> String {
    let headlines: Vec<_> = Cause::value_variants().iter().map(|&cause| headline(cause)).collect();
    let width = headlines.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let mut lines: Vec<_> =
        headlines.iter().map(|(name, meaning)| format!("{name:<width$}  {meaning}")).collect();
    lines.push("\n`tcpclose explain CAUSE`: how it comes about, what to check, what to change.\n".to_owned());
    lines.join("\n")
}

/// The name of a cause and its meaning in one sentence.
fn headline(cause: Cause) -> (&'static str, &'static str) {
    let first = text(cause).lines().next().unwrap_or_default();
    first.split_once(": ").unwrap_or((first, ""))
}

fn text(cause: Cause) -> &'static str {
    match cause {
        Cause::NoListener => include_str!("no_listener.txt"),
        Cause::Refused => include_str!("refused.txt"),
        Cause::UnreadData => include_str!("unread_data.txt"),
        Cause::LingerZero => include_str!("linger_zero.txt"),
        Cause::DataAfterClose => include_str!("data_after_close.txt"),
        Cause::Disconnect => include_str!("disconnect.txt"),
        Cause::KeepaliveTimeout => include_str!("keepalive_timeout.txt"),
        Cause::RetransmitTimeout => include_str!("retransmit_timeout.txt"),
        Cause::ConnectTimeout => include_str!("connect_timeout.txt"),
        Cause::UserTimeout => include_str!("user_timeout.txt"),
        Cause::FinTimeout => include_str!("fin_timeout.txt"),
        Cause::ConnectAbandoned => include_str!("connect_abandoned.txt"),
        Cause::AcceptOverflow => include_str!("accept_overflow.txt"),
        Cause::ListenerClosed => include_str!("listener_closed.txt"),
        Cause::Timewait => include_str!("timewait.txt"),
        Cause::InvalidSegment => include_str!("invalid_segment.txt"),
        Cause::Destroyed => include_str!("destroyed.txt"),
        Cause::OutOfMemory => include_str!("out_of_memory.txt"),
        Cause::PeerReset => include_str!("peer_reset.txt"),
        Cause::SuspectedInjection => include_str!("suspected_injection.txt"),
        Cause::HostUnreachable => include_str!("host_unreachable.txt"),
        Cause::Unknown => include_str!("unknown.txt"),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use clap::{Parser as _, error::ErrorKind};
    use serde_json::Value;

    use super::*;
    use crate::{
        cli::{Cli, Command},
        event::schema::schema,
    };

    const LINES: usize = 24;
    const COLUMNS: usize = 80;
    const PARTS: [&str; 4] = ["What", "How", "Check", "Change"];

    /// Sysctls of modules: there only once a firewall rule has loaded connection tracking.
    const SYSCTLS_OF_MODULES: [&str; 1] = ["net.netfilter.nf_conntrack_tcp_be_liberal"];

    /// Commands of one word: what else stands in backticks is part of the output.
    const COMMANDS: [&str; 1] = ["execsnoop"];

    fn texts() -> impl Iterator<Item = (Cause, &'static str)> {
        Cause::value_variants().iter().map(|&cause| (cause, text(cause)))
    }

    /// Words of a text that begin like `prefix`, as long as `also` goes on.
    fn words<'a>(text: &'a str, prefix: &'a str, also: fn(char) -> bool) -> impl Iterator<Item = &'a str> {
        text.split(move |c: char| !(c.is_ascii_alphanumeric() || also(c)))
            .map(move |word| word.trim_end_matches(also))
            .filter(move |word| word.starts_with(prefix))
    }

    #[test]
    fn begins_with_its_name_and_one_sentence() {
        for (cause, text) in texts() {
            let (name, meaning) = headline(cause);
            assert_eq!(name, cause.to_string());
            assert!(meaning.starts_with(|c: char| c.is_ascii_uppercase()), "{name}: {meaning}");
            assert!(meaning.ends_with('.') && !meaning.contains(". "), "{name}: {meaning}");
            assert!(text.ends_with(".\n") && !text.ends_with("\n\n"), "{name}: how it ends");
        }
    }

    #[test]
    fn has_the_same_parts_in_the_same_order() {
        for (cause, text) in texts() {
            let mut found = Vec::new();
            for line in text.lines().skip(1).filter(|line| !line.is_empty()) {
                let (label, rest) = line.split_at(8);
                assert!(!rest.is_empty() && !rest.starts_with(' '), "{cause}: {line}");
                if !label.trim().is_empty() {
                    found.push(label.trim());
                }
            }
            assert_eq!(found, PARTS, "{cause}");
        }
    }

    #[test]
    fn fits_a_screen() {
        let list = list();
        for text in texts().map(|(_, text)| text).chain([list.as_str()]) {
            let name = text.lines().next().expect("a first line");
            assert!(text.lines().count() <= LINES, "{name}: {} lines", text.lines().count());
            for line in text.lines() {
                assert!(line.chars().count() <= COLUMNS, "{name}: {line}");
                assert_eq!(line, line.trim_end(), "{name}: white space at the end");
            }
        }
    }

    #[test]
    fn lists_all_of_them_aligned() {
        let list = list();
        let mut lines = list.lines();
        for (cause, line) in Cause::value_variants().iter().zip(&mut lines) {
            let (name, meaning) = headline(*cause);
            assert_eq!(
                line.split_once(' ').map(|(name, rest)| (name, rest.trim_start())),
                Some((name, meaning))
            );
            assert_eq!(line.find(meaning), Some("suspected_injection  ".len()), "{line}");
        }
        assert_eq!(lines.next(), Some(""));
    }

    #[test]
    fn names_sysctls_that_this_kernel_has() {
        let mut seen = 0;
        for (cause, text) in texts() {
            for name in words(text, "net.", |c| matches!(c, '.' | '_')) {
                seen += 1;
                let path = Path::new("/proc/sys").join(name.replace('.', "/"));
                assert!(SYSCTLS_OF_MODULES.contains(&name) || path.exists(), "{cause}: {name}");
            }
        }
        assert!(seen > 20, "{seen} sysctls found");
    }

    #[test]
    fn names_counters_that_this_kernel_has() {
        // A line of names, `Prefix: Name Name …`, then one of numbers; nstat joins prefix and name.
        let mut counters = BTreeSet::new();
        for file in ["/proc/net/netstat", "/proc/net/snmp"] {
            for line in fs::read_to_string(file).expect("readable").lines().step_by(2) {
                let (prefix, names) = line.split_once(": ").expect("a prefix");
                counters.extend(names.split(' ').map(|name| format!("{prefix}{name}")));
            }
        }
        let mut seen = 0;
        for (cause, text) in texts() {
            for name in ["Tcp", "Icmp"].into_iter().flat_map(|prefix| words(text, prefix, |_| false)) {
                seen += 1;
                assert!(counters.contains(name), "{cause}: {name}");
            }
        }
        assert!(seen > 20, "{seen} counters found");
    }

    /// Names of fields, and values of fields, anywhere in the schema.
    fn names(node: &Value, fields: &mut BTreeSet<String>, values: &mut BTreeSet<String>) {
        match node {
            Value::Object(map) => {
                if let Some(Value::Object(properties)) = map.get("properties") {
                    fields.extend(properties.keys().cloned());
                }
                values.extend(map.get("const").and_then(Value::as_str).map(str::to_owned));
                let list = map.get("enum").and_then(Value::as_array).into_iter().flatten();
                values.extend(list.filter_map(Value::as_str).map(str::to_owned));
                map.values().for_each(|node| names(node, fields, values));
            }
            Value::Array(list) => list.iter().for_each(|node| names(node, fields, values)),
            _ => {}
        }
    }

    #[test]
    fn names_fields_and_values_that_are_written() {
        let (mut fields, mut values) = (BTreeSet::new(), BTreeSet::new());
        names(&schema().to_value(), &mut fields, &mut values);
        let mut seen = BTreeSet::new();
        for (cause, text) in texts() {
            assert_eq!(text.matches('`').count() % 2, 0, "{cause}: a backtick without its pair");
            for quoted in text.split('`').skip(1).step_by(2) {
                assert!(!quoted.contains('\n'), "{cause}: {quoted} goes over the end of a line");
                if let Some((field, value)) = quoted.split_once(": ") {
                    assert!(fields.contains(field) && values.contains(value), "{cause}: {quoted}");
                } else if !quoted.contains(' ') && !COMMANDS.contains(&quoted) {
                    assert!(fields.contains(quoted) || values.contains(quoted), "{cause}: {quoted}");
                    seen.insert(quoted);
                }
            }
        }
        for name in ["idle_ms", "last_data", "close_wait_ms", "ttl", "handshake_ttl", "stack", "opener"] {
            assert!(seen.contains(name), "{name} helps nowhere");
        }
    }

    #[test]
    fn sends_the_reader_to_causes_that_exist() {
        for (cause, text) in texts() {
            for rest in text.split("tcpclose explain ").skip(1) {
                let name = rest.split('`').next().unwrap_or_default();
                assert!(Cause::from_str(name, false).is_ok_and(|other| other != cause), "{cause}: {name}");
            }
        }
    }

    #[test]
    fn takes_a_cause_or_none() {
        for (args, expected) in [
            (&["tcpclose", "explain"][..], None),
            (&["tcpclose", "explain", "refused"], Some(Cause::Refused)),
        ] {
            let Some(Command::Explain { cause }) = Cli::parse_from(args).command else { panic!("{args:?}") };
            assert_eq!(cause, expected);
            let mut out = Vec::new();
            write(&mut out, cause).expect("memory");
            assert_eq!(
                String::from_utf8(out).expect("text"),
                expected.map_or_else(list, |c| text(c).to_owned())
            );
        }
    }

    #[test]
    fn an_unknown_name_is_a_usage_error_that_helps() {
        let error = Cli::try_parse_from(["tcpclose", "explain", "peer_rest"]).expect_err("no such cause");
        assert_eq!((error.kind(), error.exit_code()), (ErrorKind::InvalidValue, 2));
        assert!(error.to_string().contains("similar value exists: 'peer_reset'"), "{error}");
    }
}
