//! The parts of an ELF file that decide whether its symbols can be read, and in reasonable time.

use std::{fmt::Write as _, fs::File, path::PathBuf};

use object::{Object, ObjectSection as _, ReadCache, SectionFlags, elf::SHF_COMPRESSED};

use crate::stacks::elf::Segments;

/// The facts in the headers of a file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Headers {
    pub(super) segments: Segments,
    /// Identifies this build of the file.
    pub(super) build_id: Option<Vec<u8>>,
    /// Bytes of symbol tables.
    pub(super) symbols: u64,
    /// Bytes of `.debug_info`; 0 if there is none.
    pub(super) debug_info: u64,
    /// Whether a debug section is compressed.
    pub(super) compressed: bool,
    /// Whether it names another file with its debug information, or a part of it.
    pub(super) refers: bool,
}

impl Headers {
    /// `None` if it is not an ELF file of this machine's byte order, or is malformed.
    pub(super) fn read(file: &File) -> Option<Self> {
        let cache = ReadCache::new(file);
        let file = object::File::parse(&cache).ok()?;
        if file.is_little_endian() != cfg!(target_endian = "little") {
            return None;
        }
        let build_id = file.build_id().ok().flatten().map(<[u8]>::to_vec);
        let mut headers = Self { segments: Segments::read(&file), build_id, ..Self::default() };
        for section in file.sections() {
            let name = section.name_bytes().unwrap_or_default();
            let is_compressed = matches!(
                section.flags(),
                SectionFlags::Elf { sh_flags } if sh_flags & u64::from(SHF_COMPRESSED) != 0
            );
            headers.compressed |= is_compressed && name.starts_with(b".debug");
            match name {
                b".debug_info" => headers.debug_info = section.size(),
                b".symtab" | b".dynsym" => headers.symbols = headers.symbols.saturating_add(section.size()),
                b".gnu_debuglink" | b".gnu_debugaltlink" | b".debug_sup" => headers.refers = true,
                _ => {}
            }
        }
        Some(headers)
    }

    /// Where distributions install the debug information of this build.
    pub(super) fn debug_file(&self) -> Option<PathBuf> {
        let (first, rest) = self.build_id.as_deref().filter(|id| id.len() >= 8)?.split_first()?;
        let mut path = format!("/usr/lib/debug/.build-id/{first:02x}/");
        for byte in rest {
            // Writing to a string does not fail.
            let _ = write!(path, "{byte:02x}");
        }
        path.push_str(".debug");
        Some(path.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn reads_this_program() {
        let file = File::open(std::env::current_exe().unwrap()).unwrap();
        let headers = Headers::read(&file).unwrap();
        assert!(headers.symbols > 0 && headers.debug_info > 0, "{headers:?}");
        assert!(!headers.refers && !headers.compressed);
        assert_eq!(headers.segments.address(0), Some(0), "the headers themselves are mapped");
        assert_eq!(headers.segments.address(u64::MAX), None);
    }

    #[test]
    fn survives_what_is_not_a_program() {
        let whole = fs::read(std::env::current_exe().unwrap()).unwrap();
        let path = std::env::temp_dir().join(format!("tcpclose-elf-{}", std::process::id()));
        // Cut short, and with each byte of the header made as large as it goes.
        let cuts = [0, 3, 51, 63, 64, 100, 4096, whole.len() / 2].map(|length| whole[..length].to_vec());
        let bent = (0..64).map(|index| {
            let mut bent = whole[..4096].to_vec();
            bent[index] = 0xff;
            bent
        });
        for content in cuts.into_iter().chain(bent) {
            fs::write(&path, &content).unwrap();
            let _ = Headers::read(&File::open(&path).unwrap());
        }
        fs::remove_file(path).unwrap();
        assert_eq!(Headers::read(&File::open("/proc/self/maps").unwrap()), None);
    }

    #[test]
    fn finds_debug_files_by_build() {
        let headers = Headers { build_id: Some((0xa0..0xb4).collect()), ..Headers::default() };
        let expected = "/usr/lib/debug/.build-id/a0/a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3.debug";
        assert_eq!(headers.debug_file(), Some(expected.into()));
    }

    /// `file` calls it `BuildID[sha1]`; rustc has the linker give one.
    #[test]
    fn knows_the_build_of_a_library() {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let library = maps.split_whitespace().find(|word| word.contains("/libc.so")).unwrap();
        let headers = Headers::read(&File::open(library).unwrap()).unwrap();
        assert_eq!(headers.build_id.unwrap().len(), 20);
    }
}
