//! `/proc/PID/maps`, in which the process chose the paths.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tcpclose_user::processes::mappings;

fuzz_target!(|data: &[u8]| {
    for region in mappings::parse(data) {
        assert!(region.start < region.end);
        mappings::undeleted(&mappings::unescape(region.path));
    }
});
