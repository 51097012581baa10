//! Reads of kernel memory, at offsets that the user half found in the running kernel.

use core::{arch::asm, ptr};

use aya_ebpf::helpers::{bpf_probe_read_kernel, generated::bpf_skc_to_tcp_sock};
use tcpclose_common::offsets::ABSENT;

use crate::maps::ANCHOR;

/// A kernel object whose members can be read.
pub trait Object: Copy {
    /// Reads the member at `offset`; `None` if this kernel has no such member, or if the memory is not there.
    fn member<T: Copy>(self, offset: u16) -> Option<T>;

    /// The object that the pointer at `offset` points to.
    fn follow(self, offset: u16) -> Option<Self>;

    /// Its address as a number.
    fn address(self) -> u64;
}

/// The address of an object, as a number. Members are read by a helper, which costs about 35 ns for each.
impl Object for u64 {
    #[inline(always)]
    fn member<T: Copy>(self, offset: u16) -> Option<T> {
        if offset == ABSENT || self == 0 { None } else { read(self + u64::from(offset)) }
    }

    #[inline(always)]
    fn follow(self, offset: u16) -> Option<Self> {
        self.member(offset)
    }

    #[inline(always)]
    fn address(self) -> u64 {
        self
    }
}

/// A pointer whose type the verifier knows from BTF. A member is read by a single load instruction: the
/// verifier knows the offset, which lies in frozen read-only data, and checks it against the type. The kernel
/// handles a load that faults, and makes its result 0.
///
/// No arithmetic is allowed on such a pointer but the addition of an offset, so that a program that needs the
/// address as a number obtains it from `address()`.
#[derive(Clone, Copy)]
pub struct Typed(*const u8);

impl Typed {
    /// `pointer` must come from the context of a program that the kernel types by BTF, or from a helper that
    /// returns such a pointer; the verifier refuses the program otherwise.
    #[inline(always)]
    pub fn new<T>(pointer: *const T) -> Self {
        Self(pointer.cast())
    }

    /// The pointer, for helpers that want one of its type.
    #[inline(always)]
    pub fn pointer(self) -> *const u8 {
        self.0
    }

    /// The `struct tcp_sock` of the `struct sock` that `argument`, an argument of the program, points to;
    /// `None` if that is null, not a TCP socket, or one of the small sockets for requests and `TIME_WAIT`.
    #[inline(always)]
    pub fn tcp_sock(argument: u64) -> Option<Self> {
        // SAFETY: the helper checks the pointer, and the verifier its type.
        let tcp = unsafe { bpf_skc_to_tcp_sock(argument as *mut _) };
        if tcp.is_null() { None } else { Some(Self::new(tcp)) }
    }
}

impl Object for Typed {
    #[inline(always)]
    fn member<T: Copy>(self, offset: u16) -> Option<T> {
        if offset == ABSENT {
            return None;
        }
        // SAFETY: the verifier accepts the load only if the object has this member, and the kernel handles a
        // fault; every `T` used here is an integer or an array of integers, for which any bytes are valid.
        // Volatile, so that the compiler neither moves the load nor changes its size.
        Some(unsafe { ptr::read_volatile(self.0.add(usize::from(offset)).cast::<T>()) })
    }

    #[inline(always)]
    fn follow(self, offset: u16) -> Option<Self> {
        self.member(offset).map(Self)
    }

    // The verifier accepts only the difference of two pointers as a number. The result is therefore the
    // distance from a map's value, plus the address of that value, which the value itself contains.
    #[inline(always)]
    fn address(self) -> u64 {
        let Some(anchor) = ANCHOR.get_ptr_mut(0) else { return 0 };
        // SAFETY: a valid, aligned map value. Every program writes the same value.
        let base = unsafe {
            if ptr::read_volatile(anchor) == 0 {
                ptr::write_volatile(anchor, anchor as u64);
            }
            ptr::read_volatile(anchor)
        };
        let mut distance = self.0 as u64;
        // SAFETY: a subtraction of registers. In assembly, because the compiler might add `base` first.
        unsafe {
            asm!("{0} -= {1}", inout(reg) distance, in(reg) anchor as u64, options(pure, nomem, nostack));
        };
        distance.wrapping_add(base)
    }
}

/// Reads the member at `offset` of the struct at `base`; `None` if this kernel has no such member, if `base`
/// is null, or if the memory is not mapped.
#[inline(always)]
pub fn member<T: Copy>(base: impl Object, offset: u16) -> Option<T> {
    base.member(offset)
}

/// Reads a `T` at a kernel address.
#[inline(always)]
pub fn read<T>(address: u64) -> Option<T> {
    // SAFETY: the helper checks the address itself and fails where nothing is mapped; every `T` used here is
    // an integer or an array of integers, for which any bytes are valid.
    unsafe { bpf_probe_read_kernel(address as *const T) }.ok()
}
