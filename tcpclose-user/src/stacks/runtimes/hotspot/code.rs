//! The code cache: compiled methods, and the stubs that the machine generates when it starts.

use std::sync::Arc;

use super::layout::HotspotLayout;
use crate::stacks::memory::ProcessMemory;

/// The number of heaps that are read: JDK 9 to 25 have up to three.
const MAX_HEAPS: u32 = 16;

/// Each step in a segment map goes back by 1 to 254 segments; no compiled method takes more steps than this.
const MAX_STEPS: usize = 4_096;

/// Marks a segment that is not in use.
const FREE: u8 = 0xff;

/// The places where the machine has code.
pub(super) struct CodeCache {
    bounds: (u64, u64),
    heaps: Vec<Heap>,
}

struct Heap {
    low: u64,
    high: u64,
    segments: u64,
    shift: u32,
}

/// A piece of code: a method, a stub or the interpreter.
#[derive(Clone)]
pub(super) struct Blob {
    pub(super) address: u64,
    /// The kind of code, or the name of the stub.
    pub(super) name: Arc<str>,
    /// Size of its frames in words, including the return address; 0 if that is not fixed.
    pub(super) frame_words: u32,
}

impl CodeCache {
    /// Reads the list of heaps. They grow while the machine runs.
    pub(super) fn read(memory: &ProcessMemory, layout: &HotspotLayout) -> Option<Self> {
        let bounds = (memory.u64(layout.low_bound)?, memory.u64(layout.high_bound)?);
        let array = memory.u64(layout.heaps)?;
        let count = memory.u32(array.checked_add(layout.array_length)?)?;
        let data = memory.u64(array.checked_add(layout.array_data)?)?;
        let mut heaps = Vec::new();
        for index in 0..count.min(MAX_HEAPS) {
            let heap = memory.u64(data.checked_add(u64::from(index) * 8)?)?;
            let word = |offset: u64| memory.u64(heap.checked_add(offset)?);
            heaps.push(Heap {
                low: word(layout.heap_memory + layout.space_low)?,
                high: word(layout.heap_memory + layout.space_high)?,
                segments: word(layout.heap_segments + layout.space_low)?,
                shift: memory
                    .u32(heap.checked_add(layout.heap_segment_shift)?)
                    .filter(|shift| *shift < 32)?,
            });
        }
        Some(Self { bounds, heaps })
    }

    /// Whether an address is in the range reserved for it.
    pub(super) fn has(&self, address: u64) -> bool {
        (self.bounds.0..self.bounds.1).contains(&address)
    }

    /// Whether an address is in memory that is committed.
    pub(super) fn is_committed(&self, address: u64) -> bool {
        self.heap(address).is_some()
    }

    fn heap(&self, address: u64) -> Option<&Heap> {
        self.heaps.iter().find(|heap| (heap.low..heap.high).contains(&address))
    }

    /// The piece of code at an address. See `CodeHeap::find_block_for()`.
    pub(super) fn blob(&self, memory: &ProcessMemory, layout: &HotspotLayout, address: u64) -> Option<Blob> {
        let heap = self.heap(address)?;
        let mut segment = (address - heap.low) >> heap.shift;
        let mut back = memory.u8(heap.segments.checked_add(segment)?)?;
        for _ in 0..MAX_STEPS {
            if back == FREE {
                return None;
            }
            if back == 0 {
                break;
            }
            segment = segment.checked_sub(u64::from(back))?;
            back = memory.u8(heap.segments.checked_add(segment)?)?;
        }
        let block = heap.low.checked_add(segment << heap.shift)?;
        if back != 0 || memory.u8(block.checked_add(layout.block_used)?)? == 0 {
            return None;
        }
        let blob = block.checked_add(layout.block_size)?;
        let size = memory.u32(blob.checked_add(layout.blob_size)?)?;
        if !(blob..blob.checked_add(u64::from(size))?).contains(&address) {
            return None;
        }
        Some(Blob {
            address: blob,
            name: memory.string(memory.u64(blob.checked_add(layout.blob_name)?)?)?.into(),
            frame_words: memory
                .u32(blob.checked_add(layout.blob_frame_size)?)
                .filter(|words| *words < 1 << 20)?,
        })
    }
}

impl Blob {
    pub(super) fn is_interpreter(&self) -> bool {
        &*self.name == "Interpreter"
    }

    /// Whether it is a compiled method, or the wrapper of a native one.
    pub(super) fn is_method(&self) -> bool {
        matches!(&*self.name, "nmethod" | "native nmethod")
    }
}
