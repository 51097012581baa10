//! Tools that builds and tests need and rustup does not provide: finds them, and installs the missing ones.

use std::{env, fmt, path::PathBuf, process::Command};

use anyhow::{Result, bail, ensure};

use crate::{
    apt::{self, Package},
    command::{self, say},
    compiler::{self, Compiler, TARGET},
    linker,
    platform::Platform,
};

/// A Rust compiler with `core` for BPF. Pinned, because a later Rust may have an LLVM that bpf-linker does
/// not support.
const DEBIAN_COMPILER: [Package; 2] = [
    Package { name: "rustc-web=1.96.*", purpose: "Debian's Rust compiler, beside rustup's" },
    Package {
        name: "libstd-rust-web-dev-bpf=1.96.*",
        purpose: "its `core` for BPF, which the kernel half needs",
    },
];

/// Commands or files that tests use, and the packages that contain them.
const FOR_TESTS: [(&str, Package); 25] = [
    (
        "ip",
        Package { name: "iproute2", purpose: "`ip`, which makes the network namespaces that tests run in" },
    ),
    ("nft", Package { name: "nftables", purpose: "`nft`, the firewall of a test that has one" }),
    (
        "/usr/bin/python3",
        Package { name: "python3", purpose: "Python, which servers in tests are written in" },
    ),
    (
        "/usr/sbin/nginx",
        Package {
            name: "nginx",
            purpose: "nginx, a proxy in tests; where port 80 is free, its package starts it there as a \
                      service (`systemctl disable --now nginx` ends that)",
        },
    ),
    (
        "/usr/bin/gunicorn",
        Package { name: "gunicorn", purpose: "gunicorn, whose workers run out of time in a test" },
    ),
    (
        "/usr/sbin/haproxy",
        Package {
            name: "haproxy",
            purpose: "HAProxy, which checks a server in a test; its package has a service, which has no port \
                      to listen on",
        },
    ),
    (
        "/usr/bin/redis-check-rdb",
        Package { name: "redis-tools", purpose: "redis and its client, in tests; without a service" },
    ),
    (
        "/usr/bin/memcached",
        Package {
            name: "memcached",
            purpose: "memcached, in tests; its package starts it as a service (`systemctl disable --now \
                      memcached` ends that)",
        },
    ),
    (
        "/usr/sbin/mariadbd",
        Package { name: "mariadb-server-core", purpose: "MariaDB, in tests; without a service" },
    ),
    ("/usr/bin/mariadb", Package { name: "mariadb-client-core", purpose: "its client" }),
    (
        "/usr/lib/rabbitmq/bin/rabbitmq-server",
        Package {
            name: "rabbitmq-server",
            purpose: "RabbitMQ, in tests (`systemctl disable --now rabbitmq-server` ends its service)",
        },
    ),
    (
        "/usr/bin/pg_ctlcluster",
        Package {
            name: "postgresql",
            purpose: "PostgreSQL and pgbench, in tests (`systemctl disable --now postgresql` ends its service)",
        },
    ),
    ("/usr/bin/chromium", Package { name: "chromium", purpose: "Chromium, which shows a page in a test" }),
    ("/usr/bin/wrk", Package { name: "wrk", purpose: "wrk, which keeps servers in tests busy" }),
    ("/usr/bin/ab", Package { name: "apache2-utils", purpose: "`ab`, which does so with short connections" }),
    ("/usr/bin/gdb", Package { name: "gdb", purpose: "gdb, which the tests compare stacks with" }),
    (
        "/usr/bin/gcc",
        Package { name: "gcc", purpose: "a C compiler, for programs whose stacks are compared" },
    ),
    ("/usr/bin/g++", Package { name: "g++", purpose: "a C++ compiler, for the same" }),
    ("/usr/bin/node", Package { name: "nodejs", purpose: "Node, whose stacks a test compares" }),
    ("/usr/bin/javac", Package { name: "default-jdk-headless", purpose: "Java, in tests" }),
    (
        "/usr/share/java/httpclient.jar",
        Package {
            name: "libhttpclient-java",
            purpose: "Apache HttpClient, whose connection pool a test drains",
        },
    ),
    ("/usr/bin/podman", Package { name: "podman", purpose: "podman, whose containers tests look into" }),
    ("/usr/sbin/runc", Package { name: "runc", purpose: "runc, which starts them" }),
    (
        "/usr/bin/prometheus",
        Package {
            name: "prometheus",
            purpose: "Prometheus, which collects metrics in a test (`systemctl disable --now prometheus` \
                      ends its service)",
        },
    ),
    (
        "/usr/sbin/rsyslogd",
        Package {
            name: "rsyslog",
            purpose: "rsyslog, which collects lines in a test; its package makes it the host's system log \
                      (`systemctl disable --now rsyslog` ends that)",
        },
    ),
];

