//! Rotel, a collector of OpenTelemetry that a test sends records through. It is on `PyPI`, in a package that
//! contains the program, and is kept in the user's cache.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};

use crate::{
    apt::{self, Package},
    command::{self, say},
    workspace::cache,
};

/// The release that is installed.
const VERSION: &str = "0.0.1a15";

/// What installs it.
const PIP: Package = Package { name: "python3-pip", purpose: "pip, which installs a collector for a test" };

/// Finds Rotel, or installs it.
pub(crate) fn find_or_install() -> Result<PathBuf> {
    let folder = cache()?.join(format!("rotel-{VERSION}"));
    let program = folder.join("rotel/rotel-agent");
    if program.exists() {
        return Ok(program);
    }
    if command::output(&mut pip(&["--version"])).is_none() {
        ensure!(apt::install(&[PIP])?, "there is no pip, which installs Rotel");
    }
    say(&format!("installing Rotel {VERSION} into {}, a collector for a test", folder.display()));
    // In two steps, so that an installation that was interrupted is not taken for a complete one.
    let part = folder.with_extension("part");
    let _ = fs::remove_dir_all(&part);
    let options =
        ["install", "--quiet", "--no-deps", "--only-binary", ":all:", "--root-user-action", "ignore"];
    let mut pip = pip(&options);
    pip.arg("--target").arg(&part).arg(format!("rotel=={VERSION}"));
    command::run(&mut pip).context("Rotel cannot be installed")?;
    fs::rename(&part, &folder).with_context(|| format!("cannot create {}", folder.display()))?;
    ensure!(program.exists(), "the package rotel does not contain {}", program.display());
    Ok(program)
}

/// pip of Debian's interpreter: the first one in the path may be a script that starts another.
fn pip(arguments: &[&str]) -> Command {
    let mut pip = Command::new("/usr/bin/python3");
    pip.args(["-m", "pip"]).args(arguments);
    pip
}
