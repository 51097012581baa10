//! Lines that collectors of logs take onward.

mod otlp;
mod receiver;
mod rotel;
mod rsyslog;

use anyhow::Result;
use tcpclose_tests::bed::{Bed, Connection, Side};

/// How many connections end at a time.
const CONNECTIONS: usize = 20;

/// Ends some connections, each with a line for both of its ends.
fn end_connections(bed: &mut Bed) -> Result<Vec<Connection>> {
    let mut ended = Vec::new();
    for _ in 0..CONNECTIONS {
        ended.push(bed.established()?);
        bed.peer(Side::Client).ask("shutdown-write")?;
        bed.peer(Side::Server).ask("receive-end")?;
        bed.peer(Side::Server).ask("close")?;
        bed.peer(Side::Client).ask("close")?;
    }
    Ok(ended)
}
