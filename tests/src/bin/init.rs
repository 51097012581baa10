//! Pid 1 of the virtual machines that the tests run in: mounts what they need, loads the modules that lie in
//! `/modules`, and runs the programs that `/tests` names: a line of it is a name, a program and its arguments, with
//! variables before it as in a shell. Those of all programs are in `/environment`. What they print goes to the second serial port, between a line that names the
//! program and one that says how it ended (`xtask/src/report.rs` reads it); everything else goes to the console.

use std::{
    env,
    ffi::CString,
    fs::{self, File, OpenOptions},
    io::Write,
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
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
use tcpclose_tests::rerun::{self, Excuse};

/// The variable that says where the results go; the kernel hands it on from its command line.
const RESULTS: &str = "RESULTS";
/// The argument of the process that runs the tests.
const RUN: &str = "run";

/// How many seconds there are for starting programs, if that is limited; what has begun is not interrupted.
const SECONDS_VARIABLE: &str = "TCPCLOSE_TESTS_SECONDS";

/// What is mounted where, in this order. No control groups: their tests mount them, one version after the other.
const MOUNTS: [(&str, &str); 7] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("tracefs", "/sys/kernel/tracing"),
    ("securityfs", "/sys/kernel/security"),
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
    let up = Command::new("/usr/bin/ip").args(["link", "set", "lo", "up"]).status().context("starting ip")?;
    ensure!(up.success(), "the loopback is not up");
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
    let mut results = OpenOptions::new().read(true).write(true).open(env::var(RESULTS)?)?;
    let mut terminal = tcgetattr(&results)?;
    cfmakeraw(&mut terminal);
    tcsetattr(&results, SetArg::TCSANOW, &terminal)?;
    let environment = fs::read_to_string("/environment")?;
    let tests = fs::read_to_string("/tests")?;
    let start = Instant::now();
    let seconds = env::var(SECONDS_VARIABLE).ok().map(|text| text.parse()).transpose()?;
    for line in tests.lines() {
        let (name, words) = line.split_once(' ').with_context(|| format!("/tests has the line {line}"))?;
        if seconds.is_some_and(|seconds| start.elapsed() > Duration::from_secs(seconds)) {
            writeln!(results, "=== {name} not run: its time was over")?;
            continue;
        }
        let variables: Vec<_> = words.split(' ').map_while(|word| word.split_once('=')).collect();
        let mut words = words.split(' ').skip(variables.len());
        let program = words.next().unwrap_or_default();
        let command = || {
            let mut command = Command::new(program);
            command.envs(environment.lines().filter_map(|line| line.split_once('='))).envs(variables.clone());
            command
        };
        let arguments: Vec<_> = words.map(str::to_owned).collect();
        rerun::run(name, command, &arguments, &Excuse::Emulation, &mut results)?;
    }
    writeln!(results, "=== all")?;
    Ok(())
}
