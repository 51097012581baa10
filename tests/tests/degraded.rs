//! Environments with fewer privileges or fewer kernel interfaces than root has on a host.

use std::{fs::File, io::Write as _, thread};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Side, endpoint, user_stack},
    decoy::Decoy,
    expect::{but, differences, known},
    features::Feature,
    groups::{Group, Hierarchy},
    peer,
    scenario::{Trace, aborted, reset_by_client, routes},
    scratch::Scratch,
    tool::{Capability, Ended, Launch},
    until,
};

/// The mount points of tracefs and of debugfs, which contains another tracefs.
const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug"];
/// The directory of the kernel's BTF.
const TYPES: &str = "/sys/kernel/btf";

/// Runs the scenario while the tool traces, and expects all its lines with all fields, except for these
/// differences in the lines of the client's end and of the server's end.
fn tells_everything_but(launch: Launch, client: &Value, server: &Value) -> Result<()> {
    let mut bed = Bed::new(routes::veth_ipv6())?;
    let trace = Trace::by(launch.trace(bed.namespaces()).start()?, &bed)?;
    let connection = bed.established()?;
    let lines = aborted(&mut bed, &connection, Side::Client)?.into_iter().map(|line| {
        let this = if line["connection"]["role"] == "client" { client } else { server };
        but(line, this.clone())
    });
    trace.verify(&bed, lines.collect())
}

/// The client's close line of a connection that the client resets, for a tool that cannot filter by
/// namespace.
fn tells_something(launch: Launch) -> Result<(Value, Ended)> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let tool = launch.args(["-o", "json"]).start()?;
    let connection = reset_by_client(&mut bed)?;
    let [local, remote] = [Side::Client, Side::Server].map(|side| endpoint(connection.address(side)));
    let ends = json!({"event": "close", "connection": {"local": local, "remote": remote}});
    let line = tool.wait_for("the client's close", |line| differences(line, &ends).is_empty())?;
    Ok((line, tool.stop()?))
}

/// One item of `doctor`'s report on the environment.
fn diagnosis(launch: Launch, args: &[&str], name: &str) -> Result<Value> {
    let output = launch.args(["doctor", "-o", "json"]).args(args.iter().copied()).output()?;
    let report: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?;
    let all = ["place", "hooks"].map(|list| report[list].as_array().cloned().unwrap_or_default()).concat();
    all.into_iter().find(|one| one["name"] == name).with_context(|| format!("no {name}: {report:#}"))
}

/// Two capabilities are enough, as the README states. Facts about root's processes that only root may read
/// are unknown then.
#[test]
fn two_capabilities_are_enough() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let launch = || Launch::new()?.trace(bed.namespaces()).as_nobody(&[Capability::Bpf, Capability::Perfmon]);
    if !Feature::UnlockedMaps.is_here() {
        let ended = launch()?.run()?.with_code(1)?;
        ensure!(ended.stderr.contains("RLIMIT_MEMLOCK"), "stderr does not name the limit\n{ended}");
        return Ok(());
    }
    let tool = launch()?.start()?;
    let connection = reset_by_client(&mut bed)?;
    tool.wait_until(|lines| lines.len() >= 4);
    let ended = tool.stop()?;
    let expected = json!({
        "event": "close",
        "closed_by": "local",
        "cause": "linger_zero",
        "trigger": "close",
        "connection": {"local": {"port": connection.address(Side::Client).port()}, "bytes_sent": 1000},
        "process": {"pid": bed.peer(Side::Client).pid(), "exe": null},
        "stack": {"user": known()},
    });
    let found = ended.lines.iter().any(|line| differences(line, &expected).is_empty());
    ensure!(found, "no line matches {expected}\n{ended}");
    ensure!(
        ended.stderr.contains("CAP_SYS_PTRACE"),
        "stderr does not report what is lost without it\n{ended}"
    );
    Ok(())
}

