//! The Rust compiler that the kernel half is built with: one that has `core` for BPF, or can build it.
//!
//! Rust ships no `core` for `bpfel-unknown-none`. Debian does, with a compiler of its own; elsewhere it is
//! built from the source in the component rust-src. That does not require nightly: the kernel half uses
//! unstable features anyway (BPF assembly), which `RUSTC_BOOTSTRAP` allows in a stable compiler.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

use crate::{command, workspace::cargo_program};

/// The target that the kernel half is built for.
pub(crate) const TARGET: &str = "bpfel-unknown-none";

/// The oldest compiler that the crates here build with; the same as `rust-version` in Cargo.toml.
const OLDEST: (u32, u32) = (1, 95);

/// The source of a compiler's `core` for BPF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Core {
    /// It is installed in compiled form.
    Ready,
    /// Its source is installed, and cargo builds it along with the kernel half.
    Source,
}

/// A compiler and its properties.
#[derive(Clone, Debug)]
pub(crate) struct Compiler {
    pub(crate) rustc: PathBuf,
    pub(crate) sysroot: PathBuf,
    pub(crate) version: (u32, u32),
    /// The major version of its LLVM.
    pub(crate) llvm: u32,
    core: Option<Core>,
}

impl Compiler {
    /// Examines a compiler; `None` if it does not exist or is not a rustc.
    fn probe(rustc: &Path) -> Option<Self> {
        let (version, llvm) = parse_version(&command::output(Command::new(rustc).arg("-vV"))?)?;
        let sysroot = PathBuf::from(command::output(Command::new(rustc).args(["--print", "sysroot"]))?);
        let library = sysroot.join("lib/rustlib");
        let core = if has_core(&library.join(TARGET).join("lib")) {
            Some(Core::Ready)
        } else {
            library.join("src/rust/library/core/src/lib.rs").exists().then_some(Core::Source)
        };
        // The rustc that rustup puts on PATH selects a toolchain by the current directory: use the selected
        // one.
        let own = sysroot.join("bin/rustc");
        let rustc = if own.exists() { own } else { rustc.to_owned() };
        Some(Self { rustc, sysroot, version, llvm, core })
    }

    /// The source of this compiler's `core` for BPF, or the reason why it cannot be used.
    pub(crate) fn core(&self) -> Result<Core, String> {
        let (major, minor) = self.version;
        if self.version < OLDEST {
            return Err(format!("is Rust {major}.{minor}, and {}.{} is needed", OLDEST.0, OLDEST.1));
        }
        self.core
            .ok_or_else(|| format!("(Rust {major}.{minor}) has neither `core` for {TARGET} nor its source"))
    }

    /// Whether it is Debian's compiler.
    pub(crate) fn is_debian(&self) -> bool {
        self.core == Some(Core::Ready) && self.rustc == Path::new("/usr/bin/rustc")
    }

    /// The cargo to build with. A cargo of another release may be unable to build this compiler's `core`.
    pub(crate) fn cargo(&self) -> PathBuf {
        let own = self.sysroot.join("bin/cargo");
        if self.core == Some(Core::Source) && own.exists() {
            return own;
        }
        cargo_program()
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core =
            if self.core == Some(Core::Ready) { "has `core` for BPF" } else { "builds `core` from source" };
        let (major, minor) = self.version;
        write!(f, "{} (Rust {major}.{minor}, LLVM {}), which {core}", self.rustc.display(), self.llvm)
    }
}

/// The first usable compiler, or, for each compiler found, a line that says why it is not usable.
pub(crate) fn find() -> Result<Result<Compiler, Vec<String>>> {
    if let Some(rustc) = env::var_os("RUSTC_BPF") {
        let rustc = PathBuf::from(rustc);
        let Some(compiler) = Compiler::probe(&rustc) else {
            bail!("RUSTC_BPF is {}, which is not a Rust compiler: unset or correct it", rustc.display());
        };
        if let Err(reason) = compiler.core() {
            bail!("RUSTC_BPF is {}, which {reason}: unset or correct it", rustc.display());
        }
        return Ok(Ok(compiler));
    }
    let mut refused = Vec::new();
    // Debian's, the one that builds the user half, and nightly, which often has rust-src.
    let candidates: [fn() -> Option<PathBuf>; 3] =
        [|| Some("/usr/bin/rustc".into()), || command::find("rustc"), nightly];
    for candidate in candidates {
        let Some(compiler) = candidate().and_then(|rustc| Compiler::probe(&rustc)) else { continue };
        match compiler.core() {
            Ok(_) => return Ok(Ok(compiler)),
            Err(reason) => refused.push(format!("{} {reason}", compiler.rustc.display())),
        }
    }
    refused.dedup();
    Ok(Err(refused))
}

fn nightly() -> Option<PathBuf> {
    let mut which = Command::new(command::find("rustup")?);
    // `rustup which` must not install a toolchain.
    which.args(["which", "--toolchain", "nightly", "rustc"]).env("RUSTUP_AUTO_INSTALL", "0");
    command::output(&mut which).map(PathBuf::from)
}

/// Whether a directory of libraries contains a compiled `core`.
pub(crate) fn has_core(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|files| {
        files.flatten().any(|file| file.file_name().to_string_lossy().starts_with("libcore-"))
    })
}

/// Reads the versions of Rust and LLVM from `rustc -vV`.
fn parse_version(text: &str) -> Option<((u32, u32), u32)> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let mut release = field("release: ")?.split('.');
    let version = (release.next()?.parse().ok()?, release.next()?.parse().ok()?);
    let llvm = field("LLVM version: ")?.split('.').next()?.parse().ok()?;
    Some((version, llvm))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiler(version: (u32, u32), core: Option<Core>) -> Compiler {
        Compiler { rustc: "/usr/bin/rustc".into(), sysroot: "/usr".into(), version, llvm: 22, core }
    }

    #[test]
    fn reads_what_rustc_says_about_itself() {
        let stable = "rustc 1.95.0 (59807616e 2026-04-14)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\n\
                      release: 1.95.0\nLLVM version: 22.1.2";
        assert_eq!(parse_version(stable), Some(((1, 95), 22)));
        assert_eq!(parse_version("release: 1.97.0-nightly\nLLVM version: 23.0.0"), Some(((1, 97), 23)));
        assert_eq!(parse_version("release: 1.95.0"), None);
        assert_eq!(parse_version("release: one\nLLVM version: 22"), None);
        assert_eq!(parse_version(""), None);
    }

    #[test]
    fn a_compiler_needs_core_or_its_source() {
        assert_eq!(compiler((1, 96), Some(Core::Ready)).core(), Ok(Core::Ready));
        assert_eq!(compiler((1, 95), Some(Core::Source)).core(), Ok(Core::Source));
        let reason = "(Rust 1.97) has neither `core` for bpfel-unknown-none nor its source";
        assert_eq!(compiler((1, 97), None).core(), Err(reason.into()));
    }

    #[test]
    fn a_compiler_too_old_is_refused_though_it_has_core() {
        // The version in Debian 12 before the update to 1.96.
        assert_eq!(
            compiler((1, 85), Some(Core::Ready)).core(),
            Err("is Rust 1.85, and 1.95 is needed".into())
        );
    }

    #[test]
    fn what_is_not_a_compiler_is_none() {
        assert!(Compiler::probe(Path::new("/nonexistent/rustc")).is_none());
        assert!(Compiler::probe(Path::new("/bin/true")).is_none());
    }
}
