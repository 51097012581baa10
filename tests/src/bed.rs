//! Where a test takes place: one or two namespaces, a client and a server in them, and what is true of the
//! connections between the two.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context, Result};
use nix::unistd::getuid;
use serde_json::{Value, json};

use crate::{
    expect::{but, calls, known, one_of},
    features::Feature,
    netns::{DEVICE, Namespace},
    peer::Peer,
};

/// What lies between client and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// Nothing: both are in one namespace. The kernel then does the work of the receiving end in the context
    /// of the sending process.
    Loopback,
    /// A veth pair between two namespaces.
    Veth,
}

/// What addresses the sockets have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
    /// IPv4 addresses on IPv6 sockets.
    Mapped,
}

/// The way from client to server.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// What lies between.
    pub wire: Wire,
    /// What addresses they have.
    pub family: Family,
}

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It connects.
    Client,
    /// It accepts.
    Server,
}

/// Two processes that can reach each other and nobody else.
#[derive(Debug)]
pub struct Bed {
    // The peers before the namespaces: dropped in this order.
    client: Peer,
    server: Peer,
    client_net: Namespace,
    /// None if it is the client's.
    server_net: Option<Namespace>,
    route: Route,
}

/// A connection between them, or an attempt at one, and what was sent over it.
#[derive(Clone, Debug)]
pub struct Connection {
    client: SocketAddr,
    server: SocketAddr,
    client_sent: u64,
    server_sent: u64,
    /// Whoever sent last, as far as one can tell: the kernel's clock for it ticks once in some milliseconds.
    last: Option<(Side, Tick)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tick {
    /// Nobody else ever sent.
    Sure,
    /// The other one sent too, maybe within the same tick.
    Unsure,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Server => "server",
        })
    }
}

impl Side {
    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

impl Route {
    /// A side's address.
    pub fn address(self, side: Side) -> IpAddr {
        let host = match side {
            Side::Client => 1,
            Side::Server => 2,
        };
        match self.wire {
            Wire::Loopback if self.family == Family::Ipv6 => Ipv6Addr::LOCALHOST.into(),
            Wire::Loopback => Ipv4Addr::LOCALHOST.into(),
            Wire::Veth => self.host(host),
        }
    }

    /// An address on the wire that nobody has.
    pub fn nobody(self) -> IpAddr {
        self.host(99)
    }

    /// An address beyond the server, which knows no way there.
    pub fn nowhere(self) -> IpAddr {
        match self.family {
            Family::Ipv6 => Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 1).into(),
            Family::Ipv4 | Family::Mapped => Ipv4Addr::new(10, 99, 0, 1).into(),
        }
    }

    fn host(self, host: u8) -> IpAddr {
        match self.family {
            Family::Ipv6 => Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, host.into()).into(),
            Family::Ipv4 | Family::Mapped => Ipv4Addr::new(10, 77, 0, host).into(),
        }
    }

    /// How a process on this route writes an address.
    pub fn written(self, address: IpAddr) -> IpAddr {
        match address {
            IpAddr::V4(address) if self.family == Family::Mapped => address.to_ipv6_mapped().into(),
            _ => address,
        }
    }
}

impl Bed {
    /// Makes the namespaces and starts the processes `peer-client` and `peer-server`.
    pub fn new(route: Route) -> Result<Self> {
        Self::with_names(route, "peer-client", "peer-server")
    }

    /// The same with processes of other names.
    pub fn with_names(route: Route, client: &str, server: &str) -> Result<Self> {
        let (client_net, server_net) = match route.wire {
            Wire::Loopback => (Namespace::new()?, None),
            Wire::Veth => {
                let addresses: [&[&str]; 2] =
                    [&["10.77.0.1/24", "fd00:77::1/64"], &["10.77.0.2/24", "fd00:77::2/64"]];
                let [client_net, server_net] = Namespace::pair(addresses)?;
                (client_net, Some(server_net))
            }
        };
        let client = Peer::start(&client_net, client)?;
        let server = Peer::start(server_net.as_ref().unwrap_or(&client_net), server)?;
        Ok(Self { client, server, client_net, server_net, route })
    }

    /// The way from client to server.
    pub fn route(&self) -> Route {
        self.route
    }

    /// The namespaces of this test alone.
    pub fn namespaces(&self) -> impl Iterator<Item = &Namespace> {
        std::iter::once(&self.client_net).chain(&self.server_net)
    }

    /// The namespace of a side.
    pub fn namespace(&self, side: Side) -> &Namespace {
        match side {
            Side::Client => &self.client_net,
            Side::Server => self.server_net.as_ref().unwrap_or(&self.client_net),
        }
    }

    /// The process of a side.
    pub fn peer(&mut self, side: Side) -> &mut Peer {
        match side {
            Side::Client => &mut self.client,
            Side::Server => &mut self.server,
        }
    }

