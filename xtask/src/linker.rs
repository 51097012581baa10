//! bpf-linker, which turns the compiler's bitcode into a BPF object.
//!
//! It has to read the bitcode, so it is linked to the LLVM library of the compiler itself: no other LLVM is
//! installed, and the versions always match. It is kept in the user's cache, where other clones of the
//! repository find it.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    command::{self, say},
    compiler::Compiler,
    workspace::{cache, cargo_program},
};

/// The release that is installed.
const VERSION: &str = "0.13.0";
/// Releases that are used if they are already installed.
const SERIES: &str = "0.13.";
/// The LLVM releases it can be linked to.
const LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// Finds bpf-linker for this compiler, or installs it.
pub(crate) fn find_or_install(compiler: &Compiler) -> Result<PathBuf> {
    let llvm = libllvm(compiler);
    let folder = match &llvm {
        Some(llvm) => Some(cache()?.join(format!("bpf-linker-{VERSION}-{}", file_name(llvm)))),
        None => None,
    };
    if let (Some(folder), Some(llvm)) = (&folder, &llvm) {
        let linker = folder.join("bin/bpf-linker");
        // The LLVM that it was linked to may have been removed with its toolchain.
        if linker.exists() && fs::read_link(folder.join("llvm/lib/libLLVM.so")).is_ok_and(|to| to == *llvm) {
            return Ok(linker);
        }
    }
    if let Some(linker) = command::find("bpf-linker").filter(|linker| is_usable(linker)) {
        return Ok(linker);
    }
    let (Some(folder), Some(llvm)) = (folder, llvm) else {
        bail!(
            "no libLLVM of version {} was found for {}, to link bpf-linker {VERSION} to; \
             put a bpf-linker {SERIES}x on PATH (https://github.com/aya-rs/bpf-linker#installation)",
            compiler.llvm,
            compiler.rustc.display(),
        );
    };
    install(compiler, &folder, &llvm)?;
    Ok(folder.join("bin/bpf-linker"))
}

fn install(compiler: &Compiler, folder: &Path, llvm: &Path) -> Result<()> {
    if !LLVM.contains(&compiler.llvm) {
        bail!(
            "{} produces bitcode of LLVM {}, and bpf-linker {VERSION} is for LLVM {} to {}; \
             set RUSTC_BPF to the path of another compiler",
            compiler.rustc.display(),
            compiler.llvm,
            LLVM.start(),
            LLVM.end(),
        );
    }
    say(&format!("installing bpf-linker {VERSION} into {}; this takes about a minute", folder.display()));
    // A prefix that contains only the library, under the name given to the linker and under its soname.
    let library = folder.join("llvm/lib");
    fs::create_dir_all(&library)
        .with_context(|| format!("cannot create the directory {}", library.display()))?;
    for name in ["libLLVM.so".into(), file_name(llvm)] {
        let link = library.join(name);
        let _ = fs::remove_file(&link);
        symlink(llvm, &link).with_context(|| format!("cannot create the link {}", link.display()))?;
    }
    let mut cargo = Command::new(cargo_program());
    cargo
        .args(["install", "bpf-linker", "--version", VERSION, "--locked", "--force", "--quiet"])
        .args(["--no-default-features", "--features", &format!("llvm-{}", compiler.llvm), "--root"])
        .arg(folder)
        .env("LLVM_PREFIX", folder.join("llvm"))
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("CARGO_PROFILE_RELEASE_STRIP", "true")
        // cargo then builds in a temporary directory and removes it.
        .env_remove("CARGO_TARGET_DIR");
    command::run(&mut cargo)
}

fn is_usable(linker: &Path) -> bool {
    command::output(Command::new(linker).arg("--version")).is_some_and(|text| is_of_series(&text))
}

/// Reads `bpf-linker --version`.
fn is_of_series(text: &str) -> bool {
    text.strip_prefix("bpf-linker ").is_some_and(|version| version.starts_with(SERIES))
}

/// The shared LLVM library that a compiler uses: beside it (rustup), or in one of the system's library
/// directories.
fn libllvm(compiler: &Compiler) -> Option<PathBuf> {
    let lib = compiler.sysroot.join("lib");
    let mut folders = vec![lib.clone(), compiler.sysroot.join("lib64")];
    // Debian's, such as /usr/lib/x86_64-linux-gnu.
    folders.extend(fs::read_dir(&lib).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name();
        name.to_string_lossy().ends_with(&format!("{}-linux-gnu", env::consts::ARCH)).then(|| entry.path())
    }));
    folders.push(format!("/usr/lib/llvm-{}/lib", compiler.llvm).into());
    folders.iter().find_map(|folder| {
        let files = fs::read_dir(folder).ok()?.flatten();
        let mut files: Vec<_> =
            files.filter(|file| is_libllvm(&file.file_name().to_string_lossy(), compiler.llvm)).collect();
        files.sort_by_key(fs::DirEntry::file_name);
        // Links lead to the file whose name is the soname.
        files.iter().find_map(|file| file.path().canonicalize().ok())
    })
}

fn is_libllvm(name: &str, llvm: u32) -> bool {
    name.strip_prefix("libLLVM.so.").is_some_and(|rest| rest.split('.').next() == Some(&llvm.to_string()))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_a_linker_of_the_same_series_only() {
        assert!(is_of_series("bpf-linker 0.13.0"));
        assert!(is_of_series("bpf-linker 0.13.2-dev"));
        assert!(!is_of_series("bpf-linker 0.9.15"));
        assert!(!is_of_series("bpf-linker 0.130.0"));
        assert!(!is_of_series(""));
    }

    #[test]
    fn knows_the_library_by_its_name() {
        assert!(is_libllvm("libLLVM.so.22.1", 22));
        assert!(is_libllvm("libLLVM.so.22.1-rust-1.95.0-stable", 22));
        assert!(!is_libllvm("libLLVM.so.22.1", 2));
        assert!(!is_libllvm("libLLVM-14.so.1", 22));
        assert!(!is_libllvm("libLLVM.so", 22));
    }
}
