//! Servers that people run in production, for tests of what the tool reports about them: nginx, redis,
//! memcached, MariaDB, a message broker, and the scripts in `tests/servers`.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};

use crate::{
    netns::{Namespace, run},
    program::Program,
    sockets::{self, LISTEN, Socket},
};

/// Debian's interpreter. The first one in the path may be a script that starts another.
pub const PYTHON: &str = "/usr/bin/python3";
/// nginx.
pub const NGINX: &str = "/usr/sbin/nginx";
/// gunicorn.
pub const GUNICORN: &str = "/usr/bin/gunicorn";
/// HAProxy.
pub const HAPROXY: &str = "/usr/sbin/haproxy";
/// Node.
pub const NODE: &str = "/usr/bin/node";
/// What makes nginx's certificate.
pub const OPENSSL: &str = "/usr/bin/openssl";
/// In Debian this tool and the server are the same file, which acts by the name it is started with. The
/// tool's package has no service that would start with it.
pub const REDIS: &str = "/usr/bin/redis-check-rdb";

/// memcached.
pub const MEMCACHED: &str = "/usr/bin/memcached";

/// The port on which nginx listens.
pub const NGINX_PORT: u16 = 8080;
/// The port on which nginx speaks HTTP/2.
pub const NGINX_HTTP2_PORT: u16 = 8082;
/// The port of nginx with a short accept queue, which connections enter only with their first request, and
/// how many connections there is room for.
pub const NGINX_DEFERRED_PORT: u16 = 8083;
/// One more than the backlog (`sk_acceptq_is_full()` in `include/net/sock.h`).
pub const NGINX_DEFERRED_ROOM: usize = 9;
/// The port on which nginx speaks TLS.
pub const NGINX_TLS_PORT: u16 = 8443;
/// The port to which nginx forwards requests.
pub const BACKEND_PORT: u16 = 9000;

/// Whether a test has to be skipped for lack of a file, as in a virtual machine. The skip is printed;
/// `cargo xtask test` reads it, and accepts it if the test ran elsewhere.
pub fn is_missing(files: &[&str]) -> bool {
    let missing = files.iter().find(|file| !Path::new(file).exists());
    if let Some(file) = missing {
        println!("skipped: {file} is not here");
    }
    missing.is_some()
}

/// Starts a script in a namespace, and waits until it is ready.
pub fn start_script(namespace: &Namespace, name: &str, args: &[&str]) -> Result<Program> {
    let mut command = Command::new(PYTHON);
    command.arg(file(name)).args(args);
    let script = Program::start(namespace, command)?;
    ensure!(script.line()? == "ready", "{name} is not ready");
    Ok(script)
}

/// Starts nginx in a namespace as a proxy, with its files in `folder`. It writes the status and the request
/// of each response to its standard output.
pub fn start_nginx(namespace: &Namespace, folder: &Path) -> Result<Program> {
    let mut command = Command::new(NGINX);
    command.arg("-p").arg(folder).arg("-c").arg(file("nginx.conf")).args(["-e", "stderr"]);
    let nginx = Program::start(namespace, command)?;
    wait_for_listener(namespace, NGINX_PORT)?;
    Ok(nginx)
}

/// Starts nginx in a namespace as a proxy that speaks TLS with its clients, and closes their idle connections
/// after a second. Its files are in `folder`, where it also looks for its certificate.
pub fn start_nginx_with_tls(namespace: &Namespace, folder: &Path) -> Result<Program> {
    let configuration = folder.join("nginx-tls.conf");
    fs::copy(file("nginx-tls.conf"), &configuration)?;
    let mut certificate = Command::new(OPENSSL);
    certificate.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-batch"]);
    certificate.args(["-keyout", "key.pem", "-out", "cert.pem"]).current_dir(folder);
    let made = certificate.output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let mut command = Command::new(NGINX);
    command.arg("-p").arg(folder).arg("-c").arg(&configuration).args(["-e", "stderr"]);
    let nginx = Program::start(namespace, command)?;
    wait_for_listener(namespace, NGINX_TLS_PORT)?;
    Ok(nginx)
}

