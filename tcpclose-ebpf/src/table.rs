//! The table of live sockets, by address: buckets of [`WAYS`] addresses, and an array of entries.
//!
//! At each event, an array costs about a third of what a hash map does, because a look-up is a few
//! instructions of the program itself (`docs/performance.md`). A socket whose bucket is full gets an entry in
//! `OVERFLOW`, an LRU hash map, which evicts the entry that has had no event for longest.

use core::{arch::asm, ptr};

use tcpclose_common::{
    record::ConnectionRecord,
    table::{Bucket, WAYS},
};

use crate::maps::{BUCKETS, ENTRIES, HAS_OVERFLOW, OVERFLOW, TEARDOWNS, add_to, count, global, template};

/// A bucket and its number.
#[derive(Clone, Copy)]
struct NumberedBucket {
    bucket: *mut Bucket,
    index: u32,
}

/// The entry of the socket at `address`; null if it has none.
#[inline(always)]
pub fn find(address: u64) -> *mut ConnectionRecord {
    if let Some(place) = place(address)
        && let Some(way) = way_of(place, address)
    {
        return entry(place, way);
    }
    if has_overflow() { OVERFLOW.get_ptr_mut(address).unwrap_or(ptr::null_mut()) } else { ptr::null_mut() }
}

/// Makes a new entry for the socket at `address`, equal to the template. If the socket has one already, it is
/// reset with `renew`, and stays otherwise. Null if an entry stays, or if there is no room, which is counted.
#[inline(always)]
pub fn add(address: u64, renew: bool) -> *mut ConnectionRecord {
    let Some(place) = place(address) else { return ptr::null_mut() };
    let is_in_overflow = has_overflow() && OVERFLOW.get_ptr(address).is_some();
    if !is_in_overflow {
        let way = add_to_bucket(place, address, renew);
        if way < u64::from(WAYS) {
            return entry(place, way);
        }
        if way == EXISTS {
            return ptr::null_mut();
        }
    }
    add_to_overflow(address, renew, is_in_overflow)
}

/// The result of [`add_to_bucket`] if the socket has an entry that stays.
const EXISTS: u64 = 0x100;
/// The result of [`add_to_bucket`] if the bucket is full, or if another program is adding a socket to it.
const FULL: u64 = 0x101;

/// Adds a socket to its bucket. Returns its way there, [`EXISTS`] or [`FULL`]: a number, not an enum, because
/// the compiler would merge the cases into one register with the entry's address, and the verifier forbids
/// arithmetic on that.
#[inline(always)]
fn add_to_bucket(place: NumberedBucket, address: u64, renew: bool) -> u64 {
    // SAFETY: a valid, aligned map value. Several programs may work on one bucket at once. Of those that add
    // a socket, the one that finds its own claim alone goes on, and the others leave the bucket; a program
    // that removes a socket writes to the way of that socket only. An address is written last, so that a
    // program that finds it finds a complete entry.
    unsafe {
        let claims = &raw mut (*place.bucket).claims;
        add_to(claims, 1);
        if ptr::read_volatile(claims) != 1 {
            add_to(claims, u64::MAX);
            return FULL;
        }
        let way = match way_of(place, address) {
            Some(way) if renew => way,
            Some(_) => EXISTS,
            None => way_of_value(place, 0, address).unwrap_or(FULL),
        };
        if way < u64::from(WAYS) {
            let entry = entry(place, way);
            if !entry.is_null() {
                initialise(entry);
            }
            *since_at(place, way) = 0;
            ptr::write_volatile(address_at(place, way), address);
        }
        add_to(claims, u64::MAX);
        way
    }
}

#[inline(always)]
fn add_to_overflow(address: u64, renew: bool, exists: bool) -> *mut ConnectionRecord {
    if exists && !renew {
        return ptr::null_mut();
    }
    // SAFETY: read-only data of this object, always initialised.
    if OVERFLOW.insert(address, unsafe { &*template() }, 0).is_err() {
        count!(connections_failed);
        return ptr::null_mut();
    }
    if !exists {
        count!(overflow_added);
    }
    if let Some(has) = HAS_OVERFLOW.get_ptr_mut(0) {
        // SAFETY: a valid, aligned map value. All writers write the same value.
        unsafe { *has = 1 };
    }
    OVERFLOW.get_ptr_mut(address).unwrap_or(ptr::null_mut())
}

