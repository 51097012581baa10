//! Descriptors that change owners: forked, passed, or closed by another thread or by the kernel on behalf of
//! a process. The tool has to name the process that holds the socket.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Connection, Route, Side, user_stack},
    expect::{but, known, one_of},
    features::Feature,
    scenario::{Trace, orderly_lines, reset_lines},
    scenarios,
};

/// Whether the tool traces every accept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Accepts {
    Unseen,
    Seen,
}

type OwnershipScenario = fn(&mut Bed, Accepts) -> Result<Vec<Value>>;

/// Runs a scenario twice: once with the acceptor of the socket known to the tool, once without. The owner at
/// the end must be known both times.
fn run(route: Route, scenario: OwnershipScenario) -> Result<()> {
    // Tracing every system call would be slow on an emulated processor.
    let hook = if Feature::FunctionReturns.is_here() { "fexit" } else { "syscall" };
    for (accepts, args) in
        [(Accepts::Unseen, ["--accept-hook", "off"]), (Accepts::Seen, ["--accept-hook", hook])]
    {
        let mut bed = Bed::new(route)?;
        let trace = Trace::start(&bed, &args)?;
        let expected = scenario(&mut bed, accepts)?;
        trace.verify(&bed, expected).with_context(|| format!("with the arguments {args:?}"))?;
    }
    Ok(())
}

scenarios! {
    run on [loopback_ipv4 veth_ipv6]:
    child_closes_last
    child_exits_last
    child_lives_on_and_closes
    child_lives_on_and_is_reset
    one_of_many_workers_is_reset
    receiver_closes
    receiver_is_reset
    passed_descriptor_is_never_received
    passed_descriptor_can_never_be_received
    passed_by_server_and_reset
    passed_by_client_and_reset
    thread_closes_what_another_accepted
    thread_waits_in_what_another_closes
    ring_closes
    ring_shuts_down
    child_of_client_lives_on_and_is_reset
    receiver_from_client_is_reset
}

/// The expected process of a child of a side.
fn child_process(bed: &Bed, side: Side, child: u32) -> Result<Value> {
    Ok(but(bed.owner(side)?, json!({"pid": child, "tid": child})))
}

/// The expectation for a process that acted in a system call of its own.
fn acted(process: Value, trigger: &str, function: &str) -> Value {
    json!({
        "process": but(process, json!({"attribution": "syscall"})),
        "trigger": trigger,
        "stack": user_stack(function),
    })
}

/// The expectation for a process that holds a socket and is idle.
fn idle(process: Value, attributions: &[&str]) -> Value {
    let attributions: Vec<Value> = attributions.iter().map(|name| json!(name)).collect();
    let tid = one_of(&[json!(null), process["tid"].clone()]);
    json!({"process": but(process, json!({"tid": tid, "attribution": one_of(&attributions)}))})
}

/// The expected acceptor of a socket, on each of its lines.
fn accepted_by(process: &Value, accepts: Accepts) -> Value {
    let opener = json!({ "process": process, "stack": user_stack("peer_accepts_socket_outer") });
    json!({"opener": match accepts {
        Accepts::Unseen => Value::Null,
        Accepts::Seen => opener,
    }})
}

/// Both close lines of a connection whose server end closed first.
fn server_went_first(
    bed: &mut Bed,
    connection: &Connection,
    accepts: Accepts,
    this: Value,
) -> Result<Vec<Value>> {
    let opener = accepted_by(&bed.owner(Side::Server)?, accepts);
    orderly_lines(bed, connection, Side::Server, but(opener, this))
}

/// The processes of a connection that its client resets.
struct Parties {
    /// The child of the client that resets it; `None` if the client itself does.
    client: Option<u32>,
    /// The expectation for the server's end, which is idle.
    holder: Value,
    /// The process that accepted it.
    acceptor: Value,
}

impl Parties {
    /// The two processes of the bed, and the current holder of the server's end.
    fn with_holder(bed: &Bed, holder: Value) -> Result<Self> {
        Ok(Self { client: None, holder, acceptor: bed.owner(Side::Server)? })
    }
}

