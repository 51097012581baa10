//! One established connection, on which no event occurs that a tracer of closes has to process.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// A pair of connected sockets.
fn pair() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    Ok((client, server))
}

/// Sends one byte back and forth for this long; reports the median and the 99th percentile in µs.
pub(crate) fn ping(time: Duration) -> Result<Value> {
    let (mut client, mut server) = pair()?;
    thread::spawn(move || {
        let mut byte = [0];
        while server.read_exact(&mut byte).is_ok() && server.write_all(&byte).is_ok() {}
    });
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < time {
        let sent = Instant::now();
        client.write_all(b"?")?;
        client.read_exact(&mut [0])?;
        times.push(sent.elapsed());
    }
    times.sort_unstable();
    let percentile = |share: usize| -> Result<f64> {
        Ok(times.get(times.len() * share / 100).context("no round trip was made")?.as_secs_f64() * 1e6)
    };
    Ok(json!({"round_trips": times.len(), "p50_us": percentile(50)?, "p99_us": percentile(99)?}))
}

/// Sends as much as possible for this long; reports MiB/s as received.
pub(crate) fn bulk(time: Duration) -> Result<Value> {
    const CHUNK: usize = 128 << 10;
    let (mut client, mut server) = pair()?;
    let sink = thread::spawn(move || {
        let mut received = 0u64;
        let mut chunk = vec![0; CHUNK];
        loop {
            match server.read(&mut chunk) {
                Ok(0) => return Ok(received),
                Ok(length) => received += length as u64,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    });
    let chunk = vec![0; CHUNK];
    let start = Instant::now();
    while start.elapsed() < time {
        client.write_all(&chunk)?;
    }
    drop(client);
    let received = sink.join().map_err(|_| anyhow::anyhow!("the receiving thread panicked"))??;
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let rate = received as f64 / 1_048_576.0 / start.elapsed().as_secs_f64();
    Ok(json!({"mib_per_second": rate}))
}