/// Starts redis in a namespace, with its file `log` in `folder`. It closes a connection after `timeout`
/// seconds without a request; 0 is never.
pub fn start_redis(namespace: &Namespace, folder: &Path, port: u16, timeout: u64) -> Result<Program> {
    let program = folder.join("redis-server");
    symlink(REDIS, &program)?;
    let mut command = Command::new(program);
    command.args(["--save", "", "--loglevel", "verbose", "--logfile", "log", "--dir"]).arg(folder);
    command.args(["--port", &port.to_string(), "--timeout", &timeout.to_string()]);
    let redis = Program::start(namespace, command)?;
    wait_for_listener(namespace, port)?;
    Ok(redis)
}

/// Starts memcached in a namespace.
pub fn start_memcached(namespace: &Namespace, port: u16) -> Result<Program> {
    let mut command = Command::new(MEMCACHED);
    command.args(["-u", "root", "-U", "0", "-l", "127.0.0.1", "-p", &port.to_string()]);
    let memcached = Program::start(namespace, command)?;
    wait_for_listener(namespace, port)?;
    Ok(memcached)
}

/// MariaDB, and its program that creates a data directory.
pub const MARIADB: &str = "/usr/sbin/mariadbd";
/// The second of them.
pub const MARIADB_INSTALL: &str = "/usr/bin/mariadb-install-db";

/// Starts MariaDB in a namespace, with its data in `folder`. It asks for no password, and closes a connection
/// after `timeout` seconds without a query.
pub fn start_mariadb(namespace: &Namespace, folder: &Path, port: u16, timeout: u64) -> Result<Program> {
    let data = format!("--datadir={}", folder.join("data").display());
    let mut install = Command::new(MARIADB_INSTALL);
    install.args(["--no-defaults", "--user=root", "--skip-test-db", &data]);
    run(&mut install)?;
    let mut command = Command::new(MARIADB);
    command.args(["--no-defaults", "--user=root", "--skip-grant-tables", "--bind-address=127.0.0.1", &data]);
    command.arg(format!("--socket={}", folder.join("socket").display()));
    command.arg(format!("--pid-file={}", folder.join("pid").display()));
    command.arg(format!("--log-error={}", folder.join("log").display()));
    command.args([format!("--port={port}"), format!("--wait-timeout={timeout}")]);
    let mariadb = Program::start(namespace, command)?;
    wait_for_listener(namespace, port)?;
    Ok(mariadb)
}

/// A message broker. The script of this name in the path would change to another user.
pub const RABBITMQ: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";
/// Erlang's name server, without which it does not start.
pub const EPMD: &str = "/usr/bin/epmd";

/// Starts the message broker in a namespace, with its files in `folder`. The second program is its name
/// server.
pub fn start_rabbitmq(namespace: &Namespace, folder: &Path, port: u16) -> Result<[Program; 2]> {
    const NAMES: u16 = 4369;
    let mut names = Command::new(EPMD);
    names.args(["-address", "127.0.0.1", "-port", &NAMES.to_string()]);
    let names = Program::start(namespace, names)?;
    wait_for_listener(namespace, NAMES)?;
    let configuration = folder.join("rabbitmq.conf");
    fs::write(&configuration, format!("listeners.tcp.1 = 127.0.0.1:{port}\n"))?;
    let mut command = Command::new(RABBITMQ);
    command.env("RABBITMQ_NODENAME", "rabbit@localhost").env("RABBITMQ_CONFIG_FILE", configuration);
    // Then the script becomes the broker, instead of starting it.
    command.env("RUNNING_UNDER_SYSTEMD", "1");
    let places = ["HOME", "RABBITMQ_MNESIA_BASE", "RABBITMQ_LOG_BASE", "RABBITMQ_GENERATED_CONFIG_DIR"];
    command.envs(places.map(|place| (place, folder)));
    for (name, file) in [("RABBITMQ_ENABLED_PLUGINS_FILE", "plugins"), ("RABBITMQ_PID_FILE", "pid")] {
        command.env(name, folder.join(file));
    }
    let broker = Program::start(namespace, command)?;
    wait_for_listener(namespace, port)?;
    Ok([broker, names])
}

/// Waits until a process listens on a port.
pub fn wait_for_listener(namespace: &Namespace, port: u16) -> Result<()> {
    let listens = |socket: &Socket| socket.state == LISTEN && socket.local.port() == port;
    sockets::wait_until(namespace, "a process listens", |sockets| sockets.iter().any(listens))
}

/// The path of a file in `tests/servers`.
pub fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("servers").join(name)
}
