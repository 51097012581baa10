//! Events → closing stacks by count: one folded stack a line, `orderly;nginx;main;…;__GI___close 12`, as
//! flame graph tools read it. Nothing is written before the trace ends.
//!
//! <https://github.com/brendangregg/FlameGraph#2-fold-stacks>

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    io::{self, Write},
};

use foldhash::fast::RandomState;

use super::{Sink, escape};
use crate::event::{Close, Event, Frame};

/// The number of bytes that all different stacks together may have: 16,000 stacks of 1 KiB. Ends with further
/// stacks are counted by their cause alone.
const MAX_BYTES: usize = 16 << 20;

/// The root of ends without a cause.
const ORDERLY: &str = "orderly";

/// Stands for the process of a socket that has no known owner.
const NO_PROCESS: &str = "[unknown]";

/// Stands for the stacks for which there was no room.
const OTHERS: &str = "[others]";

/// Counts connections by the stack that closed them, under their cause and the name of the process.
#[derive(Default)]
pub struct ClosingStacks {
    counts: HashMap<String, u64, RandomState>,
    /// Bytes of the keys of `counts`.
    bytes: usize,
    /// A buffer for the stack that is being looked up.
    folded: String,
}

impl ClosingStacks {
    /// Counts the event if it is the end of a connection. An end without a stack counts for its process, or
    /// for its cause.
    pub fn add(&mut self, event: &Event) {
        let Event::Close(close) = event else { return };
        let Self { counts, bytes, folded, .. } = self;
        folded.clear();
        fold(close, folded);
        if let Some(count) = counts.get_mut(folded.as_str()) {
            *count += 1;
            return;
        }
        if *bytes + folded.len() > MAX_BYTES {
            let _ = folded.split_off(folded.find(';').unwrap_or(folded.len()));
            folded.extend([";", OTHERS]);
        }
        // Causes have few values, so an end that is counted by its cause may exceed the bound.
        let count = counts.entry(folded.clone()).or_insert_with(|| {
            *bytes += folded.len();
            0
        });
        *count += 1;
    }

    /// The folded stacks with their counts, in alphabetical order.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        let sorted: BTreeMap<&str, u64> =
            self.counts.iter().map(|(stack, count)| (stack.as_str(), *count)).collect();
        sorted.into_iter().map(|(stack, count)| format!("{stack} {count}"))
    }

    /// Whether no stack was counted.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }
}

/// Appends cause, process and frames of an end, outermost frame first.
fn fold(close: &Close, folded: &mut String) {
    match close.cause {
        // Writing to a string does not fail.
        Some(cause) => drop(write!(folded, "{cause}")),
        None => folded.push_str(ORDERLY),
    }
    folded.push(';');
    match &close.process {
        Some(process) => append(folded, &process.comm),
        None => folded.push_str(NO_PROCESS),
    }
    let Some(stack) = &close.stack else { return };
    let user = stack.user.as_deref().map(Vec::as_slice).unwrap_or_default();
    if let Some(reason) = user.last().and_then(|frame| frame.truncated) {
        let _ = write!(folded, ";[{reason}]");
    }
    for frame in user.iter().rev() {
        folded.push(';');
        append_frame(folded, frame);
    }
    for frame in stack.kernel.iter().flat_map(|frames| frames.iter().rev()) {
        folded.push(';');
        append_frame(folded, frame);
        // Flame graph tools recognize functions of the kernel by this suffix.
        folded.push_str("_[k]");
    }
}

/// Appends the function or, if it has no name, its place in the file or, without a file, its address.
fn append_frame(folded: &mut String, frame: &Frame) {
    match (&frame.symbol, &frame.module) {
        (Some(symbol), _) => append(folded, symbol),
        (None, Some(module)) => {
            append(folded, module.rsplit('/').next().unwrap_or(module));
            if let Some(offset) = frame.offset {
                let _ = write!(folded, "+{offset:#x}");
            }
        }
        (None, None) => append(folded, &frame.address),
    }
}

/// Appends a name without the characters that have a meaning in folded stacks: control characters and the
/// semicolon.
fn append(folded: &mut String, name: &str) {
    let start = folded.len();
    folded.push_str(&escape(name));
    if folded[start..].contains(';') {
        let name = folded.split_off(start).replace(';', ":");
        folded.push_str(&name);
    }
}

/// Writes closing stacks by count when the trace ends.
pub struct FoldedSink<W: Write> {
    writer: W,
    stacks: ClosingStacks,
}

