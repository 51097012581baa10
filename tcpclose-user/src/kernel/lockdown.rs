//! Whether the kernel is locked down (`kernel_lockdown(7)`), as securityfs tells where it is mounted.

use std::fs;

/// The mode in force, `none`, `integrity` or `confidentiality`. `None` if nothing tells it.
pub fn mode() -> Option<String> {
    parse(&fs::read_to_string("/sys/kernel/security/lockdown").ok()?)
}

/// All modes stand there, the one in force in brackets: `lockdown_read()` of `security/lockdown/lockdown.c`.
fn parse(modes: &str) -> Option<String> {
    let (_, rest) = modes.split_once('[')?;
    let (mode, _) = rest.split_once(']')?;
    Some(mode.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_stands_in_brackets() {
        assert_eq!(parse("none [integrity] confidentiality\n").as_deref(), Some("integrity"));
        assert_eq!(parse("[none] integrity confidentiality\n").as_deref(), Some("none"));
        assert_eq!(parse("none integrity"), None);
        assert_eq!(parse(""), None);
    }
}
