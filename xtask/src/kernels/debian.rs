//! Debian's kernels of several releases, and the programs that machines of another platform need. apt finds
//! and fetches them with package lists of its own, so that those of the system do not change, and checks
//! signatures with Debian's keys.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    apt,
    command::{self, say},
    platform::Platform,
    workspace::cache,
};

/// The keys of Debian's archive, from the package debian-archive-keyring.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A kernel and its modules, unpacked.
pub(crate) struct Kernel {
    /// Its release, as `uname -r` prints it.
    pub(crate) release: String,
    pub(crate) vmlinuz: PathBuf,
    /// The directory of its modules.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// The kernel of a suite. It is fetched once; remove the directory to fetch the newest version again.
    pub(crate) fn of_suite(platform: &Platform, suite: &str) -> Result<Self> {
        let folder = cache()?.join(platform.kernels).join(suite);
        complete(&folder, |partial| fetch_kernel(platform, suite, partial))
            .with_context(|| format!("cannot fetch the kernel of Debian {suite} for {}", platform.debian))?;
        Self::unpacked_in(&folder).with_context(|| {
            format!("{} is incomplete; remove it, and the kernel is fetched again", folder.display())
        })
    }

    fn unpacked_in(folder: &Path) -> Result<Self> {
        // Older packages have /lib/modules/RELEASE and /boot/vmlinuz-RELEASE, newer ones have both in one
        // directory.
        let modules = ["lib/modules", "usr/lib/modules"].map(|place| folder.join(place));
        let mut releases = modules
            .iter()
            .filter_map(|place| fs::read_dir(place).ok())
            .flatten()
            .collect::<Result<Vec<_>, _>>()?;
        let (Some(found), None) = (releases.pop(), releases.pop()) else {
            bail!("it does not contain exactly one directory of modules");
        };
        let release = found.file_name().to_string_lossy().into_owned();
        let modules = found.path();
        let places = [folder.join("boot").join(format!("vmlinuz-{release}")), modules.join("vmlinuz")];
        let vmlinuz = places.into_iter().find(|place| place.exists()).context("it contains no vmlinuz")?;
        Ok(Self { release, vmlinuz, modules })
    }
}

/// A directory in which Debian packages of a platform are unpacked, with all that they depend on. They belong
/// to the suite of this system, as does the linker of programs for the platform. They are fetched once, like
/// a kernel.
pub(crate) fn unpacked(platform: &Platform, packages: &[&str]) -> Result<PathBuf> {
    let folder = cache()?.join(platform.kernels).join("programs");
    complete(&folder, |partial| {
        let suite = fs::read_to_string("/etc/os-release").ok().and_then(|text| {
            let suite = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
            suite.map(str::to_owned)
        });
        let apt = Apt::with_lists(platform, &suite.context("/etc/os-release names no suite")?, partial)?;
        say(&format!("fetching for {}, with what they depend on: {}", platform.debian, packages.join(", ")));
        let mut install = apt.command("apt-get");
        install.args(["--quiet=2", "install", "--download-only", "--no-install-recommends"]);
        command::run(install.args(packages))?;
        apt.unpack("cache/archives", partial)
    })
    .with_context(|| format!("cannot fetch programs of Debian for {}", platform.debian))?;
    Ok(folder)
}

/// Creates and fills a directory if it does not exist. It gets its name only when it is complete.
fn complete(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if folder.exists() {
        return Ok(());
    }
    let partial = folder.with_extension(format!("{}.part", std::process::id()));
    let filled = fill(&partial).and_then(|()| Ok(fs::rename(&partial, folder)?));
    if filled.is_err() {
        let _ = fs::remove_dir_all(&partial);
    }
    filled
}

/// Fetches the newest kernel of a suite and unpacks it.
fn fetch_kernel(platform: &Platform, suite: &str, folder: &Path) -> Result<()> {
    // The metapackage that depends on it.
    let newest = format!("linux-image-cloud-{}", platform.debian);
    let apt = Apt::with_lists(platform, suite, folder)?;
    let mut depends = apt.command("apt-cache");
    depends
        .args(["depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks"])
        .args(["--no-replaces", "--no-enhances", &newest]);
    let listed =
        command::output(&mut depends).with_context(|| format!("the suite has no package {newest}"))?;
    let packages: Vec<_> = listed.lines().filter(|line| is_kernel(line)).collect();
    ensure!(!packages.is_empty(), "{newest} depends on no kernel");
    say(&format!("fetching {}", packages.join(", ")));
    let debs = apt.folder.join("debs");
    fs::create_dir(&debs)?;
    command::run(apt.command("apt-get").args(["--quiet=2", "download"]).args(&packages).current_dir(&debs))?;
    apt.unpack("debs", folder)
}

/// Whether a package contains a part of a specific kernel, such as linux-image-6.1.0-50-cloud-amd64. Up to
/// 7.1 linux-image contains everything; later, linux-binary contains the kernel, and linux-modules the
/// modules.
fn is_kernel(package: &str) -> bool {
    ["linux-image-", "linux-binary-", "linux-modules-"]
        .iter()
        .filter_map(|prefix| package.strip_prefix(prefix))
        .any(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
}

/// The archive from which this system gets its packages; it has the other suites as well.
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
    // The origin of the archive is known only when its package lists are present.
    apt::update()?;
    first(&mut targets).context("none of the package sources of this system is Debian's archive")
}

/// apt for a platform, with its own sources, package lists and cache, and without installed packages.
struct Apt {
    folder: PathBuf,
    architecture: &'static str,
}

impl Apt {
    /// Fetches the package lists of a suite into a directory, from which [`Self::unpack`] removes them.
    fn with_lists(platform: &Platform, suite: &str, within: &Path) -> Result<Self> {
        ensure!(
            apt::is_here() && Path::new(KEYS).exists(),
            "Debian's packages are fetched with apt-get and checked with {KEYS}; on Debian and its relatives \
             this installs it:\n  sudo apt-get install debian-archive-keyring"
        );
        let archive = archive()?;
        let folder = within.join("apt");
        for place in ["lists/partial", "cache/archives/partial"] {
            let place = folder.join(place);
            fs::create_dir_all(&place)
                .with_context(|| format!("cannot create the directory {}", place.display()))?;
        }
        fs::write(folder.join("sources.list"), format!("deb [signed-by={KEYS}] {archive} {suite} main\n"))?;
        let apt = Self { folder, architecture: platform.debian };
        say(&format!("getting the package lists of Debian {suite} for {}", platform.debian));
        command::run(apt.command("apt-get").args(["--quiet=2", "update"]))?;
        Ok(apt)
    }

    /// Unpacks the packages in a directory of apt, and removes all of apt's files.
    fn unpack(self, debs: &str, to: &Path) -> Result<()> {
        for file in fs::read_dir(self.folder.join(debs))? {
            let file = file?.path();
            if file.extension().is_some_and(|extension| extension == "deb") {
                command::run(Command::new("dpkg-deb").arg("--extract").arg(file).arg(to))?;
            }
        }
        Ok(fs::remove_dir_all(self.folder)?)
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
            &format!("APT::Architecture={}", self.architecture),
            &format!("APT::Architectures={}", self.architecture),
            "Acquire::Retries=3",
            "Acquire::Languages=none",
            // Lists that only desktops use.
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false",
            // The user that apt would switch to may have no access to these directories.
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
