//! Converts the clocks of the kernel half, boot time and jiffies, to wall time and milliseconds.

use jiff::Timestamp;
use nix::time::{ClockId, clock_gettime};

use crate::event::Time;

/// Relates `CLOCK_BOOTTIME` and jiffies to the wall clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Wall time minus boot time, nanoseconds.
    wall_minus_boot: i128,
    /// Boot time minus monotonic time: how long the host was suspended, nanoseconds.
    suspended: i128,
    /// Jiffies per second, once the first record has revealed it.
    hz: Option<u32>,
    /// When the clocks were last read, nanoseconds of `CLOCK_BOOTTIME`.
    read_at: u64,
}

/// How long a reading of the clocks is valid, in nanoseconds.
const VALID_FOR: u64 = 1_000_000;

/// Two readings of the clocks that differ by at most this many nanoseconds count as equal.
const TOLERANCE: i128 = 1_000_000;

/// Nanoseconds in a second.
const NANOSECONDS: i64 = 1_000_000_000;

/// The values that `CONFIG_HZ` can have: `kernel/Kconfig.hz`.
const RATES: [u32; 5] = [100, 250, 300, 500, 1000];

impl Clock {
    /// Reads the clocks.
    pub fn new() -> Self {
        let mut clock = Self { wall_minus_boot: 0, suspended: 0, hz: None, read_at: 0 };
        clock.synchronize();
        clock
    }

    /// Reads the clocks again, so that setting the wall clock, or a suspend, shifts only the times of later
    /// events.
    pub fn synchronize(&mut self) {
        let boot = nanoseconds(ClockId::CLOCK_BOOTTIME);
        let wall_minus_boot = nanoseconds(ClockId::CLOCK_REALTIME) - boot;
        // The two clocks are read one after the other, so every reading differs a little. Ignoring that keeps
        // the wall time of a given moment the same on every line.
        if (wall_minus_boot - self.wall_minus_boot).abs() > TOLERANCE {
            self.wall_minus_boot = wall_minus_boot;
        }
        self.suspended = boot - nanoseconds(ClockId::CLOCK_MONOTONIC);
        self.read_at = u64::try_from(boot).unwrap_or(0);
    }

    /// Whether the wall clock may have been set between the last reading of the clocks and this moment in
    /// boot time (nanoseconds).
    pub fn may_have_been_set(&self, boot: u64) -> bool {
        boot > self.read_at.saturating_add(VALID_FOR)
    }

    /// The last readings of the clocks, for a recording: nanoseconds from `CLOCK_BOOTTIME` to the wall clock,
    /// and from `CLOCK_MONOTONIC` to `CLOCK_BOOTTIME`.
    pub fn offsets(&self) -> (i64, i64) {
        let narrow = |offset: i128| i64::try_from(offset).unwrap_or(i64::MAX);
        (narrow(self.wall_minus_boot), narrow(self.suspended))
    }

    /// Sets the clocks to what [`Self::offsets`] was.
    pub fn set_offsets(&mut self, (wall_minus_boot, suspended): (i64, i64)) {
        (self.wall_minus_boot, self.suspended) = (wall_minus_boot.into(), suspended.into());
    }

    /// Nanoseconds of `CLOCK_BOOTTIME` now.
    pub fn boot_now() -> u64 {
        u64::try_from(nanoseconds(ClockId::CLOCK_BOOTTIME)).unwrap_or(0)
    }

    /// The wall time of a moment in boot time (nanoseconds).
    pub fn time(&self, boot: u64) -> Time {
        let wall = i128::from(boot) + self.wall_minus_boot;
        // It is out of range only if the host's clock is wrong by centuries. Dividing 64 bits is many times
        // faster than dividing 128.
        let time = i64::try_from(wall).ok().and_then(|wall| {
            let nanosecond = i32::try_from(wall.rem_euclid(NANOSECONDS)).ok()?;
            Timestamp::new(wall.div_euclid(NANOSECONDS), nanosecond).ok()
        });
        Time(time.unwrap_or(Timestamp::UNIX_EPOCH))
    }

    /// Now, on the wall clock.
    pub fn now() -> Time {
        Time(Timestamp::now())
    }

    /// Learns how many jiffies a second has from a moment at which `jiffies64` and `CLOCK_BOOTTIME` were both
    /// read.
    pub fn learn_hz(&mut self, jiffies64: u64, boot: u64) {
        self.hz.get_or_insert_with(|| hz(jiffies64, i128::from(boot) - self.suspended));
    }

    /// The length of `jiffies` in milliseconds; `None` until [`Self::learn_hz`] was called.
    pub fn jiffies_to_millis(&self, jiffies: u32) -> Option<f64> {
        Some(f64::from(jiffies) * 1000.0 / f64::from(self.hz?))
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

fn nanoseconds(clock: ClockId) -> i128 {
    // These clocks exist on every kernel that has BPF.
    clock_gettime(clock)
        .map_or(0, |time| i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
}

/// Jiffies per second. Jiffies start at -300 seconds as a 32-bit number (`INITIAL_JIFFIES`,
/// `include/linux/jiffies.h`), so one reading together with the monotonic clock is enough to distinguish the
/// possible rates.
fn hz(jiffies64: u64, monotonic: i128) -> u32 {
    let expected =
        |rate: u32| (1_i128 << 32) + i128::from(rate) * (monotonic - 300_000_000_000) / 1_000_000_000;
    let distance = |rate: &u32| (expected(*rate) - i128::from(jiffies64)).abs();
    RATES.into_iter().min_by_key(distance).unwrap_or(RATES[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hz_from_one_reading() {
        for rate in RATES {
            for seconds in [1_i128, 2, 60, 299, 302, 3_600, 40_000_000] {
                let jiffies = (1_i128 << 32) + i128::from(rate) * (seconds - 300);
                // A clock that started half a second late.
                let monotonic = seconds * 1_000_000_000 - if seconds > 400 { 500_000_000 } else { 0 };
                assert_eq!(hz(u64::try_from(jiffies).unwrap(), monotonic), rate, "{seconds} s at {rate} Hz");
            }
        }
    }

    #[test]
    fn boot_time_is_wall_time() {
        let clock = Clock::new();
        let before = Timestamp::now();
        let now = clock.time(Clock::boot_now()).0;
        let after = Timestamp::now();
        // The two clocks were read one after the other, and the scheduler may have run another task in
        // between.
        let slack = jiff::SignedDuration::from_secs(1);
        assert!(now + slack >= before && now <= after + slack, "{before} {now} {after}");
    }
}
