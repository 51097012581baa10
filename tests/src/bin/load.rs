//! Connections on loopback, as fast as they will go: `load [--seconds N] [--fin]`. One thread connects and
//! closes, one accepts and closes. Prints `{"connections":N,"seconds":S,"port":P}`: what was closed at both
//! ends, how long it took, and the accepting port, by which a tracer's lines are known for the load's.
//!
//! A connection ends with a RST, because an orderly end leaves a TIME_WAIT behind, and with it a port that
//! nobody can use for a while. `--fin` ends them in order all the same, and stops early when it has been
//! through the ports.

use std::{
    convert::Infallible,
    env, fs,
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    libc::linger,
    sys::socket::{setsockopt, sockopt},
};

/// How many connections are open at a time. One after the other, the threads would wait for each other most
/// of the time, and what a tracer costs would be hidden in that. This many fit into a listener's queue: a SYN
/// that finds it full is sent again only a second later.
const BATCH: u64 = 64;

/// What the accepting side sends, so that the other one closes what has been accepted: what is reset in the
/// listener's queue never belongs to anybody, and no tracer could say whose it was.
const GREETING: u8 = b'.';

fn main() -> Result<()> {
    let mut time = Duration::from_secs(2);
    let mut fin = false;
    let mut arguments = env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--seconds" => {
                let seconds =
                    arguments.next().and_then(|word| word.parse().ok()).context("--seconds of what?")?;
                time = Duration::try_from_secs_f64(seconds)?;
            }
            "--fin" => fin = true,
            other => bail!("what is {other}? usage: load [--seconds N] [--fin]"),
        }
    }
    let most = if fin { ports()? } else { u64::MAX };

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let served = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&served);
    // Nobody waits for its end: it accepts until the process is gone.
    thread::spawn(move || {
        let Err(error) = serve(&listener, &count);
        eprintln!("load: {error:#}");
        process::exit(1);
    });

    let start = Instant::now();
    let mut made = 0;
    while made + BATCH <= most && start.elapsed() < time {
        connect(address, fin).with_context(|| format!("after {made} connections"))?;
        made += BATCH;
    }
    while served.load(Ordering::Acquire) < made {
        thread::yield_now();
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(r#"{{"connections":{made},"seconds":{seconds:.6},"port":{}}}"#, address.port());
    Ok(())
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

/// How many ports there are to connect from. The listener may have one of them.
fn ports() -> Result<u64> {
    let path = "/proc/sys/net/ipv4/ip_local_port_range";
    let text = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    let range = text.split_whitespace().map(str::parse).collect::<Result<Vec<u64>, _>>()?;
    let [first, last] = range[..] else { bail!("{path} is not two numbers: {text}") };
    Ok(last - first)
}