/// The purpose of each capability that the guide requires: without it, the fact is missing.
#[test]
fn each_capability_is_needed() -> Result<()> {
    const ALL: [Capability; 3] = [Capability::Bpf, Capability::Perfmon, Capability::SysPtrace];
    if Feature::UnlockedMaps.is_missed() {
        return Ok(());
    }
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    for missing in [None, Some(Capability::SysPtrace), Some(Capability::Bpf), Some(Capability::Perfmon)] {
        let granted: Vec<_> = ALL.into_iter().filter(|one| Some(*one) != missing).collect();
        let launch = Launch::new()?.trace(bed.namespaces()).as_nobody(&granted)?;
        if let Some(name) = match missing {
            Some(Capability::Bpf) => Some("CAP_BPF"),
            Some(Capability::Perfmon) => Some("CAP_PERFMON"),
            Some(Capability::SysPtrace) | None => None,
        } {
            let ended = launch.run()?.with_code(1)?;
            ensure!(ended.stderr.contains(name), "stderr does not name {name}\n{ended}");
            continue;
        }
        let tool = launch.start()?;
        let connection = reset_by_client(&mut bed)?;
        let port = connection.address(Side::Client).port();
        let line = tool.wait_for("the client's close", |line| {
            line["event"] == "close" && line["connection"]["local"]["port"] == port
        })?;
        let exe = line["process"]["exe"].as_str();
        let is_named = line["stack"]["user"][0]["symbol"].is_string();
        let expected = missing.is_none();
        ensure!((exe.is_some(), is_named) == (expected, expected), "with {granted:?}: {line:#}");
        tool.stop()?.with_code(0)?;
    }
    Ok(())
}

/// A running trace has given up the privileges that it no longer needs, in each of its threads.
#[test]
fn a_running_trace_is_restricted() -> Result<()> {
    const STATUS: [&str; 2] = ["NoNewPrivs:\t1", "Seccomp:\t2"];
    let threads = |pid: u32| -> Result<Vec<String>> {
        let folder = std::fs::read_dir(format!("/proc/{pid}/task"))?;
        folder.map(|thread| Ok(std::fs::read_to_string(thread?.path().join("status"))?)).collect()
    };
    let is_restricted = |status: &String| STATUS.iter().all(|line| status.contains(line));
    let tool = Launch::new()?.args(["-o", "json", "--netns", "1"]).start()?;
    let statuses = until("every thread is restricted", || {
        let statuses = threads(tool.pid()).unwrap_or_default();
        Ok(Some(statuses).filter(|statuses| statuses.len() > 1 && statuses.iter().all(is_restricted)))
    })?;
    for status in statuses {
        let line = status.lines().find_map(|line| line.strip_prefix("CapPrm:\t")).context("no CapPrm")?;
        let left = u64::from_str_radix(line, 16)?;
        for (name, number) in [("CAP_SYS_ADMIN", 21), ("CAP_PERFMON", 38), ("CAP_NET_ADMIN", 12)] {
            ensure!(left & 1 << number == 0, "{name} is left: {line}");
        }
    }
    tool.stop()?.with_code(0)?;

    let free = Launch::new()?.args(["-o", "json", "--netns", "1", "--sandbox", "off"]).start()?;
    ensure!(!threads(free.pid())?.iter().any(is_restricted), "--sandbox off restricts");
    free.stop()?.with_code(0)?;

    // The command is not restricted, and inherits nothing of the kernel half.
    let script = "grep -E 'NoNewPrivs|Seccomp:|CapPrm' /proc/self/status >&2; ls -l /proc/self/fd >&2";
    let ended = Launch::new()?.args(["-o", "json", "--", "sh", "-c", script]).run()?.with_code(0)?;
    ensure!(ended.stderr.contains("NoNewPrivs:\t0") && ended.stderr.contains("Seccomp:\t0"), "{ended}");
    ensure!(ended.stderr.contains("/proc/"), "`ls` lists no descriptors\n{ended}");
    ensure!(!ended.stderr.contains("bpf"), "descriptors of BPF objects have leaked\n{ended}");
    Ok(())
}

#[test]
fn a_user_namespace_is_named() -> Result<()> {
    let ended = Launch::new()?.in_user_namespace().run()?.with_code(1)?;
    ensure!(ended.stderr.contains("user namespace"), "stderr does not name the reason\n{ended}");
    Ok(())
}

