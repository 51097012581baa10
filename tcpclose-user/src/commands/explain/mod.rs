//! `tcpclose explain`: what each cause, each kind of lingering socket and each finding means, how it comes
//! about, what to check and what to change.
//!
//! Each page is a file of one screen, printed as it is. Its first line is `name: one sentence`, and these
//! lines make up the list. Backticks enclose commands, and fields and values of the output as the schema
//! names them.

use std::io::{self, Write};

use anyhow::Result;

mod findings;

/// One page: its name, and its text.
type Page = (&'static str, &'static str);

macro_rules! pages {
    ($($name:literal)*) => {
        &[$(($name, include_str!(concat!($name, ".txt")))),*]
    };
}

/// The causes, in the order of [`Cause`](crate::event::Cause).
const CAUSES: &[Page] = pages! {
    "no_listener" "refused" "unread_data" "linger_zero" "data_after_close" "disconnect" "keepalive_timeout"
    "retransmit_timeout" "connect_timeout" "user_timeout" "fin_timeout" "connect_abandoned" "accept_overflow"
    "listener_closed" "timewait" "invalid_segment" "destroyed" "out_of_memory" "peer_reset"
    "suspected_injection" "host_unreachable" "unknown"
};

/// The kinds of lingering sockets, but for `unknown`, which is among the causes.
const KINDS: &[Page] = pages! { "leaked" "unread" "unaccepted" "unacked" "peer_not_reading" "half_closed" };

fn pages() -> impl Iterator<Item = &'static Page> {
    CAUSES.iter().chain(KINDS)
}

/// The names of all pages.
fn names() -> Vec<&'static str> {
    pages().chain(findings::PAGES).map(|(name, _)| *name).collect()
}

