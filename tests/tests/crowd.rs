//! A large number of processes that open and close connections concurrently: every end is reported once, with
//! its owner.

use std::{
    collections::BTreeMap,
    fmt,
    process::{Command, Stdio},
};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Side, endpoint},
    blind_spot::{BlindSpot, EndAddresses, Hidden},
    crowd::{Claim, Kind, connections},
    expect::{but, differences, one_of},
    features::Feature,
    scenario::{Trace, is_answer_of_listener, is_answer_without_socket, routes},
    snmp::Counters,
    sockets::{self, TIME_WAIT},
};

/// The expected lines of an end.
struct Fate {
    close: Value,
    /// The RST that it sends or receives, if any.
    reset: Option<Value>,
}

/// The expectation for one end of a connection of this kind.
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

/// Lines by their [`key`].
type Index<'a> = BTreeMap<String, Vec<&'a Value>>;

/// The key that all lines of one kind about one end share.
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

/// Out of this many ends, one may be reported wrongly because the kernel ran no BPF program for it.
const ENDS_FOR_EACH_EXCUSED: usize = 10_000;

/// The largest number of crowds. How many ends the kernel hides is a matter of chance, and the first crowd may
/// be too small to judge by: all count together, so that none of the hidden ends is ever forgotten.
const MOST_CROWDS: usize = 5;

#[test]
fn every_end_is_reported_once_with_its_owner() -> Result<()> {
    let mut all = Outcome::default();
    for _ in 0..MOST_CROWDS {
        all.add(trace_crowd()?);
        if all.is_within_limit() {
            return Ok(());
        }
        println!("{all}");
    }
    bail!("after {MOST_CROWDS} crowds: {all}");
}

/// The ends of crowds, all of which were reported rightly but those that the kernel ran no BPF program for.
#[derive(Default)]
struct Outcome {
    ends: usize,
    /// Complaints about ends that the kernel ran no BPF program for.
    excused: Vec<(EndAddresses, Vec<String>)>,
}

impl Outcome {
    fn add(&mut self, crowd: Self) {
        self.ends += crowd.ends;
        self.excused.extend(crowd.excused);
    }

    fn allowed(&self) -> usize {
        self.ends / ENDS_FOR_EACH_EXCUSED
    }

    fn is_within_limit(&self) -> bool {
        self.excused.len() <= self.allowed()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ends, excused } = self;
        write!(
            f,
            "{} of {ends} ends are wrong where the kernel ran no BPF program, and {} are allowed: \
             {excused:#?}",
            excused.len(),
            self.allowed()
        )
    }
}

#[test]
fn a_crowd_without_hidden_ends_does_not_wipe_out_another() {
    let end = || "127.0.0.1:1".parse().expect("an address");
    let crowd = |ends, hidden| Outcome { ends, excused: vec![((end(), end()), Vec::new()); hidden] };
    let mut all = crowd(20_010, 6);
    assert!(!all.is_within_limit());
    all.add(crowd(20_010, 0));
    assert!(!all.is_within_limit(), "6 of 40,020");
    all.add(crowd(20_010, 0));
    assert!(all.is_within_limit(), "6 of 60,030");
    all.add(crowd(20_010, 3));
    assert!(!all.is_within_limit(), "9 of 80,040");
}

/// Traces a crowd, and compares every line with the claims of its processes.
fn trace_crowd() -> Result<Outcome> {
    let bed = Bed::new(routes::loopback_ipv4())?;
    let trace = Trace::alone(&bed, &["--findings", "off"])?;
    let before = Counters::read(bed.namespace(Side::Client))?;
    let blind_spot = BlindSpot::watch()?;
    let (parent, claims) = crowd(&bed)?;
    sockets::wait_until(bed.namespace(Side::Client), "every end is over", |sockets| {
        sockets.iter().all(|socket| socket.state == TIME_WAIT)
    })?;
    let sent = Counters::read(bed.namespace(Side::Client))?.since(&before, "TcpOutRsts")?;
    let refused = claims.iter().filter(|claim| claim.kind == Kind::Refused).count();
    ensure!(claims.len() == 2 * connections() - refused, "{} ends were claimed", claims.len());
    let resets = |direction: &str| {
        let fates = claims.iter().filter_map(|claim| fate(claim.kind, claim.side).reset);
        fates.filter(|reset| reset["direction"] == direction).count()
    };
    // Before 6.10 the kernel does not report RSTs that it sends without a socket.
    let sent = if Feature::EveryReset.is_here() { usize::try_from(sent)? } else { resets("sent") };
    let lines_due = claims.len() + resets("received") + sent;
    let hidden = blind_spot.hidden()?;
    let missing = 2 * hidden.ends.len() + hidden.resets.len();
    let ended = trace.finish_but(&bed, hidden.resets.len(), |lines| lines.len() + missing >= lines_due)?;

    let mut comparison = Comparison {
        hidden: &hidden,
        lines: index(&ended.lines),
        complaints: Complaints::default(),
        excused: BTreeMap::new(),
    };
    for claim in &claims {
        comparison.check(claim);
    }
    comparison.check_rest(parent);
    let Comparison { complaints, mut excused, .. } = comparison;
    ensure!(complaints.0.is_empty(), "{complaints}stderr: {}", ended.stderr);

    // The number of RSTs was compared with the kernel's counter, less those that the tool could not see.
    for reset in &hidden.resets {
        excused.entry(*reset).or_default().push("this RST may be missing".to_owned());
    }
    println!("{} ends; the kernel ran no BPF program for {hidden:?}", claims.len());
    Ok(Outcome { ends: claims.len(), excused: excused.into_iter().collect() })
}

