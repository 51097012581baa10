//! Stateful firewalls that forget connections.

use std::{
    collections::VecDeque,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    process::{Command, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::Value;
use tcpclose_tests::{
    PATIENCE, descriptors,
    netns::Namespace,
    scratch::Scratch,
    servers::is_missing,
    tool::{Launch, Tool},
};

use super::{SEVERAL, findings_of_files, none, only, told};

const NFT: &str = "/usr/sbin/nft";
const PORT: u16 = 7000;
const SERVER: &str = "10.77.0.2";
/// Behind a router.
const FAR_SERVER: &str = "10.78.0.2";

/// `net.ipv4.tcp_retries2` of clients: their kernel gives up after three seconds.
const RETRIES: &str = "3";

/// Something between two networks that makes the connections through it its own, and resets what it does not
/// know.
const NAT: &str = "table ip nat {
    chain postrouting {
        type nat hook postrouting priority 100;
        oifname eth1 masquerade
    }
}
table inet filter {
    chain forward {
        type filter hook forward priority 0;
        meta l4proto tcp ct state invalid reject with tcp reset
    }
}";

/// A firewall between two networks that silently drops what belongs to no connection that it knows.
const SILENT: &str = "table inet filter {
    chain forward {
        type filter hook forward priority 0;
        meta l4proto tcp ct state invalid drop
    }
}";

/// A router between two networks that passes on everything.
const ROUTER: &str = "table inet filter {
    chain forward {
        type filter hook forward priority 0;
    }
}";

/// Something between two networks that resets every connection on which a client has asked for something.
const MIDDLEBOX: &str = "table inet filter {
    chain forward {
        type filter hook forward priority 0;
        iifname eth0 tcp flags & (syn | fin | rst) == 0 meta length > 52 reject with tcp reset
    }
}";

/// A firewall that forgets a connection after two seconds without a packet, and resets what it does not know.
const RULES: &str = "table inet filter {
    chain input {
        type filter hook input priority 0;
        iif lo accept
        meta l4proto tcp ct state invalid reject with tcp reset
    }
}";

/// Two hosts, the second behind the firewall.
fn hosts() -> Result<[Namespace; 2]> {
    descriptors::keep_to_this_thread()?;
    let hosts = Namespace::pair([&["10.77.0.1/24"], &["10.77.0.2/24"]])?;
    filter(&hosts[1], RULES)?;
    forget_soon(&hosts[1])?;
    Ok(hosts)
}

/// A client's host, a router with these rules, and a server's host.
fn routed(rules: &str) -> Result<[Namespace; 3]> {
    descriptors::keep_to_this_thread()?;
    let [client, router] = Namespace::pair([&["10.77.0.1/24"], &["10.77.0.254/24"]])?;
    let server = Namespace::new()?;
    Namespace::join([(&router, "eth1", "10.78.0.254/24"), (&server, "eth0", "10.78.0.2/24")])?;
    router.set_sysctl("net/ipv4/ip_forward", "1")?;
    client.ip(&["route add default via 10.77.0.254"])?;
    server.ip(&["route add default via 10.78.0.254"])?;
    filter(&router, rules)?;
    Ok([client, router, server])
}

fn filter(host: &Namespace, rules: &str) -> Result<()> {
    let mut nft = Command::new(NFT);
    host.enter(&mut nft)?;
    let mut nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn()?;
    if let Some(mut input) = nft.stdin.take() {
        input.write_all(rules.as_bytes())?;
    }
    ensure!(nft.wait()?.success(), "nft refuses the rules");
    Ok(())
}

/// A host forgets a connection after two seconds without a packet.
fn forget_soon(host: &Namespace) -> Result<()> {
    for (timeout, seconds) in [("established", "2"), ("close_wait", "2"), ("fin_wait", "2")] {
        host.set_sysctl(&format!("net/netfilter/nf_conntrack_tcp_timeout_{timeout}"), seconds)?;
    }
    // A connection that it does not know is not picked up.
    host.set_sysctl("net/netfilter/nf_conntrack_tcp_loose", "0")
}

fn connect(host: &Namespace) -> Result<TcpStream> {
    connect_to(host, SERVER)
}

fn connect_to(host: &Namespace, server: &str) -> Result<TcpStream> {
    let stream = host.inside(|| Ok(TcpStream::connect((server, PORT))?))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn ask(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"ask\n")?;
    stream.read_exact(&mut [0; 2])
}

