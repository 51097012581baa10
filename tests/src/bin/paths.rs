//! Closes connections from 243 different call paths that have the same instruction pointer, the same stack
//! pointer and the same return address at the top of the stack: five levels, each one of three functions with
//! frames of the same size.
//!
//! `paths PORT`: for each number that it reads, it makes and closes that many connections. The path follows
//! from the client's port, so it is known to everyone who sees the connection.

use std::{
    env, hint,
    io::{self, BufRead as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::{AsRawFd as _, IntoRawFd as _, RawFd},
};

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt::Linger};

const LEVELS: u32 = 5;

/// The result is used, so that no call is a jump.
#[inline(never)]
fn leaf(descriptor: RawFd) -> i32 {
    // SAFETY: the descriptor is open, and nothing else closes it.
    unsafe { libc::close(descriptor) + 1 }
}

macro_rules! step {
    ($name:ident, $number:expr) => {
        #[inline(never)]
        fn $name(path: u32, levels: u32, descriptor: RawFd) -> i32 {
            let kept = hint::black_box($number);
            descend(path / 3, levels - 1, descriptor) + kept
        }
    };
}
step!(first, 1);
step!(second, 2);
step!(third, 3);

#[inline(never)]
fn descend(path: u32, levels: u32, descriptor: RawFd) -> i32 {
    let step = match (levels, path % 3) {
        (0, _) => return leaf(descriptor) + 1,
        (_, 0) => first,
        (_, 1) => second,
        (_, _) => third,
    };
    step(path, levels, descriptor) + 1
}

#[inline(never)]
fn one(listener: &TcpListener) -> Result<i32> {
    let client = TcpStream::connect(listener.local_addr()?).context("cannot connect")?;
    let (_accepted, _) = listener.accept()?;
    let port = client.local_addr()?.port();
    // A RST leaves no TIME_WAIT, so that there are enough ports.
    setsockopt(&client, Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    let descriptor = client.as_raw_fd();
    let _ = client.into_raw_fd();
    Ok(descend(u32::from(port) % 3_u32.pow(LEVELS), LEVELS, descriptor))
}

fn main() -> Result<()> {
    let port = env::args().nth(1).context("usage: paths PORT")?.parse()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let mut sum = 0_i64;
    for line in io::stdin().lock().lines() {
        let count: u32 = line?.trim().parse()?;
        for _ in 0..count {
            sum += i64::from(one(&listener)?);
        }
        println!("done {sum}");
    }
    Ok(())
}