#[test]
fn tracefs_is_not_missed_where_types_are_described() -> Result<()> {
    let found = diagnosis(Launch::new()?.without(&TRACEFS)?, &[], "tracefs")?["found"].clone();
    ensure!(found.as_str().is_some_and(|found| found.starts_with("not mounted")), "{found}");
    tells_everything_but(Launch::new()?.without(&TRACEFS)?, &json!({}), &json!({}))
}

/// Fields from the arguments of tracepoints are reported, and fields from the kernel's structures are null.
#[test]
fn types_are_missed_and_said_to_be() -> Result<()> {
    // Once with the host's tracefs, and once with a tracefs that the tool mounts for itself.
    for hidden in [&[TYPES][..], &[TYPES, TRACEFS[0], TRACEFS[1]]] {
        let (line, ended) = tells_something(Launch::new()?.without(hidden)?)?;
        let expected = json!({
            "connection": {"role": "client", "bytes_sent": null, "netns": null, "cookie": null},
            "cause": "unknown",
            "trigger": null,
            "idle_ms": null,
        });
        let differences = differences(&line, &expected);
        ensure!(differences.is_empty(), "without {hidden:?}: {}\n{ended}", differences.join("\n"));
        ensure!(
            ended.stderr.contains("no BTF, so bytes"),
            "without {hidden:?}, stderr does not report it\n{ended}"
        );
    }
    Ok(())
}

#[test]
fn without_types_and_tracefs_it_says_what_it_needs() -> Result<()> {
    let unprivileged = Launch::new()?.without(&[TYPES, TRACEFS[0], TRACEFS[1]])?;
    let unprivileged = unprivileged.as_nobody(&[Capability::Bpf, Capability::Perfmon])?;
    let nowhere_to_mount_it = Launch::new()?.without(&["/sys/kernel"])?;
    for (launch, needed) in
        [(unprivileged, "CAP_SYS_ADMIN to mount it"), (nowhere_to_mount_it, "/sys/kernel/tracing")]
    {
        let ended = launch.run()?.with_code(1)?;
        for word in ["no tracefs", "BTF", needed] {
            ensure!(ended.stderr.contains(word), "stderr does not mention {word}\n{ended}");
        }
    }
    Ok(())
}

/// Makes the tool run without typed programs, iterators and programs on functions, as on a kernel whose BTF
/// comes from a package. Fields from the kernel's structures are still known.
const TYPES_APART: [&str; 2] = ["--btf", "/sys/kernel/btf/vmlinux"];

#[test]
fn without_iterators_descriptors_are_read_from_proc() -> Result<()> {
    let hook = diagnosis(Launch::new()?, &TYPES_APART, "descriptors")?;
    let results = json!([{"kind": "iter", "result": "refused"}, {"kind": "/proc", "result": "attached"}]);
    let wrong = differences(&hook["variants"], &results);
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));

    let mut bed = Bed::new(routes::veth_ipv4())?;
    // The connection is older than the trace, so only its holder can be its owner.
    let connection = bed.established()?;
    let trace = Trace::alone(&bed, &TYPES_APART)?;
    for order in ["linger0", "close"] {
        bed.peer(Side::Client).ask(order)?;
    }
    let ended = trace.finish(&bed, |lines| lines.len() >= 4)?;
    let expected = json!({
        "event": "close",
        "connection": {"local": endpoint(connection.address(Side::Server))},
        "process": {"pid": bed.peer(Side::Server).pid(), "comm": "peer-server", "attribution": "procfs"},
    });
    let found = ended.lines.iter().any(|line| differences(line, &expected).is_empty());
    ensure!(found, "no line matches {expected}\n{ended}");
    ensure!(ended.stderr.contains("may be too late"), "stderr does not name the limitation\n{ended}");
    Ok(())
}

