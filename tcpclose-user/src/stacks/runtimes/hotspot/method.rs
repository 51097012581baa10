//! Methods: their names and lines.

use super::{
    code::Blob,
    layout::{HotspotLayout, MethodTables, Scopes, SourceFile},
};
use crate::stacks::memory::ProcessMemory;

/// Longest name, in bytes.
const MAX_NAME: u16 = 2_048;

/// Largest constant part of a method, in bytes.
const MAX_CONSTANT: u64 = 1 << 20;

/// Largest table of places of a compiled method, in bytes.
const MAX_PLACES: u64 = 4 << 20;

/// The number of methods inlined into each other that are reported.
const MAX_INLINED: usize = 64;

/// The number of bytes of a scope that are read: three numbers of up to 5 bytes each.
const SCOPE: usize = 16;

/// `ConstMethod::_has_linenumber_table`.
const HAS_LINES: u16 = 1;

/// A place in a program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MethodLocation {
    pub(super) symbol: Option<String>,
    pub(super) file: Option<String>,
    pub(super) line: Option<u32>,
}

/// Names methods.
pub(super) struct Methods {
    compression: Compression,
}

/// The compression of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    /// Up to JDK 19.
    Any,
    /// From JDK 20 on, no byte of a number is 0.
    NoZero,
}

impl Methods {
    pub(super) fn new(layout: &HotspotLayout) -> Self {
        Self { compression: if layout.version < 20 { Compression::Any } else { Compression::NoZero } }
    }

    /// The method that an interpreted frame runs; `bytecode` is the address of the current bytecode.
    pub(super) fn interpreted(
        &self,
        memory: &ProcessMemory,
        layout: &HotspotLayout,
        (method, bytecode): (u64, u64),
    ) -> Option<MethodLocation> {
        let code = memory.u64(method.checked_add(layout.method_const)?)?.checked_add(layout.const_size)?;
        self.place(memory, layout, method, bytecode.checked_sub(code))
    }

    /// The methods at `pc` in compiled code, innermost first.
    pub(super) fn compiled(
        &self,
        memory: &ProcessMemory,
        layout: &HotspotLayout,
        blob: &Blob,
        pc: u64,
    ) -> Vec<MethodLocation> {
        let found = layout.scopes.as_ref().and_then(|scopes| {
            if blob.name.starts_with("native") {
                let method = memory.u64(blob.address.checked_add(scopes.method)?)?;
                return Some(vec![self.place(memory, layout, method, None)?]);
            }
            self.inlined(memory, layout, scopes, blob, pc)
        });
        found.unwrap_or_default()
    }

    fn inlined(
        &self,
        memory: &ProcessMemory,
        layout: &HotspotLayout,
        scopes: &Scopes,
        blob: &Blob,
        pc: u64,
    ) -> Option<Vec<MethodLocation>> {
        let tables = scopes.of(memory, blob.address)?;
        let mut places = Vec::new();
        let mut next = scope(memory, scopes, &tables, pc)?;
        // 0 means that there is no further one.
        while next != 0 && places.len() < MAX_INLINED {
            let scope = memory.up_to(tables.data.checked_add(u64::from(next))?, SCOPE);
            let mut numbers = Numbers { bytes: &scope, compression: self.compression };
            let (sender, method, bytecode) = (numbers.next()?, numbers.next()?, numbers.next()?);
            // Methods are numbered from 1. The number of a bytecode is its index plus 1, because the index -1
            // stands for the time before the method begins.
            let method = tables.metadata.checked_add(u64::from(method.checked_sub(1)?) * 8)?;
            let index = u64::from(bytecode).checked_sub(1);
            places.push(self.place(memory, layout, memory.u64(method)?, index)?);
            // The scope of a caller comes before that of its callees.
            next = if sender < next { sender } else { 0 };
        }
        Some(places)
    }

