//! Runs a scenario: two processes act while the tool traces them, and afterwards every line must be accounted
//! for.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    bed::{Bed, Connection, Route, Side, endpoint, user_stack},
    contract::has_field,
    expect::{self, but, known, one_of, path},
    features::{self, Feature, reason},
    snmp::Counters,
    sockets::{self, Socket, TIMER_OF_PROBES},
    tool::{Ended, Launch, Tool},
    until,
    window::Window,
};

/// A scenario: what happens on a bed. Returns the lines that the tool has to write about it.
pub type Scenario = fn(&mut Bed) -> Result<Vec<Value>>;

/// Defines the tests of scenarios: `scenarios! { run on [loopback_ipv4 veth_ipv6]: first second }` defines
/// the test `first::loopback_ipv4`, which calls `run(ROUTE, first)`, and so on.
#[macro_export]
macro_rules! scenarios {
    ($run:ident on $routes:tt: $($scenario:ident)*) => {$(
        mod $scenario {
            $crate::scenarios!(@each $run $scenario $routes);
        }
    )*};
    (@each $run:ident $scenario:ident [$($route:ident)*]) => {$(
        #[test]
        fn $route() -> anyhow::Result<()> {
            super::$run($crate::scenario::routes::$route(), super::$scenario)
        }
    )*};
}

/// The routes, under the names that tests use.
pub mod routes {
    use crate::bed::{Family, Route, Wire};

    macro_rules! routes {
        ($($name:ident: $wire:ident $family:ident),*) => {$(
            #[doc = concat!(stringify!($family), " over ", stringify!($wire), ".")]
            pub fn $name() -> Route {
                Route { wire: Wire::$wire, family: Family::$family }
            }
        )*};
    }
    routes! {
        loopback_ipv4: Loopback Ipv4, loopback_ipv6: Loopback Ipv6, loopback_mapped: Loopback Mapped,
        veth_ipv4: Veth Ipv4, veth_ipv6: Veth Ipv6, veth_mapped: Veth Mapped
    }
}

/// A running tool that traces a bed.
#[derive(Debug)]
pub struct Trace {
    tool: Watching,
    /// The kernel's counters of each namespace at the beginning.
    before: Vec<Counters>,
}

#[derive(Debug)]
enum Watching {
    /// A tool that traces this bed for this test only.
    Alone(Tool),
    /// A tool that traces all beds for all tests of this program.
    Shared(Window),
}

impl Trace {
    /// Traces a bed on which nothing has happened yet, with a tool that has these arguments.
    pub fn start(bed: &Bed, args: &[&str]) -> Result<Self> {
        if !Feature::Types.is_here() {
            // Without the kernel's types, lines do not name their namespace, so they cannot be assigned to a
            // window.
            return Self::alone(bed, args);
        }
        Ok(Self { tool: Watching::Shared(Window::open(bed, args)?), before: counters(bed)? })
    }

    /// Starts a tool that traces only the namespaces of a bed.
    pub fn alone(bed: &Bed, args: &[&str]) -> Result<Self> {
        Self::by(watch(bed, args)?, bed)
    }

    /// Uses a tool that has been started on the namespaces of a bed.
    pub fn by(tool: Tool, bed: &Bed) -> Result<Self> {
        Ok(Self { tool: Watching::Alone(tool), before: counters(bed)? })
    }

    /// Waits until the lines so far satisfy the condition. Returns false if no line has arrived for the
    /// length of the timeout.
    pub fn wait_until(&self, satisfied: impl Fn(&[Value]) -> bool) -> bool {
        match &self.tool {
            Watching::Alone(tool) => tool.wait_until(satisfied),
            Watching::Shared(window) => window.wait_until(satisfied),
        }
    }

    /// Waits for a line that `like` accepts, and returns it.
    pub fn wait_for(&self, what: &str, like: impl Fn(&Value) -> bool) -> Result<Value> {
        match &self.tool {
            Watching::Alone(tool) => tool.wait_for(what, like),
            Watching::Shared(window) => window.wait_for(what, like),
        }
    }

