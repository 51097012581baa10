//! A tool under measurement: a running tcpclose or tcplife.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};

use super::bed::Bed;
use crate::command::line;

/// The timeout of everything that ends by itself. No figure depends on it.
const PATIENCE: Duration = Duration::from_mins(2);

/// A tool that has been idle for this long has finished: it is longer than the time for which tcpclose lets
/// records accumulate.
const QUIET: Duration = Duration::from_millis(400);

/// CPU time per check that counts as idle.
const IDLE: Duration = Duration::from_micros(500);

/// The kind of tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Tcpclose,
    Tcplife,
}

/// A running tool; killed on drop.
pub(crate) struct Tracer {
    child: Child,
    process: PathBuf,
    output: PathBuf,
    errors: PathBuf,
    /// The time from the start until every program was attached; known only for tcpclose.
    pub(crate) ready: Option<Duration>,
}

/// Mounts tracefs for this process only, unless it is mounted, and executes the program.
const WITH_TRACEFS: &str = r#"mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null; exec "$0" "$@""#;

impl Tracer {
    /// Starts a tool that writes to the file `output` in the bed's folder.
    pub(crate) fn start(bed: &Bed, kind: Kind, words: &[String]) -> Result<Self> {
        Self::start_with(bed, kind, words, bed.create("output")?.into())
    }

    /// Starts a tool; tcpclose is ready when this returns.
    pub(crate) fn start_with(bed: &Bed, kind: Kind, words: &[String], output: Stdio) -> Result<Self> {
        let [program, arguments @ ..] = words else { bail!("there is no command to start") };
        let ready = bed.path("ready");
        // Not there the first time.
        let _ = fs::remove_file(&ready);
        let mut tool = match kind {
            Kind::Tcpclose => {
                let mut tool = Command::new(program);
                tool.arg("--ready-file").arg(&ready);
                tool
            }
            Kind::Tcplife => {
                // It needs tracefs in its usual place, and does not mount it as tcpclose does.
                let mut unshare = Command::new("unshare");
                unshare.args(["--mount", "sh", "-c", WITH_TRACEFS, program]);
                unshare
            }
        };
        tool.args(arguments).stdin(Stdio::null()).stdout(output).stderr(bed.create("errors")?);
        let start = Instant::now();
        let child = tool.spawn().with_context(|| format!("cannot start {}", line(&tool)))?;
        let process = Path::new("/proc").join(child.id().to_string());
        let (output, errors) = (bed.path("output"), bed.path("errors"));
        let mut tracer = Self { child, process, output, errors, ready: None };
        if kind == Kind::Tcpclose {
            tracer.until("it is ready", Duration::from_micros(200), |_| Ok(ready.exists()))?;
            tracer.ready = Some(start.elapsed());
        }
        Ok(tracer)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a condition; it is an error if the tool ends.
    fn until(
        &mut self,
        what: &str,
        every: Duration,
        mut is_so: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<()> {
        let start = Instant::now();
        while !is_so(self)? {
            check_runs(&mut self.child, &self.errors)?;
            ensure!(start.elapsed() < PATIENCE, "gave up after waiting {PATIENCE:?} until {what}");
            thread::sleep(every);
        }
        Ok(())
    }

    /// Waits until it has loaded its programs and has been idle for a while.
    pub(crate) fn settle(&mut self) -> Result<()> {
        let mut last = (Duration::ZERO, 0, 0);
        let mut since = Instant::now();
        self.until("it is idle", Duration::from_millis(20), |tracer| {
            let written = fs::metadata(&tracer.output).map_or(0, |output| output.len());
            let now = (tracer.cpu()?, tracer.held("bpf-prog")?.len(), written);
            if now.0.saturating_sub(last.0) > IDLE || (now.1, now.2) != (last.1, last.2) {
                since = Instant::now();
            }
            last = now;
            Ok(now.1 > 0 && since.elapsed() >= QUIET)
        })
    }

    /// The CPU time of the whole process so far, user and system, including threads that have ended.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        let clock = clock_getcpuclockid(pid).context("its CPU clock cannot be found")?;
        Ok(clock_gettime(clock).context("its CPU clock cannot be read")?.into())
    }

    /// The CPU time since it was `before`, in µs per connection.
    pub(crate) fn cpu_since(&self, before: Duration, connections: u64) -> Result<f64> {
        Ok(per_connection(self.cpu()?.saturating_sub(before), connections))
    }

    /// The same of [`Self::system_time`].
    pub(crate) fn system_time_since(&self, before: Duration, connections: u64) -> Result<f64> {
        Ok(per_connection(self.system_time()?.saturating_sub(before), connections))
    }

    /// The part of its CPU time that was spent in the kernel, in multiples of [`TICK`]: field 15 of
    /// `/proc/PID/stat`, see `proc_pid_stat(5)`.
    pub(crate) fn system_time(&self) -> Result<Duration> {
        let file = self.process.join("stat");
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        // The name, which is the second field, may contain spaces and parentheses.
        let fields = text.rsplit_once(')').map(|(_, rest)| rest.split_whitespace());
        let ticks = fields.and_then(|mut fields| fields.nth(12)?.parse::<u32>().ok());
        let ticks = ticks.with_context(|| format!("{} has no time in the kernel: {text}", file.display()))?;
        Ok(TICK.saturating_mul(ticks))
    }

    /// `/proc/PID/fdinfo` of each descriptor of this kind that it holds.
    pub(crate) fn held(&self, kind: &str) -> Result<Vec<String>> {
        let folder = self.process.join("fd");
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let entry = entry?;
            // A descriptor that has been closed in the meantime is not held.
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            if target.to_string_lossy() == format!("anon_inode:{kind}")
                && let Ok(text) = fs::read_to_string(self.process.join("fdinfo").join(entry.file_name()))
            {
                found.push(text);
            }
        }
        Ok(found)
    }

