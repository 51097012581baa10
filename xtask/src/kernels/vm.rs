//! One virtual machine, from its start to its end.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::debian::Kernel;
use crate::platform::Platform;

/// A machine that says nothing for so long hangs, and is stopped: several times what any test takes with an emulated
/// processor on a busy host.
const SILENCE: Duration = Duration::from_mins(5);

/// Megabytes. A file system in memory is all the disk there is.
const MEMORY: &str = "2048";

/// What a machine left behind.
pub(crate) struct Left {
    /// What the tests said.
    pub(crate) results: String,
    /// What the kernel said, and whoever writes to stderr.
    pub(crate) console: String,
    /// Whether it had to be stopped.
    pub(crate) stopped: bool,
    /// What it took of this host's processors, in seconds.
    pub(crate) processor: u64,
}

/// Boots a kernel and waits for the machine's end.
pub(crate) fn run(
    platform: &Platform,
    folder: &Path,
    kernel: &Kernel,
    image: &[&[u8]],
    arguments: &str,
) -> Result<Left> {
    let file = |kind: &str| folder.join(format!("{}.{kind}", kernel.release));
    let (initrd, results, console) = (file("initrd"), file("results"), file("console"));
    // The kernel unpacks one archive after the other.
    fs::write(&initrd, image.concat())?;
    for output in [&results, &console] {
        fs::write(output, [])?;
    }
    let mut qemu = Command::new(platform.qemu.0);
    if platform.is_host() && has_kvm() {
        qemu.args(["-accel", "kvm", "-cpu", "host"]);
    } else {
        qemu.args(["-accel", "tcg"]).args(platform.emulated);
    }
    let [first, second] = platform.ports;
    qemu.args(platform.board)
        // One processor: kernels change their own code as they run, which QEMU does not always get right where another
        // processor is running it (they crash of an int3 that was put there for a moment). And that way nobody waits for
        // another processor to come by, which is most of what attaching and detaching programs takes.
        .args(["-smp", "1", "-m", MEMORY])
        .args(["-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot"])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-chardev")
        // The emulator reads two commas as one that is no end.
        .arg(format!("file,id=results,path={}", results.display().to_string().replace(',', ",,")))
        .args(["-device", &format!("{},chardev=results", platform.second_port)])
        .arg("-kernel")
        .arg(&kernel.vmlinuz)
        .arg("-initrd")
        .arg(&initrd)
        // A bug in the kernel is to end the machine. What the kernel does not know, pid 1 has as a variable. Detaching
        // programs waits for a grace period of RCU.
        .arg("-append")
        .arg(format!(
            "console={first} RESULTS=/dev/{second} quiet oops=panic panic=-1 mitigations=off \
             rcupdate.rcu_expedited=1 {arguments}"
        ))
        .stdin(Stdio::null());
    let mut machine = qemu.spawn().with_context(|| format!("cannot start {}", platform.qemu.0))?;
    let (mut said, mut since) = (0, Instant::now());
    let (mut stopped, mut processor) = (false, 0);
    while machine.try_wait()?.is_none() {
        processor = processor_time(machine.id()).unwrap_or(processor);
        let length = fs::metadata(&results)?.len();
        if length > said {
            (said, since) = (length, Instant::now());
        } else if since.elapsed() > SILENCE {
            stopped = true;
            machine.kill()?;
        }
        thread::sleep(Duration::from_millis(100));
    }
    let read = |path: PathBuf| Ok::<_, anyhow::Error>(String::from_utf8_lossy(&fs::read(path)?).into_owned());
    Ok(Left { results: read(results)?, console: read(console)?, stopped, processor })
}

/// In seconds, of all threads of a process: `proc_pid_stat(5)`.
fn processor_time(pid: u32) -> Option<u64> {
    const TICKS: u64 = 100;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some((next()? + next()?) / TICKS)
}

/// Whether the processor does the work. The device may be there, and open, where a machine gets nowhere with it: in a
/// virtual machine whose processor has not been given the extension.
fn has_kvm() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    // Only these processors say so.
    let has_extension = cfg!(not(target_arch = "x86_64"))
        || flags.split_whitespace().any(|flag| ["vmx", "svm"].contains(&flag));
    has_extension && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}