    /// Waits for the expected lines and stops the tool. Checks that it has written exactly these lines, as
    /// far as this kernel allows, and that the kernel has counted as many sent RSTs as the tool.
    pub fn verify(self, bed: &Bed, expected: Vec<Value>) -> Result<()> {
        let expected = features::reportable(expected);
        let count = expected.len();
        let mut ended = self.finish(bed, |lines| lines.len() >= count)?;
        // On two processors a late segment may arrive when a socket is gone and its TIME_WAIT is not there
        // yet (`tcp_time_wait()`). The kernel, or on loopback its listener, answers it with a RST, which it has
        // counted.
        let mut surplus = ended.lines.len().saturating_sub(count);
        ended.lines.retain(|line| {
            let is_answer =
                surplus > 0 && (is_answer_without_socket(line) || is_answer_of_listener(line, None));
            surplus -= usize::from(is_answer);
            !is_answer
        });
        let mismatches = expect::mismatches(&ended.lines, &expected);
        ensure!(mismatches.is_empty(), "{mismatches}\n{ended}");
        Ok(())
    }

    /// Stops the tool when its lines are `enough` or no more arrive, and checks the number of RSTs.
    pub fn finish(self, bed: &Bed, enough: impl Fn(&[Value]) -> bool) -> Result<Ended> {
        self.finish_but(bed, 0, enough)
    }

    /// Same as [`Trace::finish`], where this number of sent RSTs cannot have been seen.
    pub fn finish_but(self, bed: &Bed, unseen: usize, enough: impl Fn(&[Value]) -> bool) -> Result<Ended> {
        self.wait_until(enough);
        let ended = match self.tool {
            Watching::Alone(tool) => tool.stop()?,
            Watching::Shared(window) => window.close()?,
        };
        let (mut counted, mut again) = (0, 0);
        for (before, after) in self.before.iter().zip(counters(bed)?) {
            counted += after.since(before, "TcpOutRsts")?;
            again += after.since(before, "TcpRetransSegs")?;
        }
        let sent = ended.lines.iter().filter(|line| line["event"] == "reset" && line["direction"] == "sent");
        let reported = i64::try_from(sent.count())?;
        let unseen = i64::try_from(unseen)?;
        let matches = (counted - unseen..=counted).contains(&reported)
            || (reported < counted && !Feature::EveryReset.is_here());
        ensure!(matches, "the kernel sent {counted} RSTs, the tool reported {reported}\n{ended}");
        let closes = ended.lines.iter().filter(|line| line["event"] == "close");
        let reported: i64 = closes.filter_map(|line| line["connection"]["retransmits"].as_i64()).sum();
        ensure!(
            reported <= again,
            "the kernel counted {again} retransmitted segments, the tool reported {reported}\n{ended}"
        );
        Ok(ended)
    }
}

