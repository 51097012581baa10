//! What stacks of real servers cost, and how many of them are whole.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Bench,
    bed::Bed,
    compare::tcpclose,
    programs,
    table::{self, Row, rounded},
    tool::{Kind, Tracer, check_runs},
};
use crate::command::{self, say};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How often each server is measured with each kind of stacks
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How many connections each server closes in a round
    #[arg(long, value_name = "N", default_value_t = 4_000, value_parser = clap::value_parser!(u32).range(1..))]
    connections: u32,
}

/// A server that closes its connections.
struct Closer {
    /// The name of its program, for `--comm`.
    comm: &'static str,
    /// The program without which it is left out.
    needs: &'static str,
    /// What starts it: a script for `sh`, with the directory that it may write to in `$1`.
    command: &'static str,
}

const SERVERS: [Closer; 4] = [
    Closer {
        comm: "nginx",
        needs: "nginx",
        command: r#"echo 'daemon off; master_process off; pid nginx.pid; error_log stderr; events {}
            http { access_log off; keepalive_timeout 0;
            server { listen 127.0.0.1:8080; location / { return 200 x; } } }' >"$1/nginx.conf"
            exec nginx -p "$1" -c "$1/nginx.conf""#,
    },
    Closer {
        comm: "python3",
        needs: "/usr/bin/python3",
        command: r#"cd "$1" && exec /usr/bin/python3 -m http.server 8080"#,
    },
    Closer {
        comm: "node",
        needs: "node",
        command: r#"exec node -e 'require("http").createServer(function answer(request, response) {
            response.end("x"); }).listen(8080)'"#,
    },
    Closer {
        comm: "java",
        needs: "javac",
        command: r#"cat >"$1/Answer.java" <<'EOF'
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
public class Answer {
    public static void main(String[] arguments) throws Exception {
        HttpServer server = HttpServer.create(new InetSocketAddress(8080), 64);
        server.createContext("/", exchange -> {
            exchange.getResponseHeaders().set("Connection", "close");
            exchange.sendResponseHeaders(200, -1);
            exchange.close();
        });
        server.start();
    }
}
EOF
            exec java "$1/Answer.java""#,
    },
];

/// The kinds of stacks, with the options of tcpclose.
const STACKS: [(&str, &[&str]); 3] =
    [("none", &["--stack", "none"]), ("auto", &[]), ("fp", &["--call-graph", "fp"])];

/// The time that a server may take to answer.
const PATIENCE: Duration = Duration::from_mins(1);

/// What one phase showed.
#[derive(Clone, Copy, Default)]
struct Phase {
    closes: f64,
    whole: f64,
    copied: f64,
    recognized: f64,
    bpf_ns: f64,
    cpu_us: f64,
}

/// The part of a `close` line that is needed here.
#[derive(Deserialize)]
struct CloseLine {
    event: String,
    trigger: Option<String>,
    stack: Option<CloseStack>,
}

#[derive(Deserialize)]
struct CloseStack {
    user: Option<Vec<LineFrame>>,
}

#[derive(Deserialize)]
struct LineFrame {
    truncated: Option<String>,
}

pub(crate) fn measure(bench: &mut Bench, args: &Args) -> Result<Value> {
    let tool = bench.tool()?.to_owned();
    let mut rows = Vec::<Row>::new();
    for server in &SERVERS {
        if command::find(server.needs).is_none() {
            say(&format!("{} is left out: there is no {}", server.comm, server.needs));
            continue;
        }
        bench.bed.renew()?;
        let bed = &bench.bed;
        let _running = Running::start(bed, server)?;
        let mut phases = [const { Vec::new() }; STACKS.len()];
        for round in 1..=args.rounds {
            say(&format!("{}: round {round} of {}", server.comm, args.rounds));
            for ((_, options), phases) in STACKS.iter().zip(&mut phases) {
                let options = [*options, &["--comm", server.comm]].concat();
                phases.push(phase(bed, &tcpclose(&tool, &options)?, args.connections)?);
            }
        }
        rows.extend(STACKS.iter().zip(&phases).map(|((name, _), phases)| row(server, name, phases)));
    }
    table::print(&rows);
    println!("\nMedians. The times include the ends of the client, which are filtered out.");
    Ok(table::json(&rows))
}

