//! Busy programs without a fault, which have no findings. Each is busy for a few seconds, or for as many as
//! `TCPCLOSE_TESTS_BUSY` says.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::fs::chown,
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tcpclose_tests::{
    fewer,
    netns::run,
    program::Program,
    servers::{
        BACKEND_PORT, NGINX, NGINX_HTTP2_PORT, NGINX_PORT, NGINX_TLS_PORT, OPENSSL, PYTHON, REDIS,
        is_missing, start_nginx_with_tls, start_script, wait_for_listener,
    },
    until,
};

use super::{KEYS, SEVERAL, Site, none};

const WRK: &str = "/usr/bin/wrk";
const AB: &str = "/usr/bin/ab";
const BENCHMARK: &str = "/usr/bin/redis-benchmark";
const COMPILER: &str = "/usr/bin/javac";
const JVM: &str = "/usr/bin/java";
const HTTP_CLIENT: &str = "/usr/share/java/httpclient.jar";
const SETPRIV: &str = "/usr/bin/setpriv";
const POSTGRES: u16 = 5433;

fn seconds() -> String {
    std::env::var("TCPCLOSE_TESTS_BUSY").unwrap_or_else(|_| "3".to_owned())
}

/// How long programs are busy.
pub(crate) fn duration() -> Result<Duration> {
    Ok(Duration::from_secs(seconds().parse()?))
}

/// Many connections that are kept, from wrk; then one for each request, from ab, few enough for the ports.
#[test]
fn a_busy_nginx() -> Result<()> {
    if is_missing(&[PYTHON, NGINX, WRK, AB]) {
        return Ok(());
    }
    let site = Site::open()?;
    // For longer than nginx keeps its connections, which is a minute.
    let _app = site.app("120")?;
    let _nginx = site.nginx()?;
    let url = format!("http://127.0.0.1:{NGINX_PORT}/");
    let mut wrk = Command::new(WRK);
    wrk.args(["-t", "1", "-c", "20", "-d", &seconds(), &url]);
    site.namespace.enter(&mut wrk)?;
    run(&mut wrk)?;
    let mut ab = Command::new(AB);
    ab.args(["-q", "-n", &(2000 / fewer()).to_string(), "-c", "10", &url]);
    site.namespace.enter(&mut ab)?;
    run(&mut ab)?;
    none(&site.diagnose(NGINX_PORT, 2 * usize::from(2000 / fewer()))?)
}

#[test]
fn a_busy_redis() -> Result<()> {
    if is_missing(&[REDIS, BENCHMARK]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _redis = site.redis(0)?;
    let requests = (20_000 * seconds().parse::<u32>()? / u32::from(fewer())).to_string();
    for keeps in ["1", "0"] {
        let mut benchmark = Command::new(BENCHMARK);
        benchmark.args(["-q", "-p", &KEYS.to_string(), "-c", "50", "-t", "get,set", "-k", keeps]);
        // One connection per request uses up the ports, which would be a finding.
        benchmark.args(["-n", if keeps == "1" { &requests } else { "1000" }]);
        site.namespace.enter(&mut benchmark)?;
        run(&mut benchmark)?;
    }
    none(&site.diagnose(KEYS, 100)?)
}

/// The directory of PostgreSQL's programs, which has the version in its path.
fn postgres_programs() -> Option<std::path::PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?;
    let folders = versions.filter_map(|entry| Some(entry.ok()?.path().join("bin")));
    folders.filter(|folder| folder.join("initdb").exists() && folder.join("pgbench").exists()).max()
}

/// PostgreSQL with pgbench, first with connections that are kept, then with one for each transaction.
#[test]
fn a_busy_postgres() -> Result<()> {
    let Some(programs) = postgres_programs() else {
        println!("skipped: /usr/lib/postgresql is not here");
        return Ok(());
    };
    let site = Site::open()?;
    // It refuses to run as root.
    let nobody = nix::unistd::User::from_name("nobody")?.context("there is no user nobody")?;
    let folder = site.folder.path();
    chown(folder, Some(nobody.uid.as_raw()), Some(nobody.gid.as_raw()))?;
    let data = folder.join("data");
    // A process of another user may not enter the namespace, so that the user is changed afterwards.
    let as_nobody = |name: &str| {
        let mut command = Command::new(SETPRIV);
        command.args([format!("--reuid={}", nobody.uid), format!("--regid={}", nobody.gid)]);
        command.arg("--clear-groups").arg(programs.join(name)).current_dir(folder);
        command
    };
    run(as_nobody("initdb").args(["--auth=trust", "--username=bench", "--no-sync", "-D"]).arg(&data))?;
    let mut server = as_nobody("postgres");
    server
        .args(["-p", &POSTGRES.to_string(), "-h", "127.0.0.1", "-F", "-k"])
        .arg(folder)
        .arg("-D")
        .arg(&data);
    let _server = Program::start(&site.namespace, server)?;
    wait_for_listener(&site.namespace, POSTGRES)?;
    let pgbench = |args: &[&str]| -> Result<()> {
        let mut command = as_nobody("pgbench");
        command
            .args(["-h", "127.0.0.1", "-p", &POSTGRES.to_string(), "-U", "bench"])
            .args(args)
            .arg("postgres");
        site.namespace.enter(&mut command)?;
        run(&mut command).map(drop)
    };
    until("PostgreSQL takes connections", || Ok(pgbench(&["-i", "-q", "-I", "dtGv"]).ok()))?;
    pgbench(&["-c", "8", "-T", &seconds(), "-n"])?;
    pgbench(&["-c", "4", "-t", "50", "-C", "-S", "-n"])?;
    none(&site.diagnose(POSTGRES, 2 * 200)?)
}

