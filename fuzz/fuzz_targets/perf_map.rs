//! `/tmp/perf-PID.map`, which the process writes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tcpclose_user::stacks::symbolize::perf::PerfMap;

fuzz_target!(|data: &[u8]| {
    let mut map = PerfMap::default();
    // In two pieces, as it grows while it is read.
    let (first, second) = data.split_at(data.len() / 2);
    map.add(first);
    map.add(second);
    for line in data.split(|byte| *byte == b'\n') {
        let digits = str::from_utf8(line).ok().and_then(|line| line.split(' ').next()).unwrap_or_default();
        let address = u64::from_str_radix(digits, 16).unwrap_or(u64::MAX);
        if let Some((name, start)) = map.find(address) {
            assert!(start <= address && !name.is_empty());
        }
    }
});
