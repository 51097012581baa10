//! As much of an ELF file as it takes to say whether its symbols can be read in good time, and safely.

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

const PT_LOAD: u64 = 1;
const SHF_COMPRESSED: u64 = 1 << 11;

/// The longest name of a section that matters here is much shorter.
const MAX_NAMES: u64 = 1 << 20;

/// What the headers say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Headers {
    loads: Vec<Load>,
    /// Identifies the file among all builds of all programs.
    pub(super) build_id: Option<Vec<u8>>,
    /// Bytes of symbol tables.
    pub(super) symbols: u64,
    /// Bytes of `.debug_info`; 0 without.
    pub(super) debug_info: u64,
    /// Whether some debug section is compressed.
    pub(super) compressed: bool,
    /// Whether it names another file that has, or shares, its debug information.
    pub(super) refers: bool,
}

/// A piece of the file that is mapped when it runs.
#[derive(Debug, PartialEq, Eq)]
struct Load {
    offset: u64,
    size: u64,
    address: u64,
}

impl Headers {
    /// Reads them; `None` if it is not an ELF file of this machine's byte order, or is broken.
    pub(super) fn read(file: &File) -> Option<Self> {
        let header = bytes(file, 0, 64).or_else(|| bytes(file, 0, 52))?;
        if !header.starts_with(b"\x7fELF")
            || *header.get(5)? != if cfg!(target_endian = "big") { 2 } else { 1 }
        {
            return None;
        }
        let wide = *header.get(4)? == 2;
        let (programs, sections) = if wide { (32, 40) } else { (28, 32) };
        let counts = if wide { 54 } else { 42 };
        let count = |index: usize| number(&header, counts + 2 * index, 2);
        let word = if wide { 8 } else { 4 };

        let mut headers = Self::default();
        let size = count(0)?;
        let table = bytes(file, number(&header, programs, word)?, size * count(1)?)?;
        for entry in chunks(&table, size) {
            if number(entry, 0, 4)? == PT_LOAD {
                let at = |wide_at, narrow_at| number(entry, if wide { wide_at } else { narrow_at }, word);
                headers.loads.push(Load { offset: at(8, 4)?, address: at(16, 8)?, size: at(32, 16)? });
            }
        }
        let size = count(2)?;
        let table = bytes(file, number(&header, sections, word)?, size * count(3)?)?;
        let section = |entry: &[u8]| {
            let at = |wide_at, narrow_at| number(entry, if wide { wide_at } else { narrow_at }, word);
            Some(Section {
                name: number(entry, 0, 4)?,
                flags: at(8, 8)?,
                offset: at(24, 16)?,
                size: at(32, 20)?,
            })
        };
        let sections: Vec<Section> = chunks(&table, size).filter_map(section).collect();
        // Without sections there are no symbols, and nothing else to find.
        let names = usize::try_from(count(4)?).ok().and_then(|index| sections.get(index));
        if let Some(names) =
            names.and_then(|section| bytes(file, section.offset, section.size.min(MAX_NAMES)))
        {
            for section in &sections {
                headers.note(file, section, name(&names, section.name));
            }
        }
        Some(headers)
    }

    fn note(&mut self, file: &File, section: &Section, name: &[u8]) {
        if name.starts_with(b".debug") && section.flags & SHF_COMPRESSED != 0 {
            self.compressed = true;
        }
        match name {
            b".debug_info" => self.debug_info = section.size,
            b".symtab" | b".dynsym" => self.symbols = self.symbols.saturating_add(section.size),
            b".gnu_debuglink" | b".gnu_debugaltlink" | b".debug_sup" => self.refers = true,
            b".note.gnu.build-id" => {
                self.build_id =
                    bytes(file, section.offset, section.size.min(256)).and_then(|note| build_id(&note));
            }
            _ => {}
        }
    }

    /// The address, as in the symbol table, of what is at an offset in the file.
    pub(super) fn address(&self, offset: u64) -> Option<u64> {
        let load =
            self.loads.iter().find(|load| load.offset <= offset && offset - load.offset < load.size)?;
        load.address.checked_add(offset - load.offset)
    }

    /// Where distributions put the debug information of this build.
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

struct Section {
    name: u64,
    flags: u64,
    offset: u64,
    size: u64,
}

/// The identifier in a note: sizes of name and content, a type, the name `GNU`, the content.
fn build_id(note: &[u8]) -> Option<Vec<u8>> {
    let size = usize::try_from(number(note, 4, 4)?).ok()?;
    if number(note, 0, 4)? != 4 || number(note, 8, 4)? != 3 || note.get(12..16)? != b"GNU\0" {
        return None;
    }
    Some(note.get(16..16usize.checked_add(size)?)?.to_vec())
}

fn name(names: &[u8], start: u64) -> &[u8] {
    let tail = usize::try_from(start).ok().and_then(|start| names.get(start..)).unwrap_or_default();
    tail.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn chunks(table: &[u8], size: u64) -> impl Iterator<Item = &[u8]> {
    table.chunks_exact(usize::try_from(size).unwrap_or(usize::MAX).max(1))
}

fn bytes(file: &File, offset: u64, size: u64) -> Option<Vec<u8>> {
    // Section tables of 65535 entries have 4 MiB; nothing that is read here is larger.
    let size = usize::try_from(size).ok().filter(|size| *size <= 8 << 20)?;
    let mut buffer = vec![0; size];
    file.read_exact_at(&mut buffer, offset).ok()?;
    Some(buffer)
}

/// A number of up to 8 bytes, in this machine's byte order.
fn number(bytes: &[u8], offset: usize, size: usize) -> Option<u64> {
    let bytes = bytes.get(offset..offset.checked_add(size)?)?;
    let mut wide = [0; 8];
    if cfg!(target_endian = "big") {
        wide.get_mut(8usize.checked_sub(size)?..)?.copy_from_slice(bytes);
    } else {
        wide.get_mut(..size)?.copy_from_slice(bytes);
    }
    Some(u64::from_ne_bytes(wide))
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
        assert_eq!(headers.address(0), Some(0), "the headers themselves are mapped");
        assert_eq!(headers.address(u64::MAX), None);
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
        let mut note = Vec::new();
        for word in [4u32, 20, 3] {
            note.extend(word.to_ne_bytes());
        }
        note.extend(b"GNU\0");
        note.extend(0xa0..0xb4);
        let headers = Headers { build_id: build_id(&note), ..Headers::default() };
        let expected = "/usr/lib/debug/.build-id/a0/a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3.debug";
        assert_eq!(headers.debug_file(), Some(expected.into()));
        assert_eq!(build_id(&note[..30]), None);
        assert_eq!(build_id(&[]), None);
    }
}
