//! Format and lints.

use std::{path::Path, process::Command};

use anyhow::{Context, Result};

use crate::{
    command::{self, say},
    compiler::Core,
    ebpf,
    tools::Tools,
    workspace::{Workspace, cargo_program},
};

/// Checks the format and the lints of both halves; a warning is an error.
pub(crate) fn lint(workspace: &Workspace, tools: &Tools) -> Result<()> {
    if is_here("cargo-fmt", "the format is not checked") {
        // `cargo fmt` knows none of the options that builds have.
        let mut fmt = Command::new(cargo_program());
        command::run(fmt.args(["fmt", "--all", "--check"]).current_dir(&workspace.root))
            .context("the format is not rustfmt's; `cargo fmt --all` mends it")?;
    }
    if is_here("cargo-clippy", "the lints are not checked") {
        let mut clippy = workspace.cargo("clippy");
        command::run(clippy.args(["--workspace", "--all-targets", "--", "-D", "warnings"]))
            .context("clippy has something to say")?;
    }
    lint_kernel_half(workspace, tools)
}

/// The kernel half, seen as what it is: on the host it is an empty program.
fn lint_kernel_half(workspace: &Workspace, tools: &Tools) -> Result<()> {
    let driver = tools.compiler.rustc.with_file_name("clippy-driver");
    if !driver.exists() {
        let from_debian =
            tools.compiler.core() == Ok(Core::Ready) && Path::new("/usr/bin/rustc") == tools.compiler.rustc;
        let mend =
            if from_debian { "sudo apt-get install rust-web-clippy" } else { "rustup component add clippy" };
        say(&format!(
            "the lints of the kernel half are not checked: its compiler has no clippy; `{mend}` brings it"
        ));
        return Ok(());
    }
    let mut check = ebpf::cargo(workspace, tools, "check");
    // What `cargo clippy` does, with the clippy of the compiler that has `core`.
    check
        .env("RUSTC_WORKSPACE_WRAPPER", driver)
        .env("CLIPPY_ARGS", "-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__");
    command::run(&mut check).context("clippy has something to say about the kernel half")
}

fn is_here(program: &str, otherwise: &str) -> bool {
    // rustup puts the program there whether or not it is installed: only calling it tells.
    let is_here = command::output(Command::new(program).arg("--version")).is_some();
    if !is_here {
        say(&format!(
            "{otherwise}: there is no {program} here; `rustup component add rustfmt clippy` brings it"
        ));
    }
    is_here
}
