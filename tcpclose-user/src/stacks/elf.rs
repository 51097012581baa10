//! The places in memory of the parts of an ELF file, which unwinding and symbolizing both need.

use object::{Object as _, ObjectSegment as _, ReadRef, SegmentFlags, elf::PF_X};

use crate::processes::mappings::Mapping;

/// The `PT_LOAD` segments of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments(Vec<Segment>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    /// Offset in the file.
    offset: u64,
    /// Bytes in the file.
    size: u64,
    /// Virtual address, as in the symbol table.
    address: u64,
    executable: bool,
}

impl Segments {
    /// Reads the program headers.
    pub fn read<'data>(file: &object::File<'data, impl ReadRef<'data>>) -> Self {
        let segment = |segment: object::Segment<'data, '_, _>| {
            let (offset, size) = segment.file_range();
            let executable = matches!(segment.flags(), SegmentFlags::Elf { p_flags } if p_flags & PF_X != 0);
            Segment { offset, size, address: segment.address(), executable }
        };
        Self(file.segments().map(segment).collect())
    }

    /// The virtual address, as in the symbol table, of the byte at an offset in the file.
    pub fn address(&self, offset: u64) -> Option<u64> {
        let has_offset =
            |segment: &&Segment| segment.offset <= offset && offset - segment.offset < segment.size;
        let segment = self.0.iter().find(has_offset)?;
        segment.address.checked_add(offset - segment.offset)
    }

    /// The load bias of an executable mapping of the file: the difference between an address in memory and
    /// the virtual address in the file.
    pub fn bias(&self, mapping: &Mapping) -> Option<u64> {
        let end = mapping.offset.checked_add(mapping.end.checked_sub(mapping.start)?)?;
        // A segment need not start at a page boundary, but its mapping does. The first page may therefore
        // also contain the end of the segment before it, which linkers (lld) place at other addresses, and
        // which is not executable.
        let is_mapped = |segment: &&Segment| {
            segment.executable
                && segment.offset < end
                && mapping.offset < segment.offset.saturating_add(segment.size)
        };
        let segment = self.0.iter().find(is_mapped)?;
        let start = segment.address.wrapping_add(mapping.offset).wrapping_sub(segment.offset);
        mapping.start.checked_sub(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processes::mappings::Backing;

    #[test]
    fn addresses_and_biases() {
        // The code begins in the middle of a page of the file, as lld lays it out.
        let segments = Segments(vec![
            Segment { offset: 0, size: 0x1234, address: 0x1000, executable: false },
            Segment { offset: 0x1234, size: 0x1000, address: 0x3234, executable: true },
        ]);
        assert_eq!(segments.address(0x1233), Some(0x2233));
        assert_eq!(segments.address(0x1234), Some(0x3234));
        assert_eq!(segments.address(0x2234), None);
        assert_eq!(segments.address(u64::MAX), None);
        let mapping = |start: u64, size, offset| Mapping {
            start,
            end: start.saturating_add(size),
            offset,
            base: 0,
            backing: Backing::Anonymous,
        };
        assert_eq!(segments.bias(&mapping(0x7000_3000, 0x2000, 0x1000)), Some(0x7000_0000));
        assert_eq!(segments.bias(&mapping(0x7000_4000, 0x1000, 0x2000)), Some(0x7000_0000), "the rest of it");
        assert_eq!(segments.bias(&mapping(0x7000_4000, 0x1000, 0x3000)), None, "no segment is there");
        assert_eq!(segments.bias(&mapping(0x7000_0000, 0x1000, 0)), None, "no code is there");
        assert_eq!(segments.bias(&mapping(0, 0x2000, 0x1000)), None, "below its own address");
        assert_eq!(segments.bias(&mapping(0, u64::MAX, u64::MAX)), None);
    }
}