    fn place(
        &self,
        memory: &ProcessMemory,
        layout: &HotspotLayout,
        method: u64,
        index: Option<u64>,
    ) -> Option<MethodLocation> {
        let constant = memory.u64(method.checked_add(layout.method_const)?)?;
        let at = |offset: u64| constant.checked_add(offset);
        let pool = memory.u64(at(layout.const_constants)?)?;
        let text = |index: u16| {
            let entry = pool.checked_add(layout.pool_size)?.checked_add(u64::from(index) * 8)?;
            symbol(memory, layout, memory.u64(entry)?)
        };
        let name = text(memory.u16(at(layout.const_name)?)?)?;
        let signature = text(memory.u16(at(layout.const_signature)?)?)?;
        let class = memory.u64(pool.checked_add(layout.pool_holder)?)?;
        let class_name = symbol(memory, layout, memory.u64(class.checked_add(layout.klass_name)?)?)?;
        let code_size = u64::from(memory.u16(at(layout.const_code_size)?)?);
        let file = match layout.source_file {
            SourceFile::Pool(offset) => pool.checked_add(offset),
            SourceFile::Class(offset) => class.checked_add(offset),
            SourceFile::Nowhere => None,
        };
        let file = file.and_then(|file| memory.u16(file)).filter(|index| *index != 0).and_then(text);
        let has_lines = memory.u16(at(layout.const_flags)?)? & HAS_LINES != 0;
        let line = index.filter(|index| has_lines && *index < code_size).and_then(|index| {
            // The line table follows the bytecodes, which follow the structure.
            let size = u64::from(memory.u32(at(layout.const_words)?)?) * 8;
            let table = layout.const_size + code_size;
            let length = size.checked_sub(table).filter(|length| *length <= MAX_CONSTANT)?;
            let table = memory.up_to(at(table)?, usize::try_from(length).ok()?);
            line(&table, self.compression, u32::try_from(index).ok()?)
        });
        Some(MethodLocation { symbol: Some(external(&class_name, &name, &signature)?), file, line })
    }
}

/// The offset of the scope of the code before `pc`. The table must contain exactly that address. Otherwise
/// the memory has been reused meanwhile.
fn scope(memory: &ProcessMemory, scopes: &Scopes, tables: &MethodTables, pc: u64) -> Option<u32> {
    let size = tables.places.end.checked_sub(tables.places.start).filter(|size| *size <= MAX_PLACES)?;
    let pc = pc.checked_sub(tables.code)?;
    let places = memory.up_to(tables.places.start, usize::try_from(size).ok()?);
    let number = |place: &[u8], offset: u64| {
        let offset = usize::try_from(offset).ok()?;
        Some(u32::from_ne_bytes(place.get(offset..offset + 4)?.try_into().ok()?))
    };
    let size = usize::try_from(scopes.place_size).ok().filter(|size| *size > 0)?;
    let place =
        places.chunks_exact(size).find(|place| number(place, scopes.place_pc).map(u64::from) == Some(pc))?;
    number(place, scopes.place_scope)
}

fn symbol(memory: &ProcessMemory, layout: &HotspotLayout, address: u64) -> Option<String> {
    let length =
        memory.u16(address.checked_add(layout.symbol_length)?).filter(|length| *length <= MAX_NAME)?;
    let mut bytes = vec![0; usize::from(length)];
    memory.read(address.checked_add(layout.symbol_body)?, &mut bytes)?;
    String::from_utf8(bytes).ok()
}

/// The line of the bytecode at `index`. See `Method::line_number_from_bci()`: the entries are not sorted.
fn line(table: &[u8], compression: Compression, index: u32) -> Option<u32> {
    let mut numbers = Numbers { bytes: table, compression };
    let index = i32::try_from(index).ok()?;
    let (mut start, mut line) = (0i32, 0i32);
    let mut best = None;
    loop {
        let (bytecodes, lines) = match numbers.byte()? {
            0 => return best.and_then(|(_, line)| u32::try_from(line).ok()),
            0xff => (numbers.signed()?, numbers.signed()?),
            both => (i32::from(both >> 3), i32::from(both & 7)),
        };
        start = start.checked_add(bytecodes)?;
        line = line.checked_add(lines)?;
        if start <= index && best.is_none_or(|(nearest, _)| start >= nearest) {
            best = Some((start, line));
        }
    }
}

/// Numbers in the machine's compression `UNSIGNED5`: a byte below a limit is the last of a number.
struct Numbers<'a> {
    bytes: &'a [u8],
    compression: Compression,
}

impl Numbers<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        Some(*first)
    }

    fn next(&mut self) -> Option<u32> {
        let excluded = match self.compression {
            Compression::Any => 0,
            Compression::NoZero => 1,
        };
        let low = 192 - excluded;
        let mut sum = 0u32;
        for index in 0..5 {
            let digit = u32::from(self.byte()?).checked_sub(excluded)?;
            sum = sum.wrapping_add(digit.wrapping_shl(6 * index));
            if digit < low {
                break;
            }
        }
        Some(sum)
    }

    fn signed(&mut self) -> Option<i32> {
        let number = self.next()?;
        Some((number >> 1).cast_signed() ^ -(number & 1).cast_signed())
    }
}

