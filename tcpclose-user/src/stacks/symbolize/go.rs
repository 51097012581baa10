//! Functions, files and lines of Go programs, from the table that their runtime uses to print stacks. The
//! table is kept when a program is stripped, as most Go programs are, so it is often the only source of
//! names.
//!
//! The format is that of Go 1.18 and later:
//! <https://github.com/golang/go/blob/go1.20/src/internal/abi/symtab.go>,
//! <https://github.com/golang/go/blob/go1.20/src/runtime/symtab.go>. Nothing is kept in memory; looking up an
//! address takes some thirty reads of the file.

use std::{fs::File, os::unix::fs::FileExt as _};

use super::{MAX_NAME, headers::Headers};

/// The first four bytes in Go 1.18, and from 1.20 on.
const MAGIC_1_18: u32 = 0xffff_fff0;
const MAGIC_1_20: u32 = 0xffff_fff1;

/// The number of bytes that are read of the places of one function. Beyond them the line is not known.
const MAX_PLACES: usize = 16 << 10;

/// The index, among the tables of a function, of the one about inlined functions (`PCDATA_InlTreeIndex`).
const INLINED: u64 = 2;

/// The value in the program counter's tables where nothing is inlined.
const NOT_INLINED: i32 = -1;

/// The table of one file.
#[derive(Debug)]
pub(super) struct GoTable {
    /// Where it is in the file.
    start: u64,
    end: u64,
    /// The virtual address to which its addresses are relative.
    text: u64,
    /// The unit of differences of addresses.
    quantum: u64,
    functions: u64,
    /// Offsets in the table.
    names: u64,
    units: u64,
    files: u64,
    places: u64,
    entries: u64,
    /// Size of a function's description without its tables.
    function: u64,
}

/// The function at an address, and the line if there is one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct GoLocation {
    pub(super) function: String,
    /// From the function's start to the address.
    pub(super) offset: u64,
    /// `None` in code that was inlined: its line belongs to another function.
    pub(super) line: Option<(String, u32)>,
}

impl GoTable {
    /// `None` if the file has no table of a known format, or if it is not known which addresses the table is
    /// about.
    pub(super) fn read(file: &File, headers: &Headers) -> Option<Self> {
        let (start, size) = headers.go_table?;
        let mut header = [0; 72];
        file.read_exact_at(&mut header, start).ok()?;
        let word = |index: usize| {
            let at = 8 + 8 * index;
            Some(u64::from_le_bytes(header.get(at..at + 8)?.try_into().ok()?))
        };
        let function = match u32::from_le_bytes(header[..4].try_into().ok()?) {
            MAGIC_1_18 => 40,
            MAGIC_1_20 => 44,
            _ => return None,
        };
        // A pointer has eight bytes.
        if header[4..6] != [0, 0] || header[7] != 8 {
            return None;
        }
        let table = Self {
            start,
            end: start.checked_add(size)?,
            text: word(2)?,
            quantum: header[6].into(),
            functions: word(0)?,
            names: word(3)?,
            units: word(4)?,
            files: word(5)?,
            places: word(6)?,
            entries: word(7)?,
            function,
        };
        if table.text != 0 {
            return Some(table);
        }
        // From Go 1.26 on, the table does not contain the start of the code. If Go's own linker made the
        // file, the code starts at the beginning of the section, and the program starts in a function of the
        // table.
        let table = Self { text: headers.text, ..table };
        let first = table.find(file, headers.entry)?;
        (first.offset == 0 && first.function.starts_with("_rt0_")).then_some(table)
    }

