//! Compiled code: the function that an instruction belongs to.

use std::{collections::BTreeMap, ops::Range};

use super::{
    heap::{HeapObject, V8Heap, small},
    layout::CodePlacement,
};

/// Pages that are searched for the beginning of the code that an instruction is in.
const MAX_PAGES: u64 = 64;

/// Bytes of a page.
const PAGE: usize = 4_096;

/// Bytes of the instructions of a function.
const MAX_SIZE: u32 = 16 << 20;

/// The number of V8's builtins: version 11.3 has some 2,000.
const MAX_BUILTINS: u16 = 4_096;

/// How many pieces of code are remembered. When there are more, all are dropped and searched again.
const MAX_KNOWN: usize = 4_096;

/// Members of `Code` that may have the function: each version has them among the first three.
const DATA: [u64; 3] = [8, 16, 24];

/// Items of the data for deoptimization; the function is one of them. See `DeoptimizationData`:
///
/// <https://github.com/v8/v8/blob/12.4.254/src/objects/deoptimization-data.h>
const MAX_ITEMS: u32 = 12;

/// What a piece of code was compiled from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CompiledFrom {
    /// This bytecode, without optimization.
    Bytecode(HeapObject),
    /// This function, with optimization; other functions may be inlined into it.
    Function(HeapObject),
    /// Not known, such as a copy of the interpreter, or a regular expression.
    Unknown,
}

/// The pieces of code that were found: the object that begins each, by the address of its first instruction.
#[derive(Default)]
pub(super) struct CodeObjects(BTreeMap<u64, HeapObject>);

impl CodeObjects {
    /// The `Code` object that has the instruction at an address.
    pub(super) fn at(&mut self, heap: V8Heap<'_>, address: u64) -> Option<HeapObject> {
        let known = self.0.range(..=address).next_back().and_then(|(_, it)| extent(heap, *it));
        if let Some((code, _)) = known.filter(|(_, range)| range.contains(&address)) {
            return Some(code);
        }
        let (beginning, code, range) = search(heap, address)?;
        if self.0.len() >= MAX_KNOWN {
            self.0.clear();
        }
        self.0.insert(range.start, beginning);
        Some(code)
    }
}

/// The object that is the beginning of code, and which `address` belongs to: the nearest one before it. No
/// other one can be between them, because instructions follow the object.
fn search(heap: V8Heap<'_>, address: u64) -> Option<(HeapObject, HeapObject, Range<u64>)> {
    // The first word of the page behind this one.
    let mut behind = 0;
    for number in 0..MAX_PAGES {
        let page = (address & !(PAGE as u64 - 1)).checked_sub(number * PAGE as u64)?;
        let mut bytes = [0; PAGE];
        heap.memory.read(page, &mut bytes)?;
        let words: Vec<_> = bytes.as_chunks().0.iter().copied().map(u64::from_ne_bytes).collect();
        let first = *words.first()?;
        for (index, word) in words.iter().enumerate().rev() {
            let beginning = HeapObject::at(page + 8 * index as u64);
            let next = words.get(index + 1).copied().unwrap_or(behind);
            // It refers to its map and to another object.
            if beginning.address() > address || word & 3 != 1 || next & 3 != 1 {
                continue;
            }
            if let Some((code, range)) = extent(heap, beginning) {
                return range.contains(&address).then_some((beginning, code, range));
            }
        }
        behind = first;
    }
    None
}

/// The `Code` object whose instructions an object precedes, and the range of them.
fn extent(heap: V8Heap<'_>, beginning: HeapObject) -> Option<(HeapObject, Range<u64>)> {
    let (code, first, size) = match heap.layout.code {
        CodePlacement::Within { start, size } => {
            let is_code = heap.type_of(beginning) == Some(heap.layout.code_type);
            is_code.then_some((beginning, beginning.address().checked_add(start)?, size))?
        }
        CodePlacement::Apart { stream_type, start, size } => {
            if heap.type_of(beginning) != Some(stream_type) {
                return None;
            }
            let code = heap.member_of_type(beginning, 8, heap.layout.code_type)?;
            let first = beginning.address().checked_add(start)?;
            // The `Code` object refers to the instructions twice: to their object, and to the first of them.
            let is_reference = |offset: &u64| {
                let both = [heap.word(code, *offset), heap.word(code, *offset + 8)];
                both == [Some(beginning.word()), Some(first)]
            };
            let reference = (8..=64).step_by(8).find(is_reference)?;
            let size = if let Some(size) = size {
                size
            } else {
                // Between them are flags and the number of a builtin, if it is one or a copy of one.
                let number = heap.memory.u16(code.address().checked_add(reference + 20)?)?;
                (number < MAX_BUILTINS || number == u16::MAX).then_some(reference + 24)?
            };
            (code, first, size)
        }
    };
    let size = heap.memory.u32(code.address().checked_add(size)?).filter(|size| *size <= MAX_SIZE)?;
    Some((code, first..first.checked_add(size.into())?))
}

/// What a `Code` object was compiled from.
pub(super) fn source(heap: V8Heap<'_>, code: HeapObject) -> CompiledFrom {
    for data in DATA.into_iter().filter_map(|offset| heap.member(code, offset)) {
        if let Some(bytecode) = bytecode(heap, data) {
            return CompiledFrom::Bytecode(bytecode);
        }
        if let Some(function) = optimized(heap, data) {
            return CompiledFrom::Function(function);
        }
    }
    CompiledFrom::Unknown
}

/// The bytecode in an object that is or has bytecode.
pub(super) fn bytecode(heap: V8Heap<'_>, data: HeapObject) -> Option<HeapObject> {
    let kind = heap.type_of(data)?;
    if kind == heap.layout.bytecode_type {
        return Some(data);
    }
    // It has the bytecode and a copy of the interpreter, in an order that depends on the version.
    let has_two = kind == heap.layout.interpreter_data_type;
    let its = |offset| heap.member_of_type(data, offset, heap.layout.bytecode_type);
    if has_two { its(8).or_else(|| its(16)) } else { None }
}

/// The function in the data for deoptimization. The only one in it is the one that was compiled.
fn optimized(heap: V8Heap<'_>, data: HeapObject) -> Option<HeapObject> {
    let kind = heap.type_of(data)?;
    if heap.layout.byte_arrays.contains(&kind) {
        return None;
    }
    let length = small(heap.word(data, heap.layout.array_length)?)?;
    let count = u32::try_from(length).ok()?.min(MAX_ITEMS);
    let item = |index: u32| heap.member(data, heap.layout.array_data + 8 * u64::from(index));
    let function = |item: HeapObject| {
        let kind = heap.type_of(item)?;
        if Some(kind) == heap.layout.function_wrapper {
            return heap.member_of_type(item, 8, heap.layout.shared_type);
        }
        (kind == heap.layout.shared_type).then_some(item)
    };
    let mut functions = (0..count).filter_map(item).filter_map(function);
    let only = functions.next()?;
    functions.next().is_none().then_some(only)
}
