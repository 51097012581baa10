//! What the running kernel has: expectations are lower, and tests are skipped, where something is missing, so that nothing
//! may be missing that is known to be there.

use anyhow::{Result, ensure};
use tcpclose_tests::features;

#[test]
fn nothing_is_missing_that_has_to_be_here() -> Result<()> {
    let missing = features::unlawfully_missing();
    ensure!(missing.is_empty(), "this kernel is known to have {missing:?}");
    Ok(())
}
