//! Debian's kernels, of several releases: found and fetched by apt with lists of its own, so that the system's stay as
//! they are. What comes is checked against the keys that Debian ships.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    apt,
    command::{self, say},
    workspace::cache,
};

/// The keys of Debian's archive, from the package debian-archive-keyring.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The package that depends on the newest kernel of a suite.
const NEWEST: &str = "linux-image-cloud-amd64";

/// A kernel and its modules, unpacked.
pub(crate) struct Kernel {
    /// What `uname -r` says on it.
    pub(crate) release: String,
    pub(crate) vmlinuz: PathBuf,
    /// The folder of its modules.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// The kernel of a suite. It is fetched once; removing the folder has it fetched again, in the version of that day.
    pub(crate) fn of_suite(suite: &str) -> Result<Self> {
        let folder = cache()?.join("kernels").join(suite);
        if !folder.exists() {
            // Under its final name only when it is complete.
            let partial = folder.with_extension(format!("{}.part", std::process::id()));
            let fetched = fetch(suite, &partial).and_then(|()| Ok(fs::rename(&partial, &folder)?));
            if let Err(error) = fetched {
                let _ = fs::remove_dir_all(&partial);
                return Err(error.context(format!("cannot fetch the kernel of Debian {suite}")));
            }
        }
        Self::unpacked_in(&folder).with_context(|| {
            format!("{} is broken; removing it has the kernel fetched again", folder.display())
        })
    }

    fn unpacked_in(folder: &Path) -> Result<Self> {
        // Older packages have /lib/modules/RELEASE and /boot/vmlinuz-RELEASE, newer ones have both in one folder.
        let modules = ["lib/modules", "usr/lib/modules"].map(|place| folder.join(place));
        let mut releases = modules
            .iter()
            .filter_map(|place| fs::read_dir(place).ok())
            .flatten()
            .collect::<Result<Vec<_>, _>>()?;
        let (Some(found), None) = (releases.pop(), releases.pop()) else {
            bail!("there is not one folder of modules in it");
        };
        let release = found.file_name().to_string_lossy().into_owned();
        let modules = found.path();
        let places = [folder.join("boot").join(format!("vmlinuz-{release}")), modules.join("vmlinuz")];
        let vmlinuz = places.into_iter().find(|place| place.exists()).context("there is no vmlinuz in it")?;
        Ok(Self { release, vmlinuz, modules })
    }
}

/// Fetches the newest kernel of a suite and unpacks it.
fn fetch(suite: &str, folder: &Path) -> Result<()> {
    ensure!(
        apt::is_here() && Path::new(KEYS).exists(),
        "Debian's kernels are fetched with apt-get and checked with {KEYS}; on Debian and its relatives this brings \
         it:\n  sudo apt-get install debian-archive-keyring"
    );
    let archive = archive()?;
    let apt = Apt::new(folder.join("apt"), &format!("deb [signed-by={KEYS}] {archive} {suite} main\n"))?;
    say(&format!("looking for the newest kernel of Debian {suite}"));
    command::run(apt.command("apt-get").args(["--quiet=2", "update"]))?;
    let mut depends = apt.command("apt-cache");
    depends
        .args(["depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks"])
        .args(["--no-replaces", "--no-enhances", NEWEST]);
    let listed = command::output(&mut depends).with_context(|| format!("there is no {NEWEST} in it"))?;
    let packages: Vec<_> = listed.lines().filter(|line| is_kernel(line)).collect();
    ensure!(!packages.is_empty(), "{NEWEST} depends on no kernel");
    say(&format!("fetching {}", packages.join(", ")));
    let debs = folder.join("apt/debs");
    fs::create_dir(&debs)?;
    command::run(apt.command("apt-get").args(["--quiet=2", "download"]).args(&packages).current_dir(&debs))?;
    for deb in fs::read_dir(&debs)? {
        command::run(Command::new("dpkg-deb").arg("--extract").arg(deb?.path()).arg(folder))?;
    }
    Ok(fs::remove_dir_all(folder.join("apt"))?)
}

/// Whether a package holds a part of one certain kernel, such as linux-image-6.1.0-50-cloud-amd64. Up to 7.1 the image
/// holds all of it, later linux-binary holds the kernel and linux-modules the rest.
fn is_kernel(package: &str) -> bool {
    ["linux-image-", "linux-binary-", "linux-modules-"]
        .iter()
        .filter_map(|prefix| package.strip_prefix(prefix))
        .any(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
}

/// The archive that this system gets its own packages from: it has the other suites as well.
fn archive() -> Result<String> {
    let mut targets = Command::new("apt-get");
    targets.args([
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
        "Origin: Debian",
        "Label: Debian",
    ]);
    let first = |targets: &mut Command| {
        command::output(targets).and_then(|text| text.lines().next().map(str::to_owned))
    };
    if let Some(archive) = first(&mut targets) {
        return Ok(archive);
    }
    // Who an archive is of is known when its lists are there.
    apt::update()?;
    first(&mut targets).context("none of the package sources of this system is Debian's archive")
}

/// apt with sources, lists and a cache of its own, and no packages installed.
struct Apt {
    folder: PathBuf,
}

impl Apt {
    fn new(folder: PathBuf, sources: &str) -> Result<Self> {
        for place in ["lists/partial", "cache/archives/partial"] {
            let place = folder.join(place);
            fs::create_dir_all(&place)
                .with_context(|| format!("cannot make the folder {}", place.display()))?;
        }
        fs::write(folder.join("sources.list"), sources)?;
        Ok(Self { folder })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let own = [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::lists", "lists"),
            ("Dir::Cache", "cache"),
        ];
        for (name, place) in own {
            command.arg("-o").arg(format!("{name}={}", self.folder.join(place).display()));
        }
        for option in [
            "Dir::Etc::sourceparts=/dev/null",
            "Dir::Etc::preferences=/dev/null",
            "Dir::Etc::preferencesparts=/dev/null",
            "Dir::State::status=/dev/null",
            "APT::Architecture=amd64",
            "APT::Architectures=amd64",
            "Acquire::Languages=none",
            // What a desktop would like to have of every suite.
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false",
            // The user that apt would become may have no way into these folders.
            "APT::Sandbox::User=root",
        ] {
            command.args(["-o", option]);
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::is_kernel;

    #[test]
    fn a_kernel_has_a_number() {
        assert!(is_kernel("linux-image-6.1.0-50-cloud-amd64"));
        assert!(is_kernel("linux-binary-7.2.13+deb14-cloud-amd64"));
        assert!(!is_kernel("linux-image-cloud-amd64"));
        assert!(!is_kernel("linux-base-7.2.13+deb14-cloud-amd64"));
        assert!(!is_kernel("  Depends: linux-image-6.1.0-50-cloud-amd64"));
    }
}
