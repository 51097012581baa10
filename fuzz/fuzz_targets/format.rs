//! The `format` file of a tracepoint.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tcpclose_user::kernel::format::TracepointFormat;

fuzz_target!(|text: &str| {
    if let Ok(format) = TracepointFormat::parse(text) {
        format.record_offsets();
        for field in &format.fields {
            format.value_names(&field.name);
        }
    }
});