/// The tool attaches no fexit program to accept and no fentry program to the reception of RSTs. Where the
/// kernel refuses them, all tests run without.
#[test]
fn without_programs_on_functions_openers_and_ttls_are_null() -> Result<()> {
    for (hook, null) in [("accept", "opener"), ("time to live", "ttl")] {
        let hook = diagnosis(Launch::new()?, &TYPES_APART, hook)?;
        ensure!(hook["mark"] == "less" && hook["null"][0] == null, "{hook:#}");
    }
    tells_everything_but(
        Launch::new()?.args(TYPES_APART),
        &json!({}),
        &json!({"opener": null, "process": {"attribution": "procfs"}}),
    )
}

/// Processes in their own pid namespace, as in a container, are reported with their pids on the host.
#[test]
fn pids_are_those_of_the_host() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let tool = Launch::new()?.trace(bed.namespaces()).start()?;
    let server = bed.listen()?;
    bed.peer(Side::Client).ask("new-pids")?;
    let child = bed.peer(Side::Client).fork()?;
    let connect = format!("connect {} {}", server.ip(), server.port());
    for order in [connect.as_str(), "linger0", "close"] {
        bed.peer(Side::Client).ask_child(child, order)?;
    }
    tool.wait_until(|lines| lines.len() >= 4);
    let ended = tool.stop()?;
    let process = json!({"pid": child, "tid": child, "exe": bed.peer(Side::Client).exe()?});
    let expected = json!({
        "event": "close",
        "trigger": "close",
        "connection": {"role": "client"},
        "process": process,
        "stack": user_stack("peer_closes_socket_outer"),
        "opener": {"process": process},
    });
    let found = ended.lines.iter().any(|line| differences(line, &expected).is_empty());
    ensure!(found, "no line matches {expected}\n{ended}");
    Ok(())
}

/// The tool runs in a container, and the processes outside it. They have no pid there, and its `/proc` shows
/// another process that has the same pid as one of them on the host.
#[test]
fn in_a_pid_namespace_no_process_is_mistaken_for_another() -> Result<()> {
    let launch = || Ok::<_, anyhow::Error>(Launch::new()?.in_pid_namespace());
    let place = diagnosis(launch()?, &[], "pid namespace")?;
    ensure!(place["mark"] == "less", "{place:#}");

    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let tool = launch()?.trace(bed.namespaces()).start()?;
    let client = bed.peer(Side::Client).pid();
    let decoy = Decoy::start(tool.pid(), client)?;
    let trace = Trace::by(tool, &bed)?;
    let connection = bed.established()?;
    let _lines = aborted(&mut bed, &connection, Side::Client)?;
    trace.wait_until(|lines| lines.len() >= 4);
    // The first process of a pid namespace ends after all others.
    drop(decoy);
    let ended = trace.finish(&bed, |_| true)?;
    ensure!(ended.stderr.contains("pid namespace"), "stderr does not report what is lost\n{ended}");
    let unnamed = json!({"symbol": null, "module": null});
    for side in [Side::Client, Side::Server] {
        let pid = bed.peer(side).pid();
        let ends = json!({"event": "close", "connection": {"local": endpoint(connection.address(side))}});
        let line = ended.lines.iter().find(|line| differences(line, &ends).is_empty());
        let line = line.with_context(|| format!("there is no close line of the {side}\n{ended}"))?;
        let process = json!({"pid": null, "host_pid": pid, "exe": null, "container": null});
        let expected = match side {
            Side::Client => json!({"process": process, "trigger": "close"}),
            // The server's end is idle, so its owner is known only where accepts are traced.
            Side::Server if Feature::FunctionReturns.is_here() => json!({"process": process}),
            Side::Server => json!({"process": null}),
        };
        let mut found = differences(line, &expected);
        let frames = line["stack"]["user"].as_array().into_iter().flatten();
        found.extend(frames.flat_map(|frame| differences(frame, &unnamed)));
        ensure!(found.is_empty(), "{side}: {}\n{ended}", found.join("\n"));
    }
    Ok(())
}