/// Makes the client reset a connection while the holder of the server's end is idle.
fn client_resets(
    bed: &mut Bed,
    connection: &Connection,
    accepts: Accepts,
    parties: &Parties,
) -> Result<Vec<Value>> {
    for order in ["linger0", "close"] {
        match parties.client {
            Some(child) => bed.peer(Side::Client).ask_child(child, order)?,
            None => bed.peer(Side::Client).ask(order)?,
        };
    }
    let client = match parties.client {
        Some(child) => child_process(bed, Side::Client, child)?,
        None => bed.owner(Side::Client)?,
    };
    let sender = json!({
        "cause": "linger_zero",
        "process": but(client.clone(), json!({"attribution": "syscall"})),
        "opener": {"process": client},
    });
    let receiver = but(parties.holder.clone(), accepted_by(&parties.acceptor, accepts));
    reset_lines(bed, connection, Side::Client, &sender, &receiver)
}

/// The server's own `close()` does not end the connection, because its child still holds the socket.
fn child_closes_last(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    let child = bed.peer(Side::Server).fork()?;
    bed.peer(Side::Server).ask("close")?;
    bed.peer(Side::Server).ask_child(child, "close")?;
    let this = acted(child_process(bed, Side::Server, child)?, "close", "peer_closes_socket_outer");
    server_went_first(bed, &connection, accepts, this)
}

/// The child has no memory any more when the kernel closes the socket, hence no stack and possibly no
/// program.
fn child_exits_last(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    let child = bed.peer(Side::Server).fork()?;
    bed.peer(Side::Server).ask("close")?;
    // An exited child does not answer.
    ensure!(bed.peer(Side::Server).ask_child(child, "exit 0").is_err(), "the child has not exited");
    let process = child_process(bed, Side::Server, child)?;
    let gone = one_of(&[json!(null), process["exe"].clone()]);
    let this = but(
        acted(process, "exit", ""),
        json!({
            "process": {"exe": gone},
            "stack": one_of(&[json!(null), json!({"user": null, "kernel": null})]),
        }),
    );
    server_went_first(bed, &connection, accepts, this)
}

/// Makes the server's process exit while a child that inherited its connection lives on, which must cause no
/// line. Returns the child.
fn left_to_child(bed: &mut Bed) -> Result<u32> {
    let child = bed.peer(Side::Server).ask("hand-over")?.get("child")?;
    bed.peer(Side::Server).ended()?;
    Ok(child)
}

fn child_lives_on_and_closes(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    let child = left_to_child(bed)?;
    bed.peer(Side::Server).ask("close")?;
    let this = acted(child_process(bed, Side::Server, child)?, "close", "peer_closes_socket_outer");
    let lines = server_went_first(bed, &connection, accepts, this)?;
    acceptor_is_gone(bed, lines, accepts)
}

fn child_lives_on_and_is_reset(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    let child = left_to_child(bed)?;
    let holder = idle(child_process(bed, Side::Server, child)?, &["descriptors"]);
    let parties = Parties::with_holder(bed, holder)?;
    let lines = client_resets(bed, &connection, accepts, &parties)?;
    acceptor_is_gone(bed, lines, accepts)
}

/// The program of an exited process and the names of its functions are known only if the tool has read
/// `/proc` in time.
fn acceptor_is_gone(bed: &Bed, lines: Vec<Value>, accepts: Accepts) -> Result<Vec<Value>> {
    let server = bed.owner(Side::Server)?;
    let exe = one_of(&[json!(null), server["exe"].clone()]);
    let opener = json!({ "process": but(server, json!({"exe": exe})), "stack": known() });
    let opener = match accepts {
        Accepts::Unseen => Value::Null,
        Accepts::Seen => opener,
    };
    let of_server = |line: &Value| line["connection"]["role"] == "server";
    let changed = lines.into_iter().map(|line| {
        let change = if of_server(&line) { json!({"opener": opener}) } else { json!({}) };
        but(line, change)
    });
    Ok(changed.collect())
}

