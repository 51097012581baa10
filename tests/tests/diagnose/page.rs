//! The page of `diagnose --html`, opened in Chromium.

use std::fs;

use anyhow::{Result, ensure};
use tcpclose_tests::{
    chromium::{CHROMIUM, Page},
    servers::{BACKEND_PORT, PYTHON, is_missing},
    tool::Launch,
};

use super::{SEVERAL, Site, ask, connect_in_vain, json_lines, status};

/// Chromium reads the page without a network, finds no error in it, and has all parts of it.
#[test]
fn chromium_shows_the_page() -> Result<()> {
    if is_missing(&[PYTHON, CHROMIUM]) {
        return Ok(());
    }
    let site = Site::open_with(&["--stack", "user"])?;
    let _app = site.app("1")?;
    let mut clients = site.connect_several(BACKEND_PORT)?;
    for client in &mut clients {
        ask(client, "GET /")?;
        ensure!(status(client)? == 200);
    }
    site.tool.wait_for("a socket in CLOSE_WAIT", |line| line["event"] == "lingering")?;
    connect_in_vain(&site.namespace)?;
    drop(clients);
    let is_end = |line: &&serde_json::Value| line["event"] == "close";
    ensure!(
        site.tool.wait_until(|lines| lines.iter().filter(is_end).count() >= 3 * SEVERAL),
        "not all ended"
    );
    let ended = site.tool.stop()?;
    let (events, page) = (site.folder.path().join("events.jsonl"), site.folder.path().join("page.html"));
    let text = json_lines(&ended.lines);
    fs::write(&events, text)?;
    let output =
        Launch::new()?.args(["diagnose".as_ref(), "--html".as_ref(), page.as_os_str(), events.as_os_str()]);
    ensure!(output.output()?.status.success(), "the page was not written");

    let dom = Page::of(&page, "", &site.namespace, site.folder.path()).elements()?;
    for part in [
        "<h3>refused</h3>",
        "<h3>keepalive_mismatch</h3>",
        "Ends of connections over time, by cause",
        "Sockets in CLOSE_WAIT",
        "Sockets in TIME_WAIT",
        "Where programs closed",
        "class=\"flames\"",
    ] {
        ensure!(dom.contains(part), "{part} is not in the page:\n{dom}");
    }
    // The axis of every diagram over time has two times.
    let times = dom.matches(" UTC</text>").count();
    ensure!(times == 3 && !dom.contains("<parsererror"), "{times} diagrams have an axis:\n{dom}");
    for value in dom.split("y=\"").skip(1).filter_map(|rest| rest.split('"').next()) {
        ensure!(value.parse::<f64>().is_ok(), "{value} is no coordinate");
    }
    Ok(())
}
