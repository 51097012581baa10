//! The inputs of unwinding: the registers and words from which the frames of a stack follow. In the order in
//! which they were needed, they are the recipe by which the kernel half recognizes the stack.
//!
//! A word that was read is not always needed. The saved frame pointer of a function is read with its return
//! address, and in a program without frame pointers it is any number; it matters only once another frame is
//! found through it. To find out whether it matters, each frame is unwound a second time, with [`POISON`] as
//! the frame pointer.

use std::time::Duration;

use tcpclose_common::recipe::{MAX_WORDS, Word, source};

/// A frame pointer that leads nowhere: no process has memory there.
pub(super) const POISON: u64 = 0x5afe_0000_0000_0008;

/// The result of unwinding one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UnwindStep {
    /// The caller's registers.
    Caller { pc: u64, sp: u64, fp: u64 },
    /// There is no caller.
    Outermost,
    /// It is not known.
    Failed,
}

/// A word that was read: its address and its value.
pub(super) type Read = (u64, u64);

/// Collects the inputs of one stack.
#[derive(Debug)]
pub(super) struct Inputs {
    sp: u64,
    words: Vec<Word>,
    fp: Origin,
    /// Whether all of them could be listed.
    are_listed: bool,
    lifetime: Option<Duration>,
}

/// The source of the current frame's frame pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// The register, untouched since the system call.
    Register,
    /// It was saved at this address.
    Memory(u64),
    Unknown,
}

impl Inputs {
    /// Makes an empty list for a stack whose stack pointer is `sp`.
    pub(super) fn new(sp: u64) -> Self {
        Self { sp, words: Vec::new(), fp: Origin::Register, are_listed: sp.is_multiple_of(8), lifetime: None }
    }

    /// Adds the link register, from which the innermost frame's caller follows on arm64.
    pub(super) fn link_register(&mut self, lr: u64) {
        self.add(Word { expected: lr, offset: 0, source: source::LINK_REGISTER });
    }

    /// Adds the inputs of a frame whose frame pointer is `fp`. Unwinding it led to `step` with `reads`, and
    /// with [`POISON`] as the frame pointer to `poisoned` with `poisoned_reads`.
    pub(super) fn step(
        &mut self,
        fp: u64,
        (step, reads): (UnwindStep, &[Read]),
        (poisoned, poisoned_reads): (UnwindStep, &[Read]),
    ) {
        let UnwindStep::Caller { pc, sp, fp: saved } = step else {
            if step != poisoned {
                self.frame_pointer(fp, false);
            }
            for read in reads {
                self.memory(*read, false);
            }
            return;
        };
        let UnwindStep::Caller { pc: other_pc, sp: other_sp, fp: other_saved } = poisoned else {
            return self.found_by_frame_pointer(fp, reads, (pc, sp, saved));
        };
        let places = |reads: &[Read]| reads.iter().map(|(address, _)| *address).collect::<Vec<_>>();
        if (pc, sp) != (other_pc, other_sp) || places(reads) != places(poisoned_reads) {
            return self.found_by_frame_pointer(fp, reads, (pc, sp, saved));
        }
        let is_kept = other_saved == POISON;
        self.words_of_caller(reads, (pc, sp, saved), is_kept);
    }

    /// Adds the words that a language runtime has read to name a frame whose frame pointer is `fp`.
    pub(super) fn named(&mut self, fp: u64, reads: &[Read]) {
        if !reads.is_empty() {
            self.frame_pointer(fp, true);
        }
        for read in reads {
            self.memory(*read, false);
        }
    }

    /// Adds the hash of the interpreter's frames. Call it last.
    pub(super) fn interpreter(&mut self, hash: u64) {
        self.add(Word { expected: hash, offset: 0, source: source::INTERPRETER });
    }

    /// Records that the frames depend on something that cannot be listed.
    pub(super) fn give_up(&mut self) {
        self.are_listed = false;
    }

