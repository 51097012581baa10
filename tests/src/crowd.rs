//! What the processes of `src/bin/crowd` do, and the claims that they print: the truth that a large number of
//! lines is compared with.

use std::{
    net::{Ipv4Addr, SocketAddr},
    str::FromStr,
};

use anyhow::{Context, Error, Result, bail};

use crate::{bed::Side, fewer};

/// Number of client processes. Each connects to its own listener.
pub const CLIENTS: u8 = 10;
/// Number of processes that share a listener.
pub const WORKERS: u8 = 2;
/// Number of connections of each kind per client, on a machine of full speed.
const ROUNDS: u16 = 87;
/// The local port of a client's first connection; each connection has the next one.
pub const FIRST_PORT: u16 = 10_000;
/// A port without a listener.
pub const CLOSED_PORT: u16 = 7;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident,)*) => {
        /// The way in which a connection ends.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind {
            $($(#[$doc])* $kind,)*
        }

        impl Kind {
            /// All kinds.
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
    /// The client shuts down the write direction, and closes later.
    ClientShutsDown,
    /// The client closes with a linger time of zero.
    ClientResets,
    /// The client closes with unread data.
    ClientReadsNot,
    /// A process that connected exits.
    ClientExits,
    /// A process that connected is killed.
    ClientIsKilled,
    /// There is no listener.
    Refused,
    /// The server passes the connection to another process, which closes first.
    ReceiverCloses,
    /// The server passes the connection to another process, which is idle when the client resets it.
    ReceiverIsReset,
    /// The server forks and closes; its child closes last, but before the client.
    ChildCloses,
    /// The process that connected exits, and its child is idle when the server resets the connection.
    HeirIsReset,
}

impl Kind {
    /// The kind of the connection from this port.
    pub fn of(port: u16) -> Self {
        Self::ALL[usize::from(port - FIRST_PORT) % Self::ALL.len()]
    }
}

/// Number of connections of each kind per client.
fn rounds() -> u16 {
    ROUNDS / fewer()
}

/// The ports that a client connects from.
pub fn ports() -> impl Iterator<Item = u16> {
    let rounds = rounds();
    let kinds = Kind::ALL.iter().flat_map(move |_| 0..rounds);
    kinds.zip(FIRST_PORT..).map(|(_, port)| port)
}

/// The total number of connections.
pub fn connections() -> usize {
    ports().count() * usize::from(CLIENTS)
}

/// The address of a client.
pub fn client(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 2, number)
}

/// The address that a client connects to.
pub fn server(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 1, number)
}

/// What a process states about an end of a connection before it acts on it, or before the other end does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The only process that holds this end.
    pub pid: u32,
    /// The side.
    pub side: Side,
    /// What is going to happen.
    pub kind: Kind,
    /// The local address of this end.
    pub local: SocketAddr,
    /// The remote address of this end.
    pub remote: SocketAddr,
}

impl Claim {
    /// Formats the claim as a line.
    pub fn written(&self) -> String {
        let Self { pid, side, kind, local, remote } = self;
        format!("{pid} {side} {kind:?} {local} {remote}\n")
    }

    /// Parses such a line.
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