/// The tool runs in a container together with the process that it reports, by the pid that this process has
/// there.
#[test]
fn in_a_pid_namespace_pids_are_those_inside() -> Result<()> {
    let bed = Bed::new(routes::loopback_ipv4())?;
    // The peer lives until its orders end, so that the tool can read the facts about it.
    let scratch = Scratch::new()?;
    let fifo = scratch.path().join("orders");
    mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let mut orders = File::options().read(true).write(true).open(&fifo)?;
    let script = "exec \"$0\" peer <\"$1\" >&2";
    let command = ["sh".into(), "-c".into(), script.into(), peer::program()?, fifo.into()];
    let launch = Launch::new()?.inside(bed.namespace(Side::Client))?.in_pid_namespace();
    // Nothing listens there.
    orders.write_all(b"connect 127.0.0.1 9\n")?;
    let tool = launch.args(["-o", "json", "--"]).args(command).spawn()?;
    let is_refused = |line: &Value| line["event"] == "close" && line["cause"] == "refused";
    let line = tool.wait_for("the end of a refused connection", is_refused)?;
    drop(orders);
    let ended = tool.wait()?.with_code(0)?;
    let introduction = ended.stderr.split_whitespace().find_map(|word| word.strip_prefix("pid="));
    let pid: u32 = introduction.with_context(|| format!("the peer says no pid\n{ended}"))?.parse()?;
    let expected = json!({
        "process": {"pid": pid, "tid": pid, "host_pid": known(), "comm": "peer", "attribution": "connect"},
        "opener": {"stack": {"user": known()}},
    });
    let found = differences(&line, &expected);
    ensure!(found.is_empty(), "{}\n{ended}", found.join("\n"));
    ensure!(line["process"]["host_pid"] != pid, "both are the same: {line:#}");
    let exe = line["process"]["exe"].as_str().unwrap_or_default();
    ensure!(exe.ends_with("/peer"), "{line:#}");
    Ok(())
}

const CONTAINERS: [&str; 2] = [
    "3f4ac1b2d5e6f70819283746556473829100aabbccddeeff0011223344556677",
    "b0000000000000000000000000000000000000000000000000000000000000b1",
];

/// Containers are identified by the names of control groups, whether cgroup v1, v2 or both are mounted. On a
/// machine that does not belong to the tests, v2 is or may be mounted already.
#[test]
fn containers_are_known_by_their_groups() -> Result<()> {
    // The mounts of this thread are visible only to it and to the processes that it starts.
    thread::scope(|scope| {
        let moved = scope.spawn(|| {
            let [one, other] = CONTAINERS;
            let (docker, scope) = (format!("docker/{one}"), format!("docker-{other}.scope"));
            let own = Feature::OwnMachine.is_here();
            let first = own.then(Hierarchy::first_version).transpose()?;
            if let Some(first) = &first {
                are_of("v1")?;
                in_container(first, &docker, one)?;
            }
            let second = Hierarchy::second_version()?;
            if let Some(first) = first {
                are_of("v1 and v2 (hybrid)")?;
                in_container(&first, &docker, one)?;
                in_container(&second, &scope, other)?;
            }
            if own {
                are_of("v2")?;
            }
            in_container(&second, &scope, other)
        });
        moved.join().map_err(|_| anyhow!("it panicked"))?
    })
}

/// Checks which versions of control groups the tool finds.
fn are_of(version: &str) -> Result<()> {
    let found = diagnosis(Launch::new()?, &[], "cgroups")?["found"].clone();
    ensure!(found == version, "{found} is not {version}");
    Ok(())
}

/// The client is in a group, and the server in none.
fn in_container(hierarchy: &Hierarchy, group: &str, container: &str) -> Result<()> {
    let name = group;
    let group = Group::new(hierarchy, group)?;
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    group.take_in(bed.peer(Side::Client).pid())?;
    let trace = Trace::alone(&bed, &[])?;
    let connection = bed.established()?;
    let lines = aborted(&mut bed, &connection, Side::Client)?.into_iter().map(|line| {
        let container = if line["connection"]["role"] == "client" { json!(container) } else { Value::Null };
        but(line, json!({"process": {"container": container}}))
    });
    trace.verify(&bed, lines.collect()).with_context(|| format!("in the group {name}"))
}
