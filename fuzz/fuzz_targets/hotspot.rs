//! The structures of a Java virtual machine, in the memory of a process that continues to run while they are
//! read, or that only pretends to be a Java virtual machine. The input is the memory that the machine's
//! static variables lead to; the members of its structures are fixed.
#![no_main]

use std::{fs::File, os::unix::fs::FileExt as _, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use tcpclose_fuzz::{Symbols, word};
use tcpclose_user::stacks::{
    memory::{ProcessMemory, StackMemory},
    runtimes::{Caller, Registers, hotspot},
};

/// Where the input is in the machine's memory; before it are the tables that describe the structures.
const DATA: u64 = 0x8000;
/// Bytes of input.
const SIZE: usize = 0x4000;

/// The symbols that a `libjvm.so` exports, each a word at its index, and their values.
const SYMBOLS: [(&str, u64); 10] = [
    ("gHotSpotVMStructs", 0x1000),
    ("gHotSpotVMStructEntryArrayStride", 32),
    ("gHotSpotVMStructEntryTypeNameOffset", 0),
    ("gHotSpotVMStructEntryFieldNameOffset", 8),
    ("gHotSpotVMStructEntryOffsetOffset", 16),
    ("gHotSpotVMStructEntryAddressOffset", 24),
    ("gHotSpotVMTypes", 0x3000),
    ("gHotSpotVMTypeEntryArrayStride", 16),
    ("gHotSpotVMTypeEntryTypeNameOffset", 0),
    ("gHotSpotVMTypeEntrySizeOffset", 8),
];

/// Static variables, at the start of the input.
const STATICS: [(&str, &str); 4] = [
    ("CodeCache", "_heaps"),
    ("CodeCache", "_low_bound"),
    ("CodeCache", "_high_bound"),
    ("Abstract_VM_Version", "_vm_major_version"),
];

/// Members, each a word behind the one before it in the same class.
const MEMBERS: [(&str, &[&str]); 13] = [
    ("GrowableArrayBase", &["_len"]),
    ("GrowableArray<int>", &["", "_data"]),
    ("CodeHeap", &["_memory", "", "_segmap", "", "_log2_segment_size"]),
    ("VirtualSpace", &["_low", "_high"]),
    ("HeapBlock::Header", &["_used"]),
    ("CodeBlob", &["_name", "_size", "_frame_size"]),
    ("Method", &["_constMethod"]),
    (
        "ConstMethod",
        &["_constants", "_constMethod_size", "_flags", "_code_size", "_name_index", "_signature_index"],
    ),
    ("ConstantPool", &["_pool_holder", "_source_file_name_index"]),
    ("Klass", &["_name"]),
    ("Symbol", &["_length", "_body"]),
    ("PcDesc", &["_pc_offset", "_scope_decode_offset"]),
    ("nmethod", &["", "", "", "_method", "_scopes_pcs_offset"]),
];

/// Up to JDK 22.
const BEHIND: [(&str, &str, u64); 4] = [
    ("CodeBlob", "_code_begin", 0x40),
    ("nmethod", "_dependencies_offset", 0x48),
    ("CompiledMethod", "_scopes_data_begin", 0x50),
    ("nmethod", "_metadata_offset", 0x58),
];

/// From JDK 25 on.
const APART: [(&str, &str, u64); 5] = [
    ("CodeBlob", "_code_offset", 0x40),
    ("nmethod", "_immutable_data", 0x48),
    ("nmethod", "_scopes_data_offset", 0x50),
    ("CodeBlob", "_mutable_data", 0x58),
    ("CodeBlob", "_relocation_size", 0x60),
];

const SIZES: [(&str, u64); 4] =
    [("HeapBlock", 16), ("ConstMethod", 48), ("ConstantPool", 24), ("PcDesc", 16)];

/// The memory before the input.
struct Tables {
    bytes: Vec<u8>,
    strings: usize,
    structs: usize,
    types: usize,
}

impl Tables {
    fn memory(others: &[(&str, &str, u64)]) -> Vec<u8> {
        let mut tables =
            Self { bytes: vec![0; DATA as usize], strings: 0x4000, structs: 0x1000, types: 0x3000 };
        for (index, (_, value)) in SYMBOLS.iter().enumerate() {
            tables.put(index * 8, *value);
        }
        for (index, (class, member)) in STATICS.iter().enumerate() {
            tables.member(class, member, 0, DATA + index as u64 * 8);
        }
        for (class, members) in MEMBERS {
            for (index, member) in members.iter().enumerate().filter(|(_, member)| !member.is_empty()) {
                tables.member(class, member, index as u64 * 8, 0);
            }
        }
        for (class, member, offset) in others {
            tables.member(class, member, *offset, 0);
        }
        for (class, size) in SIZES {
            let class = tables.string(class);
            let at = tables.types;
            tables.put(at, class);
            tables.put(at + 8, size);
            tables.types += 16;
        }
        tables.bytes
    }

    fn put(&mut self, at: usize, word: u64) {
        self.bytes[at..at + 8].copy_from_slice(&word.to_ne_bytes());
    }

    fn string(&mut self, text: &str) -> u64 {
        let at = self.strings;
        self.bytes[at..at + text.len()].copy_from_slice(text.as_bytes());
        self.strings += text.len() + 1;
        at as u64
    }

    fn member(&mut self, class: &str, member: &str, offset: u64, address: u64) {
        let (class, member) = (self.string(class), self.string(member));
        for (index, word) in [class, member, offset, address].into_iter().enumerate() {
            self.put(self.structs + index * 8, word);
        }
        self.structs += 32;
    }
}

/// A machine's memory, for each way to lay out compiled methods: offsets in these files are addresses.
static MEMORY: LazyLock<[File; 2]> = LazyLock::new(|| {
    [(&BEHIND[..], "behind"), (&APART[..], "apart")].map(|(others, name)| {
        let path = format!("/dev/shm/tcpclose-fuzz-hotspot-{}-{name}", std::process::id());
        let file = File::options().read(true).write(true).create_new(true).open(&path).expect("a new file");
        std::fs::remove_file(&path).expect("it was just made");
        file.write_all_at(&Tables::memory(others), 0).expect("/dev/shm has room");
        file
    })
});

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    let file = &MEMORY[usize::from(kind % 2)];
    let mut memory = vec![0; SIZE];
    let length = data.len().min(SIZE);
    memory[..length].copy_from_slice(&data[..length]);
    file.write_all_at(&memory, DATA).expect("/dev/shm has room");

    let symbols = SYMBOLS.iter().zip((0..).step_by(8));
    let symbols = symbols.map(|((name, _), address)| ((*name).to_owned(), address..address + 8)).collect();
    let program = hotspot::recognize(&Symbols(symbols)).expect("the symbols are those of HotSpot");
    let process = ProcessMemory::from(file.try_clone().expect("a descriptor"));
    let Some(mut runtime) = program.attach(0, process, 0) else { return };
    runtime.begin_stack();
    // The registers are the last words of the input; the stack is all of it.
    let mut registers = &data[data.len().saturating_sub(24)..];
    let [pc, sp, fp] = [(); 3].map(|()| word(&mut registers));
    let mut frame = Registers { pc, inside: pc, sp, fp };
    let stack = StackMemory::new(DATA, &memory);
    for _ in 0..16 {
        if !runtime.owns(frame.inside) {
            return;
        }
        runtime.name(&frame, &stack);
        let Caller::At { pc, sp, fp } = runtime.caller(&frame, &stack) else { return };
        frame = Registers { pc, inside: pc.saturating_sub(1), sp, fp };
    }
});
