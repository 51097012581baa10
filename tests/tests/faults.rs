//! What may go wrong around a trace: it is killed, its output is full, or what it traces is gone.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    mem,
    os::unix::fs::OpenOptionsExt,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use jiff::Timestamp;
use nix::{
    errno::Errno,
    libc,
    sys::{
        signal::{Signal, kill},
        stat::Mode,
        time::TimeSpec,
    },
    time::{ClockId, clock_gettime, clock_settime},
    unistd::{Pid, mkfifo},
};
use tcpclose_tests::{
    bed::{Bed, Side},
    features::Feature,
    scenario::routes,
    scratch::Scratch,
    tool::{Capability, Launch},
    until,
};

fn binary() -> Result<OsString> {
    std::env::var_os("TCPCLOSE_BIN").context("TCPCLOSE_BIN does not name the tool's binary")
}

/// The programs of a process, by their ids in the kernel.
fn programs(pid: u32) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        ids.extend(text.lines().filter_map(|line| line.strip_prefix("prog_id:")?.trim().parse::<u32>().ok()));
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// Whether the kernel still has a program with this id.
fn is_loaded(id: u32) -> Result<bool> {
    const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
    /// The first members of `union bpf_attr` for this command.
    #[repr(C)]
    struct IdAttributes {
        id: u32,
        next: u32,
        flags: u32,
        reserved: u32,
    }
    let attributes = IdAttributes { id, next: 0, flags: 0, reserved: 0 };
    // SAFETY: the kernel reads as many bytes as the structure has.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_GET_FD_BY_ID,
            &raw const attributes,
            mem::size_of::<IdAttributes>(),
        )
    };
    match Errno::result(result) {
        Ok(descriptor) => {
            nix::unistd::close(i32::try_from(descriptor)?)?;
            Ok(true)
        }
        Err(Errno::ENOENT) => Ok(false),
        Err(error) => Err(error).context("asking for a program"),
    }
}

#[test]
fn a_killed_trace_leaves_nothing_in_the_kernel() -> Result<()> {
    let tool = Launch::new()?.args(["-o", "json", "--netns", "1"]).start()?;
    let programs = programs(tool.pid())?;
    ensure!(programs.len() > 5, "the tool has only the programs {programs:?}");
    for id in &programs {
        ensure!(is_loaded(*id)?, "program {id} is not there while the tool runs");
    }
    kill(Pid::from_raw(tool.pid().try_into()?), Signal::SIGKILL)?;
    until("all programs are gone", || {
        let left = programs.iter().map(|id| is_loaded(*id)).collect::<Result<Vec<_>>>()?;
        Ok((!left.contains(&true)).then_some(()))
    })
}

#[test]
fn a_full_disk_ends_a_trace() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let full = OpenOptions::new().write(true).open("/dev/full")?;
    let mut command = Command::new(binary()?);
    command.args(["-o", "json", "--netns", &bed.namespace(Side::Client).inode().to_string(), "--"]);
    // The peer connects and closes.
    let server = bed.listen()?;
    command.arg(tcpclose_tests::peer::program()?);
    command.args(["once", &server.ip().to_string(), &server.port().to_string(), "0"]);
    bed.namespace(Side::Client).enter(&mut command)?;
    let output = command.stdout(full).stderr(Stdio::piped()).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    // With a command, 125 is the tool's own failure.
    ensure!(output.status.code() == Some(125), "{}: {errors}", output.status);
    ensure!(
        errors.contains("cannot write to the standard output") && errors.contains("No space left"),
        "{errors}"
    );
    Ok(())
}

/// The tool is stopped while a connection ends and while its reader leaves, so both lines of that connection
/// are still to be written when it goes on.
#[test]
fn lines_that_nobody_reads_are_counted_as_lost_output() -> Result<()> {
    let scratch = Scratch::new()?;
    let (pipe, recording) = (scratch.path().join("pipe"), scratch.path().join("recording"));
    mkfifo(&pipe, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&pipe)?;
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let record = ["--record".as_ref(), recording.as_os_str()];
    let tool = Launch::new()?.trace(bed.namespaces()).args(record).into_file(&pipe)?.start()?;
    tool.signal(Signal::SIGSTOP)?;
    let stat = format!("/proc/{}/stat", tool.pid());
    until("the tool is stopped", || Ok(fs::read_to_string(&stat)?.contains(") T ").then_some(())))?;
    bed.established()?;
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("receive-end")?;
    bed.peer(Side::Server).ask("close")?;
    drop(reader);
    tool.signal(Signal::SIGCONT)?;
    let ended = tool.wait()?.successful()?;

    // Without types there is no filter by namespace, and other connections may end too.
    let is_right = |count: u64| count == 2 || count > 2 && !Feature::Types.is_here();
    let count = ended
        .stderr
        .lines()
        .find_map(|line| line.split_once("; lost: ")?.1.rsplit_once(" output ")?.1.parse().ok());
    ensure!(count.is_some_and(is_right), "the summary does not count two lines as lost\n{ended}");

    let file = recording.to_str().context("the path is not text")?;
    let replayed = Launch::new()?.args(["replay", "-o", "json", file]).run()?.with_code(0)?;
    let lost = replayed.lines.iter().filter(|line| line["event"] == "lost" && line["where"] == "output");
    let count: u64 = lost.filter_map(|line| line["count"].as_u64()).sum();
    ensure!(is_right(count), "the recording does not count two lines as lost\n{replayed}");
    Ok(())
}

