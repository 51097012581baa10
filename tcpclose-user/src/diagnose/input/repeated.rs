//! Removes the stacks from lines before the lines are parsed.
//!
//! Stacks are the largest part of a line, and a diagnosis does not use those of ends. A program closes
//! sockets in few places, so the same text occurs again and again. Comparing it with text that was read
//! before is much faster than parsing it again.

use std::{collections::BTreeSet, ops::Bound};

use memchr::memmem::Finder;
use serde::de::IgnoredAny;

/// The number of different stacks that are kept, and of the bytes of all of them. When there is no room, all
/// are forgotten.
const STACKS: usize = 4_096;
const BYTES: usize = 8 << 20;

/// The beginning of the line of an end. Other lines are parsed as a whole. So are lines of ends in which
/// another program has changed the order of the fields.
const END: &[u8] = br#"{"event":"close","#;

/// The text before a stack. It is never part of a string, because quotation marks in strings are escaped.
const KEY: &[u8] = br#""stack":"#;

/// Replaces stacks by `null`, and remembers their text.
pub(super) struct KnownStacks {
    key: Finder<'static>,
    /// The text of stacks. No complete JSON object is the beginning of another one. So the only known stack
    /// with which a text can begin is the greatest that is not greater than the text.
    known: BTreeSet<Vec<u8>>,
    bytes: usize,
}

impl Default for KnownStacks {
    fn default() -> Self {
        Self { key: Finder::new(KEY), known: BTreeSet::new(), bytes: 0 }
    }
}

impl KnownStacks {
    /// The same lines with `null` for each stack of an end.
    pub(super) fn leave_out(&mut self, lines: &[u8]) -> Vec<u8> {
        let mut kept = Vec::with_capacity(lines.len());
        for line in super::lines(lines) {
            let mut rest = line;
            while line.starts_with(END)
                && let Some(at) = self.key.find(rest)
            {
                let (before, stack) = rest.split_at(at + KEY.len());
                kept.extend_from_slice(before);
                rest = match self.length(stack) {
                    Some(length) => {
                        kept.extend_from_slice(b"null");
                        stack.get(length..).unwrap_or_default()
                    }
                    None => stack,
                };
            }
            kept.extend_from_slice(rest);
            kept.push(b'\n');
        }
        kept
    }

    /// The length of the object at the beginning of a text; `None` if the text begins with something else.
    fn length(&mut self, text: &[u8]) -> Option<usize> {
        if text.first() != Some(&b'{') {
            return None;
        }
        let mut smaller = self.known.range::<[u8], _>((Bound::Unbounded, Bound::Included(text)));
        if let Some(known) = smaller.next_back().filter(|known| text.starts_with(known)) {
            return Some(known.len());
        }
        let mut values = serde_json::Deserializer::from_slice(text).into_iter::<IgnoredAny>();
        values.next()?.ok()?;
        let stack = text.get(..values.byte_offset())?;
        if self.known.len() >= STACKS || self.bytes + stack.len() > BYTES {
            self.known.clear();
            self.bytes = 0;
        }
        self.bytes += stack.len();
        self.known.insert(stack.to_owned());
        Some(stack.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(stacks: &mut KnownStacks, lines: &str) -> String {
        String::from_utf8(stacks.leave_out(lines.as_bytes())).expect("text")
    }

    #[test]
    fn only_the_stacks_of_ends_are_left_out() {
        let stack = r#"{"user":[{"symbol":"}{\""}]}"#;
        let line = |event: &str, stack: &str| {
            let acts =
                format!(r#""acts":[{{"stack":{stack},"pid":1}}],"stack":null,"opener":{{"stack":{stack}}}"#);
            format!("{{\"event\":\"{event}\",\"comm\":\"\\\"stack\\\":{{\",{acts}}}\n")
        };
        let mut stacks = KnownStacks::default();
        for _ in 0..2 {
            let lines = line("close", stack) + &line("lingering", stack);
            assert_eq!(kept(&mut stacks, &lines), line("close", "null") + &line("lingering", stack));
            assert_eq!((stacks.known.len(), stacks.bytes), (1, stack.len()));
        }
        // A stack that another one begins with, up to its last frame, and one that is not complete.
        let other = r#"{"user":[{"symbol":"}{\""},{"symbol":"a"}]}"#;
        assert_eq!(kept(&mut stacks, &line("close", other)), line("close", "null"));
        assert_eq!(kept(&mut stacks, &line("close", stack)), line("close", "null"));
        let truncated = r#"{"event":"close","stack":{"user":[{"symbol":"}{\""}"#;
        assert_eq!(kept(&mut stacks, truncated), format!("{truncated}\n"));
    }

    #[test]
    fn stacks_that_do_not_repeat_take_no_more_room() {
        let mut stacks = KnownStacks::default();
        for number in 0..2 * STACKS {
            let line = format!("{{\"event\":\"close\",\"stack\":{{\"user\":[{number}]}}}}");
            assert_eq!(kept(&mut stacks, &line), "{\"event\":\"close\",\"stack\":null}\n");
        }
        let long = "x".repeat(BYTES / 4);
        for number in 0..8 {
            let line = format!("{{\"event\":\"close\",\"stack\":{{\"user\":\"{number}{long}\"}}}}");
            assert_eq!(kept(&mut stacks, &line), "{\"event\":\"close\",\"stack\":null}\n");
        }
        let bytes: usize = stacks.known.iter().map(Vec::len).sum();
        assert!(stacks.known.len() <= STACKS && stacks.bytes == bytes && bytes <= BYTES);
    }
}
