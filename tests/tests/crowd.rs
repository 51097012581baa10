//! A crowd that does everything at once: each end is told once, and whose it was is known.

use std::{
    collections::BTreeMap,
    fmt,
    process::{Command, Stdio},
};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Side, endpoint},
    blind::Blind,
    crowd::{Claim, Kind, connections},
    expect::{but, differences, one_of},
    features::Feature,
    scenario::{Trace, routes},
    snmp::Counters,
    sockets::{self, TIME_WAIT},
};

/// What becomes of an end.
struct Fate {
    close: Value,
    /// The RST that it sends or receives.
    reset: Option<Value>,
}

/// What becomes of either end of a connection, by how it ends.
fn fate(kind: Kind, side: Side) -> Fate {
    use Kind::{
        ChildCloses, ClientCloses, ClientExits, ClientIsKilled, ClientReadsNot, ClientResets,
        ClientShutsDown, HeirIsReset, ReceiverCloses, ReceiverIsReset, Refused, ServerCloses,
    };
    match (kind, side) {
        (ClientCloses, Side::Client) | (ServerCloses | ReceiverCloses | ChildCloses, Side::Server) => {
            first("close")
        }
        (ClientShutsDown, Side::Client) => first("shutdown"),
        (ClientExits, Side::Client) => first("exit"),
        (ClientIsKilled, Side::Client) => {
            let Fate { close, reset } = first("signal");
            Fate { close: but(close, json!({"signal": "SIGKILL"})), reset }
        }
        (ClientCloses | ClientShutsDown | ClientExits | ClientIsKilled, Side::Server)
        | (ServerCloses | ReceiverCloses | ChildCloses, Side::Client) => {
            let close = json!({"closed_by": "peer", "ended": "fin", "trigger": "close", "cause": null});
            Fate { close, reset: None }
        }
        (ClientResets | ReceiverIsReset, Side::Client) | (HeirIsReset, Side::Server) => resets("linger_zero"),
        (ClientReadsNot, Side::Client) => resets("unread_data"),
        (ClientResets | ReceiverIsReset | ClientReadsNot, Side::Server) | (HeirIsReset, Side::Client) => {
            is_reset("peer_reset")
        }
        (Refused, _) => is_reset("refused"),
    }
}

fn first(trigger: &str) -> Fate {
    let close = json!({"closed_by": "local", "ended": "fin", "trigger": trigger, "cause": null});
    Fate { close, reset: None }
}

fn resets(cause: &str) -> Fate {
    let close = json!({"closed_by": "local", "ended": "reset_sent", "trigger": "close", "cause": cause});
    Fate { close, reset: Some(json!({"direction": "sent", "cause": cause})) }
}

fn is_reset(cause: &str) -> Fate {
    let close = json!({"closed_by": "peer", "ended": "reset_received", "trigger": null, "cause": cause});
    Fate { close, reset: Some(json!({"direction": "received", "cause": cause})) }
}

/// The lines that are of one kind, by both addresses.
type Index<'a> = BTreeMap<String, Vec<&'a Value>>;

/// Where the lines of an end are to be found.
fn key(event: &Value, direction: &Value, local: &Value, remote: &Value) -> String {
    format!("{event} {direction} {local} {remote}")
}

fn index(lines: &[Value]) -> Index<'_> {
    let mut index = Index::new();
    for line in lines {
        let ends = ["local", "remote"].map(|end| {
            let end = &line["connection"][end];
            json!({"address": end["address"], "port": end["port"]})
        });
        index.entry(key(&line["event"], &line["direction"], &ends[0], &ends[1])).or_default().push(line);
    }
    index
}

