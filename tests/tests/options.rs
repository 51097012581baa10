//! Options of the trace: what filters let through, and what can be requested in addition.

use std::fmt::Display;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Connection, Side, endpoint, user_stack},
    expect::{calls, differences, known, mismatches, one_of},
    features::Feature,
    scenario::{Trace, reset_by_client, routes},
    tool::Launch,
};

/// The lines that a filter lets through. One connection is reset by its client; another one ends in order
/// between other processes at other addresses.
struct FilterCase {
    /// Derives the option from the connection that must pass and the pid of its client.
    option: fn(&Connection, u32) -> [String; 2],
    /// The ends whose close line passes.
    close: &'static [Side],
    /// The ends whose reset line passes.
    reset: &'static [Side],
}

const BOTH: &[Side] = &[Side::Client, Side::Server];
const CLIENT: &[Side] = &[Side::Client];
const SERVER: &[Side] = &[Side::Server];
const NEITHER: &[Side] = &[];

const FILTERS: &[FilterCase] = &[
    FilterCase { option: |_, pid| option("pid", &pid), close: CLIENT, reset: CLIENT },
    FilterCase { option: |_, _| option("comm", &"peer-client"), close: CLIENT, reset: CLIENT },
    FilterCase { option: |_, _| option("comm", &"peer-client,peer-server"), close: BOTH, reset: BOTH },
    FilterCase { option: |to, _| option("port", &to.address(Side::Client).port()), close: BOTH, reset: BOTH },
    FilterCase { option: |to, _| option("port", &to.address(Side::Server).port()), close: BOTH, reset: BOTH },
    FilterCase {
        option: |to, _| option("local-port", &to.address(Side::Server).port()),
        close: SERVER,
        reset: SERVER,
    },
    FilterCase {
        option: |to, _| option("remote-port", &to.address(Side::Server).port()),
        close: CLIENT,
        reset: CLIENT,
    },
    FilterCase {
        option: |to, _| option("address", &to.address(Side::Server).ip()),
        close: BOTH,
        reset: BOTH,
    },
    FilterCase { option: |_, _| option("address", &"10.77.0.0/24"), close: BOTH, reset: BOTH },
    FilterCase { option: |_, _| option("address", &"10.78.0.0/16"), close: NEITHER, reset: NEITHER },
    FilterCase { option: |_, _| option("cause", &"linger_zero"), close: CLIENT, reset: CLIENT },
    FilterCase { option: |_, _| option("cause", &"linger_zero,peer_reset"), close: BOTH, reset: BOTH },
    FilterCase { option: |_, _| option("event", &"reset"), close: NEITHER, reset: BOTH },
];

fn option(name: &str, value: &dyn Display) -> [String; 2] {
    [format!("--{name}"), value.to_string()]
}

#[test]
fn filters_keep_others_out() -> Result<()> {
    let mut wanted = Bed::new(routes::veth_ipv4())?;
    let mut other = Bed::with_names(routes::loopback_ipv6(), "other-client", "other-server")?;
    for filter in FILTERS {
        let connection = wanted.established()?;
        // The kernel often assigns the same ports in new namespaces, and then a port cannot distinguish
        // connections.
        while share_a_port(&connection, &other.established()?) {}
        let option = (filter.option)(&connection, wanted.peer(Side::Client).pid());
        let namespaces = wanted.namespaces().chain(other.namespaces());
        let tool = Launch::new()?.trace(namespaces).args(&option).start()?;
        // The other connection ends first, so its lines would precede those that the test waits for.
        for (side, order) in [(Side::Client, "close"), (Side::Server, "receive-end"), (Side::Server, "close")]
        {
            other.peer(side).ask(order)?;
        }
        for order in ["linger0", "close"] {
            wanted.peer(Side::Client).ask(order)?;
        }
        wanted.peer(Side::Server).ask("await-error")?;
        let line = |event: &'static str| {
            let connection = &connection;
            move |side: &Side| {
                json!({
                    "event": event,
                    "connection": {"local": endpoint(connection.address(*side))},
                })
            }
        };
        let expected: Vec<Value> =
            filter.close.iter().map(line("close")).chain(filter.reset.iter().map(line("reset"))).collect();
        tool.wait_until(|lines| lines.len() >= expected.len());
        let ended = tool.stop()?;
        let mismatches = mismatches(&ended.lines, &expected);
        ensure!(mismatches.is_empty(), "{}: {mismatches}\n{ended}", option.join(" "));
    }
    Ok(())
}