/// The master listens, and each of its children accepts. All of them have connections when the first one is
/// reset.
fn one_of_many_workers_is_reset(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    const WORKERS: usize = 4;
    let server = bed.listen()?;
    let mut pairs = Vec::new();
    for _ in 0..WORKERS {
        pairs.push((bed.peer(Side::Server).fork()?, bed.peer(Side::Client).fork()?));
    }
    let mut established = Vec::new();
    for (worker, client) in pairs {
        let connect = format!("connect {} {}", server.ip(), server.port());
        let facts = bed.peer(Side::Client).ask_child(client, &connect)?;
        bed.peer(Side::Server).ask_child(worker, "accept")?;
        established.push((Connection::new(facts.get("local")?, server), worker, client));
    }
    let mut lines = Vec::new();
    for (connection, worker, client) in established {
        let worker = child_process(bed, Side::Server, worker)?;
        let attributions: &[&str] = match accepts {
            Accepts::Unseen => &["descriptors"],
            Accepts::Seen => &["accept"],
        };
        let holder = idle(worker.clone(), attributions);
        let parties = Parties { client: Some(client), holder, acceptor: worker };
        lines.extend(client_resets(bed, &connection, accepts, &parties)?);
    }
    Ok(lines)
}

/// A connection that the server has accepted and passed to a process that did not inherit it.
fn passed(bed: &mut Bed) -> Result<(Connection, u32)> {
    let receiver = bed.peer(Side::Server).fork()?;
    let connection = bed.established()?;
    bed.peer(Side::Server).ask(&format!("pass {receiver}"))?;
    Ok((connection, receiver))
}

fn receiver_closes(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let (connection, receiver) = passed(bed)?;
    for order in ["take", "close"] {
        bed.peer(Side::Server).ask_child(receiver, order)?;
    }
    let this = acted(child_process(bed, Side::Server, receiver)?, "close", "peer_closes_socket_outer");
    server_went_first(bed, &connection, accepts, this)
}

/// The acceptor is alive, but does not hold the socket any more.
fn receiver_is_reset(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let (connection, receiver) = passed(bed)?;
    bed.peer(Side::Server).ask_child(receiver, "take")?;
    let holder = idle(child_process(bed, Side::Server, receiver)?, &["descriptors"]);
    let parties = Parties::with_holder(bed, holder)?;
    client_resets(bed, &connection, accepts, &parties)
}

/// The descriptor is in flight when the socket that would receive it is closed, and is released with it.
fn passed_descriptor_is_never_received(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let (connection, receiver) = passed(bed)?;
    bed.peer(Side::Server).ask_child(receiver, "close-channel")?;
    let this = acted(child_process(bed, Side::Server, receiver)?, "close", "peer_closes_socket_outer");
    server_went_first(bed, &connection, accepts, this)
}

/// The descriptor is in flight to a socket that no process holds. The kernel's garbage collector releases it:
/// in a kernel thread, or, before 6.10, while the process closes the last socket that led to it. No other
/// process is involved.
fn passed_descriptor_can_never_be_received(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    bed.peer(Side::Client).ask("lose-in-cycle")?;
    let client = bed.owner(Side::Client)?;
    let by_the_kernel = json!({
        "trigger": null,
        "process": {"attribution": "connect"},
        "stack": null,
    });
    let itself = acted(client, "close", "peer_closes_socket_outer");
    let mut lines = orderly_lines(bed, &connection, Side::Client, json!({}))?;
    let of_client = lines.swap_remove(0);
    lines[0] = but(lines[0].take(), accepted_by(&bed.owner(Side::Server)?, accepts));
    lines.push(one_of(&[but(of_client.clone(), by_the_kernel), but(of_client, itself)]));
    Ok(lines)
}

/// The acceptor has closed its descriptor, and no process has received it: the socket has no owner when it is
/// reset.
fn passed_by_server_and_reset(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let (connection, _) = passed(bed)?;
    let parties = Parties::with_holder(bed, json!({"process": null}))?;
    client_resets(bed, &connection, accepts, &parties)
}

/// Same for the client's end, whose `connect()` the tool always sees.
fn passed_by_client_and_reset(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let receiver = bed.peer(Side::Client).fork()?;
    let connection = bed.established()?;
    bed.peer(Side::Client).ask(&format!("pass {receiver}"))?;
    server_resets(bed, &connection, accepts, json!({"process": null}))
}

