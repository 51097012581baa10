//! The lockdown mode of the kernel (`kernel_lockdown(7)`), read from securityfs.

use std::fs;

/// The active mode: `none`, `integrity` or `confidentiality`. `None` if securityfs is not mounted or the
/// kernel has no lockdown.
pub fn mode() -> Option<String> {
    parse(&fs::read_to_string("/sys/kernel/security/lockdown").ok()?)
}

/// The file lists all modes, with the active one in brackets: `lockdown_read()` of
/// `security/lockdown/lockdown.c`.
fn parse(modes: &str) -> Option<String> {
    let (_, rest) = modes.split_once('[')?;
    let (mode, _) = rest.split_once(']')?;
    Some(mode.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_active_mode_is_in_brackets() {
        assert_eq!(parse("none [integrity] confidentiality\n").as_deref(), Some("integrity"));
        assert_eq!(parse("[none] integrity confidentiality\n").as_deref(), Some("none"));
        assert_eq!(parse("none integrity"), None);
        assert_eq!(parse(""), None);
    }
}