    /// Resident memory, in MiB.
    pub(crate) fn resident(&self) -> Result<f64> {
        self.memory("VmRSS")
    }

    /// Peak resident memory in MiB, including mapped ring buffers.
    pub(crate) fn peak_resident(&self) -> Result<f64> {
        self.memory("VmHWM")
    }

    /// Anonymous memory in MiB: heap and stacks, without mapped files and ring buffers.
    pub(crate) fn anonymous(&self) -> Result<f64> {
        self.memory("RssAnon")
    }

    fn memory(&self, name: &str) -> Result<f64> {
        let file = self.process.join("status");
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let kib = field(&text, name).and_then(|value| value.strip_suffix(" kB"));
        Ok(kib.with_context(|| format!("{} has no {name}", file.display()))?.parse::<f64>()? / 1024.0)
    }

    /// Ends it as Ctrl-C would, so that it writes its remaining output.
    pub(crate) fn stop(&mut self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGINT)?;
        let start = Instant::now();
        while self.child.try_wait()?.is_none() {
            ensure!(start.elapsed() < PATIENCE, "it does not end {PATIENCE:?} after SIGINT");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Truncates its output file.
    pub(crate) fn cut_output(&self) -> Result<()> {
        let file = File::options().write(true).open(&self.output);
        file.and_then(|file| file.set_len(0)).with_context(|| format!("cannot cut {}", self.output.display()))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Fails if a program has ended, with what it wrote to `output`.
pub(crate) fn check_runs(child: &mut Child, output: &Path) -> Result<()> {
    if let Some(status) = child.try_wait()? {
        let output = fs::read_to_string(output).unwrap_or_default();
        bail!("it ended by itself ({status}) and printed: {}", output.trim());
    }
    Ok(())
}

/// The unit of times in `/proc`: `USER_HZ` is 100 on all architectures that tcpclose runs on.
const TICK: Duration = Duration::from_millis(10);

/// A time in µs, for each of `connections`.
fn per_connection(time: Duration, connections: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a count far below 2^52")]
    let connections = connections as f64;
    time.as_secs_f64() * 1e6 / connections
}

/// The value in a line `NAME:<tab>VALUE` of a file in `/proc`.
pub(crate) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| line.strip_prefix(name)?.strip_prefix(':');
    text.lines().find_map(value).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc_are_found_by_their_whole_name() {
        let text = "prog_tag:\t55f3\nprog_id:\t960\nVmHWM:\t    5120 kB\n";
        assert_eq!(field(text, "prog_id"), Some("960"));
        assert_eq!(field(text, "VmHWM"), Some("5120 kB"));
        assert_eq!(field(text, "prog"), None);
    }
}
