//! Offsets in bytecode → positions in a script → lines.

use std::collections::HashMap;

use super::heap::{Characters, HeapObject, V8Heap, small};

/// Characters of a script. No line is known in a longer one, unless V8 has a table of its lines.
const MAX_SOURCE: u32 = 16 << 20;

/// Characters that are read at a time.
const PIECE: u32 = 64 << 10;

/// Ends of lines that are remembered, of all scripts together. When there would be more, all are dropped.
const MAX_ENDS: usize = 1 << 20;

/// Lines of a script ahead of its text, such as of an inline script of a page.
const MAX_FIRST_LINE: u32 = 1 << 24;

/// The position, in the script, of the bytecode at an offset, of `size` bytes: that of the last entry up to it.
/// Entries are pairs of differences to the entry before. The first of them is inverted for expressions; in
/// V8 14 it has two flags instead. The first entry is for the entry of the function, and tells which it is; the
/// last one is for the instruction that returns. A table that does not end there is of another version.
///
/// <https://github.com/v8/v8/blob/12.4.254/src/codegen/source-position-table.cc>
pub(super) fn position(table: &[u8], size: i32, offset: i32) -> Option<u32> {
    let has_flags = match table.first()? {
        1 => false,
        2 => true,
        _ => return None,
    };
    let mut bytes = table.iter().copied().peekable();
    let (mut at, mut place, mut found) = (-1_i64, 0_i64, None);
    while bytes.peek().is_some() {
        let step = if has_flags {
            (unsigned(&mut bytes)? >> 2).cast_signed()
        } else {
            let step = signed(&mut bytes)?;
            if step < 0 { !step } else { step }
        };
        at = at.checked_add(step)?;
        place = place.checked_add(signed(&mut bytes)?)?;
        if at <= offset.into() {
            found = Some(place);
        }
    }
    if at != i64::from(size) - 1 {
        return None;
    }
    // The lowest bit marks positions outside of the script, and those above 31 other functions.
    let place = found.filter(|place| place & 1 == 0)?;
    u32::try_from(place).ok().filter(|place| *place < 1 << 31).and_then(|place| (place >> 1).checked_sub(1))
}

/// A signed number, with its sign in the lowest bit.
fn signed(bytes: &mut impl Iterator<Item = u8>) -> Option<i64> {
    let number = unsigned(bytes)?;
    Some((number >> 1).cast_signed() ^ -(number & 1).cast_signed())
}

/// A number: seven bits in each byte, the lowest first.
fn unsigned(bytes: &mut impl Iterator<Item = u8>) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = bytes.next()?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// The lines of scripts.
#[derive(Default)]
pub(super) struct ScriptLines {
    known: HashMap<HeapObject, Ends>,
    count: usize,
}

/// The positions of the ends of a script's lines.
struct Ends {
    source: u64,
    length: u32,
    positions: Vec<u32>,
}

impl ScriptLines {
    /// The line of a position in a script, counted from 1.
    pub(super) fn line(&mut self, heap: V8Heap<'_>, script: HeapObject, position: u32) -> Option<u32> {
        let layout = heap.layout;
        // The first line follows the name, in each version.
        let first = small(heap.word(script, layout.script_name + 8)?)?;
        let first = u32::try_from(first).ok().filter(|first| *first <= MAX_FIRST_LINE)?;
        let ends = heap.member_of_type(script, layout.script_line_ends, layout.fixed_array_type);
        let before = match ends {
            Some(ends) => listed(heap, ends, position)?,
            None => self.counted(heap, script, position)?,
        };
        Some(first + before + 1)
    }