/// A server that answers each request at once, for this many connections.
fn serve(host: &Namespace, address: &str, connections: usize) -> Result<JoinHandle<()>> {
    let listener = host.inside(|| Ok(TcpListener::bind((address, PORT))?))?;
    Ok(thread::spawn(move || {
        for connection in listener.incoming().take(connections).flatten() {
            thread::spawn(move || {
                let mut connection = connection;
                while connection.read_exact(&mut [0; 4]).is_ok() && connection.write_all(b"42").is_ok() {}
            });
        }
    }))
}

/// Six connections are closed after a second, and six are used again after more than two. Returns the
/// shortest silence before one of these was used again.
fn use_again_after_silences(client: &Namespace, server: &str) -> Result<Duration> {
    let mut waiting = Vec::new();
    for _ in 0..SEVERAL {
        let (mut short, mut long) = (connect_to(client, server)?, connect_to(client, server)?);
        ask(&mut short)?;
        ask(&mut long)?;
        waiting.push((short, long, Instant::now()));
        // A restart of the firewall would end them all at the same time.
        thread::sleep(Duration::from_millis(1100));
        // The firewall lets the FIN through.
        let short = waiting.last().map(|(short, ..)| short);
        short.map(|short| short.shutdown(Shutdown::Both)).transpose()?;
    }
    let mut shortest = Duration::MAX;
    for (_, mut long, since) in waiting {
        thread::sleep(Duration::from_secs(5).saturating_sub(since.elapsed()));
        shortest = shortest.min(since.elapsed());
        ensure!(ask(&mut long).is_err(), "the firewall has not forgotten it");
        thread::sleep(Duration::from_millis(1100));
    }
    Ok(shortest)
}

/// The only finding, which gives the bounds of the two seconds, and the lines of all events.
fn idle_cut(tool: Tool) -> Result<(Vec<Value>, Vec<Value>)> {
    let is_end = |line: &&Value| line["event"] == "close" && line["connection"]["role"] == "client";
    ensure!(tool.wait_until(|lines| lines.iter().filter(is_end).count() >= 2 * SEVERAL), "not all ended");
    let ended = tool.stop()?;
    let (own, lines): (Vec<_>, Vec<_>) = ended.lines.into_iter().partition(|line| line["event"] == "finding");
    let finding = only(&own, "idle_cut")?;
    ensure!(finding["count"] == SEVERAL && finding["remote"]["port"] == PORT, "{finding:#}");
    let milliseconds = |name: &str| finding["evidence"][name].as_f64().unwrap_or_default();
    let (died, lived) =
        (milliseconds("shortest_idle_that_died_ms"), milliseconds("longest_idle_that_lived_ms"));
    ensure!((900.0..2000.0).contains(&lived) && died > 2000.0, "{finding:#}");
    Ok((own, lines))
}

/// The findings of a trace of both hosts are those of two files, as if each host had been traced by itself.
fn are_those_of_files_of_each(hosts: &[Namespace; 2], own: &[Value], lines: &[Value]) -> Result<()> {
    let of = |host: &Namespace| -> Vec<Value> {
        lines.iter().filter(|line| line["connection"]["netns"] == host.inode()).cloned().collect()
    };
    let apart = findings_of_files(&Scratch::new()?, &[&of(&hosts[0]), &of(&hosts[1])])?;
    ensure!(told(&apart) == told(own), "the files of both hosts have {apart:#?}");
    Ok(())
}

fn joined(server: JoinHandle<()>) -> Result<()> {
    server.join().map_err(|_| anyhow::anyhow!("the server panicked"))
}

#[test]
fn a_firewall_that_forgets_idle_connections() -> Result<()> {
    if is_missing(&[NFT]) {
        return Ok(());
    }
    let hosts = hosts()?;
    let tool = Launch::new()?.trace(&hosts).args(["--linger", "off", "--stack", "none"]).start()?;
    let server = serve(&hosts[1], SERVER, 2 * SEVERAL)?;
    use_again_after_silences(&hosts[0], SERVER)?;
    joined(server)?;
    let (own, lines) = idle_cut(tool)?;
    are_those_of_files_of_each(&hosts, &own, &lines)
}

