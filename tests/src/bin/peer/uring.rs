//! Closing and shutting down through `io_uring` with raw system calls: one ring, one request, one completion.

use std::{
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr::{self, NonNull},
    str::FromStr,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Error, Result, bail};
use nix::{errno::Errno, libc};

const SETUP_SQPOLL: u32 = 1 << 1;
const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_SQ_WAKEUP: u32 = 1 << 1;
const OFFSET_RINGS: libc::off_t = 0;
const OFFSET_REQUESTS: libc::off_t = 0x1000_0000;
const REQUEST_ASYNC: u8 = 1 << 4;
const OPERATION_CLOSE: u8 = 19;
const OPERATION_SHUTDOWN: u8 = 34;

/// The requested operation.
#[derive(Clone, Copy)]
pub(crate) enum Operation {
    Close,
    /// Shuts down the write direction.
    Shutdown,
}

/// The task that executes the request.
#[derive(Clone, Copy)]
pub(crate) enum By {
    /// The task that enters the ring.
    Caller,
    /// A kernel worker thread of the `io_uring` pool.
    Worker,
    /// The kernel thread that polls the submission queue.
    Poller,
}

impl FromStr for By {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "caller" => Ok(Self::Caller),
            "worker" => Ok(Self::Worker),
            "poller" => Ok(Self::Poller),
            _ => bail!("who is {name}?"),
        }
    }
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Default)]
struct Params {
    request_entries: u32,
    completion_entries: u32,
    flags: u32,
    unused: [u32; 7],
    requests: RequestOffsets,
    completions: CompletionOffsets,
}

/// `struct io_sqring_offsets`.
#[repr(C)]
#[derive(Default)]
struct RequestOffsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    flags: u32,
    dropped: u32,
    array: u32,
    unused: [u32; 3],
}

/// `struct io_cqring_offsets`.
#[repr(C)]
#[derive(Default)]
struct CompletionOffsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    overflow: u32,
    completions: u32,
    unused: [u32; 4],
}

/// `struct io_uring_sqe`.
#[repr(C)]
#[derive(Default)]
struct Request {
    operation: u8,
    flags: u8,
    priority: u16,
    descriptor: RawFd,
    offset: u64,
    address: u64,
    length: u32,
    operation_flags: u32,
    unused: [u64; 4],
}

/// `struct io_uring_cqe`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Completion {
    user_data: u64,
    result: i32,
    flags: u32,
}

/// Submits one operation on a descriptor and waits for its completion.
pub(crate) fn submit(descriptor: RawFd, operation: Operation, by: By) -> Result<()> {
    let flags = if matches!(by, By::Poller) { SETUP_SQPOLL } else { 0 };
    let mut params = Params { flags, ..Params::default() };
    // SAFETY: the kernel writes to the parameters, which are valid and have the kernel's layout.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, &raw mut params) };
    let ring = i32::try_from(Errno::result(ring)?)?;
    // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
    let ring = unsafe { OwnedFd::from_raw_fd(ring) };
    // Both rings share one mapping on every kernel since 5.4, and the completion ring follows the submission
    // ring.
    let completions = params.completion_entries as usize * size_of::<Completion>();
    let rings = Mapping::of(&ring, OFFSET_RINGS, params.completions.completions as usize + completions)?;
    let requests = Mapping::of(&ring, OFFSET_REQUESTS, size_of::<Request>())?;

    let request = Request {
        operation: match operation {
            Operation::Close => OPERATION_CLOSE,
            Operation::Shutdown => OPERATION_SHUTDOWN,
        },
        flags: if matches!(by, By::Worker) { REQUEST_ASYNC } else { 0 },
        descriptor,
        length: if matches!(operation, Operation::Shutdown) { libc::SHUT_WR.cast_unsigned() } else { 0 },
        ..Request::default()
    };
    // SAFETY: the offsets come from the kernel, lie within its mappings and are aligned. The first entry is
    // the only one, and the kernel does not read it before the tail is advanced.
    unsafe {
        requests.at::<Request>(0).write(request);
        rings.at::<u32>(params.requests.array).write(0);
        AtomicU32::from_ptr(rings.at(params.requests.tail)).store(1, Ordering::SeqCst);
    }
    let flags = ENTER_GETEVENTS | if matches!(by, By::Poller) { ENTER_SQ_WAKEUP } else { 0 };
    let none = ptr::null::<libc::sigset_t>();
    // SAFETY: the call takes only numbers, and no signal mask.
    let entered =
        unsafe { libc::syscall(libc::SYS_io_uring_enter, ring.as_raw_fd(), 1, 1, flags, none, 0_usize) };
    Errno::result(entered)?;
    // SAFETY: as above; the call returned when the completion was there.
    let completion = unsafe { rings.at::<Completion>(params.completions.completions).read() };
    Errno::result(if completion.result < 0 { -1 } else { 0 })
        .map_err(|_| Errno::from_raw(-completion.result))?;
    Ok(())
}

/// A mapped part of a ring; unmapped on drop.
struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

impl Mapping {
    fn of(ring: &OwnedFd, offset: libc::off_t, length: usize) -> Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping at an address that the kernel chooses affects no other memory.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, ring.as_raw_fd(), offset) };
        if start == libc::MAP_FAILED {
            return Err(Errno::last().into());
        }
        Ok(Self { start: NonNull::new(start.cast()).context("mapped at 0")?, length })
    }

    /// The object at an offset. The caller must know its type.
    fn at<T>(&self, offset: u32) -> *mut T {
        self.start.as_ptr().wrapping_add(offset as usize).cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping has this start and length, and no pointer into it is left.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
