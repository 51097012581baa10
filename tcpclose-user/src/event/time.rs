//! Points in time and durations, as the output writes them.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};

/// A point in time, written as RFC 3339 in UTC with nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Time(pub Timestamp);

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:.9}", self.0))
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

/// Nanoseconds as milliseconds with microsecond resolution: what a reader of a log line can use.
pub fn millis(nanoseconds: u64) -> f64 {
    // Rounded in whole microseconds first, so that 1.3 is written 1.3 and not 1.2999999.
    #[expect(clippy::cast_precision_loss, reason = "2^53 µs are 285 years")]
    let micros = (nanoseconds.saturating_add(500) / 1000) as f64;
    micros / 1000.0
}
