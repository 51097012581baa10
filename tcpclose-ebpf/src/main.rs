//! The kernel half of tcpclose.
//!
//! `hooks` has one file per hook. Each hook updates the entry of its socket in the table (`table.rs`,
//! `connection.rs`) and, at the end of a connection or at a RST, passes it to `emit.rs`, the only writer of
//! the ring buffer.
//!
//! Built for `bpfel-unknown-none` by `cargo xtask build`. For any other target this is an empty program, so
//! that `cargo build --workspace` and `cargo clippy --workspace` work without the BPF toolchain.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![cfg_attr(
    target_arch = "bpf",
    allow(
        clippy::inline_always,
        clippy::cast_possible_truncation,
        clippy::cast_ptr_alignment,
        clippy::cast_sign_loss,
        clippy::needless_borrows_for_generic_args,
        clippy::needless_pass_by_value,
        clippy::upper_case_acronyms,
        reason = "a BPF program is one function as far as possible; helpers return u64 and i64 for values of \
                  all kinds, and the ring's entries as bytes that are aligned to 8; a map value that is \
                  passed by value would be copied to the stack, which has 512 bytes; aya's macros pass \
                  contexts by value and make types of the maps' names"
    )
)]

#[cfg(target_arch = "bpf")]
mod acts;
#[cfg(target_arch = "bpf")]
mod comm;
#[cfg(target_arch = "bpf")]
mod connection;
#[cfg(target_arch = "bpf")]
mod current;
#[cfg(target_arch = "bpf")]
mod emit;
#[cfg(target_arch = "bpf")]
mod end;
#[cfg(target_arch = "bpf")]
mod filter;
#[cfg(target_arch = "bpf")]
mod hooks;
#[cfg(target_arch = "bpf")]
mod interpreter;
#[cfg(target_arch = "bpf")]
mod iterator;
#[cfg(target_arch = "bpf")]
mod kernel;
#[cfg(target_arch = "bpf")]
mod listener;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod namespace;
#[cfg(target_arch = "bpf")]
mod packet;
#[cfg(target_arch = "bpf")]
mod recipe;
#[cfg(target_arch = "bpf")]
mod sock;
#[cfg(target_arch = "bpf")]
mod stack;
#[cfg(target_arch = "bpf")]
mod table;
#[cfg(target_arch = "bpf")]
mod task;
#[cfg(target_arch = "bpf")]
mod ttl;

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!(
        "This is the kernel half of tcpclose, built for the wrong target. `cargo xtask build` builds both \
         halves."
    );
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier accepts a program only if this cannot be reached.
    loop {}
}

/// The kernel lets only GPL-compatible programs read its memory.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
