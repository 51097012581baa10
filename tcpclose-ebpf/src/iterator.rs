//! Tasks that read a BPF iterator, of this tool or of another one.
//!
//! An iterator over descriptors holds each file while it looks at it. If the owner closes that file
//! meanwhile, the socket is closed when the reader releases the file, at the end of the system call. The
//! reader has closed nothing.

use crate::{
    current::{self, Current as _, with_current},
    kernel::member,
    maps::{ITERATOR, global},
};

/// Records what the files of all iterators have in common. The current task must be reading one.
#[inline(always)]
pub fn learn() {
    let Some(iterator) = ITERATOR.get_ptr_mut(0) else { return };
    // SAFETY: a valid, aligned map value. All writers write the same value.
    unsafe {
        if *iterator == 0 {
            *iterator = operations().unwrap_or(0);
        }
    }
}

/// Whether the current task, which is in `read()`, reads an iterator. Not inlined, so that its buffers do not
/// add to the stack of the programs that call it.
#[inline(never)]
pub fn is_read() -> bool {
    let Some(iterator) = ITERATOR.get_ptr(0) else { return false };
    // SAFETY: a valid map value.
    let iterator = unsafe { *iterator };
    iterator != 0 && operations() == Some(iterator)
}

/// Address of the `struct file_operations` of the file that is the first argument of the current task's
/// system call.
#[inline(always)]
fn operations() -> Option<u64> {
    let descriptor: u64 = with_current!(|current| member(current.registers(), global!(ITERATORS.argument)))?;
    let file = current::file(descriptor & 0xffff_ffff)?;
    member(file, global!(ITERATORS.file_op))
}
