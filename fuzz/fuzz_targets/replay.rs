//! A recording from another person, which passes through the whole user half.
#![no_main]

use std::io;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tcpclose_user::{
    commands::replay,
    filter::Filter,
    recording::frames,
    sink::{Format, Output, Palette},
};

fuzz_target!(|data: &[u8]| {
    for format in [Format::Json, Format::Text] {
        let frames = frames(Bytes::copy_from_slice(data));
        let output = |stacks| Output::to(format, io::sink(), Palette::PLAIN, stacks);
        let _ = replay::run(frames, Filter::default(), None, true, output, None);
    }
});
