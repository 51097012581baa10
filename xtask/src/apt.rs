//! Installing Debian packages.

use std::{
    io,
    process::{Command, Stdio},
};

use anyhow::Result;

use crate::command::{self, say};

/// A package: its name for apt-get, with `=VERSION` if the version is pinned, and its purpose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Package {
    pub(crate) name: &'static str,
    pub(crate) purpose: &'static str,
}

/// Whether this system installs packages with apt-get.
pub(crate) fn is_here() -> bool {
    command::find("apt-get").is_some()
}

/// The command that installs these packages, for messages.
pub(crate) fn advice(packages: &[Package]) -> String {
    let quote = |package: &Package| {
        if package.name.contains('*') { format!("'{}'", package.name) } else { package.name.to_owned() }
    };
    let words = packages.iter().map(quote).collect::<Vec<_>>().join(" ");
    format!("sudo apt-get update && sudo apt-get install --no-install-recommends {words}")
}

/// Whether apt-get can install these packages with its current package lists. Needs no root.
fn available(packages: &[Package]) -> bool {
    command::output(install_command(&mut Command::new("apt-get"), packages).arg("--simulate")).is_some()
}

/// Updates the system's package lists.
pub(crate) fn update() -> Result<()> {
    command::run(root_apt_get()?.arg("update"))
}

/// Installs packages, and announces them first. `Ok(false)` means that this system does not offer them, and
/// that nothing was changed.
pub(crate) fn install(packages: &[Package]) -> Result<bool> {
    if packages.is_empty() {
        return Ok(true);
    }
    if !is_here() {
        return Ok(false);
    }
    let mut lists_are_new = false;
    if !available(packages) {
        say("apt-get does not know the missing packages; updating its package lists first");
        update()?;
        lists_are_new = true;
        if !available(packages) {
            return Ok(false);
        }
    }
    for package in packages {
        say(&format!("installing the Debian package {}: {}", package.name, package.purpose));
    }
    let installed = command::run(install_command(&mut root_apt_get()?, packages));
    if installed.is_err() && !lists_are_new {
        say("the installation failed; trying once more with new package lists");
        update()?;
        command::run(install_command(&mut root_apt_get()?, packages))?;
        return Ok(true);
    }
    installed.map(|()| true)
}

fn install_command<'a>(apt_get: &'a mut Command, packages: &[Package]) -> &'a mut Command {
    // --no-remove: a Debian compiler that is already in use must not be replaced by another one.
    apt_get
        .args(["install", "--yes", "--quiet", "--no-install-recommends", "--no-remove"])
        .args(packages.iter().map(|package| package.name))
}

/// apt-get as root, without prompts.
fn root_apt_get() -> Result<Command> {
    let mut words = vec!["env".into(), "DEBIAN_FRONTEND=noninteractive".into(), "apt-get".into()];
    if !command::is_root() {
        words.insert(0, command::sudo("installing Debian packages")?);
    }
    let mut apt_get = Command::new(&words[0]);
    // The output of apt-get must not mix with that of tcpclose.
    apt_get.args(&words[1..]).stdin(Stdio::null()).stdout(io::stderr());
    Ok(apt_get)
}
