//! Puts the kernel half, a BPF object, where the user half takes it in: `tcpclose.bpf.o` in `OUT_DIR`.
//!
//! The object is the one that `TCPCLOSE_BPF_OBJECT` names, else the one that `cargo xtask build` made. With
//! neither the file is empty, so that the user half can be worked on with nothing installed; it then refuses
//! to trace.
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
            "cargo::warning=this build of tcpclose has no kernel half and cannot trace: `cargo xtask build` makes one"
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
    // LLVM keeps all names in one section, and the builder keeps those of sections in one of their own.
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
        // Cargo runs a build script every time while a file it watches is missing, and builds the rest again:
        // an empty file stops that, until cargo puts the real one in its place. Without it all is well, only
        // slower.
        let _ = object.parent().map(fs::create_dir_all);
        let _ = fs::write(&object, []);
    }
    Ok(object)
}
