//! `tcpclose replay` reproduces the lines of a live run from the file of `--record`, without privileges.

use std::{fs, os::unix::fs::PermissionsExt};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Side},
    expect::{differences, shortened},
    scenario::{aborted, routes},
    scratch::Scratch,
    tool::Launch,
};

/// The run has closes, resets, a lingering socket, and stacks.
#[test]
fn replay_writes_the_lines_of_the_live_run() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.path().join("record");
    let mut bed = Bed::new(routes::veth_ipv6())?;
    let record = ["--linger".as_ref(), "300ms".as_ref(), "--record".as_ref(), file.as_os_str()];
    let tool = Launch::new()?.trace(bed.namespaces()).args(record).start()?;

    let connection = bed.established()?;
    aborted(&mut bed, &connection, Side::Client)?;
    bed.connect_and_fail(bed.route().address(Side::Server), 7, "ECONNREFUSED")?;
    bed.established()?;
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("receive-end")?;
    tool.wait_for("a lingering socket", |line| line["event"] == "lingering")?;
    bed.peer(Side::Server).ask("close")?;
    let is_last = json!({"event": "close", "connection": {"role": "server"}, "ended": "fin"});
    tool.wait_for("the last close", |line| differences(line, &is_last).is_empty())?;
    let live = tool.stop()?;
    let has = |event: &str| live.lines.iter().any(|line| line["event"] == event);
    ensure!(["close", "reset", "lingering"].into_iter().all(has), "{live}");
    let is_named = |line: &Value| line["stack"]["user"][0]["symbol"].is_string();
    ensure!(live.lines.iter().any(is_named), "no stack has names\n{live}");

    fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
    let file = file.to_str().context("the path is not text")?;
    let replayed = Launch::new()?.as_nobody(&[])?.args(["replay", "-o", "json", file]).run()?.with_code(0)?;
    for (number, (live, replayed)) in live.lines.iter().zip(&replayed.lines).enumerate() {
        let differences = differences(replayed, live);
        ensure!(
            live == replayed,
            "line {}: {}\n  live     {}\n  replayed {}",
            number + 1,
            differences.join("\n  "),
            shortened(live),
            shortened(replayed)
        );
    }
    ensure!(live.lines.len() == replayed.lines.len(), "live: {live}\nreplayed: {replayed}");
    Ok(())
}