/// Writes the page of that name, or the list of all of them, to the standard output.
///
/// # Errors
/// The standard output cannot be written. It is no error if the reader has closed the pipe: `tcpclose explain
/// | head -1`.
pub fn print(name: Option<&str>) -> Result<()> {
    match write(&mut io::stdout().lock(), name) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn write(out: &mut impl Write, name: Option<&str>) -> io::Result<()> {
    let page = name.and_then(|name| pages().chain(findings::PAGES).find(|page| page.0 == name));
    out.write_all(page.map_or_else(list, |(_, text)| (*text).to_owned()).as_bytes())?;
    out.flush()
}

/// The first lines of all pages, aligned, and how to see a page.
fn list() -> String {
    let width = names().into_iter().map(str::len).max().unwrap_or_default();
    let table = |pages: &[Page]| {
        let lines = pages.iter().map(|page| format!("{:<width$}  {}\n", page.0, meaning(page)));
        lines.collect::<Vec<_>>().concat()
    };
    format!(
        "Causes:\n{}\nKinds of lingering sockets:\n{}\nFindings:\n{}\n\
         `tcpclose explain NAME`: how it comes about, what to check, what to change.\n",
        table(CAUSES),
        table(KINDS),
        table(findings::PAGES)
    )
}

/// The sentence in the first line of a page.
fn meaning((_, text): &Page) -> &'static str {
    let first = text.lines().next().unwrap_or_default();
    first.split_once(": ").map_or("", |(_, meaning)| meaning)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use clap::{Parser as _, ValueEnum as _, error::ErrorKind};
    use serde_json::Value;

    use super::*;
    use crate::{
        cli::{Cli, Command},
        event::{Cause, LingeringKind, schema::schema},
    };

    const LINES: usize = 24;
    const COLUMNS: usize = 80;
    const PARTS: [&str; 4] = ["What", "How", "Check", "Change"];

    /// Sysctls of modules, which exist only after a firewall rule has loaded connection tracking.
    const SYSCTLS_OF_MODULES: [&str; 1] = ["net.netfilter.nf_conntrack_tcp_be_liberal"];

    /// Commands of one word. Everything else in backticks is part of the output.
    const COMMANDS: [&str; 1] = ["execsnoop"];

    #[test]
    fn every_cause_and_kind_has_its_page() {
        let causes: Vec<_> = Cause::value_variants().iter().map(ToString::to_string).collect();
        assert_eq!(CAUSES.iter().map(|(name, _)| *name).collect::<Vec<_>>(), causes);
        let kinds: BTreeSet<_> = LingeringKind::value_variants().iter().map(ToString::to_string).collect();
        let pages: BTreeSet<_> = names().into_iter().map(str::to_owned).collect();
        assert!(kinds.is_subset(&pages), "{kinds:?}");
        assert!(KINDS.iter().all(|(name, _)| kinds.contains(*name)), "a page of no kind");
    }

    /// The words of a text that begin with `prefix`. They consist of letters, digits, and characters that
    /// `also` accepts.
    fn words<'a>(text: &'a str, prefix: &'a str, also: fn(char) -> bool) -> impl Iterator<Item = &'a str> {
        text.split(move |c: char| !(c.is_ascii_alphanumeric() || also(c)))
            .map(move |word| word.trim_end_matches(also))
            .filter(move |word| word.starts_with(prefix))
    }

    #[test]
    fn begins_with_its_name_and_one_sentence() {
        for page @ (name, text) in pages() {
            let meaning = meaning(page);
            assert!(text.starts_with(&format!("{name}: ")), "{name}");
            assert!(meaning.starts_with(|c: char| c.is_ascii_uppercase()), "{name}: {meaning}");
            assert!(meaning.ends_with('.') && !meaning.contains(". "), "{name}: {meaning}");
            assert!(text.ends_with(".\n") && !text.ends_with("\n\n"), "{name}: how it ends");
        }
    }

    #[test]
    fn has_the_same_parts_in_the_same_order() {
        for (page, text) in pages() {
            let mut found = Vec::new();
            for line in text.lines().skip(1).filter(|line| !line.is_empty()) {
                let (label, rest) = line.split_at(8);
                assert!(!rest.is_empty() && !rest.starts_with(' '), "{page}: {line}");
                if !label.trim().is_empty() {
                    found.push(label.trim());
                }
            }
            assert_eq!(found, PARTS, "{page}");
        }
    }

    #[test]
    fn fits_a_screen() {
        let list = list();
        let mut texts: Vec<(&str, &str)> = pages().copied().collect();
        texts.push(("list", &list));
        for (name, text) in texts {
            assert!(
                name == "list" || text.lines().count() <= LINES,
                "{name}: {} lines",
                text.lines().count()
            );
            for line in text.lines() {
                assert!(line.chars().count() <= COLUMNS, "{name}: {line}");
                assert_eq!(line, line.trim_end(), "{name}: white space at the end");
            }
        }
    }

    #[test]
    fn lists_all_of_them_aligned() {
        let list = list();
        for page in pages().chain(findings::PAGES) {
            let line = format!("\n{:<19}  {}\n", page.0, meaning(page));
            assert!(list.contains(&line), "{line}{list}");
        }
    }

    #[test]
    fn names_sysctls_that_this_kernel_has() {
        let mut seen = 0;
        for (page, text) in pages() {
            for name in words(text, "net.", |c| matches!(c, '.' | '_')) {
                seen += 1;
                let path = Path::new("/proc/sys").join(name.replace('.', "/"));
                assert!(SYSCTLS_OF_MODULES.contains(&name) || path.exists(), "{page}: {name}");
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
        for (page, text) in pages() {
            for name in ["Tcp", "Icmp"].into_iter().flat_map(|prefix| words(text, prefix, |_| false)) {
                seen += 1;
                assert!(counters.contains(name), "{page}: {name}");
            }
        }
        assert!(seen > 20, "{seen} counters found");
    }

    /// Names of fields, and values of fields, anywhere in the schema.
    fn collect_names(node: &Value, fields: &mut BTreeSet<String>, values: &mut BTreeSet<String>) {
        match node {
            Value::Object(map) => {
                if let Some(Value::Object(properties)) = map.get("properties") {
                    fields.extend(properties.keys().cloned());
                }
                values.extend(map.get("const").and_then(Value::as_str).map(str::to_owned));
                let list = map.get("enum").and_then(Value::as_array).into_iter().flatten();
                values.extend(list.filter_map(Value::as_str).map(str::to_owned));
                map.values().for_each(|node| collect_names(node, fields, values));
            }
            Value::Array(list) => list.iter().for_each(|node| collect_names(node, fields, values)),
            _ => {}
        }
    }

    #[test]
    fn names_fields_and_values_that_are_written() {
        let (mut fields, mut values) = (BTreeSet::new(), BTreeSet::new());
        collect_names(&schema().to_value(), &mut fields, &mut values);
        let mut seen = BTreeSet::new();
        for (page, text) in pages() {
            assert_eq!(text.matches('`').count() % 2, 0, "{page}: a backtick without its pair");
            for quoted in text.split('`').skip(1).step_by(2) {
                assert!(!quoted.contains('\n'), "{page}: {quoted} goes over the end of a line");
                if let Some((field, value)) = quoted.split_once(": ") {
                    assert!(fields.contains(field) && values.contains(value), "{page}: {quoted}");
                } else if !quoted.contains(' ') && !COMMANDS.contains(&quoted) {
                    assert!(fields.contains(quoted) || values.contains(quoted), "{page}: {quoted}");
                    seen.insert(quoted);
                }
            }
        }
        for name in ["idle_ms", "last_data", "close_wait_ms", "ttl", "handshake_ttl", "stack", "opener"] {
            assert!(seen.contains(name), "{name} helps nowhere");
        }
    }

    #[test]
    fn refers_to_pages_that_exist() {
        for (page, text) in pages() {
            for rest in text.split("tcpclose explain ").skip(1) {
                let name = rest.split('`').next().unwrap_or_default();
                assert!(names().contains(&name) && name != *page, "{page}: {name}");
            }
        }
    }

    #[test]
    fn takes_a_name_or_none() {
        for (args, expected) in [
            (&["tcpclose", "explain"][..], None),
            (&["tcpclose", "explain", "refused"], Some("refused")),
            (&["tcpclose", "explain", "peer_not_reading"], Some("peer_not_reading")),
        ] {
            let Some(Command::Explain { name }) = Cli::parse_from(args).command else { panic!("{args:?}") };
            assert_eq!(name.as_deref(), expected);
            let mut out = Vec::new();
            write(&mut out, expected).expect("memory");
            let out = String::from_utf8(out).expect("text");
            match expected {
                Some(name) => {
                    assert!(out.starts_with(&format!("{name}: ")) && out.contains("\nChange  "), "{out}");
                }
                None => assert_eq!(out, list()),
            }
        }
    }

    #[test]
    fn an_unknown_name_is_a_usage_error_that_helps() {
        let error = Cli::try_parse_from(["tcpclose", "explain", "peer_rest"]).expect_err("no such page");
        assert_eq!((error.kind(), error.exit_code()), (ErrorKind::InvalidValue, 2));
        assert!(error.to_string().contains("similar value exists: 'peer_reset'"), "{error}");
    }
}
