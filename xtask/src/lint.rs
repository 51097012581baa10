//! Format, lints, the order of modules, and the names of types.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};

use crate::{
    apt::{self, Package},
    command::{self, say},
    ebpf, modules, names, run, suite,
    tools::Tools,
    workspace::{Workspace, cargo_program},
};

/// The clippy of Debian's compiler.
const DEBIAN_CLIPPY: Package =
    Package { name: "rust-web-clippy=1.96.*", purpose: "clippy for the compiler of the kernel half" };

/// The fuzz targets, a workspace of their own.
const FUZZ: &str = "fuzz/Cargo.toml";

/// The crates whose modules must not use each other in a circle.
const CRATES: [&str; 5] = ["tcpclose-user", "tcpclose-ebpf", "tcpclose-common", "xtask", "tests"];

/// The crates of the product, in which each type has a name of its own.
const PRODUCT: [&str; 3] = ["tcpclose-user", "tcpclose-ebpf", "tcpclose-common"];

/// Checks the format and the lints of both halves, of the tests and of the fuzz targets, the order of modules,
/// and the names of types. A warning is an error.
pub(crate) fn lint(workspace: &Workspace, tools: &Tools) -> Result<()> {
    let mut failed = Vec::new();
    let mut note = |result: Result<()>| failed.extend(result.err().map(|error| format!("{error:#}")));
    note(check_format(workspace));
    for package in CRATES {
        note(modules::check(&workspace.root.join(package)));
    }
    note(names::check(&PRODUCT.map(|package| workspace.root.join(package))));
    note(lint_user_half(workspace));
    note(lint_fuzz_targets(workspace));
    note(lint_kernel_half(workspace, tools));
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(())
}

fn check_format(workspace: &Workspace) -> Result<()> {
    if !is_installed("cargo-fmt") {
        return missing("the format is not checked: there is no cargo-fmt", "rustup component add rustfmt");
    }
    // `cargo fmt` supports none of the options of builds.
    let mut fmt = Command::new(cargo_program());
    command::run(fmt.args(["fmt", "--all", "--check"]).current_dir(&workspace.root))
        .context("the format is not rustfmt's; `cargo fmt --all` corrects it")?;
    let mut fmt = Command::new(cargo_program());
    command::run(fmt.args(["fmt", "--check", "--manifest-path", FUZZ]).current_dir(&workspace.root))
        .with_context(|| {
            format!("the format is not rustfmt's; `cargo fmt --manifest-path {FUZZ}` corrects it")
        })
}

fn lint_user_half(workspace: &Workspace) -> Result<()> {
    if !is_installed("cargo-clippy") {
        return missing("the lints are not checked: there is no cargo-clippy", "rustup component add clippy");
    }
    let mut clippy = suite::cargo(workspace, "clippy");
    clippy.args(["--workspace", "--all-targets", "--features", run::FEATURES, "--", "-D", "warnings"]);
    command::run(&mut clippy).context("clippy has findings, see above")?;
    // What is built by default. The tests do not compile it.
    let mut clippy = suite::cargo(workspace, "clippy");
    command::run(clippy.args(["--package", "tcpclose-user", "--", "-D", "warnings"]))
        .context("clippy has findings in what is built by default, see above")
}

/// Lints the fuzz targets, which no other check compiles, so that renaming a function could break them
/// unnoticed.
fn lint_fuzz_targets(workspace: &Workspace) -> Result<()> {
    if !is_installed("cargo-clippy") {
        // `lint_user_half()` has reported it.
        return Ok(());
    }
    let mut clippy = suite::cargo(workspace, "clippy");
    // Nothing is linked, so libFuzzer does not have to be compiled, which takes a C++ compiler: the build
    // script of `libfuzzer-sys` does that unless it is given a library. It runs again each time if the file
    // does not exist.
    clippy.env("CUSTOM_LIBFUZZER_PATH", workspace.root.join(FUZZ));
    command::run(clippy.args(["--manifest-path", FUZZ, "--all-targets", "--", "-D", "warnings"]))
        .context("clippy has findings in the fuzz targets, see above")
}

/// Lints the kernel half for its own target: for the host it is an empty program.
fn lint_kernel_half(workspace: &Workspace, tools: &Tools) -> Result<()> {
    // A compiler cannot read crates that another compiler has compiled, so the lints need the clippy of the
    // compiler that has `core` for BPF.
    let Some(driver) = kernel_half_driver(tools) else {
        let fix = if tools.compiler.is_debian() {
            apt::advice(&[DEBIAN_CLIPPY])
        } else {
            "rustup component add clippy".to_owned()
        };
        return missing("the lints of the kernel half are not checked: its compiler has no clippy", &fix);
    };
    let mut check = ebpf::cargo(workspace, tools, "check");
    // The variables that `cargo clippy` sets, with that driver.
    check
        .env("RUSTC_WORKSPACE_WRAPPER", driver)
        .env("CLIPPY_ARGS", "-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__");
    command::run(&mut check).context("clippy has findings in the kernel half, see above")
}

/// The clippy of the compiler that builds the kernel half, installed first if necessary.
fn kernel_half_driver(tools: &Tools) -> Option<PathBuf> {
    let driver = tools.compiler.rustc.with_file_name("clippy-driver");
    if driver.exists() {
        return Some(driver);
    }
    if tools.compiler.is_debian() {
        // The caller reports that it is missing, and the command that installs it.
        let _ = apt::install(&[DEBIAN_CLIPPY]);
    } else if let Some(rustup) = command::find("rustup") {
        say("adding rustup's component clippy");
        let _ = command::run(Command::new(rustup).args(["component", "add", "clippy"]));
    }
    driver.exists().then_some(driver)
}

/// Reports a check that cannot be made. In CI that is a failure, because nobody reads a message there.
fn missing(what: &str, fix: &str) -> Result<()> {
    let message = format!("{what}; install it with `{fix}`");
    if command::is_ci() {
        bail!(message);
    }
    say(&message);
    Ok(())
}

fn is_installed(program: &str) -> bool {
    // rustup puts the program on PATH whether or not it is installed, so it has to be called.
    command::output(Command::new(program).arg("--version")).is_some()
}