fn row(server: &Closer, stacks: &str, phases: &[Phase]) -> Row {
    let median = |of: fn(&Phase) -> f64, decimals| {
        let values: Vec<_> = phases.iter().map(of).collect();
        rounded(table::median(&values).unwrap_or_default(), decimals)
    };
    vec![
        ("server", json!(server.comm)),
        ("stacks", json!(stacks)),
        ("closes", median(|phase| phase.closes, 0)),
        ("whole", median(|phase| phase.whole, 0)),
        ("copied", median(|phase| phase.copied, 0)),
        ("recognized", median(|phase| phase.recognized, 0)),
        ("BPF ns/close", median(|phase| phase.bpf_ns, 0)),
        ("CPU us/close", median(|phase| phase.cpu_us, 1)),
    ]
}

/// One phase: a tool that starts while the server runs, and `connections` connections.
fn phase(bed: &Bed, command: &[String], connections: u32) -> Result<Phase> {
    let mut tracer = Tracer::start(bed, Kind::Tcpclose, command)?;
    tracer.settle()?;
    Bed::set_statistics(true)?;
    let (cpu, before) = (tracer.cpu()?, programs::nanoseconds(&tracer)?);
    Running::connect(bed, connections)?;
    tracer.settle()?;
    let bpf = programs::nanoseconds(&tracer)? - before;
    Bed::set_statistics(false)?;
    let cpu_us = tracer.cpu_since(cpu, connections.into())?;
    tracer.stop()?;
    let mut phase = Phase { bpf_ns: bpf / f64::from(connections), cpu_us, ..Phase::default() };
    for line in BufReader::with_capacity(1 << 20, File::open(bed.path("output"))?).lines() {
        let line: CloseLine = serde_json::from_str(&line?).context("it wrote a line that is no event")?;
        if line.event != "close" || line.trigger.is_none() {
            continue;
        }
        phase.closes += 1.0;
        let frames = line.stack.and_then(|stack| stack.user).unwrap_or_default();
        phase.whole += f64::from(frames.last().is_some_and(|last| last.truncated.is_none()));
    }
    let summary = fs::read_to_string(bed.path("errors"))?;
    let words: Vec<_> = summary.split_whitespace().collect();
    let before = |word: &str| {
        let place = words.iter().position(|it| *it == word)?;
        words.get(place.checked_sub(1)?)?.parse().ok()
    };
    phase.copied = before("copied").unwrap_or_default();
    phase.recognized = before("recognized").unwrap_or_default();
    ensure!(phase.closes > 0.0, "the tool wrote no close of the server");
    Ok(phase)
}

/// A server; killed on drop.
struct Running {
    child: Child,
}

impl Running {
    /// Starts it, and waits until it answers.
    fn start(bed: &Bed, server: &Closer) -> Result<Self> {
        let log = bed.create("server")?;
        let mut command = bed.inside("sh");
        command.args(["-c", server.command, "sh"]).arg(bed.path(""));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().context("cannot start ip")?;
        let mut running = Self { child };
        let start = Instant::now();
        while Self::connect(bed, 1).is_err() {
            check_runs(&mut running.child, &bed.path("server")).context(server.comm)?;
            ensure!(start.elapsed() < PATIENCE, "{} has not answered for {PATIENCE:?}", server.comm);
            thread::sleep(Duration::from_millis(50));
        }
        Ok(running)
    }

    /// Makes connections with one request each.
    fn connect(bed: &Bed, connections: u32) -> Result<()> {
        let (number, at_a_time) = (connections.to_string(), connections.min(8).to_string());
        let mut client = bed.inside("ab");
        client.args(["-q", "-n", &number, "-c", &at_a_time, "http://127.0.0.1:8080/"]);
        let output = client.stdin(Stdio::null()).output().context("cannot start ip")?;
        ensure!(
            output.status.success(),
            "{} failed ({}): {}",
            command::line(&client),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
