//! The output of a tool: lines of the load's connections, and the losses that it reports.

use std::io::BufRead;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::tool::Kind;

/// Totals of a tool's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// Closes of the load's connections.
    pub(crate) closes: u64,
    /// Resets of the load's connections.
    pub(crate) resets: u64,
    /// Events that it reports as lost.
    pub(crate) lost: u64,
    /// Stacks that it reports as lost; the events were written.
    pub(crate) lost_stacks: u64,
}

/// The fields of a line of tcpclose that are needed here.
#[derive(Deserialize)]
struct Line<'a> {
    event: &'a str,
    connection: Option<Connection>,
    count: Option<u64>,
    #[serde(rename = "where")]
    place: Option<&'a str>,
}

#[derive(Deserialize)]
struct Connection {
    netns: Option<u64>,
}

impl Totals {
    /// Adds up a tool's output. The load's connections are identified by their network namespace, or, as
    /// tcplife does not report that, by the ports that accepted them.
    pub(crate) fn read(&mut self, kind: Kind, text: impl BufRead, netns: u64, ports: &[u16]) -> Result<()> {
        for line in text.lines() {
            let line = line.context("cannot read its output")?;
            match kind {
                // Messages for users are not events.
                Kind::Tcpclose if !line.starts_with('{') => {}
                Kind::Tcpclose => {
                    let line: Line = serde_json::from_str(&line)
                        .with_context(|| format!("it wrote a line that is no event: {line}"))?;
                    match line {
                        Line { event: "lost", count, place, .. } => {
                            let lost =
                                if place == Some("stacks") { &mut self.lost_stacks } else { &mut self.lost };
                            *lost += count.context("a `lost` line has no count")?;
                        }
                        line => {
                            let found = line.connection.and_then(|connection| connection.netns);
                            if found == Some(netns) {
                                self.closes += u64::from(line.event == "close");
                                self.resets += u64::from(line.event == "reset");
                            }
                        }
                    }
                }
                Kind::Tcplife => {
                    let words: Vec<_> = line.split_whitespace().collect();
                    let is_load = |word: &&str| word.parse().is_ok_and(|port| ports.contains(&port));
                    self.closes += u64::from(words.iter().any(is_load));
                    // libbpf's tools print `lost 12 events on CPU #0!`.
                    if let ["lost" | "Lost", count, ..] = words[..] {
                        self.lost += count.parse().unwrap_or(0);
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_of_the_load_count() {
        let text = concat!(
            r#"{"event":"close","connection":{"netns":7},"stack":null}"#,
            "\n",
            r#"{"event":"reset","connection":{"netns":7}}"#,
            "\n",
            r#"{"event":"close","connection":{"netns":8}}"#,
            "\n",
            r#"{"event":"lost","where":"ring","count":12}"#,
            "\n",
            r#"{"event":"lost","where":"stacks","count":3}"#,
            "\nwarning: no BTF\n",
        );
        let mut totals = Totals::default();
        totals.read(Kind::Tcpclose, text.as_bytes(), 7, &[80]).unwrap();
        assert_eq!(totals, Totals { closes: 1, resets: 1, lost: 12, lost_stacks: 3 });
        assert!(totals.read(Kind::Tcpclose, &b"{\"event\":"[..], 7, &[80]).is_err());
    }

    #[test]
    fn tcplife_is_read_by_its_columns() {
        let text = "PID COMM LADDR LPORT RADDR RPORT TX_KB RX_KB MS\n\
                    12 load 127.0.0.1 4000 127.0.0.2 80 0 0 0.1\n\
                    12 load 127.0.0.2 80 127.0.0.1 4000 0 0 0.1\n\
                    13 sshd 10.0.0.1 22 10.0.0.2 5000 0 0 1\nlost 12 events on CPU #0!\n";
        let mut totals = Totals::default();
        totals.read(Kind::Tcplife, text.as_bytes(), 7, &[80]).unwrap();
        assert_eq!(totals, Totals { closes: 2, resets: 0, lost: 12, lost_stacks: 0 });
    }
}
