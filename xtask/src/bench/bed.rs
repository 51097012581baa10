//! The environment of measurements: a network namespace and a directory of their own.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    io::{BufRead, BufReader},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::command::{self, line};

const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

pub(crate) struct Bed {
    name: String,
    folder: PathBuf,
    /// Number of the network namespace, as the tool reports it.
    pub(crate) inode: u64,
    load: PathBuf,
    janitor: Child,
}

/// Waits until its input is closed, and then restores everything. Its arguments: the namespace, the
/// directory, the old setting, and the file of the setting.
const JANITOR: &str =
    r#"trap "" HUP INT TERM; cat; ip netns delete "$1" 2>/dev/null; rm -r "$2"; echo "$3" >"$4""#;

impl Bed {
    pub(crate) fn lay(load: &Path) -> Result<Self> {
        let name = format!("tcpclose-bench-{}", std::process::id());
        let folder = env::temp_dir().join(&name);
        let stats = fs::read_to_string(STATS)
            .with_context(|| format!("cannot read {STATS}, which enables statistics of BPF programs"))?;
        fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        // A separate process, so that it cleans up however this one ends, for instance by Ctrl-C.
        let mut janitor = Command::new("sh");
        janitor.args(["-c", JANITOR, "sh", &name]).arg(&folder).args([stats.trim(), STATS]);
        let janitor = janitor.stdin(Stdio::piped()).spawn().context("cannot start sh")?;
        let mut bed = Self { name, folder, inode: 0, load: load.to_owned(), janitor };
        Self::set_statistics(false)?;
        bed.renew()?;
        // A warm-up, so that the first round does not include initial delays.
        bed.churn(LoadExtent::Seconds(1), Ends::Rst)?;
        Ok(bed)
    }

    /// Whether the kernel measures the time of each run of a BPF program, which itself takes some 0.1 µs.
    pub(crate) fn set_statistics(enabled: bool) -> Result<()> {
        let value = if enabled { "1" } else { "0" };
        fs::write(STATS, value).with_context(|| format!("cannot write to {STATS}"))
    }

    /// Replaces the network namespace with a new one, which has no `TIME_WAIT` sockets of an earlier phase.
    pub(crate) fn renew(&mut self) -> Result<()> {
        if self.inode != 0 {
            command::run(Command::new("ip").args(["netns", "delete", &self.name]))?;
        }
        command::run(Command::new("ip").args(["netns", "add", &self.name]))?;
        self.inode = fs::metadata(Path::new("/run/netns").join(&self.name))?.ino();
        command::run(Command::new("ip").args(["-n", &self.name, "link", "set", "lo", "up"]))?;
        let range = "net.ipv4.ip_local_port_range=1024 65535";
        let mut sysctl = Command::new("ip");
        sysctl.args(["netns", "exec", &self.name, "sysctl", "--quiet", "--write", range]);
        command::run(&mut sysctl)
    }

    /// A program, to be run in the namespace.
    pub(crate) fn inside(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// The load generator, to be run in the namespace.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut load = self.inside(&self.load);
        load.args(arguments).stdin(Stdio::null());
        load
    }

