//! Copies the kernel half, a BPF object, to `tcpclose.bpf.o` in `OUT_DIR`, from where the user half embeds
//! it.
//!
//! The object is the one that `TCPCLOSE_BPF_OBJECT` names or, without this variable, the one that `cargo
//! xtask build` made. If there is neither, the file is empty, so that the user half can be developed with
//! nothing installed. It then refuses to trace.
//!
//! Its DWARF, from which the linker has made BTF, is left out: that is more than half of the object.

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

fn main() -> Result<(), Box<dyn Error>> {
    let object = object()?;
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", object.display());
    let bytes = fs::read(&object).unwrap_or_default();
    if bytes.is_empty() {
        println!(
            "cargo::warning=this build of tcpclose has no kernel half and cannot trace: `cargo xtask build` \
             makes one"
        );
    }
    let stripped = if bytes.is_empty() { bytes } else { without_dwarf(&bytes)? };
    fs::write(Path::new(&env::var("OUT_DIR")?).join("tcpclose.bpf.o"), stripped)?;
    Ok(())
}

fn without_dwarf(object: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut builder = Builder::read(object)?;
    for section in &mut builder.sections {
        let name = section.name.to_vec();
        section.delete = name.starts_with(b".debug_") || name.starts_with(b".rel.debug_");
    }
    builder.delete_orphans();
    // LLVM keeps all names in one section; the builder keeps the names of sections in a separate one.
    let names = builder.sections.add();
    names.name = b".shstrtab".as_slice().into();
    names.sh_type = SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped)?;
    Ok(stripped)
}

/// Where the object is, or will be.
fn object() -> Result<PathBuf, Box<dyn Error>> {
    println!("cargo::rerun-if-env-changed=TCPCLOSE_BPF_OBJECT");
    println!("cargo::rerun-if-env-changed=CARGO_TARGET_DIR");
    if let Some(path) = env::var_os("TCPCLOSE_BPF_OBJECT").map(PathBuf::from) {
        if !path.is_file() {
            return Err(
                format!("TCPCLOSE_BPF_OBJECT says {}, and there is no such file", path.display()).into()
            );
        }
        return Ok(path);
    }
    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let workspace = package.parent().ok_or("this package is not in a folder of the workspace")?;
    let target = workspace.join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()));
    let object = target.join("bpf/bpfel-unknown-none/bpf/tcpclose-ebpf");
    if !object.exists() {
        // If a file that cargo watches is missing, cargo runs the build script each time, and builds the rest
        // again. An empty file prevents that until the real one replaces it. Without it, builds are only
        // slower.
        let _ = object.parent().map(fs::create_dir_all);
        let _ = fs::write(&object, []);
    }
    Ok(object)
}