/// The process that connected has exited, and its child is idle.
fn child_of_client_lives_on_and_is_reset(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    let child = bed.peer(Side::Client).ask("hand-over")?.get("child")?;
    bed.peer(Side::Client).ended()?;
    let holder = idle(child_process(bed, Side::Client, child)?, &["descriptors"]);
    server_resets(bed, &connection, accepts, holder)
}

/// The process that connected is alive, but does not hold the socket any more.
fn receiver_from_client_is_reset(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let receiver = bed.peer(Side::Client).fork()?;
    let connection = bed.established()?;
    bed.peer(Side::Client).ask(&format!("pass {receiver}"))?;
    bed.peer(Side::Client).ask_child(receiver, "take")?;
    let holder = idle(child_process(bed, Side::Client, receiver)?, &["descriptors"]);
    server_resets(bed, &connection, accepts, holder)
}

/// Makes the server reset a connection whose client end is held by a process other than the one that
/// connected, or by none.
fn server_resets(
    bed: &mut Bed,
    connection: &Connection,
    accepts: Accepts,
    holder: Value,
) -> Result<Vec<Value>> {
    for order in ["linger0", "close"] {
        bed.peer(Side::Server).ask(order)?;
    }
    let connects = bed.owner(Side::Client)?;
    let exe = one_of(&[json!(null), connects["exe"].clone()]);
    let receiver = but(holder, json!({"opener": {"process": {"exe": exe}, "stack": known()}}));
    let sender = but(json!({"cause": "linger_zero"}), accepted_by(&bed.owner(Side::Server)?, accepts));
    reset_lines(bed, connection, Side::Server, &sender, &receiver)
}

/// The process is the same, but not the thread.
fn thread_closes_what_another_accepted(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let connection = bed.established()?;
    let facts = bed.peer(Side::Server).ask("thread-close")?;
    let closer = json!({"tid": facts.get::<u32>("tid")?, "thread": facts.get::<String>("name")?});
    let process = but(bed.owner(Side::Server)?, closer);
    let this = acted(process, "close", "peer_closes_socket_outer");
    server_went_first(bed, &connection, accepts, this)
}

/// The waiting thread holds the socket until its wait is over, and then the kernel closes it in that thread.
fn thread_waits_in_what_another_closes(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    let mut connection = bed.established()?;
    let facts = bed.peer(Side::Server).ask("close-under-receive")?;
    let waiter = json!({"tid": facts.get::<u32>("tid")?, "thread": facts.get::<String>("name")?});
    bed.send(&mut connection, Side::Client, 10)?;
    let process = but(bed.owner(Side::Server)?, waiter);
    let this = acted(process, "close", "peer_receives_outer");
    server_went_first(bed, &connection, accepts, this)
}

fn ring_closes(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    through_ring(bed, accepts, "ring-close", |by| by == "caller")
}

/// The kernel always executes a shutdown request in a worker thread.
fn ring_shuts_down(bed: &mut Bed, accepts: Accepts) -> Result<Vec<Value>> {
    if Feature::UringShutdown.is_missed() {
        return Ok(Vec::new());
    }
    through_ring(bed, accepts, "ring-shutdown", |_| false)
}

/// Whichever thread executes the request, it works on behalf of the server's process.
fn through_ring(
    bed: &mut Bed,
    accepts: Accepts,
    order: &str,
    in_own_thread: fn(&str) -> bool,
) -> Result<Vec<Value>> {
    let mut lines = Vec::new();
    for by in ["caller", "worker", "poller"] {
        let connection = bed.established()?;
        bed.peer(Side::Server).ask(&format!("{order} {by}"))?;
        let mut process = bed.owner(Side::Server)?;
        if !in_own_thread(by) {
            process = but(process, json!({"tid": known(), "comm": known()}));
        }
        // A kernel thread has no user stack.
        let stack = if in_own_thread(by) { user_stack("syscall") } else { Value::Null };
        let this = but(acted(process, "io_uring", ""), json!({"stack": stack}));
        lines.extend(server_went_first(bed, &connection, accepts, this)?);
    }
    Ok(lines)
}
