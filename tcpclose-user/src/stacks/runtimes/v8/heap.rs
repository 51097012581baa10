//! V8's heap in the memory of a process. A word is a small integer in its upper half, or the address of an
//! object plus 1. The first word of an object is its map, which has its type.
//!
//! <https://github.com/v8/v8/blob/12.4.254/src/objects/tagged-impl.h>

use super::layout::V8Layout;
use crate::stacks::memory::ProcessMemory;

/// Characters of a name. The rest is left out.
const MAX_NAME: usize = 1_024;

/// The number of parts of a string that was concatenated.
const MAX_PARTS: usize = 64;

/// The number of strings that only refer to another one, from one to the next.
const MAX_REFERENCES: usize = 4;

/// Set in the type of external strings that do not have the address of their characters.
///
/// <https://github.com/v8/v8/blob/12.4.254/src/objects/instance-type.h> (`kUncachedExternalStringMask`)
const UNCACHED: u16 = 1 << 4;

/// An object, by its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct HeapObject(u64);

impl HeapObject {
    /// The object that a word refers to; `None` if it is a small integer or a weak reference.
    pub(super) fn of(word: u64) -> Option<Self> {
        (word & 3 == 1).then_some(Self(word & !3))
    }

    /// The object at an address, where V8 has one.
    pub(super) fn at(address: u64) -> Self {
        Self(address)
    }

    /// The word that refers to it.
    pub(super) fn word(self) -> u64 {
        self.0 | 1
    }

    pub(super) fn address(self) -> u64 {
        self.0
    }
}

/// The small integer that a word is.
pub(super) fn small(word: u64) -> Option<i32> {
    let value = u32::try_from(word >> 32).ok()?;
    (word << 32 == 0).then_some(value.cast_signed())
}

/// The heap.
#[derive(Clone, Copy)]
pub(super) struct V8Heap<'a> {
    pub(super) memory: &'a ProcessMemory,
    pub(super) layout: &'a V8Layout,
}

/// The characters of a string, in one piece.
pub(super) struct Characters {
    address: u64,
    pub(super) length: u32,
    pub(super) is_one_byte: bool,
}