    /// Has the server listen, and returns where.
    pub fn listen(&mut self) -> Result<SocketAddr> {
        let address = self.route.written(self.route.address(Side::Server));
        self.server.ask(&format!("listen {address} 0"))?.get("local")
    }

    /// A connection that the server has not accepted.
    pub fn connect(&mut self) -> Result<Connection> {
        let server = self.listen()?;
        let facts = self.client.ask(&format!("connect {} {}", server.ip(), server.port()))?;
        Ok(Connection::new(facts.get("local")?, server))
    }

    /// An attempt to connect that fails with this error.
    pub fn connect_in_vain(&mut self, address: IpAddr, port: u16, errno: &str) -> Result<Connection> {
        let address = self.route.written(address);
        let facts = self.client.ask_in_vain(&format!("connect {address} {port}"), errno)?;
        Ok(self.attempt(facts.get("local")?, SocketAddr::new(address, port)))
    }

    /// The attempt to connect from a socket that may have lost its address with the attempt, but not its
    /// port.
    pub fn attempt(&self, local: SocketAddr, remote: SocketAddr) -> Connection {
        Connection::new(SocketAddr::new(self.route.address(Side::Client), local.port()), remote)
    }

    /// A connection over which nothing has been sent.
    pub fn idle(&mut self) -> Result<Connection> {
        let connection = self.connect()?;
        self.server.ask("accept")?;
        Ok(connection)
    }

    /// A connection over which a question and an answer have gone.
    pub fn established(&mut self) -> Result<Connection> {
        let mut connection = self.idle()?;
        self.transfer(&mut connection, Side::Client, 1000)?;
        self.transfer(&mut connection, Side::Server, 300)?;
        Ok(connection)
    }

    /// Has a side send and the other receive.
    pub fn transfer(&mut self, connection: &mut Connection, from: Side, bytes: u64) -> Result<()> {
        self.send(connection, from, bytes)?;
        self.peer(from.other()).ask(&format!("receive {bytes}"))?;
        Ok(())
    }

    /// Has a side send.
    pub fn send(&mut self, connection: &mut Connection, from: Side, bytes: u64) -> Result<()> {
        self.peer(from).ask(&format!("send {bytes}"))?;
        connection.note_sent(from, bytes);
        Ok(())
    }

    /// Has whatever the client sends to this address of the wire from now on get lost on it.
    pub fn lose(&self, address: IpAddr) -> Result<()> {
        const NOBODY: &str = "lladdr 02:00:00:00:00:99 nud permanent";
        self.client_net.ip(&[format!("neigh replace {address} dev {DEVICE} {NOBODY}")]).map(drop)
    }

    /// Has whatever a side sends over the wire to the other wait, until it is let go: as if the wire were long.
    pub fn hold(&self, side: Side) -> Result<()> {
        self.set_neighbour(side, "nud incomplete")
    }

    /// Lets go what waits, in order, and what comes after it.
    pub fn release(&self, side: Side) -> Result<()> {
        let shown = self.namespace(side.other()).ip(&[format!("link show {DEVICE}")])?;
        let mut words = shown.split_whitespace().skip_while(|word| *word != "link/ether");
        let hardware = words.nth(1).with_context(|| format!("no hardware address: {shown}"))?;
        self.set_neighbour(side, &format!("lladdr {hardware} nud permanent"))
    }

    /// Sets what a side knows of the way to the other.
    fn set_neighbour(&self, side: Side, what: &str) -> Result<()> {
        let address = self.route.address(side.other());
        self.namespace(side).ip(&[format!("neigh replace {address} dev {DEVICE} {what}")]).map(drop)
    }

    /// The expected `process` of a side.
    pub fn owner(&self, side: Side) -> Result<Value> {
        let peer = match side {
            Side::Client => &self.client,
            Side::Server => &self.server,
        };
        Ok(json!({
            "pid": peer.pid(),
            "tid": peer.pid(),
            "comm": peer.name()?,
            "exe": peer.exe()?,
            "uid": getuid().as_raw(),
        }))
    }

    /// The expected `opener` of a side. Without being asked to, the tool sees accepts only where that is for free.
    fn opener(&self, side: Side) -> Result<Value> {
        let opener = |function| -> Result<Value> {
            Ok(json!({"process": self.owner(side)?, "stack": user_stack(function)}))
        };
        match side {
            Side::Client => opener("peer_connects_socket_outer"),
            Side::Server if Feature::FunctionReturns.is_here() => opener("peer_accepts_socket_outer"),
            Side::Server => Ok(Value::Null),
        }
    }

    /// What `connection` says on every line of a side.
    fn identity(&self, connection: &Connection, side: Side) -> Value {
        let (local, remote) = match side {
            Side::Client => (connection.client, connection.server),
            Side::Server => (connection.server, connection.client),
        };
        json!({
            "family": if local.is_ipv4() { "ipv4" } else { "ipv6" },
            "local": endpoint(local),
            "remote": endpoint(remote),
            "netns": self.namespace(side).inode(),
            "role": side.to_string(),
        })
    }