    /// The number of lines that end before a position, counted in the script.
    fn counted(&mut self, heap: V8Heap<'_>, script: HeapObject, position: u32) -> Option<u32> {
        let source = heap.word(script, heap.layout.script_source)?;
        let characters = heap.characters(HeapObject::of(source)?)?;
        let length = characters.length;
        let is_other = |known: &Ends| (known.source, known.length) != (source, length);
        if self.known.get(&script).is_none_or(is_other) {
            let positions = ends(heap, &characters)?;
            if let Some(older) = self.known.remove(&script) {
                self.count -= older.positions.len();
            }
            if self.count + positions.len() > MAX_ENDS {
                self.known.clear();
                self.count = 0;
            }
            self.count += positions.len();
            self.known.insert(script, Ends { source, length, positions });
        }
        let Ends { positions, .. } = self.known.get(&script)?;
        (position <= length).then_some(u32::try_from(positions.partition_point(|end| *end < position)).ok()?)
    }
}

/// The number of lines that end before a position, by V8's own table.
fn listed(heap: V8Heap<'_>, ends: HeapObject, position: u32) -> Option<u32> {
    let (mut low, mut high) = (0, heap.length(ends)?);
    while low < high {
        let middle = low.midpoint(high);
        let end = small(heap.word(ends, heap.layout.array_data + 8 * u64::from(middle))?)?;
        if u32::try_from(end).ok()? < position {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    (low < heap.length(ends)?).then_some(low)
}

/// The positions of the ends of all lines.
fn ends(heap: V8Heap<'_>, characters: &Characters) -> Option<Vec<u32>> {
    if characters.length > MAX_SOURCE {
        return None;
    }
    let mut ends = Vec::new();
    let mut start = 0;
    let mut was_return = false;
    while start < characters.length {
        let units = heap.units(characters, start, PIECE)?;
        for (position, unit) in (start..).zip(&units) {
            // Both together are one end, at the second of them.
            if was_return && *unit != u16::from(b'\n') {
                ends.push(position - 1);
            }
            was_return = *unit == u16::from(b'\r');
            if *unit == u16::from(b'\n') || matches!(*unit, 0x2028 | 0x2029) {
                ends.push(position);
            }
            if ends.len() > MAX_ENDS {
                return None;
            }
        }
        start += PIECE;
    }
    Some(ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `readIt() { return fs.readSync(0, b, 0, 1); }`, at 64 of a script, as node 20 and 25 have compiled it.
    const REAL: [[i64; 12]; 2] =
        [[-1, 130, 1, 8, -6, 20, -10, 22, -9, -22, 5, 36], [1, 130, -4, 8, 11, 20, 19, 22, 17, -22, -12, 36]];

    fn encoded(steps: &[i64]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for step in steps {
            let mut number = ((step << 1) ^ (step >> 63)).cast_unsigned();
            while number >= 0x80 {
                bytes.push(u8::try_from(number & 0x7f).unwrap() | 0x80);
                number >>= 7;
            }
            bytes.push(u8::try_from(number).unwrap());
        }
        bytes
    }

    #[test]
    fn positions_of_a_real_function() {
        for steps in REAL {
            let table = encoded(&steps);
            let found = |offset| position(&table, 28, offset);
            assert_eq!([found(-1), found(0), found(4), found(5)], [64, 68, 68, 78].map(Some));
            assert_eq!([found(14), found(22), found(27), found(99)], [89, 78, 96, 96].map(Some));
            assert_eq!(found(-2), None, "before the first one");
            assert_eq!(position(&table, 27, 0), None, "of other bytecode");
            assert_eq!(position(&table[..table.len() - 1], 28, 0), None, "cut short");
        }
    }

    #[test]
    fn other_tables_have_no_positions() {
        assert_eq!(position(&[], 1, 0), None);
        assert_eq!(position(&[0, 2, 2, 2], 1, 0), None, "no entry of the function");
        assert_eq!(position(&[0x81; 40], 1, 0), None, "a number that does not end");
        let table = |place| encoded(&[-1, place, 1, 0]);
        assert_eq!(position(&table(8), 1, 0), Some(3));
        assert_eq!(position(&table(9), 1, 0), None, "outside of the script");
        assert_eq!(position(&table(8 | 1 << 31), 1, 0), None, "of an inlined function");
        assert_eq!(position(&table(0), 1, 0), None, "no position");
        assert_eq!(position(&table(-8), 1, 0), None, "negative");
    }
}
