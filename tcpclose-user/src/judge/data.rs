//! When data was last transferred over a connection, and in which direction.

use std::cmp::Ordering;

use crate::{event::LastData, ingest::life::Sample};

/// Jiffies since data was last transferred, and its direction. `None` if there never was any, or if it could
/// not be read. If both directions had data within one jiffy, the last direction is not known.
pub fn last_data(sample: &Sample) -> Option<(u32, Option<LastData>)> {
    match (sample.sent_ago, sample.received_ago) {
        (Some(sent), Some(received)) => Some(match sent.cmp(&received) {
            Ordering::Less => (sent, Some(LastData::Sent)),
            Ordering::Equal => (sent, None),
            Ordering::Greater => (received, Some(LastData::Received)),
        }),
        (Some(sent), None) => Some((sent, Some(LastData::Sent))),
        (None, Some(received)) => Some((received, Some(LastData::Received))),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_way_data_went_last() {
        for (sent_ago, received_ago, expected) in [
            (Some(5), Some(9), Some((5, Some(LastData::Sent)))),
            (Some(9), Some(5), Some((5, Some(LastData::Received)))),
            // Within one jiffy the direction is not known, and is not guessed.
            (Some(5), Some(5), Some((5, None))),
            (Some(9), None, Some((9, Some(LastData::Sent)))),
            (None, Some(9), Some((9, Some(LastData::Received)))),
            (None, None, None),
        ] {
            let sample = Sample { sent_ago, received_ago, ..Sample::default() };
            assert_eq!(last_data(&sample), expected, "{sample:?}");
        }
    }
}
