//! Runs one virtual machine.

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

/// A machine that prints nothing for so long is considered hung, and is stopped. Several times the duration
/// of any test on an emulated processor of a busy host.
const SILENCE: Duration = Duration::from_mins(5);

/// Megabytes. The file system is in memory.
const MEMORY: &str = "2048";

/// The output of a machine that has ended.
pub(crate) struct Left {
    /// The output of the tests.
    pub(crate) results: String,
    /// The output of the kernel, and stderr of all programs.
    pub(crate) console: String,
    /// Whether it had to be stopped.
    pub(crate) stopped: bool,
    /// CPU time that it took on this host, in seconds.
    pub(crate) processor: u64,
}

/// Boots a kernel, and waits until the machine ends.
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
        // One processor: kernels patch their own code, and with several processors QEMU does not always
        // emulate that correctly (the kernel crashes at an int3 that was there only for a moment). It also
        // avoids waiting for the other processor, which is most of the time that attaching and detaching
        // programs takes.
        .args(["-smp", "1", "-m", MEMORY])
        .args(["-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot"])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-chardev")
        // A comma is escaped by doubling it.
        .arg(format!("file,id=results,path={}", results.display().to_string().replace(',', ",,")))
        .args(["-device", &format!("{},chardev=results", platform.second_port)])
        .arg("-kernel")
        .arg(&kernel.vmlinuz)
        .arg("-initrd")
        .arg(&initrd)
        // A kernel bug ends the machine. The kernel passes arguments that it does not know to pid 1 as
        // variables. Detaching programs waits for a grace period of RCU, hence rcu_expedited.
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

/// CPU time of all threads of a process, in seconds: `proc_pid_stat(5)`.
fn processor_time(pid: u32) -> Option<u64> {
    const TICKS: u64 = 100;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some((next()? + next()?) / TICKS)
}

/// Whether KVM is usable. In a virtual machine whose processor lacks the extension, the device may exist and
/// can be opened, but machines do not run with it.
fn has_kvm() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    // Only x86 processors list the extension.
    let has_extension = cfg!(not(target_arch = "x86_64"))
        || flags.split_whitespace().any(|flag| ["vmx", "svm"].contains(&flag));
    has_extension && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}