    /// The function at a virtual address.
    pub(super) fn find(&self, file: &File, address: u64) -> Option<GoLocation> {
        let wanted = u32::try_from(address.checked_sub(self.text)?).ok()?;
        let entry = |index: u64| self.number(file, self.entries.checked_add(index.checked_mul(8)?)?);
        // The last entry is the end of the last function.
        if wanted < entry(0)? || wanted >= entry(self.functions)? {
            return None;
        }
        let (mut low, mut high) = (0, self.functions);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if entry(middle)? <= wanted { low = middle } else { high = middle }
        }
        let at = self.number(file, self.entries.checked_add(low.checked_mul(8)?)?.checked_add(4)?)?;
        let function = self.entries.checked_add(at.into())?;
        let field = |index: u64| self.number(file, function.checked_add(4 * index)?);
        let offset = wanted.checked_sub(field(0)?)?;
        let name = self.text_at(file, self.names.checked_add(field(1)?.into())?)?;
        let line = || {
            let value = |table: u32| self.value(file, table, offset.into());
            if u64::from(field(7)?) > INLINED {
                let inlined = self.number(file, function.checked_add(self.function + 4 * INLINED)?)?;
                if inlined != 0 && value(inlined)? != NOT_INLINED {
                    return None;
                }
            }
            let number = u32::try_from(value(field(5)?)?).ok()?;
            let unit = u64::from(field(8)?).checked_add(number.into())?;
            let path = self.number(file, self.units.checked_add(unit.checked_mul(4)?)?)?;
            let path = self.text_at(file, self.files.checked_add(path.into())?)?;
            Some((path, u32::try_from(value(field(6)?)?).ok()?))
        };
        Some(GoLocation { function: name, offset: offset.into(), line: line() })
    }

    /// The value for an offset in a function, from its table of values by program counter.
    fn value(&self, file: &File, table: u32, wanted: u64) -> Option<i32> {
        let bytes = self.bytes(file, self.places.checked_add(table.into())?, MAX_PLACES)?;
        let mut rest = bytes.as_slice();
        let (mut value, mut offset) = (-1_i32, 0_u64);
        loop {
            let change = varint(&mut rest)?;
            // This is the end. A first value of -1 has the same form.
            if change == 0 && offset != 0 {
                return None;
            }
            let sign = if change & 1 == 0 { 0 } else { !0 };
            value = value.wrapping_add((change >> 1 ^ sign).cast_signed());
            offset = offset.checked_add(u64::from(varint(&mut rest)?).checked_mul(self.quantum)?)?;
            if wanted < offset {
                return Some(value);
            }
        }
    }

    fn number(&self, file: &File, at: u64) -> Option<u32> {
        let place = self.start.checked_add(at).filter(|place| place.saturating_add(4) <= self.end)?;
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, place).ok()?;
        Some(u32::from_le_bytes(bytes))
    }

    fn text_at(&self, file: &File, at: u64) -> Option<String> {
        let bytes = self.bytes(file, at, MAX_NAME)?;
        let end = bytes.iter().position(|byte| *byte == 0)?;
        let text = std::str::from_utf8(&bytes[..end]).ok()?;
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// Up to `most` bytes from a place in the table to its end.
    fn bytes(&self, file: &File, at: u64, most: usize) -> Option<Vec<u8>> {
        let place = self.start.checked_add(at)?;
        let size = usize::try_from(self.end.checked_sub(place)?).ok()?.min(most);
        let mut bytes = vec![0; size];
        file.read_exact_at(&mut bytes, place).ok()?;
        Some(bytes)
    }
}

