//! Connections that are opened and closed as fast as possible: one thread connects and closes, another
//! accepts and closes.
//!
//! A connection ends with a RST sent by its client, or, with `--fin`, with FINs, the client's first. In that
//! case the client leaves a socket in `TIME_WAIT` behind, whose port is in use for a minute: successive
//! batches go to different addresses, so that ports do not run out.

use std::{
    convert::Infallible,
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use anyhow::{Context, Result};
use nix::{
    libc::linger,
    sys::socket::{setsockopt, sockopt},
};
use serde_json::{Value, json};

use crate::{Options, destination};

/// The number of connections that are open at a time. With one at a time, the threads would mostly wait for
/// each other, which would hide the cost of a tracer. This many fit into a listener's queue: a SYN that finds
/// it full is retransmitted only a second later.
const BATCH: u64 = 64;

/// The byte that the accepting side sends, so that the client closes only accepted connections: a connection
/// that is reset in the accept queue belongs to no process, and no tracer could name its owner.
const GREETING: u8 = b'.';

/// Reports how many connections were closed at both ends, the time that took, and the accepting port, by
/// which the lines of a tracer are recognized.
pub(crate) fn run(options: &Options) -> Result<Value> {
    let time = options.seconds();
    let most = options.connections.unwrap_or(u64::MAX);
    let is_over = |start: Instant, made| {
        if options.connections.is_some() { made >= most } else { start.elapsed() >= time }
    };
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let port = listener.local_addr()?.port();
    let served = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&served);
    // The thread is not joined: it accepts until the process exits.
    thread::spawn(move || {
        let Err(error) = serve(&listener, &count);
        eprintln!("load: {error:#}");
        process::exit(1);
    });

    let start = Instant::now();
    let mut made = 0;
    while !is_over(start, made) {
        let address = (destination(made / BATCH), port).into();
        connect(address, options.fin).with_context(|| format!("after {made} connections"))?;
        made += BATCH;
    }
    while served.load(Ordering::Acquire) < made {
        thread::yield_now();
    }
    Ok(json!({"connections": made, "seconds": start.elapsed().as_secs_f64(), "port": port}))
}

/// Opens a batch of connections, waits until each is accepted, and closes it.
fn connect(address: SocketAddr, fin: bool) -> Result<()> {
    let batch = (0..BATCH).map(|_| TcpStream::connect(address)).collect::<Result<Vec<_>, _>>()?;
    for mut stream in batch {
        stream.read_exact(&mut [0])?;
        if !fin {
            setsockopt(&stream, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 })?;
        }
    }
    Ok(())
}

/// Accepts batches of connections, waits for the end of each, and closes it.
fn serve(listener: &TcpListener, served: &AtomicU64) -> Result<Infallible> {
    loop {
        let mut batch = Vec::new();
        for _ in 0..BATCH {
            let (mut stream, _) = listener.accept()?;
            stream.write_all(&[GREETING])?;
            batch.push(stream);
        }
        for mut stream in batch {
            match stream.read(&mut [0]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
                Err(error) => return Err(error.into()),
            }
            drop(stream);
            served.fetch_add(1, Ordering::Release);
        }
    }
}
