//! Limits an expensive scan to a tenth of a CPU on average, however often it is requested.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// After a scan, this many times its CPU time passes before the next.
const REST: u32 = 9;

/// How much of the time without a scan counts for the next ones: scans may take a tenth of it at once, because
/// what they are for comes in bursts.
const CREDIT: Duration = Duration::from_secs(1);

/// Decides when the next scan may run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    rest_until: Option<Instant>,
    /// What the last scan took.
    last: Option<Duration>,
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
    ///
    /// Of two successive scans, the shorter time counts: in a virtual machine, the time for which the
    /// hypervisor has taken the processor away may be part of it, and owners are missed while no scan runs.
    pub fn took(&mut self, time: Duration) {
        // CPU time and not elapsed time: on a busy host a scan may wait long for a CPU, which costs nothing.
        // Because of the minimum, a clock of coarse resolution does not allow the next scan at once.
        let cost = self.last.map_or(time, |last| last.min(time));
        self.last = Some(time);
        let rest = cost.max(Duration::from_micros(100)) * REST;
        let now = Instant::now();
        let earliest = now.checked_sub(CREDIT).unwrap_or(now);
        self.rest_until = Some(self.rest_until.map_or(earliest, |until| until.max(earliest)) + rest);
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
    fn a_scan_counts_by_the_time_that_it_takes() {
        let mut pace = Pace::default();
        let expensive = || {
            let start = cpu_time();
            while cpu_time() < start + CREDIT / 20 {}
            1
        };
        assert_eq!(pace.run(expensive), Some(1));
        assert!(pace.last >= Some(CREDIT / 20));
    }

    #[test]
    fn rests_after_scans_that_have_used_up_the_credit() {
        let mut pace = Pace::default();
        pace.took(CREDIT / 10);
        assert_eq!(pace.run(|| 1), Some(1), "it took less than the credit");
        pace.took(100 * CREDIT);
        pace.took(100 * CREDIT);
        assert_eq!(pace.run(|| 2), None);
        pace.rest_until = Some(Instant::now());
        assert_eq!(pace.run(|| 3), Some(3));
    }

    #[test]
    fn one_scan_that_was_held_up_does_not_stop_the_next_ones() {
        let mut pace = Pace::default();
        pace.took(CREDIT / 1_000);
        pace.took(100 * CREDIT);
        assert!(pace.is_due());
        pace.took(100 * CREDIT);
        assert!(!pace.is_due(), "it is that long");
    }
}
