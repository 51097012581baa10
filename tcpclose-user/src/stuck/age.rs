//! How long a socket has been in its state, as far as the trace shows it.

use crate::ingest::life::Life;

/// How long a socket has been in its state. All times are in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Age {
    /// When it entered the state, `CLOCK_BOOTTIME`; `None` if that was before the trace.
    pub since: Option<u64>,
    /// The least that its age can be.
    pub at_least: u64,
    /// The most that its age can be; `None` if there is no such bound.
    pub at_most: Option<u64>,
}

impl Age {
    /// The age of a socket that was inspected `now`.
    pub fn of(life: &Life, now: u64) -> Self {
        let steps = life.path.steps();
        let found_there = life.path.began_before && steps.len() == 1;
        match steps.last() {
            Some((state, entered)) if Some(*state) == life.state => {
                let at_least = now.saturating_sub(*entered);
                let known = !found_there;
                Self { since: known.then_some(*entered), at_least, at_most: known.then_some(at_least) }
            }
            // It has changed its state unseen.
            Some((_, entered)) => {
                Self { since: None, at_least: 0, at_most: Some(now.saturating_sub(*entered)) }
            }
            None => Self { since: None, at_least: 0, at_most: None },
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{ingest::life::examples::unknown, tcp::State};

    pub(in crate::stuck) fn on(path: &[(State, u64)]) -> Life {
        Life {
            path: path.iter().copied().collect(),
            state: path.last().map(|(state, _)| *state),
            ..unknown()
        }
    }

    pub(in crate::stuck) fn found(path: &[(State, u64)]) -> Life {
        let mut life = on(path);
        life.path.began_before = true;
        life
    }

    #[test]
    fn in_the_last_state() {
        let closed = on(&[(State::Established, 10), (State::CloseWait, 30)]);
        assert_eq!(Age::of(&closed, 100), Age { since: Some(30), at_least: 70, at_most: Some(70) });
    }

    #[test]
    fn of_a_socket_older_than_the_trace() {
        let waits = found(&[(State::CloseWait, 30)]);
        assert_eq!(Age::of(&waits, 100), Age { since: None, at_least: 70, at_most: None });
        let moved_on = found(&[(State::Established, 30), (State::CloseWait, 40)]);
        assert_eq!(Age::of(&moved_on, 100).since, Some(40));
    }

    #[test]
    fn in_a_state_that_it_was_not_seen_to_enter() {
        let skipped = Life { state: Some(State::FinWait2), ..on(&[(State::FinWait1, 40)]) };
        assert_eq!(Age::of(&skipped, 100), Age { since: None, at_least: 0, at_most: Some(60) });
    }
}
