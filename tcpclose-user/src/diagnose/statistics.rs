//! Decides whether times are regular, from samples of bounded size.

/// The number of values of a series that are kept.
const ROOM: usize = 256;

/// The smallest number of values that can show regularity.
pub(crate) const ENOUGH: u64 = 5;

/// The permitted distances of regular values from their median, as fractions of the median: the median
/// distance is at most `DEVIATION`, and four of five values are within `WITHIN`. Five exponentially
/// distributed waits pass this test in about one of a hundred cases.
const DEVIATION: f64 = 0.10;
const WITHIN: f64 = 0.20;

/// The kernel records the time of the last data in ticks of at most 10 ms, so differences of up to two ticks
/// do not count.
pub(crate) const TICKS_MS: f64 = 20.0;

/// A uniform sample of a series (Vitter's algorithm R, with a fixed seed: the same lines give the same
/// findings).
#[derive(Clone, Debug, Default)]
pub(crate) struct Reservoir {
    values: Vec<f32>,
    seen: u64,
    random: u64,
    least: f64,
    most: f64,
}

/// The median of a sample and the distances of its values from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    /// The number of values.
    pub(crate) count: u64,
    pub(crate) median: f64,
    /// The median of the distances to the median.
    pub(crate) deviation: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
    /// The fraction of the values within `WITHIN` of the median.
    near: f64,
}

impl Reservoir {
    #[expect(clippy::cast_possible_truncation, reason = "seven digits of a time in milliseconds are enough")]
    pub(crate) fn add(&mut self, value: f64) {
        self.least = if self.seen == 0 { value } else { self.least.min(value) };
        self.most = if self.seen == 0 { value } else { self.most.max(value) };
        self.seen += 1;
        if self.values.len() < ROOM {
            self.values.push(value as f32);
            return;
        }
        // splitmix64
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        let position = mixed % self.seen;
        if let Some(place) = usize::try_from(position).ok().and_then(|index| self.values.get_mut(index)) {
            *place = value as f32;
        }
    }

    #[cfg(test)]
    pub(crate) fn count(&self) -> u64 {
        self.seen
    }

    /// `None` if there are no values.
    pub(crate) fn spread(&self) -> Option<Spread> {
        let mut values: Vec<f64> = self.values.iter().copied().map(f64::from).collect();
        let median = median(&mut values)?;
        let near = |value: &&f64| (**value - median).abs() <= (WITHIN * median).max(TICKS_MS);
        #[expect(clippy::cast_precision_loss, reason = "at most 256")]
        let near = values.iter().filter(near).count() as f64 / values.len() as f64;
        let mut distances: Vec<f64> = values.iter().map(|value| (value - median).abs()).collect();
        let deviation = self::median(&mut distances)?;
        Some(Spread { count: self.seen, median, deviation, least: self.least, most: self.most, near })
    }

    /// The spread, if there are enough values and they are near enough to their median.
    pub(crate) fn regular(&self) -> Option<Spread> {
        self.spread().filter(Spread::is_regular)
    }
}

impl Spread {
    fn is_regular(&self) -> bool {
        self.count >= ENOUGH && self.deviation <= (DEVIATION * self.median).max(TICKS_MS) && self.near >= 0.8
    }
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    if values.len() % 2 == 1 {
        return Some(upper);
    }
    Some(f64::midpoint(*values.get(middle.checked_sub(1)?)?, upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[f64]) -> Reservoir {
        let mut sample = Reservoir::default();
        for value in values {
            sample.add(*value);
        }
        sample
    }

    #[test]
    fn median_and_deviation() {
        let spread = of(&[1.0, 2.0, 3.0, 4.0, 100.0]).spread().expect("values");
        assert!((spread.median - 3.0).abs() < 1e-6 && (spread.deviation - 1.0).abs() < 1e-6, "{spread:?}");
        assert!((of(&[1.0, 2.0]).spread().expect("values").median - 1.5).abs() < 1e-6);
        assert_eq!(Reservoir::default().spread(), None);
    }

    #[test]
    fn four_are_too_few_and_five_are_enough() {
        assert_eq!(of(&[5000.0; 4]).regular(), None);
        assert!(of(&[5000.0; 5]).regular().is_some());
        assert!(of(&[4990.0, 5000.0, 5010.0, 5100.0, 9000.0]).regular().is_some(), "one may be off");
        assert_eq!(of(&[3000.0, 5000.0, 5010.0, 5020.0, 9000.0]).regular(), None, "not two of five");
        assert_eq!(of(&[1000.0, 2000.0, 3000.0, 4000.0, 5000.0]).regular(), None);
    }

    #[test]
    fn waits_without_a_rule_seldom_look_regular() {
        let mut state = 1_u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            #[expect(clippy::cast_precision_loss, reason = "53 bits")]
            let value = (state >> 11) as f64 / (1_u64 << 53) as f64;
            value
        };
        let mut passed = 0;
        for _ in 0..10_000 {
            let waits: Vec<f64> = (0..5).map(|_| -10_000.0 * (1.0 - uniform()).ln()).collect();
            passed += u32::from(of(&waits).regular().is_some());
        }
        assert!(passed < 150, "{passed} of 10,000");
    }

    #[test]
    fn long_series_take_no_more_room() {
        let mut sample = Reservoir::default();
        for number in 0..100_000_u32 {
            sample.add(f64::from(number));
        }
        let spread = sample.spread().expect("values");
        assert_eq!((sample.values.len(), sample.count()), (ROOM, 100_000));
        assert!(
            (40_000.0..60_000.0).contains(&spread.median),
            "the sample is of the whole series: {spread:?}"
        );
        assert!(spread.least.abs() < 1e-6 && (spread.most - 99_999.0).abs() < 1e-6);
    }
}
