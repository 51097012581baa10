//! Pid 1 of the virtual machines that the tests run in. It mounts file systems, loads the modules in
//! `/modules`, and runs the programs that `/tests` lists: each line has a name, a program and its arguments,
//! preceded by variables as in a shell. `/environment` has the variables of all programs. Their output goes
//! to the second serial port, between a line that names the program and one that reports how it ended
//! (`xtask/src/report.rs` reads both); everything else goes to the console.

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

/// The variable with the device for the results, which the kernel passes on from its command line.
const RESULTS: &str = "RESULTS";
/// The argument of the process that runs the tests.
const RUN: &str = "run";

/// The number of seconds during which programs may be started, if that is limited. Running programs are not
/// interrupted.
const SECONDS_VARIABLE: &str = "TCPCLOSE_TESTS_SECONDS";

/// The number of programs at the start of the list that are started even if the time is over.
const SHARE_VARIABLE: &str = "TCPCLOSE_TESTS_SHARE";

/// The mounts, in this order. Control groups are missing: their tests mount them, one version after the
/// other.
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
        // A reboot ends the emulator; returning from pid 1 would be a kernel panic.
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
    // The tests run in a child, so that this process only has to reap orphans.
    let child = Command::new("/proc/self/exe").arg(RUN).spawn().context("starting the tests")?;
    while wait()?.pid().is_none_or(|pid| pid.as_raw().cast_unsigned() != child.id()) {}
    Ok(())
}

/// Loads the modules in the order of their names: each comes after its dependencies.
fn load_modules() -> Result<()> {
    let mut files = fs::read_dir("/modules")?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    for path in files {
        let file = File::open(&path)?;
        let parameters = CString::default();
        // SAFETY: the parameters are a string that is valid during the call.
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
    let share = env::var(SHARE_VARIABLE).ok().map_or(Ok(0), |text| text.parse())?;
    let mut lines = tests.lines().enumerate().peekable();
    while let Some((index, line)) = lines.next() {
        // The last program takes seconds, and on slow machines none would come to it in time.
        let is_due = index < share || lines.peek().is_none();
        let (name, words) = line.split_once(' ').with_context(|| format!("/tests has the line {line}"))?;
        let is_over = seconds.is_some_and(|seconds| start.elapsed() > Duration::from_secs(seconds));
        if is_over && !is_due {
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