/// A number of seven bits in each byte, the lowest first.
fn varint(bytes: &mut &[u8]) -> Option<u32> {
    let mut number = 0;
    for shift in (0..32).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u32::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    const TEXT: u64 = 0x40_1000;

    /// Offsets of the parts of a table, with room for each.
    const NAMES: u64 = 0x100;
    const UNITS: u64 = 0x200;
    const FILES: u64 = 0x300;
    const PLACES: u64 = 0x400;
    const ENTRIES: u64 = 0x500;
    const SIZE: usize = 0x700;

    fn put(table: &mut [u8], at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).unwrap();
        table[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn numbers(numbers: &[u32]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    /// Two functions: `_rt0_amd64` at 0, of 0x10 bytes, and `main.main` after it, of 0x30. In that one, the
    /// first 8 bytes are line 7, the next 8 are inlined, and the rest is line 300.
    fn table(magic: u32, text: u64) -> Vec<u8> {
        let mut table = vec![0; SIZE];
        put(&mut table, 0, &[&magic.to_le_bytes()[..], &[0, 0, 1, 8]].concat());
        for (index, word) in (0_u64..).zip([2, 1, text, NAMES, UNITS, FILES, PLACES, ENTRIES]) {
            put(&mut table, 8 + 8 * index, &word.to_le_bytes());
        }
        put(&mut table, NAMES, b"_rt0_amd64\0main.main\0");
        put(&mut table, UNITS, &numbers(&[0, 5]));
        put(&mut table, FILES, b"a.go\0main.go\0");
        // File 1 of the unit everywhere; lines; and what is inlined. Values begin at -1, and are doubled if
        // positive.
        put(&mut table, PLACES + 1, &[4, 0x30, 0]);
        put(&mut table, PLACES + 0x10, &[16, 8, 4, 8, 0xc6, 4, 0x20, 0]);
        put(&mut table, PLACES + 0x20, &[0, 8, 2, 8, 1, 0x20, 0]);
        put(&mut table, ENTRIES, &numbers(&[0, 0x40, 0x10, 0x80, 0x40]));
        put(&mut table, ENTRIES + 0x40, &numbers(&[0, 0, 0, 0, 0, 0, 0, 0, 0]));
        put(&mut table, ENTRIES + 0x80, &numbers(&[0x10, 11, 0, 0, 0, 1, 0x10, 3, 0]));
        let tables = ENTRIES + 0x80 + if magic == MAGIC_1_20 { 44 } else { 40 };
        put(&mut table, tables, &numbers(&[0, 0, 0x20]));
        table
    }

    fn read(table: &[u8], text: u64, entry: u64) -> Option<(GoTable, File)> {
        let mut file = File::from(memfd_create("table", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all(table).unwrap();
        let go_table = Some((0, table.len() as u64));
        let headers = Headers { go_table, text, entry, ..Headers::default() };
        Some((GoTable::read(&file, &headers)?, file))
    }

    fn place(function: &str, offset: u64, line: Option<u32>) -> GoLocation {
        GoLocation {
            function: function.to_owned(),
            offset,
            line: line.map(|line| ("main.go".to_owned(), line)),
        }
    }

    #[test]
    fn functions_files_and_lines() {
        for magic in [MAGIC_1_18, MAGIC_1_20] {
            let (table, file) = read(&table(magic, TEXT), 0, 0).unwrap();
            let find = |offset: u64| table.find(&file, TEXT + offset);
            assert_eq!(find(0), Some(place("_rt0_amd64", 0, None)), "a function without lines");
            assert_eq!(find(0xf), Some(place("_rt0_amd64", 0xf, None)));
            assert_eq!(find(0x10), Some(place("main.main", 0, Some(7))));
            assert_eq!(find(0x17), Some(place("main.main", 7, Some(7))));
            assert_eq!(find(0x18), Some(place("main.main", 8, None)), "inlined code");
            assert_eq!(find(0x20), Some(place("main.main", 0x10, Some(300))));
            assert_eq!(find(0x3f), Some(place("main.main", 0x2f, Some(300))));
            assert_eq!(find(0x40), None, "after the last function");
            assert_eq!(table.find(&file, TEXT - 1), None, "before the first");
            assert_eq!(table.find(&file, u64::MAX), None);
        }
    }

    #[test]
    fn the_start_of_the_code_is_checked_if_the_table_does_not_say_it() {
        let table = table(MAGIC_1_20, 0);
        let (found, file) = read(&table, TEXT, TEXT).unwrap();
        assert_eq!(found.find(&file, TEXT + 0x10), Some(place("main.main", 0, Some(7))));
        assert!(read(&table, TEXT, TEXT + 0x10).is_none(), "it starts in another function");
        assert!(read(&table, TEXT, TEXT - 0x10).is_none(), "it starts in code of C");
    }

    #[test]
    fn damaged_tables_have_no_names_and_cause_no_panic() {
        let whole = table(MAGIC_1_20, TEXT);
        assert!(read(&[&[0xfb][..], &whole[1..]].concat(), 0, 0).is_none(), "an older format");
        for length in [0, 8, 71, 72, 0x100, 0x500, 0x580] {
            let Some((table, file)) = read(&whole[..length], 0, 0) else { continue };
            assert_eq!(table.find(&file, TEXT + 0x10), None, "{length} bytes");
        }
        for at in 0..SIZE {
            for byte in [0xff, 0x80, 0] {
                let mut bent = whole.clone();
                bent[at] = byte;
                let Some((table, file)) = read(&bent, 0, 0) else { continue };
                for offset in [0, 0x10, 0x18, 0x20] {
                    let _ = table.find(&file, TEXT.wrapping_add(offset));
                }
            }
        }
    }
}
