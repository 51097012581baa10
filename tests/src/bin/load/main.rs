//! Load for the benchmark (`cargo xtask bench`), on loopback in the network namespace it is started in.
//!
//! - `load churn [--seconds N | --connections N] [--fin]` opens and closes connections as fast as it can.
//! - `load open --connections N [--half-closed]` opens connections and holds them until its standard input
//!   ends.
//! - `load ping --seconds N` measures the round trip on one established connection.
//! - `load bulk --seconds N` measures the throughput of one established connection.
//!
//! Each prints one JSON object.

mod churn;
mod established;
mod open;

use std::{env, net::Ipv4Addr, time::Duration};

use anyhow::{Context, Result, bail};

const USAGE: &str = "usage: load churn [--seconds N | --connections N] [--fin]
       load open --connections N [--half-closed]
       load ping --seconds N
       load bulk --seconds N";

/// The options of the command line.
#[derive(Default)]
struct Options {
    seconds: Option<Duration>,
    connections: Option<u64>,
    fin: bool,
    half_closed: bool,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self::default();
        while let Some(argument) = arguments.next() {
            let mut number = || -> Result<f64> {
                let word = arguments.next().with_context(|| format!("{argument} needs a number\n{USAGE}"))?;
                word.parse().with_context(|| format!("{argument} needs a number, not {word}\n{USAGE}"))
            };
            match argument.as_str() {
                "--seconds" => options.seconds = Some(Duration::try_from_secs_f64(number()?)?),
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is a count")]
                "--connections" => options.connections = Some(number()? as u64),
                "--fin" => options.fin = true,
                "--half-closed" => options.half_closed = true,
                other => bail!("unknown argument {other}\n{USAGE}"),
            }
        }
        Ok(options)
    }

    fn seconds(&self) -> Duration {
        self.seconds.unwrap_or(Duration::from_secs(2))
    }
}

fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let mode = arguments.next().context(USAGE)?;
    let options = Options::parse(arguments)?;
    let report = match mode.as_str() {
        "churn" => churn::run(&options)?,
        "open" => return open::run(options.connections.context(USAGE)?, options.half_closed),
        "ping" => established::ping(options.seconds())?,
        "bulk" => established::bulk(options.seconds())?,
        _ => bail!(USAGE),
    };
    println!("{report}");
    Ok(())
}

/// The address to connect to next. A connection needs a local port that no other connection to the same
/// address and port has, so the number of destinations multiplies the number of connections that can exist at
/// a time.
fn destination(index: u64) -> Ipv4Addr {
    let [low, high, ..] = index.to_le_bytes();
    Ipv4Addr::new(127, 0, high % 4, low % 250 + 1)
}
