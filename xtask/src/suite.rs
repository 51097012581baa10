//! The tests that load programs into the kernel. They are built once, and run on this host and in virtual
//! machines.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    command::{self, line},
    platform::Platform,
    workspace::{Workspace, cargo_program},
};

/// The package with the tests.
pub(crate) const PACKAGE: &str = "tcpclose-tests";

/// The variable with the path of the 32-bit program (`tests/src/features.rs`).
const COMPAT: &str = "TCPCLOSE_TESTS_COMPAT";

/// The variable with the path of Rotel (`tests/tests/collector/rotel.rs`).
const ROTEL: &str = "TCPCLOSE_TESTS_ROTEL";

/// The built tests.
pub(crate) struct Suite {
    /// Programs that contain tests, by file name.
    tests: BTreeMap<String, PathBuf>,
    /// Programs that tests start.
    helpers: BTreeMap<String, PathBuf>,
    /// A 32-bit program that a test starts.
    pub(crate) compat: PathBuf,
    /// A collector that a test starts, if it is here.
    rotel: Option<PathBuf>,
    folder: PathBuf,
}

impl Suite {
    /// Builds the tests.
    pub(crate) fn build(workspace: &Workspace, platform: &Platform, rotel: Option<PathBuf>) -> Result<Self> {
        let mut cargo = cargo(workspace, "test");
        cargo.args(["--package", PACKAGE, "--no-run", "--message-format=json-render-diagnostics"]);
        platform.choose(&mut cargo);
        let output = cargo.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
        ensure!(output.status.success(), "this command failed ({}): {}", output.status, line(&cargo));
        let mut suite = Self {
            tests: BTreeMap::new(),
            helpers: BTreeMap::new(),
            compat: build_compat(workspace, platform)?,
            rotel,
            folder: workspace.root.join("tests"),
        };
        for message in String::from_utf8_lossy(&output.stdout).lines() {
            let message: Value = serde_json::from_str(message).context("cargo said what is not JSON")?;
            let Some(executable) = message["executable"].as_str().map(PathBuf::from) else { continue };
            let name = message["target"]["name"].as_str().unwrap_or_default().to_owned();
            let is_helper = message["target"]["kind"][0] == "bin";
            match message["profile"]["test"].as_bool() {
                Some(true) if !is_helper => suite.tests.insert(name, executable),
                Some(false) if is_helper => suite.helpers.insert(name, executable),
                _ => None,
            };
        }
        Ok(suite)
    }

    /// The programs that contain tests, with their names.
    pub(crate) fn tests(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.tests.iter().map(|(name, program)| (name.as_str(), program.as_path()))
    }

    /// All programs.
    pub(crate) fn programs(&self) -> impl Iterator<Item = &Path> {
        self.tests.values().chain(self.helpers.values()).map(PathBuf::as_path)
    }

    /// One of the programs that tests start.
    pub(crate) fn helper(&self, name: &str) -> Result<&Path> {
        Ok(self.helpers.get(name).with_context(|| format!("there is no program {name} in {PACKAGE}"))?)
    }

    /// The variables that the tests expect.
    pub(crate) fn variables(&self, tcpclose: &Path) -> BTreeMap<String, PathBuf> {
        let helpers = self.helpers.iter().map(|(name, path)| (format!("CARGO_BIN_EXE_{name}"), path.clone()));
        let others = [("TCPCLOSE_BIN", tcpclose), (COMPAT, &self.compat)];
        let others = others.into_iter().chain(self.rotel.as_deref().map(|path| (ROTEL, path)));
        helpers.chain(others.map(|(name, path)| (name.to_owned(), path.to_owned()))).collect()
    }

    /// Runs the tests on this host; shows and returns their output. `tests/src/rerun.rs` marks where the
    /// output of a program begins and ends, and decides which failed tests are repeated.
    pub(crate) fn run_here(&self, tcpclose: &Path, arguments: &[String]) -> Result<String> {
        let mut said = String::new();
        for (name, program) in self.tests() {
            let rerun = self.helper("rerun")?;
            let mut command = if command::is_root() {
                Command::new(rerun)
            } else {
                let mut sudo = Command::new(command::sudo("loading programs into the kernel")?);
                sudo.args(["--preserve-env", "--"]).arg(rerun);
                sudo
            };
            command
                .arg(name)
                .arg(program)
                .args(arguments)
                .current_dir(&self.folder)
                .envs(self.variables(tcpclose))
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            let mut child = command.spawn().with_context(|| format!("cannot start {}", line(&command)))?;
            let output = child.stdout.take().context("a test has no standard output")?;
            // A test starts programs such as node, which make the pipe that they inherit non-blocking for all
            // that have it. If it were this program's, printing to it would fail whenever it is full.
            if let Some(mut errors) = child.stderr.take() {
                thread::spawn(move || io::copy(&mut errors, &mut io::stderr()));
            }
            println!();
            for text in BufReader::new(output).split(b'\n') {
                let text = String::from_utf8_lossy(&text?).into_owned();
                println!("{text}");
                said.extend([&text, "\n"]);
            }
            io::stdout().flush()?;
            child.wait()?;
            ensure!(said.contains(&format!("=== {name} ended: ")), "{name} was not run: see above");
        }
        said.push_str("=== all\n");
        Ok(said)
    }
}

/// `cargo SUBCOMMAND` with the flags that the suite is built with. The tests' own programs are traced, and the
/// kernel walks their stacks along the frame pointers. The flag would cause a rebuild of everything, so the
/// tests have a separate target directory; those without root and the lints share it, so that the crates and
/// macros they need are compiled once.
pub(crate) fn cargo(workspace: &Workspace, subcommand: &str) -> Command {
    let mut cargo = workspace.with_cargo(&cargo_program(), subcommand, &workspace.target.join("tests"));
    let mut flags = env::var("RUSTFLAGS").unwrap_or_default();
    flags.push_str(" -C force-frame-pointers=yes");
    cargo.env("RUSTFLAGS", flags.trim_start()).env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo
}

/// Builds the 32-bit program of `tests/tests/compat.rs`. It needs no library, so that the compiler alone is
/// enough.
fn build_compat(workspace: &Workspace, platform: &Platform) -> Result<PathBuf> {
    let folder = platform.folder(&workspace.target.join("tests"));
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let program = folder.join("compat");
    let compiler = platform.compiler_32.map_or_else(|| platform.tool("gcc"), |(name, _)| name.to_owned());
    let mut compiler = Command::new(compiler);
    compiler.arg(platform.option_32).args(["-nostdlib", "-static", "-no-pie", "-O1", "-fno-stack-protector"]);
    compiler.arg("-fomit-frame-pointer").arg("-o").arg(&program);
    command::run(compiler.arg(workspace.root.join("tests/tests/compat.c")))?;
    Ok(program)
}
