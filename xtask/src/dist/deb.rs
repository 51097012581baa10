//! The Debian package. Its contents are listed in `tcpclose-user/Cargo.toml`, at `package.metadata.deb`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::VERSION;
use crate::{
    command::{self, say},
    platform::Platform,
    workspace::{Workspace, cache, cargo_program},
};

/// The release of cargo-deb that is installed. It builds with Rust 1.85 and later.
const CARGO_DEB: &str = "3.8.0";

/// Finds cargo-deb, or installs it into the user's cache.
pub(super) fn find_or_install() -> Result<PathBuf> {
    if let Some(found) = command::find("cargo-deb") {
        return Ok(found);
    }
    let folder = cache()?.join(format!("cargo-deb-{CARGO_DEB}"));
    let program = folder.join("bin/cargo-deb");
    if !program.exists() {
        say(&format!(
            "installing cargo-deb {CARGO_DEB} into {}; this takes about a minute",
            folder.display()
        ));
        let mut cargo = Command::new(cargo_program());
        cargo
            .args(["install", "cargo-deb", "--version", CARGO_DEB, "--locked", "--quiet", "--root"])
            .arg(&folder);
        command::run(cargo.env_remove("CARGO_TARGET_DIR"))?;
    }
    Ok(program)
}

/// Packs the build for a platform.
pub(super) fn pack(
    workspace: &Workspace,
    cargo_deb: &Path,
    folder: &Path,
    platform: &Platform,
) -> Result<PathBuf> {
    let package = folder.join(format!("tcpclose_{VERSION}_{}.deb", platform.debian));
    let mut deb = Command::new(cargo_deb);
    deb.args(["--package", "tcpclose-user", "--profile", "dist", "--target", platform.triple]);
    // Called by its own name it has no cargo to take this from.
    deb.args(["--no-build", "--no-strip", "--quiet", "--output"]).arg(&package);
    deb.current_dir(&workspace.root)
        .env("CARGO", cargo_program())
        .env("CARGO_TARGET_DIR", &workspace.target)
        .env("SOURCE_DATE_EPOCH", super::timestamp(workspace));
    command::run(&mut deb).with_context(|| format!("cannot make {}", package.display()))?;
    Ok(package)
}