/// A thread of the client closes, and `--comm` has the name of the thread, or that of the program.
#[test]
fn a_thread_passes_by_its_name_and_by_that_of_its_program() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    for name in ["peer-thread", "peer-client"] {
        let connection = bed.established()?;
        let tool = Launch::new()?.trace(bed.namespaces()).args(["--comm", name]).start()?;
        bed.peer(Side::Client).ask("thread-close")?;
        bed.peer(Side::Server).ask("receive-end")?;
        bed.peer(Side::Server).ask("close")?;
        tool.wait_until(|lines| !lines.is_empty());
        let ended = tool.stop()?;
        let client = json!({
            "event": "close",
            "connection": {"local": endpoint(connection.address(Side::Client))},
            "process": {"comm": "peer-client", "thread": "peer-thread"},
        });
        let mismatches = mismatches(&ended.lines, &[client]);
        ensure!(mismatches.is_empty(), "--comm {name}: {mismatches}\n{ended}");
    }
    Ok(())
}

#[test]
fn netns_keeps_the_other_end_out() -> Result<()> {
    let mut bed = Bed::new(routes::veth_ipv6())?;
    let tool = Launch::new()?.trace([bed.namespace(Side::Server)]).start()?;
    let connection = reset_by_client(&mut bed)?;
    tool.wait_until(|lines| lines.len() >= 2);
    let ended = tool.stop()?;
    let server = json!({"local": endpoint(connection.address(Side::Server))});
    let expected = ["close", "reset"].map(|event| json!({"event": event, "connection": server}));
    let mismatches = mismatches(&ended.lines, &expected);
    ensure!(mismatches.is_empty(), "{mismatches}\n{ended}");
    Ok(())
}

fn share_a_port(one: &Connection, other: &Connection) -> bool {
    let ports = |connection: &Connection| {
        BOTH.iter().map(|side| connection.address(*side).port()).collect::<Vec<_>>()
    };
    ports(one).iter().any(|port| ports(other).contains(port))
}

/// The close line of the client's end, which it has reset, with these options.
fn close_of_client(bed: &mut Bed, args: &[&str]) -> Result<Value> {
    let trace = Trace::alone(bed, args)?;
    reset_by_client(bed)?;
    let ended = trace.finish(bed, |lines| lines.len() >= 4)?;
    let of_client = |line: &&Value| line["event"] == "close" && line["connection"]["role"] == "client";
    let found = ended.lines.iter().find(of_client);
    found.cloned().with_context(|| format!("there is no close line of the client\n{ended}"))
}

#[test]
fn stacks_are_taken_as_asked() -> Result<()> {
    let kernel = one_of(&[calls("tcp_close"), calls("__tcp_close")]);
    let user = calls("peer_closes_socket_outer");
    let cases = [
        ("none", json!(null), json!(null)),
        ("user", user_stack("peer_closes_socket_outer"), user_stack("peer_connects_socket_outer")),
        ("kernel", json!({"user": null, "kernel": kernel}), json!({"user": null, "kernel": known()})),
        ("both", json!({"user": user, "kernel": kernel}), json!({"user": known(), "kernel": known()})),
    ];
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    for (which, closing, opening) in cases {
        let line = close_of_client(&mut bed, &["--stack", which])?;
        let differences = differences(&line, &json!({"stack": closing, "opener": {"stack": opening}}));
        ensure!(differences.is_empty(), "--stack {which}: {}", differences.join("\n"));
    }
    Ok(())
}

/// Both ways to unwind find the same functions, as far as the kernel's walk goes: it misses the first caller,
/// because libc keeps no frame pointer, and ends at the first code without frame pointers.
#[test]
fn tables_lead_where_frame_pointers_lead() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let by_pointers = close_of_client(&mut bed, &["--call-graph", "fp"])?;
    let by_tables = close_of_client(&mut bed, &["--call-graph", "dwarf"])?;
    for place in ["/stack/user", "/opener/stack/user"] {
        let (fewer, more) = (functions(&by_pointers, place)?, functions(&by_tables, place)?);
        let mut rest = more.iter();
        let missing: Vec<_> =
            fewer.iter().filter(|function| !rest.by_ref().any(|it| it == *function)).collect();
        ensure!(missing.is_empty() && more.len() >= fewer.len(), "{place}: {fewer:?}\nand {more:?}");
        ensure!(more.last().is_some_and(|function| function.contains("start")), "cut short: {more:?}");
    }
    let callers = json!({
        "stack": user_stack("peer_closes_socket"),
        "opener": {"stack": user_stack("peer_connects_socket")},
    });
    let differences = differences(&by_tables, &callers);
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

