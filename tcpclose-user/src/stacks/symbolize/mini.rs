//! Mini debug info: stripped programs of some distributions (Fedora, RHEL) contain the symbols of their
//! functions in an ELF file that is compressed with xz, in the section `.gnu_debugdata`.
//!
//! blazesym decompresses without a limit, so that a small file could take all memory. It is therefore built
//! without xz here, but then it reads no symbols at all from a program with that section. For this reason, it
//! gets two files in memory instead of the program: the decompressed symbols, and a copy of the program that
//! has its dynamic symbols but not that section.
//!
//! <https://sourceware.org/gdb/current/onlinedocs/gdb.html/MiniDebugInfo.html>

use std::{
    fs::File,
    io::{self, Read, Write as _},
    os::unix::fs::FileExt as _,
    panic::{AssertUnwindSafe, catch_unwind},
};

use lzma_rust2::XzReader;
use nix::sys::memfd::{MFdFlags, memfd_create};
use object::{Object as _, ObjectSection as _, ReadCache};

use super::headers::Headers;

/// Largest section that is decompressed. bash's has 60 kB, that of a program of 100 MB some 2 MB.
const MAX_COMPRESSED: u64 = 8 << 20;

/// The largest size after decompression, which takes about 0.3 s. If there is more, there are no symbols.
const MAX_DECOMPRESSED: u64 = 32 << 20;

/// The largest amount of memory for the decompressor, in KiB: `xz -9` needs as much.
const MAX_MEMORY: u32 = 65 << 10;

/// The largest number of bytes of headers, and of each table, that are copied.
const MAX_TABLE: u64 = 16 << 20;

/// The compressed symbols of a program; `None` if it has none, or if they are malformed or too large.
pub(super) fn symbols(program: &File, headers: &Headers) -> Option<File> {
    let (offset, size, _) = headers.debug_data?;
    let mut compressed = vec![0; usize::try_from(size).ok().filter(|_| size <= MAX_COMPRESSED)?];
    program.read_exact_at(&mut compressed, offset).ok()?;
    // The file may be malicious.
    let result = catch_unwind(AssertUnwindSafe(|| decompressed(&compressed)));
    match result {
        Ok(Ok(symbols)) => in_memory(&[(0, &symbols)]),
        Ok(Err(error)) => {
            log::debug!("cannot decompress .gnu_debugdata: {error}");
            None
        }
        Err(_) => {
            log::debug!("decompressing .gnu_debugdata panicked");
            None
        }
    }
}

fn decompressed(compressed: &[u8]) -> io::Result<Vec<u8>> {
    let mut symbols = Vec::new();
    let mut reader = XzReader::new_mem_limit(compressed, false, MAX_MEMORY).take(MAX_DECOMPRESSED + 1);
    reader.read_to_end(&mut symbols)?;
    if symbols.len() as u64 > MAX_DECOMPRESSED {
        return Err(io::Error::other(format!("it has more than {} MiB", MAX_DECOMPRESSED >> 20)));
    }
    Ok(symbols)
}

/// The parts of a program that its dynamic symbols need, in a file without the section `.gnu_debugdata`.
pub(super) fn without(program: &File, headers: &Headers) -> Option<File> {
    let (.., section) = headers.debug_data?;
    let read = |offset: u64, size: u64| {
        let mut bytes = vec![0; usize::try_from(size).ok().filter(|_| size <= MAX_TABLE)?];
        program.read_exact_at(&mut bytes, offset).ok()?;
        Some((offset, bytes))
    };
    // Offsets in `Elf64_Ehdr` and `Elf32_Ehdr` of the section headers' offset, their size and their number.
    let header = read(0, 64)?.1;
    let number = |at: usize, size: usize| {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&header[at..at + size]);
        u64::from_le_bytes(bytes)
    };
    let (table, size, count) = match header[4] {
        2 => (number(0x28, 8), number(0x3a, 2), number(0x3c, 2)),
        1 => (number(0x20, 4), number(0x2e, 2), number(0x30, 2)),
        _ => return None,
    };
    let mut table = read(table, size * count)?;
    // Its name becomes the empty one, at the beginning of the names: `sh_name` is the first field.
    let entry = section.checked_mul(usize::try_from(size).ok()?)?;
    table.1.get_mut(entry..entry.checked_add(4)?)?.fill(0);
    let mut pieces = vec![(0, header.clone()), table];
    let cache = ReadCache::new(program);
    for section in object::File::parse(&cache).ok()?.sections() {
        if matches!(section.name_bytes(), Ok(b".dynsym" | b".dynstr" | b".shstrtab")) {
            let (offset, size) = section.file_range()?;
            pieces.push(read(offset, size)?);
        }
    }
    let pieces: Vec<_> = pieces.iter().map(|(offset, bytes)| (*offset, bytes.as_slice())).collect();
    in_memory(&pieces)
}

/// A file in memory with these bytes at these offsets; the gaps between them take no memory.
fn in_memory(pieces: &[(u64, &[u8])]) -> Option<File> {
    let mut file = File::from(memfd_create("tcpclose-symbols", MFdFlags::MFD_CLOEXEC).ok()?);
    for (offset, bytes) in pieces {
        file.write_all_at(bytes, *offset).ok()?;
    }
    file.flush().ok()?;
    Some(file)
}

#[cfg(test)]
mod tests {
    use lzma_rust2::{XzOptions, XzWriter};

    use super::*;

    fn compressed(content: &[u8]) -> Vec<u8> {
        let mut writer = XzWriter::new(Vec::new(), XzOptions::with_preset(0)).unwrap();
        writer.write_all(content).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn decompresses_what_is_sound_and_not_too_large() {
        let content: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let small = compressed(&content);
        assert_eq!(decompressed(&small).unwrap(), content);
        for length in [0, 1, 12, small.len() / 2, small.len() - 1] {
            assert!(decompressed(&small[..length]).is_err(), "{length} bytes");
        }
        let limit = usize::try_from(MAX_DECOMPRESSED).unwrap();
        assert_eq!(decompressed(&compressed(&vec![0; limit])).unwrap().len(), limit);
        let error = decompressed(&compressed(&vec![0; limit + 1])).unwrap_err();
        assert!(error.to_string().contains("more than 32 MiB"), "{error}");
    }
}