/// Clients that drop idle TLS connections: they say goodbye (`close_notify`) and wait for the server's
/// answer, so that the server is the first to close.
#[test]
fn clients_that_drop_idle_connections() -> Result<()> {
    if is_missing(&[PYTHON, NGINX, OPENSSL]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _app = site.app("60")?;
    let _nginx = start_nginx_with_tls(&site.namespace, site.folder.path())?;
    let port = NGINX_TLS_PORT.to_string();
    let start = |_| start_script(&site.namespace, "tls_client.py", &[&port]);
    let mut clients: Vec<Program> = (0..SEVERAL).map(start).collect::<Result<_>>()?;
    for client in &mut clients {
        ensure!(client.ask("ask /kept")? == "done");
    }
    // How long they keep them.
    thread::sleep(Duration::from_secs(1));
    for client in &mut clients {
        ensure!(client.ask("part")? == "done");
    }
    none(&site.diagnose(NGINX_TLS_PORT, 2 * SEVERAL)?)
}

/// The connection of a client of HTTP/2 (RFC 9113).
struct Http2(TcpStream);

impl Http2 {
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const SETTINGS: u8 = 4;
    const WINDOW_UPDATE: u8 = 8;
    /// `ACK` of settings, and `END_STREAM` of everything else.
    const LAST: u8 = 1;
    const END_HEADERS: u8 = 4;

    fn send(&mut self, kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Result<()> {
        let length = u8::try_from(payload.len())?;
        let head = [0, 0, length, kind, flags, 0, 0, 0, stream];
        Ok(self.0.write_all(&[&head, payload].concat())?)
    }

    /// The kind and the flags of the next frame.
    fn frame(&mut self) -> Result<(u8, u8)> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        self.0.read_exact(&mut vec![0; length.try_into()?])?;
        Ok((head[3], head[4]))
    }

    /// Requests `/`, and reads the answer.
    fn ask(&mut self) -> Result<()> {
        // From the table of headers that every client knows (RFC 7541): GET, http, `/`, and a host.
        let headers = [b"\x82\x86\x84\x41\x09".as_slice(), b"localhost"].concat();
        self.0.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")?;
        self.send(Self::SETTINGS, 0, 0, &[])?;
        self.send(Self::HEADERS, Self::END_HEADERS | Self::LAST, 1, &headers)?;
        loop {
            match self.frame()? {
                (Self::SETTINGS, 0) => self.send(Self::SETTINGS, Self::LAST, 0, &[])?,
                (Self::DATA, flags) if flags & Self::LAST != 0 => return Ok(()),
                _ => {}
            }
        }
    }

    /// Returns the window that the answer took.
    fn return_window(&mut self) -> Result<()> {
        self.send(Self::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 2])
    }
}

/// Clients of HTTP/2 that have been busy before they read their answers, and return the window only then.
/// They keep their connections for a second, and close them.
#[test]
fn clients_that_return_a_window_late() -> Result<()> {
    if is_missing(&[PYTHON, NGINX]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _app = site.app("60")?;
    let nginx = site.nginx()?;
    let mut clients = Vec::new();
    for stream in site.connect_several(NGINX_HTTP2_PORT)? {
        let mut client = Http2(stream);
        client.ask()?;
        ensure!(nginx.line()? == "200 GET / HTTP/2.0");
        clients.push(client);
    }
    // How long they are busy: longer than a tick of the kernel's clock.
    thread::sleep(Duration::from_millis(100));
    clients.iter_mut().try_for_each(Http2::return_window)?;
    // How long they keep them.
    thread::sleep(Duration::from_secs(1));
    drop(clients);
    none(&site.diagnose(NGINX_HTTP2_PORT, 2 * SEVERAL)?)
}

/// A JVM that requests pages through a pool.
#[test]
fn a_busy_java_pool() -> Result<()> {
    if is_missing(&[PYTHON, COMPILER, JVM, HTTP_CLIENT]) {
        return Ok(());
    }
    let site = Site::open()?;
    let _app = site.app("60")?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/Prices.java");
    let folder = site.folder.path();
    run(Command::new(COMPILER).args(["-cp", HTTP_CLIENT, "-d"]).arg(folder).arg(source))?;
    let mut command = Command::new(JVM);
    command.arg("-cp").arg(format!("{HTTP_CLIENT}:{}", folder.display())).args(["Prices", "5"]);
    let mut jvm = Program::start(&site.namespace, command)?;
    let start = std::time::Instant::now();
    let duration = duration()?;
    while start.elapsed() < duration {
        let answer = jvm.ask(&format!("500 http://127.0.0.1:{BACKEND_PORT}/"))?;
        ensure!(answer == "answered=500 failed=0 refused=0 leased=0", "{answer}");
    }
    drop(jvm);
    none(&site.diagnose(BACKEND_PORT, 2)?)
}