impl V8Heap<'_> {
    pub(super) fn word(self, object: HeapObject, offset: u64) -> Option<u64> {
        self.memory.u64(object.0.checked_add(offset)?)
    }

    /// The object that a member refers to.
    pub(super) fn member(self, object: HeapObject, offset: u64) -> Option<HeapObject> {
        self.word(object, offset).and_then(HeapObject::of)
    }

    pub(super) fn type_of(self, object: HeapObject) -> Option<u16> {
        let map = self.member(object, 0)?;
        self.memory.u16(map.0.checked_add(self.layout.instance_type)?)
    }

    /// The object that a member refers to, if it has this type.
    pub(super) fn member_of_type(self, object: HeapObject, offset: u64, wanted: u16) -> Option<HeapObject> {
        self.member(object, offset).filter(|it| self.type_of(*it) == Some(wanted))
    }

    /// The object as it is now: the garbage collector leaves the new address in one that it has moved.
    pub(super) fn moved(self, object: HeapObject) -> Option<HeapObject> {
        let first = self.word(object, 0)?;
        Some(if first & 1 == 0 { HeapObject(first) } else { object })
    }

    /// The number of items of an array.
    pub(super) fn length(self, array: HeapObject) -> Option<u32> {
        small(self.word(array, self.layout.array_length)?).and_then(|length| u32::try_from(length).ok())
    }

    /// The objects that an array refers to without keeping them alive, of its first items.
    pub(super) fn weak_items(self, array: HeapObject, limit: u32) -> Option<Vec<HeapObject>> {
        let length = self.length(array)?.min(limit);
        let mut bytes = vec![0; usize::try_from(length).ok()? * 8];
        self.memory.read(array.0.checked_add(self.layout.array_data)?, &mut bytes)?;
        let words = bytes.as_chunks().0.iter().copied().map(u64::from_ne_bytes);
        Some(words.filter(|word| word & 3 == 3).map(|word| HeapObject(word & !3)).collect())
    }

    /// The content of an array of bytes; `None` if it is another object, or longer.
    pub(super) fn bytes(self, array: HeapObject, limit: u32) -> Option<Vec<u8>> {
        let kind = self.type_of(array)?;
        if !self.layout.byte_arrays.contains(&kind) {
            return None;
        }
        let length = self.length(array).filter(|length| *length <= limit)?;
        let mut content = vec![0; usize::try_from(length).ok()?];
        self.memory.read(array.0.checked_add(self.layout.array_data)?, &mut content)?;
        Some(content)
    }

    pub(super) fn is_string(self, object: HeapObject) -> bool {
        self.type_of(object).is_some_and(|kind| kind < self.layout.first_nonstring_type)
    }

    fn string_length(self, string: HeapObject) -> Option<u32> {
        self.memory.u32(string.0.checked_add(self.layout.string_length)?)
    }

    /// The characters of a string; `None` if they are in several pieces, or if it is no string.
    pub(super) fn characters(self, string: HeapObject) -> Option<Characters> {
        let layout = self.layout;
        let (mut string, mut skipped) = (string, 0_u64);
        let length = self.string_length(string)?;
        for _ in 0..MAX_REFERENCES {
            let kind = self.type_of(string).filter(|kind| *kind < layout.first_nonstring_type)?;
            let is_one_byte = kind & layout.encoding_mask == layout.one_byte_tag;
            let representation = kind & layout.representation_mask;
            if representation == layout.thin_tag {
                string = self.member(string, layout.thin_actual)?;
                continue;
            }
            if representation == layout.sliced_tag {
                let offset = small(self.word(string, layout.sliced_offset)?)?;
                skipped = skipped.checked_add(u64::try_from(offset).ok()?)?;
                string = self.member(string, layout.sliced_parent)?;
                continue;
            }
            if representation == layout.cons_tag {
                // One that was used in one piece is kept as its first part.
                let second = self.member(string, layout.cons_second)?;
                if self.string_length(second)? != 0 {
                    return None;
                }
                string = self.member(string, layout.cons_first)?;
                continue;
            }
            let data = if representation == layout.external_tag && kind & UNCACHED == 0 {
                // The address of the characters follows the one of the C++ object that owns them.
                self.word(string, layout.external_resource.checked_add(8)?)?
            } else if representation == layout.seq_tag {
                let chars = if is_one_byte { layout.one_byte_chars } else { layout.two_byte_chars };
                string.0.checked_add(chars)?
            } else {
                return None;
            };
            if skipped.checked_add(length.into())? > self.string_length(string)?.into() {
                return None;
            }
            let address = data.checked_add(if is_one_byte { skipped } else { skipped.checked_mul(2)? })?;
            return Some(Characters { address, length, is_one_byte });
        }
        None
    }

    /// The characters of a range that begins at `start`.
    pub(super) fn units(self, characters: &Characters, start: u32, count: u32) -> Option<Vec<u16>> {
        let count = count.min(characters.length.checked_sub(start)?);
        let width = if characters.is_one_byte { 1 } else { 2 };
        let mut bytes = vec![0; usize::try_from(count).ok()? * width];
        self.memory.read(characters.address.checked_add(u64::from(start) * width as u64)?, &mut bytes)?;
        Some(if characters.is_one_byte {
            bytes.into_iter().map(u16::from).collect()
        } else {
            bytes.as_chunks().0.iter().map(|unit| u16::from_ne_bytes(*unit)).collect()
        })
    }

    /// The text of a string, or its beginning.
    pub(super) fn string(self, string: HeapObject) -> Option<String> {
        let mut units = Vec::new();
        let mut rest = vec![string];
        for _ in 0..MAX_PARTS {
            let Some(part) = rest.pop().filter(|_| units.len() < MAX_NAME) else { break };
            if let Some(characters) = self.characters(part) {
                let room = u32::try_from(MAX_NAME - units.len()).ok()?;
                units.extend(self.units(&characters, 0, room)?);
                continue;
            }
            let kind = self.type_of(part).filter(|kind| *kind < self.layout.first_nonstring_type)?;
            if kind & self.layout.representation_mask != self.layout.cons_tag {
                return None;
            }
            rest.push(self.member(part, self.layout.cons_second)?);
            rest.push(self.member(part, self.layout.cons_first)?);
        }
        Some(String::from_utf16_lossy(&units))
    }
}
