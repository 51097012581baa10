//! `--metrics`, collected by a real Prometheus.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tcpclose_tests::{
    bed::{Bed, Side},
    netns::Namespace,
    program::Program,
    scenario::{Trace, routes},
    scratch::Scratch,
    servers::is_missing,
    tool::Launch,
    until,
};

const PROMETHEUS: &str = "/usr/bin/prometheus";
const PROMTOOL: &str = "/usr/bin/promtool";

/// Ports in the namespace of the tool.
const METRICS: u16 = 9435;
const COLLECTOR: u16 = 9090;

/// How many connections are reset.
const RESETS: usize = 5;

/// The status and the body of a response from a port of the loopback interface. By HTTP 1.0, whose bodies are
/// not cut to pieces.
fn get(namespace: &Namespace, port: u16, path: &str) -> Result<(u16, String)> {
    namespace.inside(|| {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        let (head, body) = response.split_once("\r\n\r\n").context("no body")?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        Ok((status, body.to_owned()))
    })
}

/// The value of a metric whose name and labels begin with `start`.
fn value(text: &str, start: &str) -> Option<f64> {
    text.lines().find(|line| line.starts_with(start))?.rsplit(' ').next()?.parse().ok()
}

fn percent_encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |encoded, byte| encoded + &format!("%{byte:02X}"))
}

fn deployed(name: &str) -> String {
    format!("{}/../deploy/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The result of a query to Prometheus.
fn query(namespace: &Namespace, expression: &str) -> Result<Vec<Value>> {
    let path = format!("/api/v1/query?query={}", percent_encoded(expression));
    let (status, body) = get(namespace, COLLECTOR, &path)?;
    let answer: Value = serde_json::from_str(&body).with_context(|| format!("{status}: {body}"))?;
    ensure!(answer["status"] == "success", "{expression}: {body}");
    Ok(answer["data"]["result"].as_array().cloned().unwrap_or_default())
}

/// The queries of the dashboard.
fn queries() -> Result<Vec<String>> {
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(deployed("grafana/tcpclose.json"))?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let expressions = targets.map(|target| target["expr"].as_str().context("a target without a query"));
    // Grafana puts at least four times the interval of collection there.
    expressions.map(|expression| Ok(expression?.replace("$__rate_interval", "10s"))).collect()
}

#[test]
fn prometheus_collects_what_the_lines_say() -> Result<()> {
    if is_missing(&[PROMETHEUS, PROMTOOL]) {
        return Ok(());
    }
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let launch = Launch::new()?.inside(bed.namespace(Side::Client))?.trace(bed.namespaces());
    let tool = launch.args(["--linger", "100ms", "--metrics", &METRICS.to_string()]).start()?;
    let trace = Trace::by(tool, &bed)?;
    for path in ["/healthz", "/readyz"] {
        ensure!(get(bed.namespace(Side::Client), METRICS, path)?.0 == 200, "{path}");
    }

    let folder = Scratch::new()?;
    let configuration = folder.path().join("prometheus.yml");
    fs::write(
        &configuration,
        format!(
            "global: {{scrape_interval: 1s}}\nrule_files: ['{}']\nscrape_configs:\n  \
             - job_name: tcpclose\n    static_configs: [{{targets: ['127.0.0.1:{METRICS}']}}]\n",
            deployed("prometheus/alerts.yml")
        ),
    )?;
    let mut command = Command::new(PROMETHEUS);
    command.arg(format!("--config.file={}", configuration.display()));
    command.arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()));
    command.arg(format!("--web.listen-address=127.0.0.1:{COLLECTOR}")).arg("--log.level=error");
    let _prometheus = Program::start(bed.namespace(Side::Client), command)?;
    until("Prometheus has collected", || {
        let up = query(bed.namespace(Side::Client), "up{job=\"tcpclose\"}").unwrap_or_default();
        Ok(up.first().filter(|up| up["value"][1] == "1").map(|_| ()))
    })?;

    for _ in 0..RESETS {
        bed.established()?;
        for order in ["linger0", "close"] {
            bed.peer(Side::Client).ask(order)?;
        }
    }
    // And one that its server does not close.
    bed.established()?;
    bed.peer(Side::Client).ask("close")?;
    ensure!(
        trace.wait_until(|lines| lines.iter().any(|line| line["event"] == "lingering")),
        "nothing lingers"
    );

    let namespace = bed.namespace(Side::Client);
    let labels = "process=\"peer-client\",cause=\"linger_zero\",closed_by=\"local\"";
    let (_, text) = get(namespace, METRICS, "/metrics")?;
    let found = value(&text, &format!("tcpclose_closes_total{{{labels}}}"));
    ensure!(found == Some(5.0), "{found:?} closes: {text}");
    let until_known = |expression: &str, expected: &str| {
        until(expression, || {
            let found = query(namespace, expression)?;
            Ok(found.first().filter(|it| it["value"][1] == expected).map(|_| ()))
        })
    };
    until_known(&format!("tcpclose_closes_total{{{labels}}}"), &RESETS.to_string())?;
    until_known("sum(tcpclose_resets_total{direction=\"sent\",cause=\"linger_zero\"})", &RESETS.to_string())?;
    until_known("sum(tcpclose_lingering_sockets{state=\"CLOSE_WAIT\"})", "1")?;
    let queries = queries()?;
    ensure!(queries.len() >= 7, "{queries:?}");
    for expression in queries {
        until(&expression, || Ok((!query(namespace, &expression)?.is_empty()).then_some(())))?;
    }
    let (_, rules) = get(namespace, COLLECTOR, "/api/v1/rules")?;
    ensure!(rules.contains("TcpCloseLeak") && !rules.contains("\"health\":\"err\""), "{rules}");

    bed.peer(Side::Server).ask("close")?;
    until("the socket lingers no more", || {
        let (_, text) = get(bed.namespace(Side::Client), METRICS, "/metrics")?;
        Ok(value(&text, "tcpclose_lingering_sockets{").filter(|count| *count < 0.5))
    })?;
    Ok(())
}

#[test]
fn promtool_accepts_rules() -> Result<()> {
    if is_missing(&[PROMTOOL]) {
        return Ok(());
    }
    let rules = deployed("prometheus/alerts.yml");
    ensure!(Path::new(&rules).exists(), "{rules} is missing");
    let output = Command::new(PROMTOOL).args(["check", "rules", &rules]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn an_address_that_cannot_be_used_is_named() -> Result<()> {
    let ended = Launch::new()?.args(["--metrics", "192.0.2.1:9435"]).run()?.with_code(1)?;
    if !ended.stderr.contains("192.0.2.1:9435 (--metrics)") {
        bail!("stderr does not name the address\n{ended}");
    }
    Ok(())
}
