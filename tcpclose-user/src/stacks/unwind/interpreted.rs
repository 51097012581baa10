//! Frames of interpreters among those of the stack: they replace the calls of the interpreter's loop that run
//! them.

use crate::stacks::{
    frame::UnwoundFrame,
    runtimes::{At, Run},
};

/// A frame of the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    /// Its index in the list of frames.
    pub(super) index: usize,
    /// An address inside the instruction that it is at.
    pub(super) address: u64,
    /// Its stack pointer. Its part of the stack ends at the stack pointer of its caller.
    pub(super) sp: u64,
}

/// Replaces each call by the run of frames that it runs. A call stays as it is if it is not among `spots`, if
/// none of its frames has a name, or if the call can only be found by the order of calls and not all of them
/// are recognized: compilers move rarely used code of the loop to other places, and the stack may be
/// incomplete.
pub(super) fn merge(
    runs: Vec<Run>,
    spots: &[Spot],
    is_loop: impl Fn(u64) -> bool,
    frames: &mut Vec<UnwoundFrame>,
) {
    let in_order = runs.iter().filter(|run| run.at == At::NextLoop).count();
    let are_known = in_order <= 1 || in_order == spots.iter().filter(|spot| is_loop(spot.address)).count();
    let mut next = 0;
    let mut places = Vec::new();
    for run in runs {
        if run.at == At::NextLoop && !are_known {
            continue;
        }
        let is_it = |at: &usize| match run.at {
            At::Stack(address) => {
                let ends = spots.get(at + 1).map(|caller| caller.sp);
                spots[*at].sp <= address && ends.is_some_and(|end| address < end)
            }
            At::NextLoop => is_loop(spots[*at].address),
        };
        let Some(found) = (next..spots.len()).find(is_it) else { continue };
        next = found + 1;
        if run.frames.iter().any(|frame| frame.symbol.is_some()) {
            places.push((spots[found].index, run.frames));
        }
    }
    // It begins with the last call, so that the indexes of the others do not change.
    for (index, run) in places.into_iter().rev() {
        frames.splice(index..=index, run.into_iter().map(UnwoundFrame::Named));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::event::Frame;

    fn named(symbol: Option<&str>) -> Arc<Frame> {
        Arc::new(Frame { symbol: symbol.map(str::to_owned), ..Frame::nameless(1) })
    }

    /// Four frames with 16 bytes of stack each; the loop is at 0x2000.
    fn merged(runs: Vec<Run>) -> Vec<String> {
        let addresses = [0x1000, 0x2000, 0x1100, 0x2010];
        let mut frames: Vec<_> = addresses.into_iter().map(UnwoundFrame::Return).collect();
        let spot = |(index, address)| Spot { index, address, sp: 0x7000 + 16 * index as u64 };
        let spots: Vec<_> = addresses.into_iter().enumerate().map(spot).collect();
        merge(runs, &spots, |address| (0x2000..0x2100).contains(&address), &mut frames);
        let text = |frame: &UnwoundFrame| match frame {
            UnwoundFrame::Instruction(address) | UnwoundFrame::Return(address) => format!("{address:x}"),
            UnwoundFrame::Named(frame) => frame.symbol.clone().unwrap_or_else(|| "?".to_owned()),
        };
        frames.iter().map(text).collect()
    }

    #[test]
    fn runs_take_the_places_of_the_calls_of_the_loop() {
        let run =
            |at, names: &[Option<&str>]| Run { at, frames: names.iter().map(|name| named(*name)).collect() };
        let next = |names: &[Option<&str>]| run(At::NextLoop, names);
        assert_eq!(
            merged(vec![next(&[Some("a"), None]), next(&[Some("b")])]),
            ["1000", "a", "?", "1100", "b"]
        );
        assert_eq!(
            merged(vec![next(&[Some("a")]), next(&[Some("b")]), next(&[Some("c")])]),
            ["1000", "2000", "1100", "2010"],
            "a third call is not recognized, and may be any of them"
        );
        assert_eq!(merged(vec![next(&[None]), next(&[Some("b")])]), ["1000", "2000", "1100", "b"]);
        let at = |address| At::Stack(address);
        assert_eq!(merged(vec![run(at(0x7028), &[Some("a")])]), ["1000", "2000", "a", "2010"]);
        assert_eq!(
            merged(vec![run(at(0x7030), &[Some("a")])]),
            ["1000", "2000", "1100", "2010"],
            "no caller"
        );
        assert_eq!(
            merged(vec![run(at(0x7fff), &[Some("a")]), run(at(0x7010), &[Some("b")])]),
            ["1000", "b", "1100", "2010"]
        );
    }
}
