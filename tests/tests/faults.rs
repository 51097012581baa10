//! What may go wrong around a trace: it is killed, its output is full, or what it traces is gone.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    mem,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    libc,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tcpclose_tests::{
    bed::{Bed, Side},
    scenario::routes,
    tool::Launch,
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
    struct Attributes {
        id: u32,
        next: u32,
        flags: u32,
        reserved: u32,
    }
    let attributes = Attributes { id, next: 0, flags: 0, reserved: 0 };
    // SAFETY: the kernel reads as many bytes as the structure has.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_GET_FD_BY_ID,
            &raw const attributes,
            mem::size_of::<Attributes>(),
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
