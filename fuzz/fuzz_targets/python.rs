//! The structures of CPython, in the memory of a process that continues to run while they are read, or that
//! only pretends to be a Python program. The input consists of the version, of the runtime and the memory
//! that it leads to, and of the frames that the kernel half lists.
#![no_main]

use std::{fs::File, os::unix::fs::FileExt as _, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use tcpclose_common::{
    interpreter::{IDENTITY_WORDS, Interpreter, MAX_INTERPRETED, SEED, mix},
    record::{Interpreted, InterpretedFrame},
};
use tcpclose_fuzz::{Symbols, word};
use tcpclose_user::stacks::{
    memory::{ProcessMemory, StackMemory},
    runtimes::python,
};
use zerocopy::FromZeros as _;

/// Where the input is in the memory. Before it are the version and the type of code objects.
const DATA: u64 = 0x1000;
/// Bytes of input.
const SIZE: usize = 0x2000;

const VERSION: u64 = 0x100;
const CODE_TYPE: u64 = 0x200;
const LOOP: u64 = 0x300;

/// The upper half of `Py_Version`; the first two versions differ in their symbols.
const VERSIONS: [u64; 6] = [0x309, 0x30a, 0x30b, 0x30c, 0x30d, 0x30e];

/// The symbols that the files of CPython export, and the first versions with them.
const SYMBOLS: [(&str, u64, u64); 6] = [
    ("_PyRuntime", DATA, 0x309),
    ("PyCode_Type", CODE_TYPE, 0x309),
    ("_PyEval_EvalFrameDefault", LOOP, 0x309),
    ("PyFrame_GetCode", LOOP, 0x309),
    ("PyModule_AddObjectRef", LOOP, 0x30a),
    ("Py_Version", VERSION, 0x30b),
];

/// The memory: offsets in this file are addresses.
static MEMORY: LazyLock<File> = LazyLock::new(|| {
    let path = format!("/dev/shm/tcpclose-fuzz-python-{}", std::process::id());
    let file = File::options().read(true).write(true).create_new(true).open(&path).expect("a new file");
    std::fs::remove_file(&path).expect("it was just made");
    file
});

/// The hash of a code object, computed as in the kernel half.
fn identity(memory: &ProcessMemory, interpreter: &Interpreter, code: u64) -> u64 {
    let mut bytes = [0; 8 * IDENTITY_WORDS];
    if memory.read(code.wrapping_add(interpreter.identity.into()), &mut bytes).is_none() {
        return 0;
    }
    let count = interpreter.identity_words as usize;
    let words = bytes.as_chunks().0.iter().enumerate();
    words.fold(SEED, |hash, (at, word)| mix(hash, if at < count { u64::from_ne_bytes(*word) } else { 0 }))
}

fuzz_target!(|data: &[u8]| {
    let [kind, count, data @ ..] = data else { return };
    let version = VERSIONS[usize::from(*kind) % VERSIONS.len()];
    let mut memory = vec![0; SIZE];
    let length = data.len().min(SIZE);
    memory[..length].copy_from_slice(&data[..length]);
    if version >= 0x30d {
        // Otherwise no input would get beyond this point.
        memory[..8].copy_from_slice(b"xdebugpy");
        memory[8..16].copy_from_slice(&(version << 16).to_ne_bytes());
        memory[16..24].fill(0);
    }
    MEMORY.write_all_at(&(version << 16).to_ne_bytes(), VERSION).expect("/dev/shm has room");
    MEMORY.write_all_at(&memory, DATA).expect("/dev/shm has room");

    let symbols = SYMBOLS.iter().filter(|(_, _, since)| version >= *since);
    let symbols =
        symbols.map(|(name, address, _)| ((*name).to_owned(), *address..*address + 0x100)).collect();
    let program = python::recognize(&Symbols(symbols)).expect("the symbols are those of CPython");
    let process = || ProcessMemory::from(MEMORY.try_clone().expect("a descriptor"));
    let Some(mut runtime) = program.attach(1, process(), 0) else { return };
    let interpreter = runtime.interpreter().expect("it is one");

    // The frames are the last words of the input; the stack is all of it.
    let count = usize::from(*count) % (MAX_INTERPRETED + 1);
    let mut listed = &data[data.len().saturating_sub(8 * (1 + 4 * count))..];
    let mut list = Interpreted::new_zeroed();
    list.call = word(&mut listed);
    list.count = count as u32;
    list.is_cut = u32::from(count == MAX_INTERPRETED);
    for frame in &mut list.frames[..count] {
        let [address, code, instruction, kind] = [(); 4].map(|()| word(&mut listed));
        let identity = identity(&process(), &interpreter, code);
        *frame = InterpretedFrame { address, code, instruction, kind, identity };
    }
    runtime.interpreted(&list, &StackMemory::new(DATA, &memory));
    runtime.is_loop(list.call);
});
