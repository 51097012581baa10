//! Points in time and durations, as the output writes them.

use std::cell::Cell;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};

use crate::plain::plain;

/// A point in time, written as RFC 3339 in UTC with nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Time(pub Timestamp);

/// Length of the text of a time, and of the part of it that ends with the seconds.
const LENGTH: usize = "2026-01-01T00:00:00.000000000Z".len();
const TO_SECONDS: usize = "2026-01-01T00:00:00".len();

thread_local! {
    /// The last second that was written, and its text. Many events fall into the same second as the previous
    /// one.
    static LAST: Cell<(i64, [u8; TO_SECONDS])> = const { Cell::new((i64::MIN, [0; TO_SECONDS])) };
}

impl Time {
    /// Its text, in ASCII; `None` before 1970 and after 9999.
    fn text(self) -> Option<[u8; LENGTH]> {
        let second = self.0.as_second();
        let nanosecond = u32::try_from(self.0.subsec_nanosecond()).ok()?;
        let (known, mut to_seconds) = LAST.get();
        if known != second {
            let text = format!("{:.0}", Timestamp::from_second(second).ok()?);
            to_seconds = text.strip_suffix('Z').filter(|text| text.is_ascii())?.as_bytes().try_into().ok()?;
            LAST.set((second, to_seconds));
        }
        let mut text = [b'Z'; LENGTH];
        text[..TO_SECONDS].copy_from_slice(&to_seconds);
        text[TO_SECONDS] = b'.';
        // Groups of three digits, which the processor computes at the same time.
        let groups = [nanosecond / 1_000_000, nanosecond / 1_000 % 1_000, nanosecond % 1_000];
        let digit = |number: u32| b'0' + u8::try_from(number % 10).unwrap_or(0);
        for (digits, group) in text[TO_SECONDS + 1..LENGTH - 1].chunks_exact_mut(3).zip(groups) {
            digits.copy_from_slice(&[digit(group / 100), digit(group / 10), digit(group)]);
        }
        Some(text)
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some(text) = self.text() else { return serializer.collect_str(&format_args!("{:.9}", self.0)) };
        // SAFETY: `text()` returns nothing but ASCII. The check would take as long as making the text.
        plain(unsafe { str::from_utf8_unchecked(&text) }, serializer)
    }
}

impl JsonSchema for Time {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Time".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "format": "date-time",
            "pattern": r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{9}Z$",
            "description": "RFC 3339, UTC, nanoseconds"
        })
    }
}

/// Nanoseconds as milliseconds with a resolution of microseconds, which suffices for a log.
pub fn millis(nanoseconds: u64) -> f64 {
    // Rounded in whole microseconds first, so that 1.3 is written 1.3 and not 1.2999999.
    #[expect(clippy::cast_precision_loss, reason = "2^53 µs are 285 years")]
    let micros = (nanoseconds.saturating_add(500) / 1000) as f64;
    micros / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_jiff_writes_them() {
        for text in [
            "1970-01-01T00:00:00.000000000Z",
            "2026-11-28T15:59:59.999999999Z",
            "2026-11-28T15:59:59.000000001Z",
            "2026-11-28T16:00:00.120000000Z",
            "2026-11-28T15:59:59.5Z",
            "2024-02-29T23:59:59.000001Z",
            "9999-12-30T22:00:00.999999999Z",
            "1969-12-31T23:59:59.75Z",
            "1969-12-31T23:59:59Z",
            "-000044-03-15T12:00:00.1Z",
        ] {
            let time = Time(text.parse().unwrap());
            let expected = format!("\"{:.9}\"", time.0);
            assert_eq!(serde_json::to_string(&time).unwrap(), expected);
        }
    }
}