/// A method as the machine's own listings show it: `java.lang.String Prices.price(java.lang.String, int)`.
fn external(class: &str, name: &str, signature: &str) -> Option<String> {
    let (parameters, result) = signature.strip_prefix('(')?.split_once(')')?;
    let (result, rest) = type_name(result)?;
    if !rest.is_empty() {
        return None;
    }
    let mut text = format!("{result} {}.{name}(", class.replace('/', "."));
    let mut rest = parameters;
    while !rest.is_empty() {
        let (parameter, after) = type_name(rest)?;
        if rest.len() < parameters.len() {
            text.push_str(", ");
        }
        text.push_str(&parameter);
        rest = after;
    }
    text.push(')');
    Some(text)
}

/// The first type in a descriptor, and the rest of it.
///
/// <https://docs.oracle.com/javase/specs/jvms/se17/html/jvms-4.html#jvms-4.3.2>
fn type_name(descriptor: &str) -> Option<(String, &str)> {
    let element = descriptor.trim_start_matches('[');
    let dimensions = descriptor.len() - element.len();
    let (name, rest) = match element.chars().next()? {
        'B' => ("byte", &element[1..]),
        'C' => ("char", &element[1..]),
        'D' => ("double", &element[1..]),
        'F' => ("float", &element[1..]),
        'I' => ("int", &element[1..]),
        'J' => ("long", &element[1..]),
        'S' => ("short", &element[1..]),
        'V' => ("void", &element[1..]),
        'Z' => ("boolean", &element[1..]),
        'L' => element[1..].split_once(';')?,
        _ => return None,
    };
    Some((name.replace('/', ".") + &"[]".repeat(dimensions), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_people_read_them() {
        assert_eq!(
            external("Prices", "price", "(Ljava/lang/String;[[IJ)Ljava/lang/String;").as_deref(),
            Some("java.lang.String Prices.price(java.lang.String, int[][], long)")
        );
        assert_eq!(external("a/b/C$D", "<init>", "()V").as_deref(), Some("void a.b.C$D.<init>()"));
        for broken in ["", "()", "(", "(L;", "(La)V", "(Q)V", "()VV", "([)V", "V"] {
            assert_eq!(external("C", "m", broken).filter(|_| broken != "(L;"), None, "{broken}");
        }
    }

    #[test]
    fn numbers_of_both_kinds() {
        let read = |bytes, compression| Numbers { bytes, compression }.next();
        // 191 is the last that fits into a byte, and 192 the first that does not.
        assert_eq!(read(&[191], Compression::Any), Some(191));
        assert_eq!(read(&[192, 0], Compression::Any), Some(192));
        assert_eq!(read(&[200, 3], Compression::Any), Some(200 + 3 * 64));
        assert_eq!(read(&[255, 252, 252, 252, 252], Compression::Any), Some(u32::MAX));
        assert_eq!(read(&[1], Compression::NoZero), Some(0));
        assert_eq!(read(&[191], Compression::NoZero), Some(190));
        assert_eq!(read(&[192, 1], Compression::NoZero), Some(191));
        assert_eq!(read(&[0], Compression::NoZero), None);
        assert_eq!(read(&[255], Compression::Any), None, "cut short");
        let signed = |bytes| Numbers { bytes, compression: Compression::Any }.signed();
        assert_eq!([signed(&[0]), signed(&[1]), signed(&[2]), signed(&[3])], [0, -1, 1, -2].map(Some));
    }

    #[test]
    fn lines_in_no_order() {
        // Bytecode 0 is line 5; 4 is line 6; 20 is line 3, in the long form; 9 is line 4.
        let table = [5, 4 << 3 | 1, 0xff, 32, 5, 0xff, 21, 2, 0];
        let line = |index| line(&table, Compression::Any, index);
        assert_eq!([line(0), line(3), line(4)], [Some(5), Some(5), Some(6)]);
        assert_eq!([line(8), line(9), line(19), line(20), line(99)], [6, 4, 4, 3, 3].map(Some));
        assert_eq!(super::line(&table[..5], Compression::Any, 0), None, "cut short");
        assert_eq!(super::line(&[0], Compression::Any, 0), None);
    }
}
