//! The pages of findings, in the form of the others. Two findings, `accept_overflow` and `refused`, have the
//! name of the cause that they consist of, and share its page.

use super::Page;

/// All of them.
pub(super) const PAGES: &[Page] = &[
    ("keepalive_mismatch", include_str!("findings/keepalive_mismatch.txt")),
    ("client_gave_up", include_str!("findings/client_gave_up.txt")),
    ("backend_died", include_str!("findings/backend_died.txt")),
    ("leak", include_str!("findings/leak.txt")),
    ("time_wait_pressure", include_str!("findings/time_wait_pressure.txt")),
    ("unread_close", include_str!("findings/unread_close.txt")),
    ("idle_cut", include_str!("findings/idle_cut.txt")),
    ("connect_unanswered", include_str!("findings/connect_unanswered.txt")),
    ("forged", include_str!("findings/forged.txt")),
    ("deploy", include_str!("findings/deploy.txt")),
    ("chain", include_str!("findings/chain.txt")),
];

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::PAGES;
    use crate::{commands::explain::names, event::FindingKind};

    #[test]
    fn every_kind_has_a_page() {
        for kind in FindingKind::value_variants() {
            assert!(names().contains(&kind.to_string().as_str()), "{kind}");
        }
        for (name, _) in PAGES {
            let is_kind = FindingKind::value_variants().iter().any(|kind| kind.to_string() == *name);
            assert!(is_kind, "{name}: a page of no kind");
        }
    }

    #[test]
    fn a_page_fits_a_screen_and_has_all_parts() {
        for (name, page) in PAGES {
            assert!(page.starts_with(&format!("{name}: ")), "{page}");
            assert!(page.lines().count() <= 24, "{page}");
            for line in page.lines() {
                assert!(line.chars().count() <= 80, "{line}");
            }
            for part in ["What ", "How ", "Check ", "Change "] {
                assert!(page.lines().any(|line| line.starts_with(part)), "{name} has no {part}");
            }
        }
    }
}
