//! The initial file system of a virtual machine. It contains the test programs and tcpclose, the commands
//! that tests run, the libraries of all of them at their paths on this host, and the modules of one kernel.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use super::{
    Plan,
    debian::{self, Kernel},
};
use crate::{command, platform::Platform};

/// The commands that tests run.
const COMMANDS: [&str; 4] = ["ip", "nft", "sh", "ss"];

/// Variables of the programs there (`tests/src/lib.rs`, `tests/src/features.rs`). Two test threads: while one
/// test waits for a timer, the other uses the processor.
const VARIABLES: [(&str, &str); 5] = [
    ("PATH", "/usr/bin"),
    ("HOME", "/tmp"),
    ("TCPCLOSE_TESTS_FEWER", "20"),
    ("TCPCLOSE_TESTS_MACHINE", "1"),
    ("RUST_TEST_THREADS", "2"),
];

/// Modules that tests need, unless they are built into the kernel. Their dependencies are added.
const MODULES: [&str; 5] = ["veth", "nf_tables", "nft_reject_inet", "tcp_diag", "mptcp_diag"];

/// The Debian packages that contain the commands, and the libraries that Rust programs are linked to.
const PACKAGES: [&str; 5] = ["iproute2", "nftables", "dash", "libc6", "libgcc-s1"];

/// The directory of the test programs and tcpclose in the machine. Their path on this host may be below a
/// mount point there.
const PROGRAMS: &str = "/programs";

/// Mount points, and directories that are written to.
const FOLDERS: [&str; 9] = ["dev", "modules", "proc", "run", "sys", "tmp", "usr/bin", "usr/lib", "usr/lib64"];

/// Other names of these directories.
const LINKS: [(&str, &str); 5] = [
    ("bin", "usr/bin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
    ("sbin", "usr/sbin"),
    ("usr/sbin", "bin"),
];

/// The part of the file system that all machines share, packed.
pub(crate) fn common(folder: &Path, plan: &Plan) -> Result<Vec<u8>> {
    let (suite, tcpclose) = (plan.suite, plan.tcpclose);
    let root = fresh(&folder.join("root"))?;
    for place in FOLDERS {
        fs::create_dir_all(root.join(place))?;
    }
    for (name, to) in LINKS {
        symlink(to, root.join(name))?;
    }
    for program in suite.programs().chain([tcpclose]) {
        let copy = under(&root, &place(program));
        copy_to(program, &copy)?;
        // Keeps the names of functions; source lines would make the image five times as large.
        command::run(Command::new(plan.platform.tool("strip")).arg("--strip-debug").arg(copy))?;
    }
    if plan.platform.is_host() {
        add_from_host(&root, suite.programs().chain([tcpclose]))?;
    } else {
        add_from_packages(&root, plan.platform)?;
    }
    copy_to(&suite.compat, &under(&root, &place(&suite.compat)))?;
    fs::copy(suite.helper("init")?, root.join("init"))?;
    let variables = suite
        .variables(tcpclose)
        .into_iter()
        .map(|(name, value)| (name, place(&value).display().to_string()));
    let own = VARIABLES.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let environment = variables.chain(own).map(|(name, value)| format!("{name}={value}\n"));
    fs::write(root.join("environment"), environment.collect::<String>())?;
    pack(&root)
}

/// The path in the machine of a program of this host.
pub(crate) fn place(program: &Path) -> PathBuf {
    Path::new(PROGRAMS).join(program.file_name().unwrap_or_default())
}

/// Adds this host's commands, and the libraries that they and the programs load.
fn add_from_host<'a>(root: &Path, programs: impl Iterator<Item = &'a Path>) -> Result<()> {
    let mut needed = BTreeSet::new();
    for program in programs {
        needed.extend(libraries(program)?);
    }
    for name in COMMANDS {
        let program = command::find(name).with_context(|| format!("there is no {name}"))?;
        add_command(root, name, &program)?;
        needed.extend(libraries(&program)?);
    }
    for library in needed {
        copy_to(&library, &under(root, &library))?;
    }
    Ok(())
}

/// Adds another platform's commands, and all libraries of their packages: only that platform's loader could
/// list the libraries that each needs.
fn add_from_packages(root: &Path, platform: &Platform) -> Result<()> {
    let packages = debian::unpacked(platform, &PACKAGES)?;
    for name in COMMANDS {
        let places = ["usr/bin", "bin", "usr/sbin", "sbin"].map(|place| packages.join(place).join(name));
        let program = places.iter().find(|place| place.exists());
        add_command(root, name, program.with_context(|| format!("no package of {PACKAGES:?} has {name}"))?)?;
    }
    for place in
        ["lib", "usr/lib"].map(Path::new).iter().flat_map(|lib| [lib.to_path_buf(), lib.join(platform.gnu)])
    {
        let Ok(files) = fs::read_dir(packages.join(&place)) else { continue };
        for file in files {
            let file = file?;
            if file.file_name().to_string_lossy().contains(".so") {
                copy_to(&file.path(), &root.join(&place).join(file.file_name()))?;
            }
        }
    }
    Ok(())
}