/// The clock is set forward by an hour while a connection is open, and back.
#[test]
fn the_clock_may_be_set() -> Result<()> {
    const STEP: TimeSpec = TimeSpec::new(3_600, 0);
    if Feature::OwnMachine.is_missed() {
        return Ok(());
    }
    let clock = ClockId::CLOCK_REALTIME;
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let tool = Launch::new()?.trace(bed.namespaces()).start()?;
    for is_forward in [true, false] {
        let connection = bed.established()?;
        let now = clock_gettime(clock)?;
        clock_settime(clock, if is_forward { now + STEP } else { now - STEP })?;
        let before = clock_gettime(clock)?.tv_sec();
        bed.peer(Side::Client).ask("close")?;
        bed.peer(Side::Server).ask("receive-end")?;
        bed.peer(Side::Server).ask("close")?;
        let port = connection.address(Side::Client).port();
        let line = tool.wait_for("the client's end", |line| {
            line["event"] == "close" && line["connection"]["local"]["port"] == port
        })?;
        let after = clock_gettime(clock)?.tv_sec();
        let time: Timestamp = line["time"].as_str().context("no time")?.parse()?;
        let seconds = time.as_second();
        ensure!((before - 1..=after + 1).contains(&seconds), "{seconds} not in {before}..={after}: {line}");
        let age = line["connection"]["age_ms"].as_f64().context("no age")?;
        ensure!((0.0..1_800_000.0).contains(&age), "the age has jumped: {line}");
    }
    tool.stop()?;
    Ok(())
}

/// The tool starts a few threads, and then the command.
#[test]
fn without_room_for_threads_a_trace_says_so_or_goes_on() -> Result<()> {
    const ENOUGH: u64 = 40;
    // Elsewhere this user may not load programs at all.
    if Feature::UnlockedMaps.is_missed() {
        return Ok(());
    }
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let mut refused = Vec::new();
    for tasks in 1..=ENOUGH {
        let server = bed.listen()?;
        let capabilities = [Capability::Bpf, Capability::Perfmon, Capability::SysPtrace];
        let launch =
            Launch::new()?.inside(bed.namespace(Side::Client))?.with_most_tasks(tasks, &capabilities)?;
        let launch = launch.args(["-o", "json", "--"]).args([tcpclose_tests::peer::program()?]);
        let ended = launch.args(["once", &server.ip().to_string(), &server.port().to_string(), "0"]).run()?;
        ensure!(!ended.stderr.contains("panicked"), "with {tasks}: {ended}");
        if ended.code() == Some(0) {
            let port = server.port();
            let is_told = ended.lines.iter().any(|line| line["connection"]["remote"]["port"] == port);
            ensure!(is_told, "with {tasks}, the command's connection is not reported: {ended}");
            ensure!(!refused.is_empty(), "one task is enough for all");
            return Ok(());
        }
        let ended = ended.with_code(125)?;
        let failed = ["cannot start a thread", "cannot run"].into_iter().find(|it| ended.stderr.contains(it));
        refused.push(failed.with_context(|| format!("with {tasks}, it does not say why: {ended}"))?);
    }
    bail!("{ENOUGH} tasks are not enough: {refused:?}")
}

#[test]
fn a_namespace_may_go_while_it_is_traced() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let tool = Launch::new()?.trace(bed.namespaces()).start()?;
    let connection = bed.established()?;
    let port = connection.address(Side::Client).port();
    drop(bed);
    tool.wait_for("the client's end", |line| {
        line["event"] == "close" && line["connection"]["local"]["port"] == port
    })?;
    tool.stop()?.with_code(0)?;
    Ok(())
}