    /// Limits the time for which the frames are certain; with zero, there is no recipe.
    pub(super) fn expire_after(&mut self, lifetime: Duration) {
        self.are_listed &= !lifetime.is_zero();
        self.lifetime = Some(self.lifetime.map_or(lifetime, |known| known.min(lifetime)));
    }

    /// The words of a recipe, and how long it is valid; `None` stands for ever. There is no recipe if a word
    /// cannot be listed, or if there are too many words.
    pub(super) fn finish(self) -> Option<(Vec<Word>, Option<Duration>)> {
        (self.are_listed && !self.words.is_empty() && self.words.len() <= MAX_WORDS)
            .then_some((self.words, self.lifetime))
    }

    fn found_by_frame_pointer(&mut self, fp: u64, reads: &[Read], caller: (u64, u64, u64)) {
        self.frame_pointer(fp, true);
        self.words_of_caller(reads, caller, false);
    }

    /// Adds the words from which a caller's registers were read. With `is_kept`, its frame pointer is that of
    /// the frame.
    fn words_of_caller(&mut self, reads: &[Read], (pc, sp, fp): (u64, u64, u64), is_kept: bool) {
        let mut saved = None;
        for &(address, word) in reads {
            if !is_kept && word == fp && word != pc {
                saved = Some(address);
            } else {
                self.memory((address, word), word == sp);
            }
        }
        if !is_kept {
            self.fp = saved.map_or(Origin::Unknown, Origin::Memory);
        }
    }

    /// Adds the frame pointer `fp` of the current frame, which was needed: as an address in the stack, or as
    /// a plain value.
    fn frame_pointer(&mut self, fp: u64, is_address: bool) {
        match (self.fp, is_address) {
            (Origin::Register, true) => self.add(Word {
                expected: fp.wrapping_sub(self.sp),
                offset: 0,
                source: source::FRAME_POINTER,
            }),
            (Origin::Register, false) => {
                self.add(Word { expected: fp, offset: 0, source: source::FRAME_POINTER_VALUE });
            }
            (Origin::Memory(address), _) => self.memory((address, fp), is_address),
            (Origin::Unknown, _) => self.are_listed = false,
        }
    }

    fn memory(&mut self, (address, word): Read, is_address: bool) {
        let distance = address.wrapping_sub(self.sp).cast_signed();
        let (true, Ok(offset)) = (distance % 8 == 0, i32::try_from(distance)) else {
            self.are_listed = false;
            return;
        };
        self.add(if is_address {
            Word { expected: word.wrapping_sub(self.sp), offset, source: source::STACK_ADDRESS }
        } else {
            Word { expected: word, offset, source: source::MEMORY }
        });
    }

