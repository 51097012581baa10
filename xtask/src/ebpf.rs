//! Builds the kernel half.

use std::process::Command;

use anyhow::{Context, Result};

use crate::{
    command,
    compiler::{Core, TARGET},
    tools::Tools,
    workspace::Workspace,
};

/// Builds the kernel half into the directory where `tcpclose-user/build.rs` looks for it.
pub(crate) fn build(workspace: &Workspace, tools: &Tools) -> Result<()> {
    command::run_build(&mut cargo(workspace, tools, "build")).context("the kernel half could not be built")
}

/// A cargo command for the kernel half. Its settings apply to this command only: the user half has another
/// compiler.
pub(crate) fn cargo(workspace: &Workspace, tools: &Tools, subcommand: &str) -> Command {
    let compiler = &tools.compiler;
    let mut cargo = workspace.with_cargo(&compiler.cargo(), subcommand, &workspace.target.join("bpf"));
    cargo.args([
        "--package",
        "tcpclose-ebpf",
        "--bin",
        "tcpclose-ebpf",
        "--profile",
        "bpf",
        "--target",
        TARGET,
    ]);
    if compiler.core() == Ok(Core::Source) {
        cargo.args(["-Z", "build-std=core"]);
    }
    cargo
        .env("RUSTC", &compiler.rustc)
        // aya uses inline assembly for BPF, which is unstable.
        .env("RUSTC_BOOTSTRAP", "1")
        // bpf-linker generates BTF from the debug information.
        .env("RUSTFLAGS", "-C debuginfo=2 -C link-arg=--btf")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &tools.linker);
    // These are meant for the host's compiler, and would replace or wrap one of the settings above.
    for name in ["CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTUP_TOOLCHAIN"] {
        cargo.env_remove(name);
    }
    cargo
}
