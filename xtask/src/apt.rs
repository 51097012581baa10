//! Installing Debian packages.

use std::{
    io,
    process::{Command, Stdio},
};

use anyhow::{Result, ensure};

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
fn available(packages: &[Package], removal: Removal) -> bool {
    simulation(packages, removal).is_some()
}

/// What apt-get would print if it installed these packages.
fn simulation(packages: &[Package], removal: Removal) -> Option<String> {
    command::output(install_command(&mut Command::new("apt-get"), packages, removal).arg("--simulate"))
}

/// The packages that apt-get would remove, by the output of a simulation.
fn removed(simulation: &str) -> Vec<&str> {
    simulation.lines().filter_map(|line| line.strip_prefix("Remv ")?.split_whitespace().next()).collect()
}

/// Whether installing may remove other packages. It may where the machine is thrown away afterwards;
/// elsewhere it could replace what is in use, such as another compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Removal {
    Allowed,
    Refused,
}

/// Updates the system's package lists.
pub(crate) fn update() -> Result<()> {
    command::run(root_apt_get()?.arg("update"))
}

/// Installs packages, and announces them first. `Ok(false)` means that this system does not offer them, and
/// that nothing was changed.
///
/// # Errors
/// apt-get fails, or it would have to remove other packages and this is no CI machine.
pub(crate) fn install(packages: &[Package]) -> Result<bool> {
    if packages.is_empty() {
        return Ok(true);
    }
    if !is_here() {
        return Ok(false);
    }
    let mut lists_are_new = false;
    let mut removal = Removal::Refused;
    if !available(packages, removal) {
        say("apt-get cannot install the missing packages; updating its package lists first");
        update()?;
        lists_are_new = true;
        if !available(packages, removal) {
            let Some(simulation) = simulation(packages, Removal::Allowed) else { return Ok(false) };
            let removed = removed(&simulation).join(", ");
            ensure!(
                command::is_ci(),
                "the packages that are missing conflict with others: {removed}. This installs them and \
                 removes those:\n  {}",
                advice(packages)
            );
            say(&format!("the missing packages conflict with others, which are removed: {removed}"));
            removal = Removal::Allowed;
        }
    }
    for package in packages {
        say(&format!("installing the Debian package {}: {}", package.name, package.purpose));
    }
    let installed = command::run(install_command(&mut root_apt_get()?, packages, removal));
    if installed.is_err() && !lists_are_new {
        say("the installation failed; trying once more with new package lists");
        update()?;
        command::run(install_command(&mut root_apt_get()?, packages, removal))?;
        return Ok(true);
    }
    installed.map(|()| true)
}

fn install_command<'a>(apt_get: &'a mut Command, packages: &[Package], removal: Removal) -> &'a mut Command {
    apt_get
        .args(["install", "--yes", "--quiet", "--no-install-recommends"])
        // Another apt-get, such as unattended-upgrades, may be at work.
        .args(["--option", "DPkg::Lock::Timeout=300"])
        .args((removal == Removal::Refused).then_some("--no-remove"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_that_would_be_removed_are_named() {
        let simulation = "Reading package lists...\n\
                          Remv qemu-utils [1:10.0.2] [qemu-block-extra:amd64 ]\n\
                          Inst qemu-system-common (1:7.2 Debian:12/oldstable [amd64])\n\
                          Conf qemu-system-common (1:7.2 Debian:12/oldstable [amd64])\n";
        assert_eq!(removed(simulation), ["qemu-utils"]);
    }
}
