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
        if !self.is_due() {
            return None;
        }
        let before = cpu_time();
        let result = scan();
        self.took(cpu_time().saturating_sub(before));
        Some(result)
    }

    /// Whether a scan may run now.
    pub fn is_due(&self) -> bool {
        self.rest_until.is_none_or(|until| until <= Instant::now())
    }

    /// Records the end of a scan that has taken this CPU time, in this or another thread.
    pub fn took(&mut self, time: Duration) {
        // CPU time and not elapsed time: on a busy host a scan may wait long for a CPU, which costs nothing,
        // and scanning less often would miss owners. Because of the minimum, a clock of coarse resolution
        // does not allow the next scan at once.
        let rest = time.max(Duration::from_micros(100)) * REST;
        let now = Instant::now();
        self.rest_until = Some(self.rest_until.unwrap_or(now).max(now) + rest);
    }
}

/// The CPU time that this thread has used, in user space and in the kernel.
pub(crate) fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_after_a_scan() {
        let mut pace = Pace::default();
        let expensive = || {
            // Whatever the clock's resolution, nine times the duration of the scan cannot have passed right
            // after it.
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
