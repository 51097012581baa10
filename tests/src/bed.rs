//! The test bed: one or two network namespaces, a client and a server process in them, and the expected facts
//! about the connections between the two.

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

/// The link between client and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// No link: both are in one namespace. The kernel then processes the receiving end in the context of the
    /// sending process.
    Loopback,
    /// A veth pair between two namespaces.
    Veth,
}

/// The address family of the sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
    /// IPv4 addresses on IPv6 sockets.
    Mapped,
}

/// The path from client to server.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// The link.
    pub wire: Wire,
    /// The address family.
    pub family: Family,
}

/// One of the two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The end that connects.
    Client,
    /// The end that accepts.
    Server,
}

/// Two processes that can reach each other and no other host.
#[derive(Debug)]
pub struct Bed {
    // The peers precede the namespaces because fields are dropped in this order.
    client: Peer,
    server: Peer,
    client_net: Namespace,
    /// `None` if the server shares the client's namespace.
    server_net: Option<Namespace>,
    route: Route,
}

/// A connection or a connection attempt, and the bytes sent over it.
#[derive(Clone, Debug)]
pub struct Connection {
    client: SocketAddr,
    server: SocketAddr,
    client_sent: u64,
    server_sent: u64,
    /// The side that sent last, as far as it is known: the kernel's clock for this has a resolution of some
    /// milliseconds.
    last: Option<(Side, Tick)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tick {
    /// The other side has never sent.
    Sure,
    /// The other side has sent too, possibly within the same tick.
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
    /// The opposite side.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

impl Route {
    /// The address of a side.
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

    /// An on-link address that no host has.
    pub fn unused_address(self) -> IpAddr {
        self.host(99)
    }

    /// An address behind the server, to which the server has no route.
    pub fn unreachable_address(self) -> IpAddr {
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

    /// The address as a socket on this route reports it.
    pub fn written(self, address: IpAddr) -> IpAddr {
        match address {
            IpAddr::V4(address) if self.family == Family::Mapped => address.to_ipv6_mapped().into(),
            _ => address,
        }
    }
}

impl Bed {
    /// Creates the namespaces and starts the processes `peer-client` and `peer-server`.
    pub fn new(route: Route) -> Result<Self> {
        Self::with_names(route, "peer-client", "peer-server")
    }

    /// Same as [`Bed::new`], with other process names.
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

    /// The path from client to server.
    pub fn route(&self) -> Route {
        self.route
    }

    /// The namespaces that belong to this test alone.
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

    /// Makes the server listen, and returns its address.
    pub fn listen(&mut self) -> Result<SocketAddr> {
        let address = self.route.written(self.route.address(Side::Server));
        self.server.ask(&format!("listen {address} 0"))?.get("local")
    }

    /// Opens a connection that the server does not accept.
    pub fn connect(&mut self) -> Result<Connection> {
        let server = self.listen()?;
        let facts = self.client.ask(&format!("connect {} {}", server.ip(), server.port()))?;
        Ok(Connection::new(facts.get("local")?, server))
    }

    /// Makes a connection attempt that must fail with this error.
    pub fn connect_and_fail(&mut self, address: IpAddr, port: u16, errno: &str) -> Result<Connection> {
        let address = self.route.written(address);
        let facts = self.client.ask_and_fail(&format!("connect {address} {port}"), errno)?;
        Ok(self.attempt(facts.get("local")?, SocketAddr::new(address, port)))
    }

    /// The connection attempt of a socket that the kernel may have unbound from its address, but not from its
    /// port, when the attempt failed.
    pub fn attempt(&self, local: SocketAddr, remote: SocketAddr) -> Connection {
        Connection::new(SocketAddr::new(self.route.address(Side::Client), local.port()), remote)
    }

    /// Opens a connection over which nothing is sent.
    pub fn idle(&mut self) -> Result<Connection> {
        let connection = self.connect()?;
        self.server.ask("accept")?;
        Ok(connection)
    }

    /// Opens a connection over which a request and a response are sent.
    pub fn established(&mut self) -> Result<Connection> {
        let mut connection = self.idle()?;
        self.transfer(&mut connection, Side::Client, 1000)?;
        self.transfer(&mut connection, Side::Server, 300)?;
        Ok(connection)
    }

    /// Makes one side send and the other receive.
    pub fn transfer(&mut self, connection: &mut Connection, from: Side, bytes: u64) -> Result<()> {
        self.send(connection, from, bytes)?;
        self.peer(from.other()).ask(&format!("receive {bytes}"))?;
        Ok(())
    }

    /// Makes one side send.
    pub fn send(&mut self, connection: &mut Connection, from: Side, bytes: u64) -> Result<()> {
        self.peer(from).ask(&format!("send {bytes}"))?;
        connection.note_sent(from, bytes);
        Ok(())
    }

    /// From now on, packets from the client to this on-link address are lost.
    pub fn lose(&self, address: IpAddr) -> Result<()> {
        const NOBODY: &str = "lladdr 02:00:00:00:00:99 nud permanent";
        self.client_net.ip(&[format!("neigh replace {address} dev {DEVICE} {NOBODY}")]).map(drop)
    }

    /// Queues all packets that a side sends over the link until `release`, as a link with a long delay would.
    pub fn hold(&self, side: Side) -> Result<()> {
        self.set_neighbour(side, "nud incomplete")
    }

    /// Delivers the queued packets in order, and no longer holds those that follow.
    pub fn release(&self, side: Side) -> Result<()> {
        let shown = self.namespace(side.other()).ip(&[format!("link show {DEVICE}")])?;
        let mut words = shown.split_whitespace().skip_while(|word| *word != "link/ether");
        let hardware = words.nth(1).with_context(|| format!("no hardware address: {shown}"))?;
        self.set_neighbour(side, &format!("lladdr {hardware} nud permanent"))
    }

    /// Sets the neighbour entry of a side for the other.
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

    /// The expected `opener` of a side. By default the tool traces accepts only where that costs nothing.
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

    /// The expected `connection` on every line of a side.
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

    /// The expected close line of a side: the facts common to all closes, overridden by `this`.
    ///
    /// The owner of the socket is known from its own action if it acted; otherwise because it opened the
    /// socket, holds it, or closes the dead socket later.
    pub fn close_line(&self, connection: &Connection, side: Side, this: Value) -> Result<Value> {
        let (sent, received) = connection.sent_and_received(side);
        let process = if this["trigger"].is_null() {
            let obtained = match side {
                Side::Client => json!("connect"),
                Side::Server => json!("accept"),
            };
            let found = [obtained, json!("descriptors"), json!("syscall")];
            but(self.any_thread(side)?, json!({"attribution": one_of(&found)}))
        } else {
            json!({"attribution": "syscall", "thread": known()})
        };
        let line = json!({
            "event": "close",
            "connection": {
                "opened": known(),
                "age_ms": known(),
                "bytes_sent": sent,
                "bytes_received": received,
                // On a busy host a tail loss probe may be sent although nothing is lost, so `Trace::finish`
                // compares the sum.
                "retransmits": known(),
                "rtt_us": known(),
            },
            "trigger": null,
            "signal": null,
            "signal_from": null,
            "destroyed_by": null,
            "cause": null,
            "close_wait_ms": null,
            "stack": null,
        });
        let line = but(line, self.common(connection, side)?);
        let mut line = but(but(line, json!({ "process": process })), this);
        if line.get("acts").is_none() && !line["trigger"].is_null() {
            let [trigger, stack] = ["trigger", "stack"].map(|field| line[field].clone());
            let pid = line["process"]["pid"].clone();
            line["acts"] = json!([{"trigger": trigger, "at_ms": known(), "pid": pid, "stack": stack}]);
        }
        Ok(line)
    }

    /// The expected reset line of a side, overridden by `this`.
    pub fn reset_line(&self, connection: &Connection, side: Side, this: Value) -> Result<Value> {
        let mut line = but(json!({"event": "reset"}), self.common(connection, side)?);
        if this["direction"] == "received" {
            line = but(line, json!({"process": self.any_thread(side)?}));
        }
        Ok(but(line, this))
    }

    /// The expected lingering line of a side, overridden by `this`.
    pub fn lingering_line(&self, connection: &Connection, side: Side, this: Value) -> Result<Value> {
        let line = json!({
            "event": "lingering",
            "connection": self.identity(connection, side),
            "process": but(self.owner(side)?, self.any_thread(side)?),
            "since": known(),
            "unread_bytes": 0,
            "unsent_bytes": 0,
            "trigger": null,
            "signal": null,
            "signal_from": null,
            "stack": null,
            "opener": self.opener(side)?,
        });
        Ok(but(line, this))
    }

    /// The expected lingering line of a side whose socket is older than the trace, overridden by `this`.
    pub fn listed_line(&self, connection: &Connection, side: Side, this: Value) -> Result<Value> {
        let not_traced = json!({"opened": null, "age_ms": null, "cookie": known()});
        let line = json!({
            "event": "lingering",
            "connection": but(self.identity(connection, side), not_traced),
            "process": but(self.owner(side)?, json!({"tid": null, "attribution": "procfs"})),
            "since": null,
            "unsent_bytes": 0,
            "trigger": null,
            "stack": null,
            "opener": null,
        });
        Ok(but(line, this))
    }

    /// Overrides for `process` where the thread does not matter.
    fn any_thread(&self, side: Side) -> Result<Value> {
        Ok(json!({"tid": one_of(&[json!(null), self.owner(side)?["tid"].clone()])}))
    }

    /// The acts of a client that shut down its half, and closed later.
    pub fn shut_and_closed(&mut self) -> Value {
        let pid = self.peer(Side::Client).pid();
        let act = |trigger: &str, function: &str| {
            let stack = user_stack(function);
            json!({"trigger": trigger, "at_ms": known(), "pid": pid, "stack": stack})
        };
        json!([act("shutdown", "peer_shuts_socket_outer"), act("close", "peer_closes_socket_outer")])
    }

    /// The fields that close and reset lines have in common.
    fn common(&self, connection: &Connection, side: Side) -> Result<Value> {
        let (idle, last_data) = match connection.last {
            None => (json!(null), json!(null)),
            Some((last, tick)) => {
                let name = json!(if last == side { "sent" } else { "received" });
                (known(), if tick == Tick::Sure { name } else { one_of(&[name, json!(null)]) })
            }
        };
        let since = |bytes: u64| if bytes > 0 { known() } else { json!(null) };
        let (sent, received) = connection.sent_and_received(side);
        Ok(json!({
            "connection": self.identity(connection, side),
            "process": self.owner(side)?,
            "idle_ms": idle,
            "last_data": last_data,
            "since_sent_ms": since(sent),
            "since_received_ms": since(received),
            "unread_bytes": 0,
            "unacked_bytes": 0,
            "opener": self.opener(side)?,
        }))
    }
}

impl Connection {
    /// A connection between these addresses, over which nothing has been sent yet.
    pub fn new(client: SocketAddr, server: SocketAddr) -> Self {
        let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        Self { client: plain(client), server: plain(server), client_sent: 0, server_sent: 0, last: None }
    }

    /// The address of a side.
    pub fn address(&self, side: Side) -> SocketAddr {
        match side {
            Side::Client => self.client,
            Side::Server => self.server,
        }
    }

    /// The bytes that a side has sent and received.
    fn sent_and_received(&self, side: Side) -> (u64, u64) {
        match side {
            Side::Client => (self.client_sent, self.server_sent),
            Side::Server => (self.server_sent, self.client_sent),
        }
    }

    /// Records that a side has sent this many bytes.
    pub fn note_sent(&mut self, from: Side, bytes: u64) {
        match from {
            Side::Client => self.client_sent += bytes,
            Side::Server => self.server_sent += bytes,
        }
        let alone = self.client_sent == 0 || self.server_sent == 0;
        self.last = Some((from, if alone { Tick::Sure } else { Tick::Unsure }));
    }
}

/// The form of an address in a line.
pub fn endpoint(address: SocketAddr) -> Value {
    json!({"address": address.ip(), "port": address.port()})
}

/// The expected user stack of an action in this function of a peer.
pub fn user_stack(function: &str) -> Value {
    json!({"user": calls(function), "kernel": null})
}