/// The same with a NAT in between, so that the ends of a connection have other addresses on each side and are
/// not joined.
#[test]
fn a_nat_that_forgets_idle_connections() -> Result<()> {
    if is_missing(&[NFT]) {
        return Ok(());
    }
    let hosts = routed(NAT)?;
    forget_soon(&hosts[1])?;
    let tool =
        Launch::new()?.trace([&hosts[0], &hosts[2]]).args(["--linger", "off", "--stack", "none"]).start()?;
    let server = serve(&hosts[2], FAR_SERVER, 2 * SEVERAL)?;
    use_again_after_silences(&hosts[0], FAR_SERVER)?;
    joined(server)?;
    let (_, lines) = idle_cut(tool)?;
    let is_servers = |line: &&Value| line["connection"]["netns"] == hosts[2].inode();
    let seen: Vec<_> =
        lines.iter().filter(is_servers).map(|line| &line["connection"]["remote"]["address"]).collect();
    ensure!(
        !seen.is_empty() && seen.iter().all(|address| **address == "10.78.0.254"),
        "there is no NAT: {seen:?}"
    );
    Ok(())
}

/// A firewall that drops the packets of connections that it has forgotten. The client's kernel sends its data
/// again until it gives up, which is no part of the silence.
#[test]
fn a_firewall_that_drops_what_it_has_forgotten() -> Result<()> {
    if is_missing(&[NFT]) {
        return Ok(());
    }
    let hosts = routed(SILENT)?;
    forget_soon(&hosts[1])?;
    hosts[0].set_sysctl("net/ipv4/tcp_retries2", RETRIES)?;
    let tool = Launch::new()?.trace([&hosts[0]]).args(["--linger", "off", "--stack", "none"]).start()?;
    let server = serve(&hosts[2], FAR_SERVER, 2 * SEVERAL)?;
    let silence = use_again_after_silences(&hosts[0], FAR_SERVER)?;
    joined(server)?;
    let (own, lines) = idle_cut(tool)?;
    let timeouts = lines.iter().filter(|line| line["cause"] == "retransmit_timeout").count();
    ensure!(timeouts == SEVERAL, "{timeouts} of them timed out: {lines:#?}");
    // How long the kernel sent the data again is known only to within its first wait.
    let died = own[0]["evidence"]["shortest_idle_that_died_ms"].as_f64().unwrap_or_default();
    let silence = silence.as_secs_f64() * 1000.0;
    ensure!((silence - 500.0..silence + 100.0).contains(&died), "{silence} ms were silent: {own:#?}");
    Ok(())
}

/// The paths of connections to a server fail one after the other while their clients are busy. Nothing was
/// idle, although the kernel sends for seconds what nobody receives.
#[test]
fn paths_that_fail_are_no_idle_timeout() -> Result<()> {
    if is_missing(&[NFT]) {
        return Ok(());
    }
    let hosts = routed(ROUTER)?;
    hosts[0].set_sysctl("net/ipv4/tcp_retries2", RETRIES)?;
    let tool = Launch::new()?.trace([&hosts[0]]).args(["--linger", "off", "--stack", "none"]).start()?;
    let server = serve(&hosts[2], FAR_SERVER, 2 * SEVERAL)?;
    for _ in 0..SEVERAL {
        let mut client = connect_to(&hosts[0], FAR_SERVER)?;
        ask(&mut client)?;
        // Some silence that does no harm.
        thread::sleep(Duration::from_millis(200));
    }
    let mut busy = Vec::new();
    for _ in 0..SEVERAL {
        let mut client = connect_to(&hosts[0], FAR_SERVER)?;
        let port = client.local_addr()?.port();
        busy.push((port, thread::spawn(move || while ask(&mut client).is_ok() {})));
    }
    joined(server)?;
    for (port, client) in busy {
        filter(&hosts[1], &format!("add rule inet filter forward tcp sport {port} drop"))?;
        joined(client)?;
    }
    let is_end = |line: &&Value| line["event"] == "close";
    ensure!(tool.wait_until(|lines| lines.iter().filter(is_end).count() >= 2 * SEVERAL), "not all ended");
    let (own, lines): (Vec<_>, Vec<_>) =
        tool.stop()?.lines.into_iter().partition(|line| line["event"] == "finding");
    let timeouts = lines.iter().filter(|line| line["cause"] == "retransmit_timeout").count();
    ensure!(timeouts == SEVERAL, "{timeouts} of them timed out: {lines:#?}");
    none(&own)
}

