//! `/proc/PID/cgroup`, whose names were chosen by whoever made the control groups.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tcpclose_user::processes::container;

fuzz_target!(|text: &str| {
    if let Some(id) = container::id(text) {
        assert!(!id.is_empty() && text.contains(&id));
    }
});
