//! Tables of code objects → lines. An offset counts bytes of instructions. A table that does not extend that
//! far is damaged, or belongs to another code object, so there is no line.

use super::layout::LineTable;

/// The line of the instruction at an offset, in a function that begins at the line `first`.
pub(super) fn line(kind: LineTable, table: &[u8], first: i32, offset: u64) -> Option<u32> {
    let found = match kind {
        LineTable::Increments => increments(table, first, offset),
        LineTable::Ranges => ranges(table, first, offset),
        LineTable::Locations => locations(table, first, offset),
    };
    found.and_then(|line| u32::try_from(line).ok())
}

/// Pairs of the increases of the offset and of the line. The last line extends to the end.
///
/// <https://github.com/python/cpython/blob/v3.9.0/Objects/lnotab_notes.txt>
fn increments(table: &[u8], first: i32, offset: u64) -> Option<i32> {
    let (mut at, mut line) = (0_u64, first);
    for [bytes, lines] in table.as_chunks().0 {
        at += u64::from(*bytes);
        if at > offset {
            break;
        }
        line = line.checked_add(i32::from(lines.cast_signed()))?;
    }
    Some(line)
}

/// Pairs of a length and of the increase of the line before it; -128 stands for instructions without a line.
///
/// <https://github.com/python/cpython/blob/v3.10.0/Objects/lnotab_notes.txt>
fn ranges(table: &[u8], first: i32, offset: u64) -> Option<i32> {
    let (mut end, mut line) = (0_u64, first);
    for [bytes, lines] in table.as_chunks().0 {
        end += u64::from(*bytes);
        let lines = lines.cast_signed();
        if lines != i8::MIN {
            line = line.checked_add(i32::from(lines))?;
        }
        if offset < end {
            return (lines != i8::MIN).then_some(line);
        }
    }
    None
}

/// Entries of a length in instructions, a kind, and data about line and column that depends on the kind.
///
/// <https://github.com/python/cpython/blob/v3.11.0/Objects/locations.md>
fn locations(table: &[u8], first: i32, offset: u64) -> Option<i32> {
    let mut bytes = table.iter().copied().peekable();
    let (mut end, mut line) = (0_u64, first);
    while let Some(begin) = bytes.next() {
        if begin & 0x80 == 0 {
            return None;
        }
        end += 2 * (u64::from(begin & 7) + 1);
        let kind = begin >> 3 & 0xf;
        let lines = match kind {
            13 | 14 => signed(&mut bytes)?,
            10..=12 => i32::from(kind) - 10,
            _ => 0,
        };
        line = line.checked_add(lines)?;
        if offset < end {
            return (kind != 15).then_some(line);
        }
        // The rest of the entry: only the first byte of an entry has the highest bit.
        while bytes.next_if(|byte| byte & 0x80 == 0).is_some() {}
    }
    None
}

/// A signed number: six bits in each byte, the lowest first, and the sign in the lowest bit of the number.
fn signed(bytes: &mut impl Iterator<Item = u8>) -> Option<i32> {
    let mut number = 0_u32;
    for shift in (0..32).step_by(6) {
        let byte = bytes.next()?;
        number |= u32::from(byte & 0x3f) << shift;
        if byte & 0x40 == 0 {
            let magnitude = (number >> 1).cast_signed();
            return Some(if number & 1 == 0 { magnitude } else { -magnitude });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines of these offsets in a function that begins at line 1.
    fn lines<const N: usize>(kind: LineTable, table: &[u8], offsets: [u64; N]) -> [Option<u32>; N] {
        offsets.map(|offset| line(kind, table, 1, offset))
    }

    #[test]
    fn increments_go_both_ways() {
        let table = [0, 1, 2, 1, 4, 0xff, 4, 3];
        assert_eq!(
            lines(LineTable::Increments, &table, [0, 2, 4, 6, 8, 10, 12]),
            [2, 3, 3, 2, 2, 5, 5].map(Some)
        );
        assert_eq!(line(LineTable::Increments, &[], 7, 4), Some(7), "a function of one line");
        assert_eq!(line(LineTable::Increments, &[0, 0x80, 2, 0], 7, 4), None, "a line before the first");
    }

    #[test]
    fn ranges_may_have_no_line() {
        let table = [2, 1, 4, 1, 2, 0x80, 0, 5, 4, 0xff];
        assert_eq!(
            lines(LineTable::Ranges, &table, [0, 2, 4, 6, 8, 10, 12]),
            [Some(2), Some(3), Some(3), None, Some(7), Some(7), None]
        );
        assert_eq!(line(LineTable::Ranges, &table[..1], 1, 0), None, "cut short");
    }

    #[test]
    fn locations_of_every_kind() {
        // One instruction without a move; two, one line on (11), with two columns; one with a column (short
        // form); one with a line 3 back (13); one without a line (15); one in the long form (14), 100 lines
        // on.
        let table = [
            0x80 | 10 << 3,
            1,
            2,
            0x80 | 11 << 3 | 1,
            1,
            2,
            0x80 | 2 << 3,
            5,
            0x80 | 13 << 3,
            0b111,
            0x80 | 15 << 3,
            0x80 | 14 << 3,
            // 200 in two pieces of six bits.
            0x40 | 0b00_1000,
            0b11,
            0,
            1,
            1,
        ];
        let found = [0, 2, 4, 6, 8, 10, 12].map(|offset| line(LineTable::Locations, &table, 5, offset));
        assert_eq!(found, [Some(5), Some(6), Some(6), Some(6), Some(3), None, Some(103)]);
        assert_eq!(line(LineTable::Locations, &table, 5, 14), None, "behind the last one");
        assert_eq!(line(LineTable::Locations, &[0x80 | 14 << 3, 0x7f], 5, 0), None, "cut short");
        assert_eq!(line(LineTable::Locations, &[1, 2, 3], 5, 0), None, "no beginning");
    }
}
