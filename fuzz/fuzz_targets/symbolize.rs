//! The symbols and debug information of an ELF file that some process has mapped. The input is two offsets
//! into the file and the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tcpclose_fuzz::{BASE, Scratch, allow_caught_panics, word};
use tcpclose_user::stacks::symbolize::Symbolizer;

fuzz_target!(init: allow_caught_panics(), |data: &[u8]| {
    let mut data = data;
    let offsets = [word(&mut data), word(&mut data)];
    if data.is_empty() {
        return;
    }
    let file = Scratch::new(data);
    let frames = offsets.map(|offset| BASE + offset % (1 << 20));
    let named = Symbolizer::new().user(Some(&file.mapped()), &frames);
    assert!(named.len() >= frames.len());
});
