//! Builds and starts tcpclose.

use std::{env, os::unix::process::CommandExt, path::PathBuf, process::Command};

use anyhow::{Context, Error, Result};

use crate::{
    command::{self, line},
    ebpf,
    platform::Platform,
    tools,
    workspace::Workspace,
};

/// Variables that affect the output of tcpclose, and that sudo would remove.
const KEPT: [&str; 6] = ["RUST_LOG", "RUST_BACKTRACE", "NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TZ"];

/// The features of the user half that are not built by default, for tests and lints.
pub(crate) const FEATURES: &str = "tcpclose-user/otlp";

/// Builds both halves in release mode; returns the path of tcpclose.
pub(crate) fn build_all(workspace: &Workspace) -> Result<PathBuf> {
    ebpf::build(workspace, &tools::for_building()?)?;
    build_user_half(workspace, Platform::host(), true, None)
}

/// Builds the user half, which embeds the kernel half, with these features; returns its path.
pub(crate) fn build_user_half(
    workspace: &Workspace,
    platform: &Platform,
    release: bool,
    features: Option<&str>,
) -> Result<PathBuf> {
    let mut cargo = workspace.cargo("build");
    cargo.args(["--package", "tcpclose-user", "--bin", "tcpclose"]);
    cargo.args(features.map(|features| ["--features", features]).iter().flatten());
    platform.choose(&mut cargo);
    if release {
        cargo.arg("--release");
    }
    command::run_build(&mut cargo).context("the user half could not be built")?;
    Ok(platform.folder(&workspace.target).join(if release { "release" } else { "debug" }).join("tcpclose"))
}

/// Replaces this process with tcpclose, which then receives signals and sets the exit status. Returns only on
/// failure.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Error {
    match build_all(workspace).and_then(|tcpclose| start_command(tcpclose, args)) {
        Ok(mut command) => Error::new(command.exec()).context(format!("cannot start {}", line(&command))),
        Err(error) => error,
    }
}

fn start_command(tcpclose: PathBuf, args: &[String]) -> Result<Command> {
    let mut command = if command::is_root() {
        Command::new(tcpclose)
    } else {
        let mut sudo = Command::new(command::sudo("tracing")?);
        // Only variables that are set: a strict sudoers file may refuse the option as a whole.
        let kept: Vec<_> = KEPT.into_iter().filter(|name| env::var_os(name).is_some()).collect();
        if !kept.is_empty() {
            sudo.arg(format!("--preserve-env={}", kept.join(",")));
        }
        sudo.arg("--").arg(tcpclose);
        sudo
    };
    command.args(args);
    Ok(command)
}
