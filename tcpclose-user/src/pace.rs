//! Limits an expensive scan to a tenth of a CPU, however often it is requested.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// After a scan, this many times its CPU time passes before the next.
const REST: u32 = 9;

/// Decides when the next scan may run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    rest_until: Option<Instant>,
}

impl Pace {
    /// Runs a scan and returns its result; `None` if it is too early after the last one.
    pub fn run<T>(&mut self, scan: impl FnOnce() -> T) -> Option<T> {
        let start = Instant::now();
        if self.rest_until.is_some_and(|until| start < until) {
            return None;
        }
        let before = cpu_time();
        let result = scan();
        // CPU time and not elapsed time: on a busy host a scan may wait long for a CPU, which costs nothing, and scanning
        // less often would miss owners. The minimum keeps a clock of coarse resolution from allowing the next at once.
        let took = cpu_time().saturating_sub(before).max(Duration::from_micros(100));
        self.rest_until = Some(start + took * (REST + 1));
        Some(result)
    }
}

/// The CPU time that this thread has used, in user space and in the kernel.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_after_a_scan() {
        let mut pace = Pace::default();
        let expensive = || {
            // Whatever the clock's resolution, nine times as long has not passed right after it.
            let start = cpu_time();
            while cpu_time() < start + Duration::from_millis(100) {}
            1
        };
        assert_eq!(pace.run(expensive), Some(1));
        assert_eq!(pace.run(|| 2), None);
        pace.rest_until = Some(Instant::now());
        assert_eq!(pace.run(|| 3), Some(3));
    }
}
