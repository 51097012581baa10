//! Keeps a look at everything from taking more than a tenth of a CPU, however often it is asked for.

use std::time::{Duration, Instant};

/// After a look, this many times its duration pass before the next.
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
        let seen = look();
        // A clock that stood still during the look is no reason to take the next one at once.
        let took = start.elapsed().max(Duration::from_micros(100));
        self.rest_until = Some(start + took * (REST + 1));
        Some(seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_after_a_look() {
        let mut pace = Pace::default();
        let dear = || {
            // However long this takes, nine times as long is not over at once.
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(200) {}
            1
        };
        assert_eq!(pace.look(dear), Some(1));
        assert_eq!(pace.look(|| 2), None);
        pace.rest_until = Some(Instant::now());
        assert_eq!(pace.look(|| 3), Some(3));
    }
}