impl<W: Write> FoldedSink<W> {
    /// Writes to `writer`.
    pub fn new(writer: W) -> Self {
        Self { writer, stacks: ClosingStacks::default() }
    }
}

impl<W: Write> Sink for FoldedSink<W> {
    fn write(&mut self, event: &Event) -> io::Result<()> {
        self.stacks.add(event);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        let mut writer = io::BufWriter::new(&mut self.writer);
        for line in self.stacks.lines() {
            writeln!(writer, "{line}")?;
        }
        writer.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Cause, Stack, Truncated, examples};

    fn folded(events: &[Event]) -> String {
        let mut written = Vec::new();
        let mut sink = FoldedSink::new(&mut written);
        for event in events {
            sink.write(event).expect("memory");
            sink.flush().expect("memory");
        }
        sink.finish().expect("memory");
        drop(sink);
        String::from_utf8(written).expect("UTF-8")
    }

    fn frame(symbol: Option<&str>, module: Option<&str>, offset: Option<u64>) -> Frame {
        Frame {
            address: "0x1000".into(),
            symbol: symbol.map(str::to_owned),
            module: module.map(str::to_owned),
            offset,
            file: None,
            line: None,
            inlined: false,
            truncated: None,
        }
    }

    fn close(cause: Option<Cause>, comm: &str, stack: Option<Stack>) -> Event {
        let Event::Close(mut close) = examples::orderly() else { unreachable!() };
        close.cause = cause;
        close.process.as_mut().expect("known").comm = comm.into();
        close.stack = stack;
        Event::Close(close)
    }

    #[test]
    fn counts_stacks_with_the_outermost_frame_first() {
        let stack = Stack {
            user: Some(
                vec![frame(Some("close"), None, Some(4)), frame(None, Some("/bin/a"), Some(0x10))].into(),
            ),
            kernel: Some(vec![frame(Some("tcp_close"), None, None), frame(None, None, None)].into()),
        };
        let events = [
            close(None, "nginx", Some(stack.clone())),
            close(Some(Cause::UnreadData), "nginx", Some(stack.clone())),
            close(None, "nginx", Some(stack)),
            close(Some(Cause::PeerReset), "curl", None),
            examples::reset_sent(),
            examples::lost(),
        ];
        assert_eq!(
            folded(&events),
            "orderly;nginx;a+0x10;close;0x1000_[k];tcp_close_[k] 2\n\
             peer_reset;curl 1\n\
             unread_data;nginx;a+0x10;close;0x1000_[k];tcp_close_[k] 1\n"
        );
    }

    #[test]
    fn no_name_adds_a_frame_or_a_line() {
        let user = vec![frame(Some("f<[u8; 4]>\n;x 3"), None, None)];
        let stack = Stack { user: Some(user.into()), kernel: None };
        assert_eq!(folded(&[close(None, "a;b\n", Some(stack))]), "orderly;a:b\\n;f<[u8: 4]>\\n:x 3 1\n");
    }

    #[test]
    fn an_incomplete_stack_and_an_unknown_owner_say_so() {
        let mut last = frame(Some("start"), None, None);
        last.truncated = Some(Truncated::NoFramePointer);
        let stack = Stack { user: Some(vec![frame(Some("close"), None, None), last].into()), kernel: None };
        let Event::Close(mut event) = close(None, "", Some(stack)) else { unreachable!() };
        event.process = None;
        assert_eq!(folded(&[Event::Close(event)]), "orderly;[unknown];[no frame pointer];start;close 1\n");
    }

    #[test]
    fn beyond_the_bound_ends_are_counted_by_cause() {
        let mut stacks = ClosingStacks::default();
        let with_name = |name: usize| {
            let user = vec![frame(Some(&format!("{name:02000}")), None, None)];
            close(Some(Cause::LingerZero), "a", Some(Stack { user: Some(user.into()), kernel: None }))
        };
        let count = MAX_BYTES / 2_000 + 100;
        for name in 0..count {
            stacks.add(&with_name(name));
        }
        assert!(stacks.bytes <= MAX_BYTES + 100, "{}", stacks.bytes);
        assert_eq!(stacks.counts.values().sum::<u64>(), count as u64, "none is left out");
        assert!(stacks.counts["linger_zero;[others]"] > 100);
        let before = stacks.counts["linger_zero;[others]"];
        stacks.add(&with_name(0));
        assert_eq!(stacks.counts["linger_zero;[others]"], before, "known stacks go on being counted");
    }
}
