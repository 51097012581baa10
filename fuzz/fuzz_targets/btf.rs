//! `/sys/kernel/btf/vmlinux`, or the file that `--btf` names. Lookups use names from the input, so that they
//! reach the types in it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tcpclose_user::kernel::btf::Btf;

fuzz_target!(|data: &[u8]| {
    let Ok(btf) = Btf::parse(data) else { return };
    // Strings of the input: the section is usually the last one.
    let names: Vec<&str> =
        data.split(|byte| *byte == 0).filter_map(|name| str::from_utf8(name).ok()).rev().take(8).collect();
    for name in &names {
        btf.size_of(name);
        btf.enum_values(name, "");
        btf.func_proto_params(name);
        for member in &names {
            let _ = btf.member(&format!("{name}.{member}"));
        }
    }
    btf.func_params(&names);
});