    /// Runs the load generator to its end; returns its report.
    pub(crate) fn load(&self, arguments: &[&str]) -> Result<Value> {
        let mut load = self.command(arguments);
        let output = load.stderr(Stdio::inherit()).output().context("cannot start ip")?;
        ensure!(output.status.success(), "this command failed ({}): {}", output.status, line(&load));
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!("the load generator printed {:?}", String::from_utf8_lossy(&output.stdout))
        })
    }

    /// Opens and closes connections.
    pub(crate) fn churn(&self, extent: LoadExtent, ends: Ends) -> Result<Churn> {
        let (option, number) = match extent {
            LoadExtent::Seconds(seconds) => ("--seconds", u64::from(seconds)),
            LoadExtent::Connections(connections) => ("--connections", connections),
        };
        let number = number.to_string();
        let mut arguments = vec!["churn", option, &number];
        arguments.extend((ends == Ends::Fin).then_some("--fin"));
        Ok(serde_json::from_value(self.load(&arguments)?)?)
    }

    /// Opens connections and holds them until the result is dropped. With `half_closed`, each leaves a socket
    /// in `CLOSE_WAIT`.
    pub(crate) fn hold(&self, connections: u64, half_closed: bool) -> Result<Held> {
        let mut held = Held { children: Vec::new(), connections: 0 };
        // One process may hold fewer than requested, because of its limit of open files.
        while held.connections < connections {
            let more = (connections - held.connections).to_string();
            let mut arguments = vec!["open", "--connections", &more];
            arguments.extend(half_closed.then_some("--half-closed"));
            let mut child = self
                .command(&arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .context("cannot start ip")?;
            let stdout = child.stdout.take();
            held.children.push(child);
            let mut report = String::new();
            BufReader::new(stdout.context("the load generator has no output")?).read_line(&mut report)?;
            let report: Value = serde_json::from_str(&report)
                .with_context(|| format!("the load generator printed {report:?} instead of a report"))?;
            let opened = report["connections"].as_u64().filter(|&opened| opened > 0);
            held.connections += opened.context("the load generator opened no connection")?;
        }
        Ok(held)
    }

    /// The path of a file in the directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Creates a file in the directory for appending, which also works after it has been truncated.
    pub(crate) fn create(&self, name: &str) -> Result<File> {
        let path = self.path(name);
        // The file does not exist the first time.
        let _ = fs::remove_file(&path);
        let file = File::options().create_new(true).append(true).open(&path);
        file.with_context(|| format!("cannot create {}", path.display()))
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        // A failure cannot be handled here.
        let _ = self.janitor.wait();
    }
}

/// Close events per connection, one at each end.
pub(crate) const CLOSES: u32 = 2;

/// The way in which connections end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Ends {
    /// With a RST that the client sends.
    Rst,
    /// With FINs, the client's first.
    Fin,
}

impl Ends {
    /// Reset events per connection: one sent, one received. A few of those that end with FINs have one too:
    /// on two processors the server's FIN at times arrives when the client's socket is gone and its
    /// `TIME_WAIT` entry is not there yet, and the kernel answers with a RST.
    pub(crate) fn resets(self) -> u32 {
        match self {
            Self::Rst => 2,
            Self::Fin => 0,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Rst => "RST",
            Self::Fin => "FIN",
        }
    }
}

/// The amount of load.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LoadExtent {
    /// As many connections as possible in this time.
    Seconds(u32),
    /// This many connections.
    Connections(u64),
}

impl LoadExtent {
    /// About half of it.
    pub(crate) fn half(self) -> Self {
        match self {
            Self::Seconds(seconds) => Self::Seconds(seconds.div_ceil(2)),
            Self::Connections(connections) => Self::Connections(connections.div_ceil(2)),
        }
    }
}

/// Report of the load generator on connections that it opened and closed.
#[derive(Clone, Copy, Deserialize)]
pub(crate) struct Churn {
    pub(crate) connections: u32,
    pub(crate) seconds: f64,
    /// The port that accepted them.
    pub(crate) port: u16,
}

impl Churn {
    /// Connections per second.
    pub(crate) fn rate(&self) -> f64 {
        f64::from(self.connections) / self.seconds
    }
}

/// Processes that hold connections; they end, and close them, when this is dropped.
pub(crate) struct Held {
    children: Vec<Child>,
    pub(crate) connections: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        for child in &mut self.children {
            drop(child.stdin.take());
        }
        for child in &mut self.children {
            // A failure cannot be handled here.
            let _ = child.wait();
        }
    }
}

/// The memory that is still available to programs, in MiB.
pub(crate) fn available_memory() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let kib = super::tool::field(&text, "MemAvailable").and_then(|value| value.strip_suffix(" kB"));
    Ok(kib.context("/proc/meminfo has no MemAvailable")?.parse::<f64>()? / 1024.0)
}
