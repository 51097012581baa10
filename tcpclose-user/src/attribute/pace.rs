//! Keeps a look at everything from taking more than a tenth of a CPU, however often it is asked for.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// After a look, this many times what it cost pass before the next.
const REST: u32 = 9;

/// When the next look may be taken.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    rest_until: Option<Instant>,
}

impl Pace {
    /// Takes a look, unless the last one was too dear and too lately.
    pub fn look<T>(&mut self, look: impl FnOnce() -> T) -> Option<T> {
        let start = Instant::now();
        if self.rest_until.is_some_and(|until| start < until) {
            return None;
        }
        let before = cpu_time();
        let seen = look();
        // On a busy host a look may wait for a CPU for long, which costs nobody anything: it is no reason to look less
        // often, and to find owners gone. A clock that stood still is no reason to take the next look at once.
        let took = cpu_time().saturating_sub(before).max(Duration::from_micros(100));
        self.rest_until = Some(start + took * (REST + 1));
        Some(seen)
    }
}

/// What this thread has had of a CPU; its share of that of the kernel included.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_after_a_look() {
        let mut pace = Pace::default();
        let dear = || {
            // However much this costs, nine times as long is not over at once.
            let start = cpu_time();
            while cpu_time() < start + Duration::from_millis(100) {}
            1
        };
        assert_eq!(pace.look(dear), Some(1));
        assert_eq!(pace.look(|| 2), None);
        pace.rest_until = Some(Instant::now());
        assert_eq!(pace.look(|| 3), Some(3));
    }
}