/// If a stack is longer than the copied part, the frames within that part are reported.
#[test]
fn short_copies_have_the_innermost_frames() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let whole = functions(&close_of_client(&mut bed, &["--call-graph", "dwarf"])?, "/stack/user")?;
    let cut = functions(&close_of_client(&mut bed, &["--call-graph", "dwarf,1024"])?, "/stack/user")?;
    ensure!(cut.len() < whole.len() && whole.starts_with(&cut), "{cut:?}\nof {whole:?}");
    Ok(())
}

/// Without the kernel's types, the tool uses frame pointers, and reports it.
#[test]
fn without_types_frame_pointers_have_to_do() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let connection = bed.established()?;
    let port = connection.address(Side::Client).port().to_string();
    let options = ["-o", "json", "--btf", "none", "--local-port", &port];
    let tool = Launch::new()?.args(options).start()?;
    bed.peer(Side::Client).ask("close")?;
    for order in ["receive-end", "close"] {
        bed.peer(Side::Server).ask(order)?;
    }
    let is_close = |line: &Value| line["event"] == "close";
    let line = tool.wait_for("the close", is_close)?;
    let differences = differences(&line, &json!({"stack": user_stack("peer_closes_socket_outer")}));
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    let ended = tool.stop()?;
    ensure!(ended.stderr.contains("--call-graph auto and dwarf need BTF"), "{ended}");
    Ok(())
}

/// The functions of a stack, innermost first.
fn functions(line: &Value, stack: &str) -> Result<Vec<String>> {
    let frames =
        line.pointer(stack).and_then(Value::as_array).with_context(|| format!("no {stack} in {line}"))?;
    Ok(frames.iter().filter_map(|frame| frame["symbol"].as_str()).map(str::to_owned).collect())
}

/// The reported cookie equals the one that the socket reports itself. If no process has requested it, it is
/// known only where the kernel lets the tool generate it.
#[test]
fn cookie_is_that_of_the_socket() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let trace = Trace::start(&bed, &[])?;
    bed.established()?;
    let cookie: u64 = bed.peer(Side::Client).ask("cookie")?.get("cookie")?;
    for order in ["linger0", "close"] {
        bed.peer(Side::Client).ask(order)?;
    }
    let ended = trace.finish(&bed, |lines| lines.len() >= 4)?;
    for connection in ended.lines.iter().map(|line| &line["connection"]) {
        let reported = &connection["cookie"];
        let is_right = if connection["role"] == "client" {
            *reported == json!(cookie)
        } else {
            // Without the helper a socket has a cookie if somebody has asked for it: here the tool itself may
            // have, when it asked for the sockets that are older than the trace.
            (reported.is_u64() || !Feature::Cookies.is_here()) && *reported != json!(cookie)
        };
        ensure!(is_right, "the client's cookie is {cookie}\n{ended}");
    }
    Ok(())
}

/// With every accept traced, the tool knows where a connection was accepted, and knows its owner without
/// reading `/proc`.
#[test]
fn accept_is_seen_when_asked_for() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let trace = Trace::alone(&bed, &["--accept-hook", "syscall"])?;
    reset_by_client(&mut bed)?;
    let ended = trace.finish(&bed, |lines| lines.len() >= 4)?;
    let owner = bed.owner(Side::Server)?;
    let expected = json!({
        "process": {"pid": owner["pid"], "attribution": "accept"},
        "opener": {"process": owner, "stack": user_stack("peer_accepts_socket_outer")},
    });
    let servers = |line: &&Value| line["event"] == "close" && line["connection"]["role"] == "server";
    let found: Vec<String> =
        ended.lines.iter().filter(servers).flat_map(|line| differences(line, &expected)).collect();
    ensure!(
        found.is_empty() && ended.lines.iter().any(|line| servers(&line)),
        "{}\n{ended}",
        found.join("\n")
    );
    Ok(())
}