/// A middlebox resets connections in the server's name. Its packets have another TTL than the server's.
#[test]
fn a_middlebox_that_forges_resets() -> Result<()> {
    if is_missing(&[NFT]) {
        return Ok(());
    }
    let hosts = routed(MIDDLEBOX)?;
    hosts[1].set_sysctl("net/ipv4/ip_default_ttl", "200")?;
    let tool = Launch::new()?.trace([&hosts[0]]).args(["--ttl", "--stack", "none"]).start()?;
    let server = serve(&hosts[2], FAR_SERVER, SEVERAL)?;
    for _ in 0..SEVERAL {
        let mut client = connect_to(&hosts[0], FAR_SERVER)?;
        ensure!(ask(&mut client).is_err(), "the middlebox lets it through");
    }
    joined(server)?;
    let is_end = |line: &&Value| line["event"] == "close";
    ensure!(tool.wait_until(|lines| lines.iter().filter(is_end).count() >= SEVERAL), "not all ended");
    let ended = tool.stop()?;
    let own: Vec<_> = ended.lines.into_iter().filter(|line| line["event"] == "finding").collect();
    let finding = only(&own, "forged")?;
    ensure!(finding["count"] == SEVERAL && finding["remote"]["port"] == PORT, "{finding:#}");
    Ok(())
}

/// Clients that have sent all of their request shut down sending. Six of them wait so long for the answer
/// that the firewall forgets them: the client's kernel acknowledges the answer, but the firewall lets nothing
/// through to the server. Six others get their answer at once.
#[test]
fn a_firewall_that_cuts_half_closed_connections() -> Result<()> {
    if is_missing(&[NFT]) {
        return Ok(());
    }
    let hosts = hosts()?;
    // The server's kernel soon stops to send again what is not acknowledged.
    hosts[1].set_sysctl("net/ipv4/tcp_orphan_retries", "1")?;
    let tool = Launch::new()?.trace(&hosts).args(["--linger", "off", "--stack", "none"]).start()?;
    let listener = hosts[1].inside(|| Ok(TcpListener::bind((SERVER, PORT))?))?;
    let ask = || -> Result<(TcpStream, TcpStream)> {
        let mut client = connect(&hosts[0])?;
        let (mut connection, _) = listener.accept()?;
        client.write_all(b"ask\n")?;
        client.shutdown(Shutdown::Write)?;
        connection.read_to_end(&mut Vec::new())?;
        Ok((client, connection))
    };
    // They are apart in time, because a restart of the firewall would end them all at once.
    let mut clients = Vec::new();
    let mut waiting = VecDeque::new();
    while clients.len() < SEVERAL || !waiting.is_empty() {
        if clients.len() < SEVERAL {
            let (mut client, mut connection) = ask()?;
            connection.write_all(b"42")?;
            drop(connection);
            ensure!(client.read_to_end(&mut Vec::new())? == 2, "no answer");
            let (client, connection) = ask()?;
            clients.push(client);
            waiting.push_back((connection, Instant::now()));
        }
        thread::sleep(Duration::from_millis(1100));
        let is_forgotten = |(_, since): &mut (_, Instant)| since.elapsed() > Duration::from_secs(3);
        while let Some((mut connection, _)) = waiting.pop_front_if(is_forgotten) {
            connection.write_all(b"42")?;
        }
    }
    let is_cut = |line: &&Value| line["event"] == "close" && line["ended"] == "timeout";
    ensure!(tool.wait_until(|lines| lines.iter().filter(is_cut).count() >= SEVERAL), "not all ended");
    drop(clients);
    let ended = tool.stop()?;
    let (own, lines): (Vec<_>, Vec<_>) = ended.lines.into_iter().partition(|line| line["event"] == "finding");
    let finding = only(&own, "idle_cut")?;
    ensure!(finding["count"] == SEVERAL && finding["evidence"]["local_port"] == PORT, "{finding:#}");
    let milliseconds = |name: &str| finding["evidence"][name].as_f64().unwrap_or_default();
    let died = milliseconds("shortest_half_closed_that_died_ms");
    let lived = milliseconds("longest_half_closed_that_lived_ms");
    ensure!(died > 2000.0 && lived < 2000.0, "{finding:#}");
    are_those_of_files_of_each(&hosts, &own, &lines)
}
