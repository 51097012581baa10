//! Offsets of the members of the virtual machine's structures, from the tables that it exports for debuggers.

use std::{collections::HashMap, ops::Range};

use crate::stacks::memory::ProcessMemory;

/// The number of entries of a table that are read: JDK 17 has 788 members and 600 types.
const MAX_ENTRIES: u64 = 4_096;

/// Addresses, in the file, of the tables that the machine exports.
#[derive(Clone, Debug)]
pub(super) struct HotspotSymbols {
    structs: ExportedTable<4>,
    types: ExportedTable<2>,
}

/// Addresses of variables that describe a table: its address, the size of its entries, and the offsets of
/// their members.
#[derive(Clone, Debug)]
struct ExportedTable<const MEMBERS: usize> {
    first: u64,
    stride: u64,
    members: [u64; MEMBERS],
}

impl HotspotSymbols {
    /// Looks up their symbols; `None` for any file but a `libjvm.so`.
    pub(super) fn find(address: &dyn Fn(&str) -> Option<u64>) -> Option<Self> {
        Some(Self {
            structs: ExportedTable {
                first: address("gHotSpotVMStructs")?,
                stride: address("gHotSpotVMStructEntryArrayStride")?,
                members: [
                    address("gHotSpotVMStructEntryTypeNameOffset")?,
                    address("gHotSpotVMStructEntryFieldNameOffset")?,
                    address("gHotSpotVMStructEntryOffsetOffset")?,
                    address("gHotSpotVMStructEntryAddressOffset")?,
                ],
            },
            types: ExportedTable {
                first: address("gHotSpotVMTypes")?,
                stride: address("gHotSpotVMTypeEntryArrayStride")?,
                members: [
                    address("gHotSpotVMTypeEntryTypeNameOffset")?,
                    address("gHotSpotVMTypeEntrySizeOffset")?,
                ],
            },
        })
    }
}

impl<const MEMBERS: usize> ExportedTable<MEMBERS> {
    /// The members of each entry. The first member of the entry after the last one is 0.
    fn read(&self, memory: &ProcessMemory, bias: u64) -> Option<Vec<[u64; MEMBERS]>> {
        let value = |symbol: u64| memory.u64(symbol.checked_add(bias)?);
        let (first, stride) = (value(self.first)?, value(self.stride)?);
        let mut offsets = [0; MEMBERS];
        for (offset, member) in offsets.iter_mut().zip(self.members) {
            *offset = value(member)?;
        }
        let mut entries = Vec::new();
        for index in 0..MAX_ENTRIES {
            let entry = first.checked_add(stride.checked_mul(index)?)?;
            let mut words = [0; MEMBERS];
            for (word, offset) in words.iter_mut().zip(offsets) {
                *word = memory.u64(entry.checked_add(offset)?)?;
            }
            if words[0] == 0 {
                break;
            }
            entries.push(words);
        }
        Some(entries)
    }
}

