//! Lines from the trace of another person, of one host or of two: the input is split at the first form feed,
//! which no JSON contains. The findings, their text and the page are written as well.
#![no_main]

use std::io;

use libfuzzer_sys::fuzz_target;
use tcpclose_fuzz::Scratch;
use tcpclose_user::{
    diagnose::{
        Diagnosis,
        input::Input,
        page,
        pictures::Pictures,
        report::{self, Seqs},
    },
    sink::Palette,
};

fuzz_target!(|data: &[u8]| {
    let files: Vec<_> = data.splitn(2, |byte| *byte == b'\x0c').map(Scratch::new).collect();
    let paths: Vec<_> = files.iter().map(|file| file.path().to_owned()).collect();
    let mut input = Input::open(&paths, true).expect("the files exist");
    let mut diagnosis = Diagnosis::new(input.names());
    let mut pictures = Pictures::default();
    input
        .read(|observation, source| {
            diagnosis.add(observation, source);
            pictures.add(observation);
        })
        .expect("files in memory can be read");
    let findings = diagnosis.findings(true);
    let totals = diagnosis.totals();
    report::write(&mut io::sink(), &findings, totals, Palette::PLAIN, Seqs::Named).expect("a sink takes all");
    page::write(&mut io::sink(), &findings, totals, &pictures).expect("a sink takes all");
});
