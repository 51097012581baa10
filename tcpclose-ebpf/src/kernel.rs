//! Reads of kernel memory, at offsets that the user half found in the running kernel.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use tcpclose_common::offsets::ABSENT;

/// Reads the member at `offset` of the struct at `base`; `None` if this kernel has no such member, if `base` is null,
/// or if the memory is not mapped.
#[inline(always)]
pub fn member<T>(base: u64, offset: u16) -> Option<T> {
    if offset == ABSENT || base == 0 {
        return None;
    }
    read(base + u64::from(offset))
}

/// Reads a `T` at a kernel address.
#[inline(always)]
pub fn read<T>(address: u64) -> Option<T> {
    // SAFETY: the helper checks the address itself and fails where nothing is mapped; every `T` used here is an
    // integer or an array of integers, for which any bytes are valid.
    unsafe { bpf_probe_read_kernel(address as *const T) }.ok()
}
