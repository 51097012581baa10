//! The kernel's own TCP counters of a network namespace, which are independent of the tool.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result};

use crate::netns::Namespace;

/// A snapshot of `/proc/net/snmp` and `/proc/net/netstat`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters(BTreeMap<String, i64>);

impl Counters {
    /// Reads the counters of a namespace.
    pub fn read(namespace: &Namespace) -> Result<Self> {
        let text = namespace.inside(|| {
            let read = |file: &str| fs::read_to_string(format!("/proc/thread-self/net/{file}"));
            Ok(read("snmp")? + &read("netstat")?)
        })?;
        Self::parse(&text)
    }

    /// Parses pairs of lines, `Tcp: name name…` and `Tcp: number number…`.
    fn parse(text: &str) -> Result<Self> {
        let lines: Vec<&str> = text.lines().collect();
        let mut counters = BTreeMap::new();
        for pair in lines.chunks(2) {
            let [names, numbers] = pair else { continue };
            let (group, names) = names.split_once(": ").context("a line of names without a group")?;
            let (_, numbers) = numbers.split_once(": ").context("a line of numbers without a group")?;
            for (name, number) in names.split_whitespace().zip(numbers.split_whitespace()) {
                counters.insert(format!("{group}{name}"), number.parse().context(name.to_owned())?);
            }
        }
        Ok(Self(counters))
    }

    /// One counter, by the name that `nstat` uses: `TcpOutRsts`, `TcpExtTCPAbortOnData`.
    pub fn get(&self, name: &str) -> Result<i64> {
        self.0.get(name).copied().with_context(|| format!("this kernel counts no {name}"))
    }

    /// How much a counter grew since `earlier`.
    pub fn since(&self, earlier: &Self, name: &str) -> Result<i64> {
        Ok(self.get(name)? - earlier.get(name)?)
    }
}

#[cfg(test)]
mod tests {
    use super::Counters;

    #[test]
    fn pairs_of_lines_become_counters() {
        let counters =
            Counters::parse("Tcp: MaxConn OutRsts\nTcp: -1 7\nTcpExt: TCPAbortOnData\nTcpExt: 3\n").unwrap();
        assert_eq!(counters.get("TcpMaxConn").unwrap(), -1);
        assert_eq!(counters.get("TcpOutRsts").unwrap(), 7);
        assert_eq!(counters.get("TcpExtTCPAbortOnData").unwrap(), 3);
        assert!(counters.get("TcpNoSuch").is_err());
    }
}
