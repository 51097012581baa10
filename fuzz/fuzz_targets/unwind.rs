//! The unwind tables of an ELF file that some process has mapped. The input is the registers, the size of the
//! stack, the stack and the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tcpclose_common::{
    recipe::MAX_WORDS,
    record::{Header, StackCopy, VERSION, tag},
    stack::MAX_FRAMES,
};
use tcpclose_fuzz::{BASE, Scratch, allow_caught_panics, word};
use tcpclose_user::stacks::unwind::Unwinder;

/// Where the stack is.
const STACK: u64 = 0x7000_0000;

fuzz_target!(init: allow_caught_panics(), |data: &[u8]| {
    let mut data = data;
    let [ip, sp, fp, size] = [(); 4].map(|()| word(&mut data));
    let size = usize::try_from(size % 1024).unwrap_or(0).min(data.len());
    let (stack, file) = data.split_at(size);
    if file.is_empty() {
        return;
    }
    let file = Scratch::new(file);
    let image = file.mapped();
    let copy = StackCopy {
        header: Header { tag: tag::STACK, version: VERSION, length: 0 },
        key: 1,
        pid: image.pid,
        bytes: 0,
        mm: image.mm,
        start: STACK,
        ip: BASE + ip % (1 << 20),
        sp: STACK + sp % 1024,
        fp: STACK + fp % 1024,
        lr: BASE + fp % (1 << 20),
        code_pages: 0,
    };
    let unwound = Unwinder::default().unwind(&copy, stack, None, |_| Some(image.clone()));
    assert!((1..=MAX_FRAMES).contains(&unwound.stack.frames.len()));
    assert!(unwound.words.len() <= MAX_WORDS);
});
