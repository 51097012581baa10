//! Closes a connection by dropping it, three calls deep.

use std::{io::Read, net::TcpStream};

struct Client(TcpStream);

impl Client {
    #[inline(never)]
    fn connect(port: &str) -> std::io::Result<Self> {
        let port = port.parse().map_err(std::io::Error::other)?;
        TcpStream::connect(("127.0.0.1", port)).map(Self)
    }
}

#[inline(never)]
fn serve(client: Client) -> usize {
    let read = std::io::stdin().read(&mut [0]).unwrap_or(0);
    read + forget_about(client)
}

/// It returns a result so that the compiler does not end it with a jump to `close()`, which would remove it
/// from the stack.
#[inline(never)]
fn forget_about(client: Client) -> usize {
    drop(client.0);
    std::hint::black_box(0)
}

fn main() -> std::io::Result<()> {
    let port = std::env::args().nth(1).unwrap_or_default();
    let client = Client::connect(&port)?;
    println!("connected");
    std::process::exit(i32::from(serve(client) == 0));
}
