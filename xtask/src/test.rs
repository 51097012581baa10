//! Running the tests.

use std::{env, process::Command};

use anyhow::{Context, Result, bail};

use crate::{
    command::{self, say},
    ebpf, lint, run, tools,
    workspace::{Workspace, cargo_program},
};

/// The package whose tests load programs into the kernel, as root.
const ROOT_TESTS: &str = "tcpclose-tests";

/// Runs lints and all tests, or the tests that `filters` name. Each step runs whatever became of the one before.
pub(crate) fn test(workspace: &Workspace, filters: &[String], args: &[String]) -> Result<()> {
    tools::for_testing()?;
    let tools = tools::for_building()?;
    let mut failed = Vec::new();
    let mut note = |what: &'static str, result: Result<()>| {
        if let Err(error) = result {
            say(&format!("{error:#}"));
            failed.push(what);
        }
    };
    if filters.is_empty() {
        note("lints", lint::lint(workspace, &tools));
    }
    ebpf::build(workspace, &tools)?;
    let tcpclose = run::build_user_half(workspace, true)?;

    let mut plain = workspace.cargo("test");
    plain.args(["--workspace", "--exclude", ROOT_TESTS, "--no-fail-fast", "--"]).args(filters).args(args);
    note("tests without root", command::run(&mut plain));

    let mut root = root_tests(workspace)?;
    root.env("TCPCLOSE_BIN", tcpclose).args(filters).args(args);
    note("tests with root", command::run(&mut root));

    if !failed.is_empty() {
        bail!("failed, see above: {}", failed.join(", "));
    }
    Ok(())
}

fn root_tests(workspace: &Workspace) -> Result<Command> {
    // The tests' own programs are traced, and the kernel walks their stacks along the frame pointers. The flag
    // would have everything built anew, hence a target folder of their own.
    let mut cargo = workspace.with_cargo(&cargo_program(), "test", &workspace.target.join("tests"));
    let mut flags = env::var("RUSTFLAGS").unwrap_or_default();
    flags.push_str(" -C force-frame-pointers=yes");
    cargo.env("RUSTFLAGS", flags.trim_start()).env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo.args(["--package", ROOT_TESTS, "--no-fail-fast"]);
    if !command::is_root() {
        let sudo = command::sudo("loading programs into the kernel")?;
        let host = host().context("`rustc -vV` does not say what it builds for")?;
        let runner = format!("CARGO_TARGET_{}_RUNNER", host.to_uppercase().replace(['-', '.'], "_"));
        cargo.env(runner, format!("{} --preserve-env --", sudo.display()));
    }
    cargo.arg("--");
    Ok(cargo)
}

/// The triple of this machine.
fn host() -> Option<String> {
    let text = command::output(Command::new("rustc").arg("-vV"))?;
    text.lines().find_map(|line| line.strip_prefix("host: ")).map(str::to_owned)
}
