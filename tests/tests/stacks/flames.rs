//! The picture of `--flamegraph`, opened in Chromium.

use anyhow::{Result, ensure};
use tcpclose_tests::{
    chromium::{CHROMIUM, Page},
    scratch::Scratch,
    servers::is_missing,
    tool::Launch,
};

use super::{Connected, GCC, compile};

/// The functions are in the picture, and its script finds one of them.
#[test]
fn chromium_shows_the_flame_graph() -> Result<()> {
    if is_missing(&[GCC, CHROMIUM]) {
        return Ok(());
    }
    let folder = Scratch::new()?;
    let program = compile(GCC, &["-O2", "-g", "-fomit-frame-pointer"], "hang_up.c", &folder)?;
    let picture = folder.path().join("ends.svg");
    let launch = Launch::new()?.args(["--flamegraph".as_ref(), picture.as_os_str()]);
    let mut connected = Connected::start(&program, &[], launch)?;
    connected.program.tell("go")?;
    connected.reported()?;
    let Connected { tool, namespace, .. } = connected;
    tool.stop()?;
    let page = Page::of(&picture, "?s=hang_up", &namespace, folder.path());
    let elements = page.elements()?;
    for part in ["orderly (1 connections", "program (1 ", "main (1 ", "serve (1 ", "hang_up (1 "] {
        ensure!(elements.contains(part), "{part} is not in the picture:\n{elements}");
    }
    ensure!(elements.contains("Matched: 100"), "the script has not searched:\n{elements}");
    ensure!(!elements.contains("<parsererror"), "{elements}");
    Ok(())
}
