//! A locked down kernel: first against modification, then also against reading its memory. Only a reboot
//! undoes either.

use std::fs;

use anyhow::{Context, Result, ensure};
use tcpclose_tests::{
    bed::{Bed, Side},
    features::Feature,
    scenario::{Trace, aborted, routes},
    tool::Launch,
};

const MODE: &str = "/sys/kernel/security/lockdown";

#[test]
fn integrity_loses_nothing_and_confidentiality_is_named() -> Result<()> {
    if Feature::OwnMachine.is_missed() {
        return Ok(());
    }
    let mode = fs::read_to_string(MODE)?;
    if mode.contains("[none]") {
        fs::write(MODE, "integrity").context("locking the kernel down")?;
    }
    // In a repetition of the test, the kernel may already be in the stricter mode.
    if !mode.contains("[confidentiality]") {
        let mut bed = Bed::new(routes::loopback_ipv4())?;
        let trace = Trace::alone(&bed, &[])?;
        let connection = bed.established()?;
        let expected = aborted(&mut bed, &connection, Side::Client)?;
        trace.verify(&bed, expected)?;
        fs::write(MODE, "confidentiality").context("locking the kernel down further")?;
    }
    let ended = Launch::new()?.run()?.with_code(1)?;
    ensure!(ended.stderr.contains("locked down, in mode `confidentiality`"), "{ended}");
    let output = Launch::new()?.args(["doctor"]).output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.code() == Some(3) && text.contains("confidentiality"), "{text}");
    Ok(())
}
