//! Checks the features of the running kernel. A missing feature lowers expectations and skips tests, so a
//! feature that this kernel is known to have must not be missing.

use anyhow::{Result, ensure};
use tcpclose_tests::features;

#[test]
fn nothing_is_missing_that_has_to_be_here() -> Result<()> {
    let missing = features::unlawfully_missing();
    ensure!(missing.is_empty(), "this kernel is known to have {missing:?}");
    Ok(())
}
