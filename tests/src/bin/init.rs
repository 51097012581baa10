//! Pid 1 of the virtual machines that the tests run in: mounts what they need, loads the modules that lie in
//! `/modules`, and runs the programs that `/tests` names: a line of it is a name, a program and its arguments. Their
//! variables are in `/environment`. What they print goes to the second serial port, between a line that names the
//! program and one that says how it ended (`xtask/src/report.rs` reads it); everything else goes to the console.

use std::{
    env,
    ffi::CString,
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Write},
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    errno::Errno,
    libc,
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr},
        wait::wait,
    },
    unistd::Pid,
};

/// Where the results go.
const RESULTS: &str = "/dev/ttyS1";
/// The argument of the process that runs the tests.
const RUN: &str = "run";

/// What is mounted where, in this order.
const MOUNTS: [(&str, &str); 7] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("tracefs", "/sys/kernel/tracing"),
];

fn main() {
    let result = if env::args().nth(1).as_deref() == Some(RUN) { run_tests() } else { be_init() };
    if let Err(error) = &result {
        eprintln!("init: {error:#}");
    }
    if Pid::this().as_raw() == 1 {
        // The machine's end ends the emulator; a pid 1 that returns would be a panic.
        let _ = reboot(RebootMode::RB_AUTOBOOT);
    }
}

fn be_init() -> Result<()> {
    ensure!(Pid::this().as_raw() == 1, "this is for pid 1 of a virtual machine");
    for (kind, place) in MOUNTS {
        mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting {kind} on {place}"))?;
    }
    fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777))?;
    load_modules()?;
    // A child of its own, so that this process has nothing to do but to bury whoever it inherits.
    let child = Command::new("/proc/self/exe").arg(RUN).spawn().context("starting the tests")?;
    while wait()?.pid().is_none_or(|pid| pid.as_raw().cast_unsigned() != child.id()) {}
    Ok(())
}

/// Loads what the host has laid out, in the order of the names: each comes after what it depends on.
fn load_modules() -> Result<()> {
    let mut files = fs::read_dir("/modules")?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    for path in files {
        let file = File::open(&path)?;
        let parameters = CString::default();
        // SAFETY: the parameters are a string that is alive through the call.
        let result =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
        Errno::result(result).with_context(|| format!("loading {}", path.display()))?;
    }
    Ok(())
}

fn run_tests() -> Result<()> {
    let mut results = OpenOptions::new().read(true).write(true).open(RESULTS)?;
    let mut terminal = tcgetattr(&results)?;
    cfmakeraw(&mut terminal);
    tcsetattr(&results, SetArg::TCSANOW, &terminal)?;
    let environment = fs::read_to_string("/environment")?;
    let tests = fs::read_to_string("/tests")?;
    for line in tests.lines() {
        let mut words = line.split(' ');
        let (Some(name), Some(program)) = (words.next(), words.next()) else {
            bail!("/tests has the line {line}")
        };
        let mut command = Command::new(program);
        command.args(words).envs(environment.lines().filter_map(|line| line.split_once('=')));
        writeln!(results, "=== {name}")?;
        let ended = run(&mut command, &mut results);
        writeln!(results, "=== {name} ended: {}", ended.unwrap_or_else(|error| format!("{error:#}")))?;
    }
    writeln!(results, "=== all")?;
    Ok(())
}

/// Runs one program, and says how it ended.
fn run(command: &mut Command, results: &mut File) -> Result<String> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let Some(output) = child.stdout.take() else { bail!("no standard output") };
    for line in BufReader::new(output).split(b'\n') {
        results.write_all(&line?)?;
        results.write_all(b"\n")?;
    }
    Ok(child.wait()?.to_string())
}