#[test]
fn everybody_is_told_apart() -> Result<()> {
    let bed = Bed::new(routes::loopback_ipv4())?;
    let trace = Trace::alone(&bed, &[])?;
    let before = Counters::read(bed.namespace(Side::Client))?;
    let blind = Blind::watch()?;
    let (parent, claims) = crowd(&bed)?;
    sockets::wait_until(bed.namespace(Side::Client), "every end is over", |sockets| {
        sockets.iter().all(|socket| socket.state == TIME_WAIT)
    })?;
    let sent = Counters::read(bed.namespace(Side::Client))?.since(&before, "TcpOutRsts")?;
    let expected: Vec<_> = claims.iter().map(|claim| (claim, fate(claim.kind, claim.side))).collect();
    let refused = claims.iter().filter(|claim| claim.kind == Kind::Refused).count();
    ensure!(claims.len() == 2 * connections() - refused, "{} ends were claimed", claims.len());
    let resets = |direction: &str| {
        let is_one = |fate: &Fate| fate.reset.as_ref().is_some_and(|reset| reset["direction"] == direction);
        expected.iter().filter(|(_, fate)| is_one(fate)).count()
    };
    // The kernel sends some on behalf of nobody, and may keep that to itself.
    let every_reset = Feature::EveryReset.is_here();
    let sent = if every_reset { usize::try_from(sent)? } else { resets("sent") };
    let lines_due = claims.len() + resets("received") + sent;
    let unseen = blind.seen()?;
    println!("where the kernel may run no BPF program: {unseen:?}");
    let missing = 2 * unseen.connections.len() + unseen.resets;
    let ended = trace.finish_but(&bed, unseen.resets, |lines| lines.len() + missing >= lines_due)?;

    let mut index = index(&ended.lines);
    let mut complaints = Complaints::default();
    let mut unknown = BTreeMap::<(Kind, &str), usize>::new();
    for (claim, fate) in expected {
        let Claim { pid, kind, side, local, remote } = *claim;
        let (here, there) = (endpoint(local), endpoint(remote));
        let owner = json!({ "pid": pid });
        // Who does not act can be gone when anybody looks. Whoever is named has to be the right one.
        let process = if fate.close["trigger"].is_null() { one_of(&[json!(null), owner]) } else { owner };
        let mut told = |event: &str, this: &Value| {
            let lines = index.remove(&key(&json!(event), &this["direction"], &here, &there));
            let lines = lines.unwrap_or_default();
            if unseen.connections.contains(&(local, remote)) {
                // Told later with what is known, or not at all; but never of anybody else.
                if lines.iter().any(|line| !line["process"].is_null() && line["process"]["pid"] != pid) {
                    complaints.add(claim, &format!("{lines:?}"));
                }
                return;
            }
            if lines.len() != 1 {
                complaints.add(claim, &format!("{} {event} lines", lines.len()));
            }
            let this =
                but(this.clone(), json!({"process": process, "connection": {"role": side.to_string()}}));
            for line in lines {
                if line["process"].is_null() {
                    *unknown
                        .entry((kind, if event == "close" { "closes" } else { "resets" }))
                        .or_default() += 1;
                }
                let found = differences(line, &this);
                if !found.is_empty() {
                    complaints.add(claim, &format!("the {event} line: {}", found.join(" and ")));
                }
            }
        };
        told("close", &fate.close);
        if let Some(reset) = &fate.reset {
            told("reset", reset);
        }
        if kind == Kind::Refused && every_reset {
            let answers = index.remove(&key(&json!("reset"), &json!("sent"), &there, &here));
            let answers = answers.unwrap_or_default();
            if answers.len() != 1 || !is_answer_of_nobody(answers[0]) {
                complaints.add(claim, &format!("{answers:?} are the answers"));
            }
        }
    }
    println!("of nobody, where nobody acted: {unknown:?}");
    // An acknowledgement that comes late finds no socket any more, or the listener, and is answered with a RST
    // too. The kernel has counted those.
    for line in index.into_values().flatten() {
        let is_excused = line["event"] == "lost"
            && line["where"] == "connections"
            && line["count"].as_u64() <= Some(unseen.connections.len() as u64);
        if !is_excused && !is_answer_of_nobody(line) && !is_answer_of_listener(line, parent) {
            complaints.0.entry("nobody".to_owned()).or_default().push(line.to_string());
        }
    }
    ensure!(complaints.0.is_empty(), "{complaints}stderr: {}", ended.stderr);
    Ok(())
}

/// What is wrong, by the kind of thing that it is wrong with: of many, some of each.
#[derive(Default)]
struct Complaints(BTreeMap<String, Vec<String>>);

impl Complaints {
    fn add(&mut self, claim: &Claim, complaint: &str) {
        let Claim { kind, side, .. } = claim;
        self.0.entry(format!("{kind:?} at the {side}")).or_default().push(format!("{claim:?}: {complaint}"));
    }
}

impl fmt::Display for Complaints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SOME: usize = 3;
        for (what, complaints) in &self.0 {
            writeln!(f, "{what}: {} complaints, such as", complaints.len())?;
            for complaint in complaints.iter().take(SOME) {
                writeln!(f, "  {complaint}")?;
            }
        }
        Ok(())
    }
}

/// Whether a line tells of a RST that the host sent for want of a socket.
fn is_answer_of_nobody(line: &Value) -> bool {
    let nobody = json!({
        "event": "reset",
        "direction": "sent",
        "cause": "no_listener",
        "process": null,
        "state": null,
    });
    differences(line, &nobody).is_empty()
}

/// Whether a line tells of a RST that the host sent for a listener, all of which are this process's.
fn is_answer_of_listener(line: &Value, pid: u32) -> bool {
    let listener = json!({
        "event": "reset",
        "direction": "sent",
        "cause": "invalid_segment",
        "process": {"pid": pid, "attribution": "listener"},
        "state": "LISTEN",
    });
    differences(line, &listener).is_empty()
}

/// Has the crowd do its things. Returns the process that all others descend from, and what they said.
fn crowd(bed: &Bed) -> Result<(u32, Vec<Claim>)> {
    let mut crowd = Command::new(env!("CARGO_BIN_EXE_crowd"));
    crowd.stdin(Stdio::null()).stdout(Stdio::piped());
    bed.namespace(Side::Client).enter(&mut crowd)?;
    let crowd = crowd.spawn()?;
    let parent = crowd.id();
    let output = crowd.wait_with_output()?;
    ensure!(output.status.success(), "the crowd ended with {}", output.status);
    let claims = String::from_utf8(output.stdout)?;
    Ok((parent, claims.lines().map(Claim::parse).collect::<Result<_>>()?))
}
