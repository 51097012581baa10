//! What the processes of `src/bin/crowd` do, and what they say about it: the truth to compare many lines with.

use std::{
    net::{Ipv4Addr, SocketAddr},
    str::FromStr,
};

use anyhow::{Context, Error, Result, bail};

use crate::{bed::Side, fewer};

/// Clients, each a process with a listener of its own to connect to.
pub const CLIENTS: u8 = 10;
/// Processes that share a listener.
pub const WORKERS: u8 = 2;
/// How often each client does each kind of thing, where there is time for so many.
const ROUNDS: u16 = 87;
/// Where a client's connections come from: one port for each, in order.
pub const FIRST_PORT: u16 = 10_000;
/// Where nobody listens.
pub const CLOSED_PORT: u16 = 7;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident,)*) => {
        /// How a connection ends.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind {
            $($(#[$doc])* $kind,)*
        }

        impl Kind {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$kind),*];
        }

        impl FromStr for Kind {
            type Err = Error;

            fn from_str(name: &str) -> Result<Self> {
                match name {
                    $(stringify!($kind) => Ok(Self::$kind),)*
                    _ => bail!("there is no kind {name}"),
                }
            }
        }
    };
}
kinds! {
    /// The client closes first.
    ClientCloses,
    /// The server closes first.
    ServerCloses,
    /// The client shuts down for writing, and later closes.
    ClientShutsDown,
    /// The client closes without lingering.
    ClientResets,
    /// The client closes with unread data.
    ClientReadsNot,
    /// A process that connected exits.
    ClientExits,
    /// A process that connected is killed.
    ClientIsKilled,
    /// Nobody listens.
    Refused,
    /// The server passes the connection to another process, which closes it first.
    ReceiverCloses,
    /// The server passes the connection to another process, which sits idle while the client resets it.
    ReceiverIsReset,
    /// The server forks and closes, and its child closes last, but before the client.
    ChildCloses,
    /// The process that connected exits, and its child sits idle while the server resets the connection.
    HeirIsReset,
}

impl Kind {
    /// Of the connection that comes from a port.
    pub fn of(port: u16) -> Self {
        Self::ALL[usize::from(port - FIRST_PORT) % Self::ALL.len()]
    }
}

/// How often each client does each kind of thing.
fn rounds() -> u16 {
    ROUNDS / fewer()
}

/// The ports that a client connects from.
pub fn ports() -> impl Iterator<Item = u16> {
    let rounds = rounds();
    let kinds = Kind::ALL.iter().flat_map(move |_| 0..rounds);
    kinds.zip(FIRST_PORT..).map(|(_, port)| port)
}

/// How many connections there are in all.
pub fn connections() -> usize {
    ports().count() * usize::from(CLIENTS)
}

/// A client's address.
pub fn client(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 2, number)
}

/// The address that a client connects to.
pub fn server(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 1, number)
}

/// What a process says before it acts on an end of a connection, or lets it be acted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The process that has this end alone.
    pub pid: u32,
    /// Which end.
    pub side: Side,
    /// What is to happen.
    pub kind: Kind,
    /// This end's address.
    pub local: SocketAddr,
    /// The other end's.
    pub remote: SocketAddr,
}

impl Claim {
    /// As a line.
    pub fn written(&self) -> String {
        let Self { pid, side, kind, local, remote } = self;
        format!("{pid} {side} {kind:?} {local} {remote}\n")
    }

    /// From such a line.
    pub fn parse(line: &str) -> Result<Self> {
        let mut words = line.split(' ');
        let mut next = || words.next().with_context(|| format!("too short: {line}"));
        Ok(Self {
            pid: next()?.parse()?,
            side: match next()? {
                "client" => Side::Client,
                "server" => Side::Server,
                other => bail!("there is no side {other}"),
            },
            kind: next()?.parse()?,
            local: next()?.parse()?,
            remote: next()?.parse()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Claim, FIRST_PORT, Kind, ports};
    use crate::bed::Side;

    #[test]
    fn claims_are_read_as_written() {
        let claim = Claim {
            pid: 1,
            side: Side::Server,
            kind: Kind::Refused,
            local: "127.0.0.1:80".parse().unwrap(),
            remote: "127.0.0.2:81".parse().unwrap(),
        };
        assert_eq!(Claim::parse(claim.written().trim_end()).unwrap(), claim);
    }

    #[test]
    fn every_kind_has_as_many_ports() {
        for kind in Kind::ALL {
            assert_eq!(ports().filter(|port| Kind::of(*port) == *kind).count(), usize::from(super::rounds()));
        }
        assert_eq!(ports().next(), Some(FIRST_PORT));
    }
}