    fn add(&mut self, word: Word) {
        if self.words.len() <= MAX_WORDS && !self.words.contains(&word) {
            self.words.push(word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SP: u64 = 0x7000;

    fn word(source: u32, offset: i32, expected: u64) -> Word {
        Word { expected, offset, source }
    }

    fn caller(pc: u64, sp: u64, fp: u64) -> UnwindStep {
        UnwindStep::Caller { pc, sp, fp }
    }

    fn words(inputs: Inputs) -> Vec<Word> {
        inputs.finish().unwrap().0
    }

    #[test]
    fn a_saved_frame_pointer_counts_once_a_frame_is_found_through_it() {
        let mut inputs = Inputs::new(SP);
        // The system call wrapper: its return address is at the stack pointer, the frame pointer is its
        // caller's.
        inputs.step(
            0x7100,
            (caller(1, 0x7008, 0x7100), &[(0x7000, 1)]),
            (caller(1, 0x7008, POISON), &[(0x7000, 1)]),
        );
        // Its caller saved the frame pointer of a function that keeps one, and is found without.
        let reads = [(0x7018, 0x7100), (0x7020, 2)];
        inputs.step(0x7100, (caller(2, 0x7028, 0x7100), &reads), (caller(2, 0x7028, 0x7100), &reads));
        let before = words(Inputs { words: inputs.words.clone(), ..Inputs::new(SP) });
        assert_eq!(before, [word(source::MEMORY, 0, 1), word(source::MEMORY, 0x20, 2)]);
        // The function that keeps one.
        inputs.step(0x7100, (caller(3, 0x7110, 0), &[(0x7100, 0), (0x7108, 3)]), (UnwindStep::Failed, &[]));
        // Its caller ends the stack, whatever the frame pointer is.
        inputs.step(0, (UnwindStep::Outermost, &[]), (UnwindStep::Outermost, &[]));
        assert_eq!(
            words(inputs),
            [
                word(source::MEMORY, 0, 1),
                word(source::MEMORY, 0x20, 2),
                word(source::STACK_ADDRESS, 0x18, 0x100),
                word(source::MEMORY, 0x108, 3),
            ]
        );
    }

    #[test]
    fn the_register_and_the_value_that_ends_a_stack_count() {
        let mut inputs = Inputs::new(SP);
        inputs.step(0x7010, (caller(1, 0x7020, 0), &[(0x7010, 0), (0x7018, 1)]), (UnwindStep::Failed, &[]));
        // A chain of frame pointers that ends with 0.
        inputs.step(0, (UnwindStep::Outermost, &[]), (UnwindStep::Failed, &[]));
        assert_eq!(
            words(inputs),
            [
                word(source::FRAME_POINTER, 0, 0x10),
                word(source::MEMORY, 0x18, 1),
                word(source::MEMORY, 0x10, 0),
            ]
        );
        let mut inputs = Inputs::new(SP);
        inputs.link_register(9);
        inputs.step(0, (UnwindStep::Outermost, &[]), (UnwindStep::Failed, &[]));
        assert_eq!(
            words(inputs),
            [word(source::LINK_REGISTER, 0, 9), word(source::FRAME_POINTER_VALUE, 0, 0)]
        );
    }

    #[test]
    fn a_stack_pointer_from_memory_is_an_address() {
        let mut inputs = Inputs::new(SP);
        let reads = [(0x7010, 5), (0x7018, 0x7200)];
        inputs.step(7, (caller(5, 0x7200, 7), &reads), (caller(5, 0x7200, POISON), &reads));
        inputs.named(7, &[(0x7200, 6)]);
        inputs.expire_after(Duration::from_secs(2));
        inputs.expire_after(Duration::from_secs(1));
        inputs.expire_after(Duration::from_secs(3));
        let (words, lifetime) = inputs.finish().unwrap();
        assert_eq!(lifetime, Some(Duration::from_secs(1)));
        assert_eq!(
            words,
            [
                word(source::MEMORY, 0x10, 5),
                word(source::STACK_ADDRESS, 0x18, 0x200),
                word(source::FRAME_POINTER, 0, 7_u64.wrapping_sub(SP)),
                word(source::MEMORY, 0x200, 6),
            ]
        );
    }

    #[test]
    fn there_is_no_recipe_without_all_words() {
        assert!(Inputs::new(SP).finish().is_none(), "nothing was needed");
        let mut inputs = Inputs::new(SP + 1);
        inputs.link_register(1);
        assert!(inputs.finish().is_none(), "words that are not aligned");
        let mut far = Inputs::new(SP);
        far.step(0, (UnwindStep::Failed, &[(1 << 40, 0)]), (UnwindStep::Failed, &[]));
        assert!(far.finish().is_none());
        // The frame pointer was computed, not read.
        let mut inputs = Inputs::new(SP);
        inputs.step(
            0x7010,
            (caller(1, 0x7020, 0x7040), &[(0x7018, 1)]),
            (caller(1, 0x7020, 0x7041), &[(0x7018, 1)]),
        );
        inputs.step(0x7040, (caller(2, 0x7050, 0), &[(0x7048, 2)]), (UnwindStep::Failed, &[]));
        assert!(inputs.finish().is_none());
        let mut long = Inputs::new(SP);
        for index in 0..=MAX_WORDS as u64 {
            long.step(0, (UnwindStep::Failed, &[(SP + 8 * index, index)]), (UnwindStep::Failed, &[]));
        }
        assert!(long.finish().is_none());
    }
}