/// Makes the other side read to the end and close after `first` has acted, and returns the expected lines.
pub fn orderly_lines(bed: &mut Bed, connection: &Connection, first: Side, this: Value) -> Result<Vec<Value>> {
    let second = first.other();
    bed.peer(second).ask("receive-end")?;
    bed.peer(second).ask("close")?;
    let acted = json!({
        "closed_by": "local",
        "ended": "fin",
        "states": path(&["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]),
    });
    let followed = json!({
        "closed_by": "peer",
        "ended": "fin",
        "trigger": "close",
        "close_wait_ms": known(),
        "states": path(&["ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSE"]),
        "stack": user_stack("peer_closes_socket_outer"),
    });
    Ok(vec![
        bed.close_line(connection, first, but(acted, this))?,
        bed.close_line(connection, second, followed)?,
    ])
}

/// The lines of an established connection that one side has reset while the other side was idle: two closes
/// and the RST, sent and received. `sender` and `receiver` are the additional expectations of each side; each
/// of their fields is expected on those of the side's two lines that have such a field.
///
/// Unless `sender` says otherwise, the side has reset the connection by `close()`.
pub fn reset_lines(
    bed: &Bed,
    connection: &Connection,
    by: Side,
    sender: &Value,
    receiver: &Value,
) -> Result<Vec<Value>> {
    let states = path(&["ESTABLISHED", "CLOSE"]);
    let acted = json!({
        "closed_by": "local",
        "ended": "reset_sent",
        "trigger": "close",
        "states": states,
        "direction": "sent",
        "stack": user_stack("peer_closes_socket_outer"),
    });
    let suffered = json!({
        "closed_by": "peer",
        "ended": "reset_received",
        "cause": "peer_reset",
        "states": states,
        "direction": "received",
        "state": "ESTABLISHED",
        "stack": null,
    });
    let sender = but(acted, sender.clone());
    let receiver = but(suffered, receiver.clone());
    Ok(vec![
        bed.close_line(connection, by, fields_of("close", &sender)?)?,
        bed.reset_line(connection, by, fields_of("reset", &sender)?)?,
        bed.close_line(connection, by.other(), fields_of("close", &receiver)?)?,
        bed.reset_line(connection, by.other(), fields_of("reset", &receiver)?)?,
    ])
}

/// The expected fields that an event has, out of those of a close and a reset.
fn fields_of(event: &str, expected: &Value) -> Result<Value> {
    let fields = expected.as_object().context("an expectation is an object")?;
    let unknown = fields.keys().find(|field| !["close", "reset"].iter().any(|event| has_field(event, field)));
    ensure!(unknown.is_none(), "no event has the field {unknown:?}");
    Ok(fields.clone().into_iter().filter(|(field, _)| has_field(event, field)).collect())
}

/// Whether a line reports a RST that the host sent because a segment had no socket.
pub fn is_answer_without_socket(line: &Value) -> bool {
    let without_socket = json!({
        "event": "reset",
        "direction": "sent",
        "cause": "no_listener",
        "process": null,
        "state": null,
    });
    expect::differences(line, &without_socket).is_empty()
}

/// Whether a line reports a RST that the host sent for a listener of this process, or of any.
pub fn is_answer_of_listener(line: &Value, pid: Option<u32>) -> bool {
    let listener = json!({
        "event": "reset",
        "direction": "sent",
        "cause": "invalid_segment",
        "process": {"pid": pid.map_or_else(known, Value::from), "attribution": "listener"},
        "state": "LISTEN",
    });
    expect::differences(line, &listener).is_empty()
}

/// Starts a tool that traces only this bed.
pub fn watch(bed: &Bed, args: &[&str]) -> Result<Tool> {
    Launch::new()?.args(args).trace(bed.namespaces()).start()
}

/// Makes one side reset a connection, and returns the expected lines.
pub fn aborted(bed: &mut Bed, connection: &Connection, by: Side) -> Result<Vec<Value>> {
    for order in ["linger0", "close"] {
        bed.peer(by).ask(order)?;
    }
    reset_lines(bed, connection, by, &json!({"cause": "linger_zero", "reason": reason(known())}), &json!({}))
}

/// Makes a connection whose server reads nothing, and whose client writes until its host probes the server's
/// window. Returns it with the number of bytes that the client has written.
pub fn shut_window(bed: &mut Bed) -> Result<(Connection, u64)> {
    // Before 6.6 the window may exceed the memory for it. Segments are lost then, and the window never
    // closes.
    bed.namespace(Side::Server).set_sysctl("net/ipv4/tcp_adv_win_scale", "-4")?;
    let connection = bed.idle()?;
    let ends = (connection.address(Side::Client), connection.address(Side::Server));
    let probes = |socket: &Socket| (socket.local, socket.remote) == ends && socket.timer == TIMER_OF_PROBES;
    let mut written = 0;
    until("the client probes the server's window", || {
        // Filled more than once, because acknowledged data makes room for more.
        written += bed.peer(Side::Client).ask("fill")?.get::<u64>("bytes")?;
        Ok(sockets::list(bed.namespace(Side::Client))?.iter().any(probes).then_some(()))
    })?;
    Ok((connection, written))
}

/// The lines of an end whose peer has closed, and then reset the connection while this end was idle.
pub fn reset_in_close_wait(bed: &Bed, connection: &Connection, side: Side) -> Result<Vec<Value>> {
    let close = json!({
        "closed_by": "peer",
        "ended": "reset_received",
        "cause": "peer_reset",
        "close_wait_ms": known(),
        "states": path(&["ESTABLISHED", "CLOSE_WAIT", "CLOSE"]),
    });
    let reset = json!({"direction": "received", "cause": "peer_reset", "state": "CLOSE_WAIT", "stack": null});
    Ok(vec![bed.close_line(connection, side, close)?, bed.reset_line(connection, side, reset)?])
}

/// The line of a RST with which a side's host answers a segment of a connection that it has no socket for any
/// more.
pub fn reset_without_socket(bed: &Bed, connection: &Connection, side: Side) -> Value {
    json!({
        "event": "reset",
        "direction": "sent",
        "cause": "no_listener",
        "reason": reason(json!("NO_SOCKET")),
        "state": null,
        "process": null,
        "connection": {
            "local": endpoint(connection.address(side)),
            "remote": endpoint(connection.address(side.other())),
            "netns": bed.namespace(side).inode(),
        },
        "opener": null,
        "stack": null,
    })
}

/// Makes the server close a connection that the client's host has no socket for any more, and returns the
/// expected lines.
pub fn fin_without_socket(bed: &mut Bed, connection: &Connection) -> Result<Vec<Value>> {
    bed.peer(Side::Server).ask("close")?;
    let closed = json!({
        "closed_by": "local",
        "ended": "reset_received",
        "trigger": "close",
        "cause": "peer_reset",
        "states": path(&["ESTABLISHED", "FIN_WAIT1", "CLOSE"]),
        "stack": user_stack("peer_closes_socket_outer"),
    });
    let received =
        json!({"direction": "received", "cause": "peer_reset", "state": "FIN_WAIT1", "stack": null});
    Ok(vec![
        reset_without_socket(bed, connection, Side::Client),
        bed.close_line(connection, Side::Server, closed)?,
        bed.reset_line(connection, Side::Server, received)?,
    ])
}

/// What a close line lacks after a failed connection attempt.
pub fn never_established() -> Value {
    let nothing = one_of(&[json!(null), json!(0)]);
    json!({
        "connection": {
            "opened": null,
            "age_ms": null,
            "bytes_sent": nothing,
            "bytes_received": nothing,
            "retransmits": known(),
            "rtt_us": null,
        },
        "states": path(&["SYN_SENT", "CLOSE"]),
    })
}

/// How a connection attempt ends after an ICMP error. If `connect()` still has the socket locked when the
/// error arrives, the kernel saves the error for the retransmission timer; otherwise the error itself ends
/// the attempt (`tcp_v4_err()`).
pub fn ended_by_icmp() -> Value {
    one_of(&[json!(null), json!("timeout")])
}

/// A connection that the client resets.
pub fn reset_by_client(bed: &mut Bed) -> Result<Connection> {
    let connection = bed.established()?;
    for order in ["linger0", "close"] {
        bed.peer(Side::Client).ask(order)?;
    }
    Ok(connection)
}

/// Runs a scenario that the tool traces from its beginning.
pub fn run(route: Route, scenario: Scenario) -> Result<()> {
    let mut bed = Bed::new(route)?;
    let trace = Trace::start(&bed, &[])?;
    let expected = scenario(&mut bed)?;
    trace.verify(&bed, expected)
}

fn counters(bed: &Bed) -> Result<Vec<Counters>> {
    bed.namespaces().map(Counters::read).collect()
}