/// Commands that virtual machines need, besides the emulator.
const FOR_MACHINES: [(&str, Package); 3] = [
    ("cpio", Package { name: "cpio", purpose: "`cpio`, which packs the first file system of those kernels" }),
    ("strip", Package { name: "binutils", purpose: "`strip`, which makes it small" }),
    ("xz", Package { name: "xz-utils", purpose: "`xz`, which unpacks kernel modules" }),
];

/// The tools that build the kernel half.
pub(crate) struct Tools {
    pub(crate) compiler: Compiler,
    pub(crate) linker: PathBuf,
}

impl fmt::Display for Tools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "compiler of the kernel half: {}", self.compiler)?;
        write!(f, "linker of the kernel half: {}", self.linker.display())
    }
}

/// Finds or installs the tools that build the kernel half.
pub(crate) fn for_building() -> Result<Tools> {
    let compiler = match compiler::find()? {
        Ok(compiler) => compiler,
        Err(refused) => install_compiler(&refused)?,
    };
    let linker = linker::find_or_install(&compiler)?;
    Ok(Tools { compiler, linker })
}

/// Installs missing tools that tests use, on a platform.
pub(crate) fn for_testing(platform: &Platform) -> Result<()> {
    let library = platform.library_32.filter(|_| platform.is_host());
    let of_platform: Vec<_> = platform.compiler_32.into_iter().chain(library).collect();
    install_missing("the tests need", &[&FOR_TESTS[..], &of_platform].concat())
}

/// Installs missing commands that virtual machines need.
pub(crate) fn for_machines(platform: &Platform) -> Result<()> {
    install_missing("tests on other kernels need", &[&[platform.qemu], &FOR_MACHINES[..]].concat())
}

/// Installs the tools that build the user half for another platform than the host's.
pub(crate) fn for_platform(platform: &Platform) -> Result<()> {
    let triple = platform.triple;
    if platform.is_host() {
        return Ok(());
    }
    install_missing("building for another platform needs", &platform.linker)?;
    if !platform.has_std() && command::find("rustup").is_some() {
        say(&format!("adding rustup's target {triple}, the standard library for it"));
        command::run(Command::new("rustup").args(["target", "add", triple]))?;
    }
    ensure!(
        platform.has_std(),
        "the Rust compiler has no standard library for {triple}: `rustup target add {triple}` installs it, \
         or for Debian's compiler the package libstd-rust-dev:{}",
        platform.debian
    );
    Ok(())
}

fn install_missing(who: &str, commands: &[(&str, Package)]) -> Result<()> {
    let missing: Vec<_> = commands
        .iter()
        .filter(|(program, _)| command::find(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if !apt::install(&missing)? {
        let programs = missing.iter().map(|package| package.purpose).collect::<Vec<_>>().join("; ");
        bail!(
            "{who} tools that are missing, and that apt-get does not offer: {programs}. On Debian this \
             installs them:\n  {}",
            apt::advice(&missing)
        );
    }
    Ok(())
}

/// Installs Debian's compiler where there is one, otherwise the source of `core` for rustup's.
fn install_compiler(refused: &[String]) -> Result<Compiler> {
    say(&format!("missing: a Rust compiler with `core` for {TARGET}"));
    let failed = match apt::install(&DEBIAN_COMPILER) {
        Ok(true) => "Debian's was installed and cannot be used".to_owned(),
        Ok(false) => "apt-get does not offer one".to_owned(),
        Err(error) => format!("{error:#}"),
    };
    if let Ok(compiler) = compiler::find()? {
        return Ok(compiler);
    }
    if let Some(rustup) = command::find("rustup") {
        say("adding rustup's component rust-src, the source of `core`");
        // A failure is reported below, with everything else that was tried.
        let _ = command::run(Command::new(rustup).args(["component", "add", "rust-src"]));
    }
    match compiler::find()? {
        Ok(compiler) => Ok(compiler),
        Err(_) => bail!("{}", advice(refused, &failed)),
    }
}

fn advice(refused: &[String], failed: &str) -> String {
    let found = if refused.is_empty() { "no Rust compiler at all".into() } else { refused.join("\n  ") };
    let toolchain = env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".into());
    format!(
        "the kernel half needs a Rust compiler with `core` for {TARGET}, or with the source of it. Found:\n  \
         {found}\n\
         Installing one failed: {failed}.\n\
         One of these commands installs one:\n  {}\n  rustup component add rust-src --toolchain {toolchain}",
        apt::advice(&DEBIAN_COMPILER),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_has_what_was_found_and_what_to_type() {
        let text = advice(&["/usr/bin/rustc is Rust 1.85, and 1.95 is needed".into()], "apt-get offers none");
        for part in [
            "/usr/bin/rustc is Rust 1.85",
            "apt-get offers none",
            "apt-get install --no-install-recommends 'rustc-web=1.96.*' 'libstd-rust-web-dev-bpf=1.96.*'",
            "rustup component add rust-src",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    }
}
