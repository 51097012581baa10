//! The paths of the repository and of the target directory, and the `cargo` to build with.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

/// The repository that this program was started from.
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    /// Cargo's target directory. `tcpclose-user/build.rs` looks for the kernel half in it, by the same rule.
    pub(crate) target: PathBuf,
}

/// The cargo that runs this program, which belongs to the toolchain that rustup selected.
pub(crate) fn cargo_program() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

/// The directory in the user's cache for files that other clones of the repository can use too.
pub(crate) fn cache() -> Result<PathBuf> {
    let folder = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
    Ok(cache
        .context("neither HOME nor XDG_CACHE_HOME is set, so there is nowhere to install to")?
        .join("tcpclose"))
}

impl Workspace {
    pub(crate) fn find() -> Result<Self> {
        // cargo sets the variable for programs that it runs; the value at build time is used if the binary is
        // run by hand.
        let package = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root =
            Path::new(&package).parent().context("xtask is not in a folder of the repository")?.to_owned();
        let target = root.join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()));
        Ok(Self { root, target })
    }

    /// `cargo SUBCOMMAND` in this repository, with this toolchain.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        self.with_cargo(&cargo_program(), subcommand, &self.target)
    }

    /// `cargo SUBCOMMAND` with another cargo and another target directory.
    pub(crate) fn with_cargo(&self, cargo: &Path, subcommand: &str, target: &Path) -> Command {
        let mut cargo = Command::new(cargo);
        cargo.current_dir(&self.root).arg(subcommand).arg("--target-dir").arg(target);
        if self.root.join("Cargo.lock").exists() {
            cargo.arg("--locked");
        }
        cargo
    }
}