/// Removes the entry of the socket at `address`.
#[inline(always)]
pub fn remove(address: u64) {
    if let Some(place) = place(address)
        && let Some(way) = way_of(place, address)
    {
        // SAFETY: the way is this socket's. Volatile, because other programs may use it from the last write
        // on.
        unsafe {
            ptr::write_volatile(since_at(place, way), 0);
            ptr::write_volatile(address_at(place, way), 0);
        }
    } else if has_overflow() && OVERFLOW.remove(address).is_ok() {
        count!(overflow_removed);
    }
}

/// Records that the socket at `address` entered a teardown state at `since`.
#[inline(always)]
pub fn teardown_began(address: u64, since: u64) {
    if let Some(place) = place(address)
        && let Some(way) = way_of(place, address)
    {
        // SAFETY: the way is this socket's.
        unsafe { *since_at(place, way) = since };
    } else if TEARDOWNS.insert(address, &since, 0).is_err() {
        count!(teardowns_failed);
    }
}

/// Records that the socket at `address` is no longer in a teardown state.
#[inline(always)]
pub fn teardown_over(address: u64) {
    if let Some(place) = place(address)
        && let Some(way) = way_of(place, address)
    {
        // SAFETY: the way is this socket's.
        unsafe { *since_at(place, way) = 0 };
    } else if has_overflow() {
        // This fails for most sockets, which were never in this map.
        let _ = TEARDOWNS.remove(address);
    }
}

/// The bucket for `address`.
#[inline(always)]
fn place(address: u64) -> Option<NumberedBucket> {
    // Multiplication by 2^64 divided by the golden ratio spreads addresses, which differ in their middle
    // bits, over the upper half; its product with the number of buckets has the bucket's number in its upper
    // half.
    let spread = address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let index = ((spread * u64::from(global!(PARAMS.buckets))) >> 32) as u32;
    BUCKETS.get_ptr_mut(index).map(|bucket| NumberedBucket { bucket, index })
}

/// The way of the bucket that has `address`.
#[inline(always)]
fn way_of(place: NumberedBucket, address: u64) -> Option<u64> {
    way_of_value(place, address, address)
}

/// The way that has `value`, looked for on behalf of the socket at `address`.
#[inline(always)]
fn way_of_value(place: NumberedBucket, value: u64, address: u64) -> Option<u64> {
    let mut way = 0;
    while way < WAYS as usize {
        // SAFETY: a valid, aligned map value.
        if unsafe { ptr::read_volatile(&raw const (*place.bucket).addresses[way]) } == value {
            return Some(unknown(way as u64, address));
        }
        way += 1;
    }
    None
}

/// `way` as a number that the verifier does not know, because it would examine the rest of the program once
/// for each: addresses of sockets are multiples of 8. It does not depend on what was read from the bucket, so
/// that the processor need not wait for the bucket before it fetches the entry.
#[inline(always)]
fn unknown(way: u64, address: u64) -> u64 {
    way + (address & 7)
}

/// The entry of a way.
#[inline(always)]
fn entry(place: NumberedBucket, way: u64) -> *mut ConnectionRecord {
    ENTRIES.get_ptr_mut(place.index * WAYS + way as u32).unwrap_or(ptr::null_mut())
}

/// The address that is stored in a way.
#[inline(always)]
fn address_at(place: NumberedBucket, way: u64) -> *mut u64 {
    // SAFETY: inside of the bucket, a valid map value.
    unsafe { (&raw mut (*place.bucket).addresses[0]).add(bounded(way)) }
}

/// The time that is stored in a way.
#[inline(always)]
fn since_at(place: NumberedBucket, way: u64) -> *mut u64 {
    // SAFETY: inside of the bucket, a valid map value.
    unsafe { (&raw mut (*place.bucket).since[0]).add(bounded(way)) }
}

/// A way, with bounds that the verifier knows: an eighth one would still be inside the bucket. In assembly,
/// because the compiler knows the bounds from comparisons, and kernels before 5.16 forget those when the
/// number has been on the stack.
#[inline(always)]
fn bounded(mut way: u64) -> usize {
    // SAFETY: an operation on a register.
    unsafe { asm!("{0} &= 7", inout(reg) way, options(pure, nomem, nostack)) };
    way as usize
}

/// Whether `OVERFLOW` has ever had an entry.
#[inline(always)]
fn has_overflow() -> bool {
    match HAS_OVERFLOW.get_ptr(0) {
        // SAFETY: a valid map value.
        Some(has) => unsafe { ptr::read_volatile(has) != 0 },
        None => false,
    }
}

/// Copies the template: a load and a store for each word.
#[inline(always)]
fn initialise(entry: *mut ConnectionRecord) {
    // SAFETY: both are valid, and the template is not in the table.
    unsafe { ptr::copy_nonoverlapping(template(), entry, 1) };
}
