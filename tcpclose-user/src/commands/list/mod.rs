//! `tcpclose list`: the sockets that are in a teardown state now, and the number of sockets in every state.
//! It loads no program into the kernel.

mod report;

use std::{
    io::{self, ErrorKind},
    net::IpAddr,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    attribute,
    cli::{ListArgs, ReportFormat},
    event::{Attribution, Endpoint, Event, Lingering, Role},
    filter::Filter,
    host::ProgramInfo,
    processes::Processes,
    sink::{Format, Output, Palette, Written},
    sockets::{self, Gaps, Scan, Socket},
};
use report::ListReport;

/// Scans the sockets once. Writes them to the standard output, and what could not be read to the standard
/// error.
///
/// # Errors
/// The standard output cannot be written. It is no error if the reader has closed the pipe.
pub fn list(args: ListArgs) -> Result<()> {
    let ListArgs { output, linger, filter } = args;
    let filter = Filter::from(filter);
    let mut scan = sockets::scan(&filter);
    let mut processes = Processes::new();
    let (at, stuck) = (scan.at, std::mem::take(&mut scan.stuck));
    let lines = stuck
        .iter()
        .filter(|socket| !is_younger(socket, linger))
        .map(|socket| Event::Lingering(Box::new(socket.lingering(at, &mut processes))))
        .filter(|event| filter.wants(event));
    match output {
        ReportFormat::Json => write_lines(lines),
        ReportFormat::Text => {
            let mut report = ListReport::default();
            for line in lines {
                if let Event::Lingering(lingering) = line {
                    report.add(*lingering);
                }
            }
            drop_filtered(&mut scan, &filter, &mut processes);
            finish(report.write(&mut io::stdout().lock(), Palette::of_stdout(), &scan))
        }
    }
    .context("cannot write to the standard output")?;
    for gap in gaps(&scan.gaps) {
        eprintln!("tcpclose: {gap}");
    }
    Ok(())
}

/// Whether a socket has certainly been in its state for less than this.
fn is_younger(socket: &Socket, linger: Duration) -> bool {
    socket.entry.age().at_most.is_some_and(|most| Duration::from_millis(most.into()) < linger)
}

fn write_lines(lines: impl Iterator<Item = Event>) -> io::Result<()> {
    let mut output = Output::stdout(Format::Json, true);
    for line in lines {
        if output.write(line)? == Written::ReaderGone {
            return Ok(());
        }
    }
    output.flush().map(|_| ())
}

/// It is no error if the reader has closed the pipe: `tcpclose list | head`.
fn finish(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Drops the counts that the filters exclude. If any filter is about processes, that includes sockets without
/// one.
fn drop_filtered(scan: &mut Scan, filter: &Filter, processes: &mut Processes) {
    if filter.is_about_processes() {
        scan.processes.retain(|tally| {
            let process = attribute::listed(
                &tally.process,
                Attribution::Procfs,
                ProgramInfo::of(processes, tally.process.pid, 0),
            );
            filter.wants_process(Some(&process))
        });
        scan.namespaces.clear();
    }
}

/// What could not be read, in one sentence for each gap.
fn gaps(gaps: &Gaps) -> Vec<String> {
    let Gaps { processes, tables, namespaces, stuck, owned, holders } = gaps;
    let mut sentences = Vec::new();
    if *processes > 0 {
        sentences.push(format!(
            "the file descriptors of {processes} processes may not be read, so their sockets are listed \
             without an owner, and network namespaces that contain only such processes are missing; run it \
             as root (sudo tcpclose list) to see everything"
        ));
    }
    if !tables.is_empty() {
        sentences.push(format!(
            "ages, bytes and cookies of sockets in the network namespaces {} are not known: they were read \
             from /proc/PID/net/tcp, because sock_diag could not be used there (it needs CAP_SYS_ADMIN and \
             CONFIG_INET_DIAG)",
            some(tables)
        ));
    }
    if let Some((_, why)) = namespaces.first() {
        let inodes: Vec<_> = namespaces.iter().map(|(netns, _)| *netns).collect();
        sentences.push(format!(
            "the network namespaces {} are missing: {why}; run it as root to enter them",
            some(&inodes)
        ));
    }
    for (count, what) in [
        (*stuck, "lingering sockets are counted but not listed"),
        (*owned, "sockets are listed without an owner"),
        (*holders, "holders of sockets are not listed"),
    ] {
        if count > 0 {
            sentences.push(format!("{count} {what}, because there are too many; use filters"));
        }
    }
    sentences
}

/// The first few numbers, and how many more there are.
fn some(namespaces: &[u32]) -> String {
    const ENOUGH: usize = 5;
    let named = namespaces.iter().take(ENOUGH).map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match namespaces.len().saturating_sub(ENOUGH) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

/// The remote end that the sockets of a group have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Towards {
    /// Outgoing: the address and port that they connected to.
    To(Endpoint),
    /// Incoming: the address that they came from, and the local port.
    From(IpAddr, u16),
}

impl Towards {
    fn of(lingering: &Lingering) -> Option<Self> {
        let (local, remote) = (lingering.connection.local?, lingering.connection.remote?);
        Some(match lingering.connection.role {
            // Each client has a different port.
            Some(Role::Server) => Self::From(remote.address, local.port),
            _ => Self::To(remote),
        })
    }
}
