//! `cargo xtask dist`: the release. It contains, for each platform, a static binary in a tarball and in a
//! Debian package, with the manual page and completions that the binary generates itself.

mod deb;
pub(crate) mod image;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{
    command::{self, say},
    ebpf,
    platform::Platform,
    tools,
    workspace::Workspace,
};

/// Version of the package, which all packages of the workspace share.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The maximum size of a binary, in bytes.
const LIMIT: u64 = 12 << 20;

/// Shells that completions are generated for, each with the name of its file.
const SHELLS: [(&str, &str); 3] =
    [("bash", "tcpclose.bash"), ("zsh", "_tcpclose"), ("fish", "tcpclose.fish")];

/// Files of the repository that are released: the licences, and the README with what it refers to. The list
/// of the Debian package is in `tcpclose-user/Cargo.toml`.
const FILES: [&str; 15] = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "LICENSE-APACHE",
    "LICENSE-GPL2",
    "LICENSE-MIT",
    "docs/architecture.md",
    "docs/cases.md",
    "docs/field.md",
    "docs/guide.md",
    "docs/kernels.md",
    "docs/performance.md",
    "docs/schema.json",
    "docs/testing.md",
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Platforms to build for, as rustc calls them, with commas; by default all that are supported
    #[arg(long, value_name = "TRIPLE", value_delimiter = ',', value_parser = Platform::parse)]
    target: Vec<&'static Platform>,
}

/// Builds everything into `target/dist`, and prints the checksums.
pub(crate) fn dist(workspace: &Workspace, args: &Args) -> Result<()> {
    let platforms = if args.target.is_empty() { Platform::all().collect() } else { args.target.clone() };
    let folder = workspace.target.join("dist");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let cargo_deb = deb::find_or_install()?;
    ebpf::build(workspace, &tools::for_building()?)?;
    // The host's binary generates the documents for all platforms.
    let own = build(workspace, Platform::host())?;
    generate_documents(&own, &folder.join("doc"))?;
    let mut files = Vec::new();
    for platform in platforms {
        let binary = build(workspace, platform)?;
        files.push(pack_tarball(workspace, &folder, platform, &binary)?);
        files.push(deb::pack(workspace, &cargo_deb, &folder, platform)?);
    }
    let names = files.iter().filter_map(|file| file.file_name());
    let mut checksum = Command::new("sha256sum");
    let sums = command::output(checksum.args(names).current_dir(&folder)).context("sha256sum failed")? + "\n";
    fs::write(folder.join("SHA256SUMS"), &sums)?;
    print!("{sums}");
    say(&format!("all of it is in {}", folder.display()));
    Ok(())
}

/// Builds the static binary for a platform; the kernel half must have been built.
fn build(workspace: &Workspace, platform: &Platform) -> Result<PathBuf> {
    tools::for_platform(platform)?;
    let mut cargo = workspace.cargo("build");
    cargo.args(["--package", "tcpclose-user", "--bin", "tcpclose", "--profile", "dist"]);
    // Also for the host: without --target, the flags would apply to build scripts and macros too, which
    // cannot be static.
    platform.choose_always(&mut cargo);
    let flags = env::var("RUSTFLAGS").unwrap_or_default() + " -C target-feature=+crt-static";
    cargo.env("RUSTFLAGS", flags.trim_start()).env_remove("CARGO_ENCODED_RUSTFLAGS");
    command::run_build(&mut cargo).with_context(|| format!("cannot build for {}", platform.triple))?;
    let binary = workspace.target.join(platform.triple).join("dist/tcpclose");
    let size = fs::metadata(&binary).with_context(|| format!("cannot read {}", binary.display()))?.len();
    ensure!(size < LIMIT, "{} has {size} bytes, and the limit is {LIMIT}", binary.display());
    Ok(binary)
}

