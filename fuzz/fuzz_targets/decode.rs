//! Records of the kernel half, alone as they are in the ring, and in files that `--record` wrote.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tcpclose_user::{
    ingest::decode::decode,
    recording::{RecordingFrame, frames},
};

fuzz_target!(|data: &[u8]| {
    let data = Bytes::copy_from_slice(data);
    let _ = decode(&data);
    for frame in frames(data).unwrap_or_default() {
        if let RecordingFrame::Record(record) = frame {
            let _ = decode(&record);
        }
    }
});