/// Compares the tool's lines with the claims of the processes.
struct Comparison<'a> {
    hidden: &'a Hidden,
    /// The lines that no claim has accounted for yet.
    lines: Index<'a>,
    complaints: Complaints,
    /// Complaints about ends that the kernel ran no BPF program for.
    excused: BTreeMap<EndAddresses, Vec<String>>,
}

impl<'a> Comparison<'a> {
    /// Compares the lines about an end with the claim of its owner.
    fn check(&mut self, claim: &Claim) {
        let Claim { pid, kind, side, local, remote } = *claim;
        let (here, there) = (endpoint(local), endpoint(remote));
        let fate = fate(kind, side);
        let owner = json!({ "pid": pid });
        // A process that does not act can be gone by the time the tool looks for it. If one is named, it must
        // be the right one.
        let process = if fate.close["trigger"].is_null() { one_of(&[json!(null), owner]) } else { owner };
        let end = json!({"process": process, "connection": {"role": side.to_string()}});

        let mut found = Vec::new();
        let mut names_another = false;
        let expected = [("close", Some(fate.close)), ("reset", fate.reset)];
        for (event, this) in expected.into_iter().filter_map(|(event, this)| Some((event, this?))) {
            let lines = self.take(event, &this["direction"], &here, &there);
            if lines.len() != 1 {
                found.push(format!("{} {event} lines", lines.len()));
            }
            let this = but(this, end.clone());
            for line in lines {
                names_another |= !line["process"].is_null() && line["process"]["pid"] != pid;
                let differences = differences(line, &this);
                if !differences.is_empty() {
                    found.push(format!("the {event} line: {}", differences.join(" and ")));
                }
            }
        }
        let mut is_hidden = self.hidden.ends.contains(&(local, remote));
        if kind == Kind::Refused && Feature::EveryReset.is_here() {
            is_hidden |= self.hidden.ends.contains(&(remote, local));
            let answers = self.take("reset", &json!("sent"), &there, &here);
            if answers.len() != 1 || !is_answer_without_socket(answers[0]) {
                found.push(format!("the RST that refuses it is reported by {answers:?}"));
            }
        }
        // The tool may report a hidden end later with what is known, or not at all, but never with another
        // owner.
        if is_hidden && !names_another && !found.is_empty() {
            self.excused.entry((local, remote)).or_default().extend(found);
        } else {
            for complaint in &found {
                self.complaints.add(claim, complaint);
            }
        }
    }

    fn take(&mut self, event: &str, direction: &Value, local: &Value, remote: &Value) -> Vec<&'a Value> {
        self.lines.remove(&key(&json!(event), direction, local, remote)).unwrap_or_default()
    }

    /// Checks the lines that no claim has accounted for. A late ACK finds no socket any more, or the
    /// listener, and is answered with a RST as well. The kernel has counted those.
    fn check_rest(&mut self, parent: u32) {
        for line in std::mem::take(&mut self.lines).into_values().flatten() {
            let is_loss_of_hidden = line["event"] == "lost"
                && line["where"] == "connections"
                && line["count"].as_u64() <= Some(self.hidden.ends.len() as u64);
            if !is_loss_of_hidden
                && !is_answer_without_socket(line)
                && !is_answer_of_listener(line, Some(parent))
            {
                self.complaints.0.entry("unexpected lines".to_owned()).or_default().push(line.to_string());
            }
        }
    }
}

/// Complaints by kind and side. Of many, some of each are shown.
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

/// Runs the processes. Returns the pid of their common ancestor and their claims.
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