fn add_command(root: &Path, name: &str, program: &Path) -> Result<()> {
    copy_to(program, &root.join("usr/bin").join(name))
}

/// A machine's own part of the file system, packed: the list of its tests, and the modules of its kernel,
/// which it loads in the order of their names.
pub(crate) fn own(folder: &Path, kernel: &Kernel, tests: &str) -> Result<Vec<u8>> {
    let root = fresh(&folder.join(&kernel.release))?;
    let place = root.join("modules");
    fs::create_dir(&place)?;
    fs::write(root.join("tests"), tests)?;
    let mut files = Vec::new();
    collect_files(&kernel.modules, &mut files)?;
    let mut loaded = Vec::new();
    for name in MODULES {
        load(name, &files, &mut loaded)?;
    }
    for (index, (name, module)) in loaded.iter().enumerate() {
        fs::write(place.join(format!("{index:02}-{name}.ko")), module)?;
    }
    pack(&root)
}

/// Adds a module, after the modules that it depends on. A module without a file is built in or does not
/// exist; in the latter case the tests report the missing feature.
fn load(name: &str, files: &[PathBuf], loaded: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    if loaded.iter().any(|(other, _)| other == name) {
        return Ok(());
    }
    let Some(file) = files.iter().find(|file| module_name(file).as_deref() == Some(name)) else {
        return Ok(());
    };
    let module = if file.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(file).output()?;
        ensure!(output.status.success(), "xz cannot unpack {}", file.display());
        output.stdout
    } else {
        fs::read(file)?
    };
    for needed in dependencies(&module) {
        load(&needed, files, loaded)?;
    }
    loaded.push((name.to_owned(), module));
    Ok(())
}

/// `nf_tables` for `…/nf_tables.ko.xz`. Names of modules have underscores, even if those of their files have
/// hyphens.
fn module_name(file: &Path) -> Option<String> {
    Some(file.file_name()?.to_str()?.split_once(".ko")?.0.replace('-', "_"))
}

/// The dependencies of a module, from a string such as `depends=nfnetlink,libcrc32c`.
fn dependencies(module: &[u8]) -> Vec<String> {
    const MARK: &[u8] = b"\0depends=";
    let Some(start) = module.windows(MARK.len()).position(|part| part == MARK) else { return Vec::new() };
    let text = &module[start + MARK.len()..];
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    String::from_utf8_lossy(&text[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

fn collect_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect_files(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Creates an empty directory, in place of an existing one.
fn fresh(folder: &Path) -> Result<PathBuf> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)
        .with_context(|| format!("cannot create the directory {}", folder.display()))?;
    Ok(folder.to_owned())
}

/// An absolute path, below the root of a file system.
fn under(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn copy_to(file: &Path, to: &Path) -> Result<()> {
    let copied = to.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::copy(file, to));
    copied.map(drop).with_context(|| format!("cannot copy {} to {}", file.display(), to.display()))
}

/// The shared libraries that a program loads, the loader itself included.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = command::output(Command::new("ldd").arg(program))
        .with_context(|| format!("ldd cannot read {}", program.display()))?;
    Ok(listed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

/// The cpio archive of a directory, which the kernel unpacks; all files belong to root.
fn pack(root: &Path) -> Result<Vec<u8>> {
    let mut names = Vec::new();
    collect_names(root, Path::new(""), &mut names)?;
    let mut cpio = Command::new("cpio");
    cpio.args(["--create", "--format=newc", "--null", "--owner=+0:+0", "--quiet"]).current_dir(root);
    let mut child = cpio.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start cpio")?;
    let mut stdin = child.stdin.take().context("cpio has no standard input")?;
    let writer = std::thread::spawn(move || stdin.write_all(&names));
    let output = child.wait_with_output()?;
    let _ = writer.join();
    ensure!(output.status.success(), "cpio failed ({})", output.status);
    Ok(output.stdout)
}

/// The names of all files in a directory, each terminated by a zero byte, directories before their contents.
fn collect_names(root: &Path, within: &Path, names: &mut Vec<u8>) -> Result<()> {
    for entry in fs::read_dir(root.join(within))? {
        let entry = entry?;
        let name = within.join(entry.file_name());
        names.extend(name.as_os_str().as_encoded_bytes());
        names.push(0);
        if entry.file_type()?.is_dir() {
            collect_names(root, &name, names)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_name_what_they_need() {
        let info = b"license=GPL\0depends=nfnetlink,crc32c-generic\0retpoline=Y\0";
        assert_eq!(dependencies(info), ["nfnetlink", "crc32c_generic"]);
        assert_eq!(dependencies(b"\0depends=\0name=veth\0"), [""; 0]);
        assert_eq!(dependencies(b""), [""; 0]);
    }

    #[test]
    fn modules_go_by_names_with_underscores() {
        assert_eq!(module_name(Path::new("a/nf-tables.ko.xz")).as_deref(), Some("nf_tables"));
        assert_eq!(module_name(Path::new("a/veth.ko")).as_deref(), Some("veth"));
        assert_eq!(module_name(Path::new("modules.order")), None);
    }
}
