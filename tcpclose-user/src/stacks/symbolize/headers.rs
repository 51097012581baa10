//! The parts of an ELF file that show whether its symbols can be read in reasonable time.

use std::fs::File;

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
    /// Bytes of `.symtab`, which is one of them; 0 if the file is stripped.
    pub(super) symtab: u64,
    /// Bytes of `.debug_info`; 0 if there is none.
    pub(super) debug_info: u64,
    /// Whether a debug section is compressed.
    pub(super) compressed: bool,
    /// Whether it names another file with its debug information, or a part of it.
    pub(super) refers: bool,
    /// The name of the file with its debug information, and the checksum of that file.
    pub(super) debug_link: Option<(Vec<u8>, u32)>,
    /// The place of the compressed symbols of a stripped file: offset, size and number of the section
    /// `.gnu_debugdata`.
    pub(super) debug_data: Option<(u64, u64, usize)>,
    /// The place of the table of a Go program's functions: offset and size.
    pub(super) go_table: Option<(u64, u64)>,
    /// The virtual address of the section `.text`, and the one at which the program starts.
    pub(super) text: u64,
    pub(super) entry: u64,
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
        let debug_link =
            file.gnu_debuglink().ok().flatten().map(|(name, checksum)| (name.to_vec(), checksum));
        let mut headers = Self {
            segments: Segments::read(&file),
            build_id,
            debug_link,
            entry: file.entry(),
            ..Self::default()
        };
        for section in file.sections() {
            let name = section.name_bytes().unwrap_or_default();
            let is_compressed = matches!(
                section.flags(),
                SectionFlags::Elf { sh_flags } if sh_flags & u64::from(SHF_COMPRESSED) != 0
            );
            headers.compressed |= is_compressed && name.starts_with(b".debug");
            match name {
                b".debug_info" => headers.debug_info = section.size(),
                b".symtab" | b".dynsym" => {
                    headers.symbols = headers.symbols.saturating_add(section.size());
                    if name == b".symtab" {
                        headers.symtab = section.size();
                    }
                }
                b".gnu_debugdata" => {
                    headers.debug_data =
                        section.file_range().map(|(offset, size)| (offset, size, section.index().0));
                }
                b".text" => headers.text = section.address(),
                b".gopclntab" | b".data.rel.ro.gopclntab" => headers.go_table = section.file_range(),
                b".gnu_debuglink" | b".gnu_debugaltlink" | b".debug_sup" => headers.refers = true,
                _ => {}
            }
        }
        Some(headers)
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
        // The file is cut short, and each byte of the header is set to its maximum.
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

    /// `file` calls it `BuildID[sha1]`; rustc makes the linker add one.
    #[test]
    fn knows_the_build_of_a_library() {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let library = maps.split_whitespace().find(|word| word.contains("/libc.so")).unwrap();
        let headers = Headers::read(&File::open(library).unwrap()).unwrap();
        assert_eq!(headers.build_id.unwrap().len(), 20);
    }
}
