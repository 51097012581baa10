//! The heap of V8, in the memory of a process that continues to run while it is read, or that only pretends to
//! be a JavaScript program. The input consists of the version, of the heap, and of the addresses of
//! instructions and frame pointers of some frames.
#![no_main]

use std::{fs::File, ops::Range, os::unix::fs::FileExt as _, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use tcpclose_fuzz::{Symbols, word};
use tcpclose_user::stacks::{
    memory::{ProcessMemory, StackMemory},
    runtimes::{CodeMapping, CodeOwner, Registers, v8},
};

/// Where the heap is in the memory, and the builtin that runs interpreted functions. The variables that
/// describe the heap begin at 0.
const HEAP: u64 = 0x1000;
const INTERPRETER: Range<u64> = 0x800..0x880;
/// Bytes of the heap.
const SIZE: usize = 0x4000;
/// The number of frames.
const FRAMES: usize = 5;

/// The variables of two versions.
const VARIABLES: [&str; 2] = [
    include_str!("../../tcpclose-user/fixtures/v8/20.20.variables"),
    include_str!("../../tcpclose-user/fixtures/v8/24.21.variables"),
];

/// The names, values and addresses of variables: each is a word at its index.
fn variables(list: &'static str) -> impl Iterator<Item = (&'static str, i32, u64)> {
    list.lines().zip((0..).step_by(8)).map(|(line, address)| {
        let (name, value) = line.split_once(' ').expect("a name and a value");
        (name, value.parse().expect("a number"), address)
    })
}

/// A process's memory, for each version: offsets in these files are addresses.
static MEMORY: LazyLock<[File; VARIABLES.len()]> = LazyLock::new(|| {
    VARIABLES.map(|list| {
        let version = list.len();
        let path = format!("/dev/shm/tcpclose-fuzz-v8-{}-{version}", std::process::id());
        let file = File::options().read(true).write(true).create_new(true).open(&path).expect("a new file");
        std::fs::remove_file(&path).expect("it was just made");
        for (_, value, address) in variables(list) {
            file.write_all_at(&value.to_ne_bytes(), address).expect("/dev/shm has room");
        }
        file
    })
});

fuzz_target!(|data: &[u8]| {
    let [kind, data @ ..] = data else { return };
    let version = usize::from(*kind) % VARIABLES.len();
    let file = &MEMORY[version];
    let mut memory = vec![0; SIZE];
    let length = data.len().min(SIZE);
    memory[..length].copy_from_slice(&data[..length]);
    file.write_all_at(&memory, HEAP).expect("/dev/shm has room");

    let symbols = variables(VARIABLES[version])
        .map(|(name, _, address)| (format!("v8dbg_{name}"), address..address + 4))
        .chain([("Builtins_InterpreterEntryTrampoline".to_owned(), INTERPRETER)]);
    let binary = v8::recognize(&Symbols(symbols.collect())).expect("the symbols are those of V8");
    let process = ProcessMemory::from(file.try_clone().expect("a descriptor"));
    let mut runtime = binary.attach(0, process, 0).expect("the variables are those of V8");
    runtime.mapped(&[
        CodeMapping { range: 0..HEAP, owner: CodeOwner::Own { bias: 0 } },
        CodeMapping { range: HEAP..HEAP + SIZE as u64, owner: CodeOwner::Generated },
    ]);
    // The frames are the last words of the input; the stack is all of it.
    let frames = &data[data.len().saturating_sub(16 * FRAMES)..];
    let stack = StackMemory::new(HEAP, &memory);
    // Twice, because functions are remembered.
    for _ in 0..2 {
        runtime.begin_stack();
        let mut frames = frames;
        for _ in 0..FRAMES {
            let (pc, fp) = (word(&mut frames), word(&mut frames));
            let inside = pc.saturating_sub(1);
            if runtime.owns(inside) {
                runtime.name(&Registers { pc, inside, sp: fp, fp }, &stack);
            }
        }
    }
});
