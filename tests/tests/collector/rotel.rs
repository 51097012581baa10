//! `--otlp` with Rotel, a collector that people run, which passes records on.

use std::{env, process::Command};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tcpclose_tests::{
    bed::Bed, netns::Namespace, program::Program, scenario::routes, scratch::Scratch, until,
};

use crate::{
    CONNECTIONS, end_connections,
    otlp::{by_number, is_complete, launch},
    receiver::Receiver,
};

/// Where it listens; it passes records on to the receiver.
const ADDRESS: &str = "127.0.0.1:4319";

fn start(rotel: &str, namespace: &Namespace, folder: &Scratch) -> Result<Program> {
    let mut command = Command::new(rotel);
    command.args(["start", "--otlp-grpc-endpoint", "127.0.0.1:4320", "--otlp-http-endpoint", ADDRESS]);
    command.args(["--exporter", "otlp", "--otlp-exporter-protocol", "http"]);
    command.args(["--otlp-exporter-endpoint", &Receiver::url()]);
    command.arg("--pid-file").arg(folder.path().join("pid"));
    Program::start(namespace, command)
}

#[test]
fn rotel_passes_every_record_on_although_it_is_restarted() -> Result<()> {
    let Ok(rotel) = env::var("TCPCLOSE_TESTS_ROTEL") else {
        println!("skipped: Rotel is not here");
        return Ok(());
    };
    let receiver = Receiver::new()?;
    let folder = Scratch::new()?;
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let mut collector = start(&rotel, receiver.namespace(), &folder)?;
    let url = format!("http://{ADDRESS}");
    let tool = launch(&receiver, &bed)?.args(["--otlp", &url, "--stack", "both"]).start()?;
    end_connections(&mut bed)?;
    until("the first records arrive", || {
        Ok((by_number(receiver.taken()?)?.len() >= 2 * CONNECTIONS).then_some(()))
    })?;
    // It passes on what it has, and ends.
    collector.signal(Signal::SIGTERM)?;
    collector.ended()?;
    end_connections(&mut bed)?;
    until("the tool notices", || Ok(tool.said_so_far().stderr.contains("lines wait").then_some(())))?;
    let mut collector = start(&rotel, receiver.namespace(), &folder)?;
    end_connections(&mut bed)?;
    let ended = tool.stop()?;
    collector.signal(Signal::SIGTERM)?;
    collector.ended()?;
    ensure!(ended.lines.len() >= 6 * CONNECTIONS, "{ended}");
    is_complete(&ended.lines, receiver.taken()?).with_context(|| ended.to_string())?;
    Ok(())
}