macro_rules! layout {
    ($(
        $(#[$doc:meta])*
        $member:ident = $kind:ident $type:literal $(, $field:literal)? $(or $other:literal, $others:literal)?;
    )*) => {
        /// Offsets of members, sizes of types and addresses of statics.
        #[derive(Debug)]
        pub(super) struct HotspotLayout {
            /// The major version of the JDK.
            pub(super) version: u32,
            /// How compiled methods describe the methods inlined into them, if that is known.
            pub(super) scopes: Option<Scopes>,
            /// The place of the name of a class's source file.
            pub(super) source_file: SourceFile,
            $($(#[$doc])* pub(super) $member: u64),*
        }

        impl HotspotLayout {
            fn from(tables: &Tables, version: u32) -> Result<Self, &'static str> {
                Ok(Self {
                    version,
                    scopes: Scopes::from(tables),
                    source_file: SourceFile::from(tables),
                    $($member: tables.$kind($type $(, $field)?)
                        $(.or_else(|| tables.$kind($other, $others)))?
                        .ok_or(concat!($type $(, "::", $field)?))?),*
                })
            }
        }
    };
}

layout! {
    /// `GrowableArray<CodeHeap*>*`.
    heaps = address "CodeCache", "_heaps";
    low_bound = address "CodeCache", "_low_bound";
    high_bound = address "CodeCache", "_high_bound";
    array_length = offset "GrowableArrayBase", "_len" or "GenericGrowableArray", "_len";
    array_data = offset "GrowableArray<int>", "_data";
    heap_memory = offset "CodeHeap", "_memory";
    heap_segments = offset "CodeHeap", "_segmap";
    heap_segment_shift = offset "CodeHeap", "_log2_segment_size";
    space_low = offset "VirtualSpace", "_low";
    space_high = offset "VirtualSpace", "_high";
    block_used = offset "HeapBlock::Header", "_used";
    block_size = size "HeapBlock";
    blob_name = offset "CodeBlob", "_name";
    blob_size = offset "CodeBlob", "_size";
    /// In words.
    blob_frame_size = offset "CodeBlob", "_frame_size";
    method_const = offset "Method", "_constMethod";
    const_size = size "ConstMethod";
    const_constants = offset "ConstMethod", "_constants";
    /// Size in words, including bytecodes and tables.
    const_words = offset "ConstMethod", "_constMethod_size";
    const_flags = offset "ConstMethod", "_flags" or "ConstMethod", "_flags._flags";
    const_code_size = offset "ConstMethod", "_code_size";
    const_name = offset "ConstMethod", "_name_index";
    const_signature = offset "ConstMethod", "_signature_index";
    pool_size = size "ConstantPool";
    pool_holder = offset "ConstantPool", "_pool_holder";
    klass_name = offset "Klass", "_name";
    symbol_length = offset "Symbol", "_length";
    symbol_body = offset "Symbol", "_body";
}

/// How a compiled method describes itself and the methods inlined into it.
#[derive(Debug)]
pub(super) struct Scopes {
    pub(super) method: u64,
    pub(super) place_size: u64,
    pub(super) place_pc: u64,
    pub(super) place_scope: u64,
    kept: TablePlacement,
}

/// The place of the tables of compiled methods.
#[derive(Debug)]
enum TablePlacement {
    /// Behind its code, from JDK 9 to 22.
    Behind {
        code_begin: u64,
        /// From the start of the blob to the first `PcDesc`.
        places: u64,
        /// From there to the end of the last.
        places_end: u64,
        /// Address of the data that they point into.
        data: u64,
        /// From the start of the blob to the methods that the data refers to.
        metadata: u64,
    },
    /// In separate memory, from JDK 25 on.
    Apart {
        /// From the start of the blob to the first instruction.
        code: u64,
        immutable: u64,
        /// From there to the first `PcDesc`.
        places: u64,
        /// From there to the end of the last, where the data that they point into begins.
        data: u64,
        mutable: u64,
        /// From there to the methods.
        metadata: u64,
    },
}

/// The tables of one compiled method, as addresses.
pub(super) struct MethodTables {
    pub(super) code: u64,
    /// `PcDesc`s.
    pub(super) places: Range<u64>,
    pub(super) data: u64,
    pub(super) metadata: u64,
}

impl Scopes {
    fn from(tables: &Tables) -> Option<Self> {
        Some(Self {
            method: tables
                .offset("CompiledMethod", "_method")
                .or_else(|| tables.offset("nmethod", "_method"))?,
            place_size: tables.size("PcDesc")?,
            place_pc: tables.offset("PcDesc", "_pc_offset")?,
            place_scope: tables.offset("PcDesc", "_scope_decode_offset")?,
            kept: TablePlacement::behind(tables).or_else(|| TablePlacement::apart(tables))?,
        })
    }

    /// The tables of the compiled method at `blob`.
    pub(super) fn of(&self, memory: &ProcessMemory, blob: u64) -> Option<MethodTables> {
        let pointer = |member: u64| memory.u64(blob.checked_add(member)?);
        let number = |member: u64| memory.u32(blob.checked_add(member)?).map(u64::from);
        match self.kept {
            TablePlacement::Behind { code_begin, places, places_end, data, metadata } => Some(MethodTables {
                code: pointer(code_begin)?,
                places: blob.checked_add(number(places)?)?..blob.checked_add(number(places_end)?)?,
                data: pointer(data)?,
                metadata: blob.checked_add(number(metadata)?)?,
            }),
            TablePlacement::Apart { code, immutable, places, data, mutable, metadata } => {
                let immutable = pointer(immutable)?;
                let data = immutable.checked_add(number(data)?)?;
                Some(MethodTables {
                    code: blob.checked_add(number(code)?)?,
                    places: immutable.checked_add(number(places)?)?..data,
                    data,
                    metadata: pointer(mutable)?.checked_add(number(metadata)?)?,
                })
            }
        }
    }
}

impl TablePlacement {
    /// <https://github.com/openjdk/jdk/blob/jdk-17-ga/src/hotspot/share/code/nmethod.hpp>
    fn behind(tables: &Tables) -> Option<Self> {
        Some(Self::Behind {
            code_begin: tables.offset("CodeBlob", "_code_begin")?,
            places: tables.offset("nmethod", "_scopes_pcs_offset")?,
            places_end: tables.offset("nmethod", "_dependencies_offset")?,
            data: tables.offset("CompiledMethod", "_scopes_data_begin")?,
            metadata: tables.offset("nmethod", "_metadata_offset")?,
        })
    }

    /// <https://github.com/openjdk/jdk/blob/jdk-25-ga/src/hotspot/share/code/nmethod.hpp>
    fn apart(tables: &Tables) -> Option<Self> {
        Some(Self::Apart {
            code: tables.offset("CodeBlob", "_code_offset")?,
            immutable: tables.offset("nmethod", "_immutable_data")?,
            places: tables.offset("nmethod", "_scopes_pcs_offset")?,
            data: tables.offset("nmethod", "_scopes_data_offset")?,
            mutable: tables.offset("CodeBlob", "_mutable_data")?,
            metadata: tables.offset("CodeBlob", "_relocation_size")?,
        })
    }
}

/// The place of the constant pool index of a source file's name.
#[derive(Clone, Copy, Debug)]
pub(super) enum SourceFile {
    /// In the class, up to JDK 15.
    Class(u64),
    /// In its constant pool.
    Pool(u64),
    /// Not known.
    Nowhere,
}

impl SourceFile {
    fn from(tables: &Tables) -> Self {
        let pool = tables.offset("ConstantPool", "_source_file_name_index").map(Self::Pool);
        let class = || tables.offset("InstanceKlass", "_source_file_name_index").map(Self::Class);
        pool.or_else(class).unwrap_or(Self::Nowhere)
    }
}

/// The contents of the tables.
struct Tables {
    /// Offset and address, by class and member.
    members: HashMap<(String, String), (u64, u64)>,
    sizes: HashMap<String, u64>,
}

impl Tables {
    fn read(memory: &ProcessMemory, bias: u64, symbols: &HotspotSymbols) -> Option<Self> {
        let mut members = HashMap::new();
        for [class, member, offset, address] in symbols.structs.read(memory, bias)? {
            if let (Some(class), Some(member)) = (memory.string(class), memory.string(member)) {
                members.insert((class, member), (offset, address));
            }
        }
        let mut sizes = HashMap::new();
        for [name, size] in symbols.types.read(memory, bias)? {
            if let Some(name) = memory.string(name) {
                sizes.insert(name, size);
            }
        }
        Some(Self { members, sizes })
    }

    fn member(&self, class: &str, member: &str) -> Option<(u64, u64)> {
        self.members.get(&(class.to_owned(), member.to_owned())).copied()
    }

    /// Larger offsets are not accepted, so that sums of offsets stay small.
    fn offset(&self, class: &str, member: &str) -> Option<u64> {
        self.member(class, member).map(|(offset, _)| offset).filter(|offset| *offset < 1 << 16)
    }

    fn address(&self, class: &str, member: &str) -> Option<u64> {
        self.member(class, member).map(|(_, address)| address).filter(|address| *address != 0)
    }

    fn size(&self, class: &str) -> Option<u64> {
        self.sizes.get(class).copied().filter(|size| *size < 1 << 16)
    }
}

impl HotspotLayout {
    /// Reads the layout from a process. The error names the first member that is missing.
    pub(super) fn read(
        memory: &ProcessMemory,
        bias: u64,
        symbols: &HotspotSymbols,
    ) -> Result<Self, &'static str> {
        let tables = Tables::read(memory, bias, symbols).ok_or("its structures")?;
        let version = tables
            .address("Abstract_VM_Version", "_vm_major_version")
            .and_then(|address| memory.u32(address))
            .ok_or("its version")?;
        Self::from(&tables, version)
    }
}
