//! `tcpclose list`: the sockets that linger now, and how many there are of every other kind. A look at the host from
//! outside, with no program in the kernel.

mod report;

use std::{
    io::{self, ErrorKind},
    net::IpAddr,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    attribute::{self, process::Processes},
    cli::ListArgs,
    event::{Attribution, Endpoint, Event, Lingering, Role},
    filter::Filter,
    host::Program,
    sink::{Format, Output, Palette, Written},
    sockets::{self, Gaps, Scan, Socket},
};
use report::Report;

/// Looks once, writes what it saw to the standard output, and what it could not see to the standard error.
///
/// # Errors
/// The standard output does not take it. That nobody reads on is none.
pub fn list(args: ListArgs) -> Result<()> {
    let ListArgs { output, linger, filter } = args;
    let filter = Filter::from(filter);
    let mut scan = sockets::scan(&filter);
    let mut processes = Processes::new();
    let (at, lingering) = (scan.at, std::mem::take(&mut scan.lingering));
    let lines = lingering
        .iter()
        .filter(|socket| !is_younger(socket, linger))
        .map(|socket| Event::Lingering(Box::new(socket.lingering(at, &mut processes))))
        .filter(|event| filter.wants(event));
    match output {
        Format::Json => write_lines(lines),
        Format::Text => {
            let mut report = Report::default();
            for line in lines {
                if let Event::Lingering(lingering) = line {
                    report.add(*lingering);
                }
            }
            keep_wanted(&mut scan, &filter, &mut processes);
            finish(report.write(&mut io::stdout().lock(), Palette::of_stdout(), &scan))
        }
    }
    .context("cannot write to the standard output")?;
    for gap in gaps(&scan.gaps) {
        eprintln!("tcpclose: {gap}");
    }
    Ok(())
}

/// Whether it has surely been in its state for less than this.
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

/// A reader that has seen enough is no error: `tcpclose list | head`.
fn finish(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Drops the counts of processes that were not asked for, and those without a process if any were.
fn keep_wanted(scan: &mut Scan, filter: &Filter, processes: &mut Processes) {
    if filter.is_about_processes() {
        scan.processes.retain(|tally| {
            let process = attribute::listed(
                &tally.process,
                Attribution::Procfs,
                Program::of(processes, tally.process.pid, 0),
            );
            filter.wants_process(Some(&process))
        });
        scan.namespaces.clear();
    }
}

/// What could not be looked at, a sentence each.
fn gaps(gaps: &Gaps) -> Vec<String> {
    let Gaps { processes, tables, namespaces, lingering, owned, holdings } = gaps;
    let mut said = Vec::new();
    if *processes > 0 {
        said.push(format!(
            "the descriptors of {processes} processes may not be looked at, so their sockets have no owner here, and \
             network namespaces that only they are in are left out; as root (sudo tcpclose list) all can be seen"
        ));
    }
    if !tables.is_empty() {
        said.push(format!(
            "of sockets in the network namespaces {} neither ages nor bytes are known: the kernel did not let them be \
             asked about there (CAP_SYS_ADMIN and CONFIG_INET_DIAG do), and /proc/PID/net/tcp says less",
            some(tables)
        ));
    }
    if let Some((_, why)) = namespaces.first() {
        let inodes: Vec<_> = namespaces.iter().map(|(netns, _)| *netns).collect();
        said.push(format!(
            "the network namespaces {} are left out: {why}; as root they can be entered",
            some(&inodes)
        ));
    }
    for (count, what) in [
        (*lingering, "lingering sockets are counted, but not listed"),
        (*owned, "sockets were not looked up among the descriptors, so they have no owner here"),
        (*holdings, "holders of sockets are left out"),
    ] {
        if count > 0 {
            said.push(format!("there are too many: {count} {what}; filters make them fewer"));
        }
    }
    said
}

/// The first few, and how many more there are.
fn some(namespaces: &[u32]) -> String {
    const ENOUGH: usize = 5;
    let named = namespaces.iter().take(ENOUGH).map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match namespaces.len().saturating_sub(ENOUGH) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

/// Where the sockets of a group lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Towards {
    /// They connected there.
    To(Endpoint),
    /// They came from there, to this port.
    From(IpAddr, u16),
}

impl Towards {
    fn of(lingering: &Lingering) -> Option<Self> {
        let (local, remote) = (lingering.connection.local?, lingering.connection.remote?);
        Some(match lingering.connection.role {
            // The port of a client is another one each time.
            Some(Role::Server) => Self::From(remote.address, local.port),
            _ => Self::To(remote),
        })
    }
}
