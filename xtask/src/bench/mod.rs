//! `cargo xtask bench`: what tracing costs.
//!
//! Machines are noisy, so every comparison is made within one run: rounds without a tool and with each tool
//! alternate, and medians are reported. Figures of different runs do not compare.

mod bed;
mod blocked;
mod compare;
mod diagnose;
mod established;
mod lingering;
mod open;
mod output;
mod profile;
mod programs;
mod soak;
mod stacks;
mod syscalls;
mod table;
mod tool;

use std::{
    env, fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{
    apt::{self, Package},
    command::{self, line, say},
    platform::Platform,
    run, tools,
    workspace::{Workspace, cargo_program},
};

use bed::Bed;

/// Optional programs of the measurements, with what is missing without them.
const OPTIONAL: [(&str, Package); 2] = [
    ("bpftool", Package { name: "bpftool", purpose: "bpftool, which knows the names of BPF programs" }),
    ("tcplife", Package { name: "libbpf-tools", purpose: "tcplife, which tcpclose is compared with" }),
];

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_value_name = "MEASUREMENT")]
pub(crate) struct Args {
    #[command(subcommand)]
    measurement: Option<Measurement>,
    #[command(flatten)]
    compare: compare::Args,
    #[command(flatten)]
    common: Common,
}

/// Options of every measurement.
#[derive(clap::Args)]
#[group(skip)]
struct Common {
    /// Measure this build of tcpclose and build none; several, with commas, are measured side by side
    #[arg(long, global = true, value_name = "PATH", value_delimiter = ',')]
    tool: Vec<PathBuf>,
    /// Also write the figures to this file, as JSON
    #[arg(long, global = true, value_name = "PATH")]
    json: Option<PathBuf>,
    /// The load generator, if it was built already
    #[arg(long, global = true, hide = true)]
    load: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum Measurement {
    /// The cost of a close while many other connections are open
    Open(open::Args),
    /// CPU time and memory while many sockets linger in `CLOSE_WAIT`
    Lingering(lingering::Args),
    /// Memory and losses over many ends
    Soak(soak::Args),
    /// What happens when nobody reads the tool's output
    Blocked(blocked::Args),
    /// Latency and throughput of established connections with and without the tool
    Established(established::Args),
    /// Cost and completeness of stacks of real servers, by frame pointers and whole
    Stacks(stacks::Args),
    /// System calls of the tool for a thousand events
    Syscalls(syscalls::Args),
    /// Instructions that the tool needs for an event, counted by callgrind on replayed records
    Profile(profile::Args),
    /// Time and memory that `tcpclose diagnose` takes for many lines
    Diagnose(diagnose::Args),
}

/// The state that every measurement starts from.
struct Bench {
    bed: Bed,
    /// The builds of tcpclose to measure.
    tools: Vec<PathBuf>,
}

impl Bench {
    /// The build to measure, for measurements of a single one.
    fn tool(&self) -> Result<&Path> {
        if let [_, _, ..] = &self.tools[..] {
            say("this measurement takes one tool: the first --tool is measured");
        }
        Ok(self.tools.first().context("there is no tool to measure")?)
    }
}

/// Builds, becomes root, and measures.
pub(crate) fn bench(workspace: &Workspace, args: &Args) -> Result<()> {
    let common = &args.common;
    let is_built = common.load.is_some();
    if !is_built {
        tools::for_testing(Platform::host())?;
        for (program, package) in OPTIONAL {
            if command::find(program).is_none() && !apt::install(&[package]).unwrap_or(false) {
                say(&format!("there is no {}, and apt-get does not offer it", package.purpose));
            }
        }
    }
    let tools = if common.tool.is_empty() { vec![run::build_all(workspace)?] } else { common.tool.clone() };
    let load = match &common.load {
        Some(load) => load.clone(),
        None => build_load(workspace)?,
    };
    if !command::is_root() {
        return Err(become_root(args, &tools, &load)?);
    }
    let mut bench = Bench { bed: Bed::lay(&load)?, tools };
    let figures = match &args.measurement {
        None => compare::measure(&mut bench, &args.compare),
        Some(Measurement::Open(args)) => open::measure(&mut bench, args),
        Some(Measurement::Lingering(args)) => lingering::measure(&mut bench, args),
        Some(Measurement::Soak(args)) => soak::measure(&mut bench, args),
        Some(Measurement::Blocked(args)) => blocked::measure(&mut bench, args),
        Some(Measurement::Established(args)) => established::measure(&mut bench, args),
        Some(Measurement::Stacks(args)) => stacks::measure(&mut bench, args),
        Some(Measurement::Syscalls(args)) => syscalls::measure(&mut bench, args),
        Some(Measurement::Profile(args)) => profile::measure(&mut bench, args),
        Some(Measurement::Diagnose(args)) => diagnose::measure(&mut bench, args),
    }?;
    if let Some(path) = &common.json {
        write_json(path, &figures)?;
    }
    Ok(())
}

fn write_json(path: &Path, figures: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(figures)? + "\n";
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Restarts this program through sudo, with the same arguments. Returns only on failure.
fn become_root(args: &Args, tools: &[PathBuf], load: &Path) -> Result<anyhow::Error> {
    let mut sudo = Command::new(command::sudo("measuring")?);
    sudo.arg("--").arg(env::current_exe()?).args(env::args_os().skip(1));
    if args.common.tool.is_empty() {
        for tool in tools {
            sudo.arg("--tool").arg(tool);
        }
    }
    sudo.arg("--load").arg(load);
    let error = sudo.exec();
    Ok(anyhow::Error::new(error).context(format!("cannot start {}", line(&sudo))))
}

/// Builds the load generator with frame pointers, along which the kernel walks its stack: without them a
/// stack would be unrealistically cheap. It has no debug information, like servers in production: with it,
/// each stack has three times as many frames, most of them inlined ones.
fn build_load(workspace: &Workspace) -> Result<PathBuf> {
    let target = workspace.target.join("tests");
    let mut cargo = workspace.with_cargo(&cargo_program(), "build", &target);
    let flags = env::var("RUSTFLAGS").unwrap_or_default() + " -C force-frame-pointers=yes";
    cargo.env("RUSTFLAGS", flags.trim_start()).env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo.env("CARGO_PROFILE_RELEASE_DEBUG", "none");
    cargo.args(["--package", "tcpclose-tests", "--bin", "load", "--release"]);
    command::run_build(&mut cargo).context("the load generator could not be built")?;
    Ok(target.join("release/load"))
}

#[cfg(test)]
mod tests {
    use clap::{Parser, Subcommand as _};

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn common_options_may_follow_any_measurement() {
        for words in
            ["", "open", "lingering", "soak", "blocked", "established", "syscalls", "profile", "diagnose"]
        {
            assert!(words.is_empty() || Measurement::has_subcommand(words));
            let line = format!("bench {words} --tool /a,/b --json /c --load /d");
            let common = Cli::try_parse_from(line.split_whitespace()).unwrap().args.common;
            assert_eq!(common.tool, [PathBuf::from("/a"), PathBuf::from("/b")]);
            assert_eq!((common.json, common.load), (Some("/c".into()), Some("/d".into())));
        }
    }
}