/// Makes tcpclose write its manual page and completions.
fn generate_documents(tcpclose: &Path, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let write = |arguments: &[&str], name: &str| -> Result<()> {
        let mut tool = Command::new(tcpclose);
        let text = command::output(tool.args(arguments))
            .with_context(|| format!("this command failed: {}", command::line(&tool)))?;
        fs::write(folder.join(name), text + "\n").with_context(|| format!("cannot write {name}"))
    };
    write(&["man"], "tcpclose.1")?;
    SHELLS.into_iter().try_for_each(|(shell, name)| write(&["completions", shell], name))
}

/// Packs a tarball whose bytes depend on its contents only.
fn pack_tarball(workspace: &Workspace, folder: &Path, platform: &Platform, binary: &Path) -> Result<PathBuf> {
    let name = format!("tcpclose-{VERSION}-linux-{}", platform.debian);
    let content = folder.join(&name);
    // The directory does not exist the first time.
    let _ = fs::remove_dir_all(&content);
    for subfolder in ["completions", "docs"] {
        fs::create_dir_all(content.join(subfolder))?;
    }
    let copy = |from: &Path, to: &str| {
        fs::copy(from, content.join(to)).map(drop).with_context(|| format!("cannot copy {}", from.display()))
    };
    copy(binary, "tcpclose")?;
    let doc = folder.join("doc");
    copy(&doc.join("tcpclose.1"), "tcpclose.1")?;
    for (_, file) in SHELLS {
        copy(&doc.join(file), &format!("completions/{file}"))?;
    }
    for file in FILES {
        copy(&workspace.root.join(file), file)?;
    }
    let tarball = folder.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    tar.args(["--create", "--gzip", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"]);
    tar.arg(format!("--mtime=@{}", timestamp(workspace))).arg("--file").arg(&tarball);
    command::run(tar.arg("--directory").arg(folder).arg(&name))?;
    fs::remove_dir_all(&content)?;
    Ok(tarball)
}

/// The timestamp of files in packages: `SOURCE_DATE_EPOCH`, otherwise the time of the last commit.
fn timestamp(workspace: &Workspace) -> String {
    env::var("SOURCE_DATE_EPOCH").ok().unwrap_or_else(|| {
        let mut git = Command::new("git");
        command::output(git.args(["log", "-1", "--format=%ct"]).current_dir(&workspace.root))
            .unwrap_or_else(|| "0".to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The files that a Markdown document links to, as paths from the root of the repository.
    fn links(document: &str, text: &str) -> Vec<PathBuf> {
        let folder = Path::new(document).parent().expect("a file is in a folder");
        let inline = text.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
        let reference = text.lines().filter_map(|line| line.strip_prefix('[')?.split_once("]: "));
        let targets = inline.map(|(target, _)| target).chain(reference.map(|(_, target)| target));
        targets
            .filter(|target| !target.contains("://") && !target.starts_with('#'))
            .map(|target| {
                let file = target.split('#').next().expect("split() yields at least one part");
                match file.strip_prefix("../") {
                    Some(file) => PathBuf::from(file),
                    None => folder.join(file),
                }
            })
            .collect()
    }

    #[test]
    fn links_of_released_documents_lead_to_released_files() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut count = 0;
        for document in FILES
            .into_iter()
            .filter(|file| Path::new(file).extension().is_some_and(|extension| extension == "md"))
        {
            let text = fs::read_to_string(root.join(document)).expect("it is in the repository");
            for link in links(document, &text) {
                count += 1;
                assert!(FILES.iter().any(|file| link == Path::new(file)), "{document}: {}", link.display());
            }
        }
        assert!(count > 20, "only {count} links were found");
    }

    #[test]
    fn the_debian_package_has_the_same_files() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let manifest = fs::read_to_string(root.join("tcpclose-user/Cargo.toml")).expect("the manifest");
        for file in FILES {
            let folder = Path::new(file).parent().expect("a file is in a folder").display().to_string();
            let at = Path::new("usr/share/doc/tcpclose").join(folder).display().to_string();
            let asset = format!(r#"["../{file}", "{}/", "644"]"#, at.trim_end_matches('/'));
            assert!(manifest.contains(&asset), "{asset} is missing");
        }
    }
}