    /// The close line of a side: what is true of every close, and these things about this one.
    ///
    /// Who acted on the socket is known by that. Who did not is known by having obtained it, or by holding
    /// it, or by closing the dead socket later.
    pub fn close_line(&self, connection: &Connection, side: Side, this: Value) -> Result<Value> {
        let (sent, received) = match side {
            Side::Client => (connection.client_sent, connection.server_sent),
            Side::Server => (connection.server_sent, connection.client_sent),
        };
        let process = if this["trigger"].is_null() {
            let obtained = match side {
                Side::Client => json!("connect"),
                Side::Server => json!("accept"),
            };
            let found = [obtained, json!("descriptors"), json!("syscall")];
            but(self.any_thread(side)?, json!({"attribution": one_of(&found)}))
        } else {
            json!({"attribution": "syscall"})
        };
        let line = json!({
            "event": "close",
            "connection": {
                "opened": known(),
                "age_ms": known(),
                "bytes_sent": sent,
                "bytes_received": received,
                // On a busy host a probe may go although nothing is lost: `Trace::finish` compares the sum.
                "retransmits": known(),
                "rtt_us": known(),
            },
            "trigger": null,
            "signal": null,
            "cause": null,
            "close_wait_ms": null,
            "stack": null,
        });
        let line = but(line, self.common(connection, side)?);
        Ok(but(but(line, json!({ "process": process })), this))
    }

    /// The reset line of a side, likewise.
    pub fn reset_line(&self, connection: &Connection, side: Side, this: Value) -> Result<Value> {
        let mut line = but(json!({"event": "reset"}), self.common(connection, side)?);
        if this["direction"] == "received" {
            line = but(line, json!({"process": self.any_thread(side)?}));
        }
        Ok(but(line, this))
    }

    /// The line that tells of a side's end that lingers, likewise.
    pub fn lingering_line(&self, connection: &Connection, side: Side, this: Value) -> Result<Value> {
        let line = json!({
            "event": "lingering",
            "connection": self.identity(connection, side),
            "process": but(self.owner(side)?, self.any_thread(side)?),
            "since": known(),
            "unread_bytes": 0,
            "opener": self.opener(side)?,
        });
        Ok(but(line, this))
    }

    /// The lingering line of a side whose socket was not watched from its beginning, likewise.
    pub fn listed_line(&self, connection: &Connection, side: Side, this: Value) -> Result<Value> {
        let line = json!({
            "event": "lingering",
            "connection": but(self.identity(connection, side), json!({"opened": null, "age_ms": null, "cookie": known()})),
            "process": but(self.owner(side)?, json!({"tid": null, "attribution": "procfs"})),
            "since": null,
            "opener": null,
        });
        Ok(but(line, this))
    }

    /// What is expected of `process` where nobody need know which of its threads it was.
    fn any_thread(&self, side: Side) -> Result<Value> {
        Ok(json!({"tid": one_of(&[json!(null), self.owner(side)?["tid"].clone()])}))
    }

    /// What close and reset lines have in common.
    fn common(&self, connection: &Connection, side: Side) -> Result<Value> {
        let (idle, last_data) = match connection.last {
            None => (json!(null), json!(null)),
            Some((last, tick)) => {
                let name = json!(if last == side { "sent" } else { "received" });
                (known(), if tick == Tick::Sure { name } else { one_of(&[name, json!(null)]) })
            }
        };
        Ok(json!({
            "connection": self.identity(connection, side),
            "process": self.owner(side)?,
            "idle_ms": idle,
            "last_data": last_data,
            "opener": self.opener(side)?,
        }))
    }
}

impl Connection {
    /// Of these addresses, nothing sent yet.
    pub fn new(client: SocketAddr, server: SocketAddr) -> Self {
        let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        Self { client: plain(client), server: plain(server), client_sent: 0, server_sent: 0, last: None }
    }

    /// A side's address.
    pub fn address(&self, side: Side) -> SocketAddr {
        match side {
            Side::Client => self.client,
            Side::Server => self.server,
        }
    }

    /// Has a side have sent so much.
    pub fn note_sent(&mut self, from: Side, bytes: u64) {
        match from {
            Side::Client => self.client_sent += bytes,
            Side::Server => self.server_sent += bytes,
        }
        let alone = self.client_sent == 0 || self.server_sent == 0;
        self.last = Some((from, if alone { Tick::Sure } else { Tick::Unsure }));
    }
}

/// How an address stands in a line.
pub fn endpoint(address: SocketAddr) -> Value {
    json!({"address": address.ip(), "port": address.port()})
}

/// The expected stack, when user stacks are taken, of an action by this function of a peer.
pub fn user_stack(function: &str) -> Value {
    json!({"user": calls(function), "kernel": null})
}
