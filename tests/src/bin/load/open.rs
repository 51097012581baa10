//! Connections that stay open, with both ends in this process.

use std::{
    io,
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
};

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;

use crate::destination;

/// Number of descriptors left for other purposes.
const SPARE: u64 = 64;

/// Opens connections, prints `{"connections":N,"port":P}`, and closes them when standard input ends.
///
/// With `half_closed`, the client closes its end and the server does not: each connection leaves a socket in
/// `CLOSE_WAIT`.
pub(crate) fn run(connections: u64, half_closed: bool) -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    // The number that the descriptor limit allows; the benchmark starts as many processes as it needs.
    let held = if half_closed { 1 } else { 2 };
    let connections = connections.min(most.saturating_sub(SPARE) / held);
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let port = listener.local_addr()?.port();
    let mut open = Vec::new();
    for index in 0..connections {
        let stream = TcpStream::connect((destination(index / 64), port))
            .with_context(|| format!("after {index} connections"))?;
        let (accepted, _) = listener.accept()?;
        open.push(accepted);
        if half_closed {
            stream.shutdown(Shutdown::Both)?;
        } else {
            open.push(stream);
        }
    }
    println!("{}", json!({"connections": connections, "port": port}));
    io::copy(&mut io::stdin().lock(), &mut io::sink())?;
    Ok(())
}
