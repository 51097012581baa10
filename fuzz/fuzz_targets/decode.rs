//! Records of the kernel half, and files that `--record` wrote.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tcpclose_user::ingest::decode::decode;

fuzz_target!(|data: &[u8]| {
    let _ = decode(&Bytes::copy_from_slice(data));
});
