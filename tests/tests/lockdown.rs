//! A kernel that lets nobody read its memory. There is no way back from that but to boot.

use std::fs;

use anyhow::{Context, Result, ensure};
use tcpclose_tests::{features::Feature, tool::Launch};

#[test]
fn confidentiality_is_named() -> Result<()> {
    if Feature::OwnMachine.is_missed() {
        return Ok(());
    }
    fs::write("/sys/kernel/security/lockdown", "confidentiality").context("locking the kernel down")?;
    let ended = Launch::new()?.run()?.with_code(1)?;
    ensure!(ended.stderr.to_lowercase().contains("lockdown"), "stderr does not name the reason\n{ended}");
    Ok(())
}
