use super::*;

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};

use crate::processes::Processes;

/// The variable that makes the test below wait, in a process of its own.
const WAIT: &str = "TCPCLOSE_TEST_WAIT";

const LANDMARK_LINE: u32 = line!() + 3;
/// A function to be found. The compiler must neither inline it nor merge it with another one.
#[inline(never)]
fn landmark(number: u32) -> u32 {
    std::hint::black_box(number).wrapping_mul(31_337)
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "this is about functions that are merged into others")]
fn deepest(number: u32) -> u32 {
    std::hint::black_box(number).rotate_left(7)
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "this is about functions that are merged into others")]
fn merged(number: u32) -> u32 {
    deepest(number).wrapping_add(std::hint::black_box(5))
}

const MERGED_CALL_LINE: u32 = line!() + 3;
#[inline(never)]
fn host_of_merged(number: u32) -> u32 {
    merged(number).wrapping_add(std::hint::black_box(3))
}

fn address_of(function: fn(u32) -> u32) -> u64 {
    std::hint::black_box(function)(1);
    function as usize as u64
}

fn own_image() -> Arc<Image> {
    Processes::new().image(std::process::id(), 1).unwrap()
}

fn scratch(name: &str) -> PathBuf {
    let directory = std::env::temp_dir().join(format!("tcpclose-symbolize-{}-{name}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    directory
}

fn is_landmark(frame: &Frame) -> bool {
    frame.symbol.as_deref().is_some_and(|symbol| symbol.ends_with("tests::landmark"))
}

/// This test program again, in a process that waits.
struct WaitingTest {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl WaitingTest {
    fn start(program: &Path) -> Self {
        let path = module_path!();
        let test = format!("{}::waits_for_the_end_of_its_input", path.split_once("::").unwrap().1);
        let mut child = Command::new(program)
            .args(["--exact", &test, "--nocapture"])
            .env(WAIT, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.as_mut().unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"READY") {
            let mut byte = [0];
            stdout.read_exact(&mut byte).expect("the test ended without having waited");
            seen.push(byte[0]);
        }
        let stdin = child.stdin.take();
        Self { child, stdin }
    }

    fn end(&mut self) {
        self.stdin.take();
        self.child.wait().unwrap();
    }
}

impl Drop for WaitingTest {
    fn drop(&mut self) {
        self.end();
    }
}

#[test]
fn waits_for_the_end_of_its_input() {
    if std::env::var_os(WAIT).is_some() {
        std::io::stdout().write_all(b"READY").unwrap();
        std::io::stdout().flush().unwrap();
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    }
}

/// Where `landmark` is in another process of this program, or of a copy.
fn landmark_in(image: &Image) -> u64 {
    let here = address_of(landmark);
    let own = own_image();
    let (own, exe) = (own.mapping(here).unwrap(), Path::new(image.exe.as_deref().unwrap()));
    let is_other = |backing: &Backing| matches!(backing, Backing::File { path, .. } if **path == *exe);
    let other = image.mappings.iter().find(|mapping| is_other(&mapping.backing)).unwrap();
    here - own.base + other.base
}

#[test]
fn names_functions_of_this_process() {
    let image = own_image();
    let mut symbolizer = Symbolizer::new();
    let here = address_of(landmark);
    let frames = symbolizer.user(Some(&image), &[here + 1, here, here + 1, 8]);
    assert_eq!(frames.len(), 4, "{frames:#?}");
    assert!(is_landmark(&frames[0]), "{frames:#?}");
    assert_eq!(frames[0].address, format!("{:#x}", here + 1));
    assert_eq!(frames[0].offset, Some(1));
    assert_eq!(frames[0].line, Some(LANDMARK_LINE));
    assert!(frames[0].file.as_deref().unwrap().ends_with("symbolize/tests.rs"), "{frames:#?}");
    assert_eq!(frames[0].module, image.exe);
    assert!(!frames[0].inlined);
    assert!(!is_landmark(&frames[1]), "a return address belongs to the call before it");
    assert!(is_landmark(&frames[2]));
    assert_eq!(frames[2].offset, Some(1), "of the address that is reported");
    assert_eq!(frames[3], Frame::nameless(8), "nothing is mapped there");
    // The second result comes from the cache.
    assert_eq!(symbolizer.user(Some(&image), &[here + 1, here, here + 1, 8]), frames);
    assert_eq!(symbolizer.user(None, &[here, 9]), [Frame::nameless(here), Frame::nameless(9)]);
}

#[test]
fn tells_merged_functions_apart() {
    let image = own_image();
    let mut symbolizer = Symbolizer::new();
    let start = address_of(host_of_merged);
    let is = |frame: &Frame, name: &str| frame.symbol.as_deref().is_some_and(|symbol| symbol.ends_with(name));
    let stacks = (start..start + 256).map(|address| symbolizer.user(Some(&image), &[address]));
    let found = stacks.into_iter().find(|frames| frames.iter().any(|frame| is(frame, "::deepest")));
    let frames = found.expect("deepest() is nowhere");
    // Functions of the standard library may have been merged into it in turn.
    let position = frames.iter().position(|frame| is(frame, "::deepest")).unwrap();
    let [inner, middle, outer] = &frames[position..] else { panic!("{frames:#?}") };
    assert!(inner.inlined && inner.offset.is_none(), "{frames:#?}");
    assert!(middle.inlined && is(middle, "::merged"), "{frames:#?}");
    assert!(!outer.inlined && outer.offset.is_some() && is(outer, "::host_of_merged"), "{frames:#?}");
    assert_eq!(outer.line, Some(MERGED_CALL_LINE), "the line of the call");
    assert!(inner.line < middle.line && middle.line < outer.line, "{frames:#?}");
    assert_eq!((&inner.address, &middle.address), (&outer.address, &outer.address));
}

#[test]
fn names_functions_of_a_process_that_has_ended() {
    let mut processes = Processes::new();
    let mut waiting = WaitingTest::start(&std::env::current_exe().unwrap());
    let pid = waiting.child.id();
    processes.notice(pid, 1, None);
    waiting.end();
    let image = processes.image(pid, 1).unwrap();
    assert!(!image.is_running());
    let frames = Symbolizer::new().user(Some(&image), &[landmark_in(&image)]);
    assert!(is_landmark(&frames[0]), "{frames:#?}");
}

#[test]
fn never_reads_a_file_that_took_the_place_of_another() {
    let directory = scratch("replaced");
    let program = directory.join("program");
    let newer = directory.join("newer");
    let original = std::env::current_exe().unwrap();
    for noticed_late in [false, true] {
        fs::copy(&original, &program).unwrap();
        fs::copy(&original, &newer).unwrap();
        let mut processes = Processes::new();
        let mut waiting = WaitingTest::start(&program);
        let pid = waiting.child.id();
        if !noticed_late {
            processes.notice(pid, 1, None);
        }
        fs::rename(&newer, &program).unwrap();
        if noticed_late {
            processes.notice(pid, 1, None);
        }
        waiting.end();
        let image = processes.image(pid, 1).unwrap();
        assert_eq!(image.exe.as_deref(), program.to_str());
        let address = landmark_in(&image);
        let frames = Symbolizer::new().user(Some(&image), &[address]);
        assert_eq!(frames[0].module.as_deref(), program.to_str());
        if noticed_late {
            // Its path did not lead to it, so it was kept open.
            assert!(is_landmark(&frames[0]), "{frames:#?}");
        } else {
            assert_eq!((&frames[0].symbol, frames[0].line), (&None, None), "{frames:#?}");
            assert_eq!(frames[0].offset, Some(address - image.mapping(address).unwrap().base));
        }
    }
    fs::remove_dir_all(directory).unwrap();
}

#[test]
fn never_reads_a_file_that_was_written_to() {
    let directory = scratch("written");
    let program = directory.join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let mut processes = Processes::new();
    let mut waiting = WaitingTest::start(&program);
    let image = processes.image(waiting.child.id(), 1).unwrap();
    waiting.end();
    let mut symbolizer = Symbolizer::new();
    let address = landmark_in(&image);
    assert!(is_landmark(&symbolizer.user(Some(&image), &[address])[0]));
    File::options().write(true).open(&program).unwrap().set_len(4096).unwrap();
    assert!(is_landmark(&symbolizer.user(Some(&image), &[address])[0]), "known from before");
    assert_eq!(symbolizer.user(Some(&image), &[address + 1])[0].symbol, None);
    assert_eq!(Symbolizer::new().user(Some(&image), &[address])[0].symbol, None);
    fs::remove_dir_all(directory).unwrap();
}

#[test]
fn reads_a_removed_file_while_it_runs() {
    let directory = scratch("removed");
    let program = directory.join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let mut processes = Processes::new();
    let waiting = WaitingTest::start(&program);
    fs::remove_dir_all(directory).unwrap();
    let image = processes.image(waiting.child.id(), 1).unwrap();
    let mut symbolizer = Symbolizer::new();
    let frames = symbolizer.user(Some(&image), &[landmark_in(&image)]);
    assert!(is_landmark(&frames[0]), "{frames:#?}");
    symbolizer.sweep();
    assert!(!symbolizer.files.is_empty(), "it is still mapped");
    drop((image, processes));
    symbolizer.sweep();
    assert!(symbolizer.files.is_empty());
}

#[test]
fn names_functions_of_the_vdso() {
    let image = own_image();
    let Some(vdso) = image.mappings.iter().find(|it| matches!(it.backing, Backing::Vdso)) else {
        return; // Not every kernel maps one.
    };
    let mut symbolizer = Symbolizer::new();
    let frames: Vec<Frame> = (vdso.start..vdso.end)
        .step_by(8)
        .flat_map(|address| symbolizer.user(Some(&image), &[address]))
        .collect();
    assert!(frames.iter().all(|frame| frame.module.as_deref() == Some("[vdso]")));
    let named = frames.iter().filter_map(|frame| frame.symbol.as_deref());
    assert!(named.into_iter().any(|symbol| symbol.contains("clock_gettime")));
    assert!(frames.iter().all(|frame| frame.symbol.is_some() || frame.offset.is_some()));
}

#[test]
fn names_functions_compiled_at_run_time() {
    let mut image = Image::clone(&own_image());
    let mapping =
        Mapping { start: 0x10000, end: 0x20000, offset: 0, base: 0x10000, backing: Backing::Anonymous };
    image.mappings.insert(0, mapping);
    let path = PathBuf::from(format!("/tmp/perf-{}.map", std::process::id()));
    let mut symbolizer = Symbolizer::new();
    let name = |symbolizer: &mut Symbolizer, image: &Image| {
        let frame = symbolizer.user(Some(image), &[0x10110]).remove(0);
        (frame.symbol, frame.offset, frame.module)
    };
    assert_eq!(name(&mut symbolizer, &image), (None, None, None));

    // A link in a directory that all may write to is not followed.
    let elsewhere = scratch("perf").join("map");
    fs::write(&elsewhere, "10100 100 planted\n").unwrap();
    std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
    assert_eq!(name(&mut symbolizer, &image), (None, None, None));
    fs::remove_file(&path).unwrap();

    fs::write(&path, "10100 100 LazyCompile:~end /app/server.js:12\n").unwrap();
    let expected = (Some("LazyCompile:~end /app/server.js:12".to_owned()), Some(0x10), None);
    assert_eq!(name(&mut symbolizer, &image), expected);

    // The JVM rewrites the whole file, and may have placed other code at the same addresses.
    fs::write(&path, "10000 100 Interpreter\n10100 80 java.lang.String Prices.price(int)\n").unwrap();
    let expected = (Some("java.lang.String Prices.price(int)".to_owned()), Some(0x10), None);
    assert_eq!(name(&mut symbolizer, &image), expected);

    // Once the process has ended, its id and its file may belong to another process.
    fs::write(&path, "10100 100 somebody_elses_function_altogether__________\n10100 100 b\n").unwrap();
    image.started = None;
    assert_eq!(name(&mut symbolizer, &image), expected);
    fs::remove_file(&path).unwrap();
    fs::remove_dir_all(elsewhere.parent().unwrap()).unwrap();
}

#[test]
fn names_functions_of_the_kernel() {
    let text = String::from_utf8_lossy(&fs::read("/proc/kallsyms").unwrap_or_default()).into_owned();
    let line = text.lines().find(|line| line.ends_with(" tcp_close"));
    let mut symbolizer = Symbolizer::new();
    let frames = match line.map(|line| u64::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap()) {
        // Hidden, or no TCP.
        None | Some(0) => symbolizer.kernel(&[1, u64::MAX]),
        Some(address) => {
            let frames = symbolizer.kernel(&[address, address + 5, address]);
            assert_eq!((frames[0].symbol.as_deref(), frames[0].offset), (Some("tcp_close"), Some(0)));
            assert_eq!((frames[1].symbol.as_deref(), frames[1].offset), (Some("tcp_close"), Some(5)));
            assert_ne!(frames[2].symbol.as_deref(), Some("tcp_close"));
            symbolizer.kernel(&[1, u64::MAX])
        }
    };
    assert_eq!(frames, [Frame::nameless(1), Frame::nameless(u64::MAX)]);
}

/// Returns what blazesym finds at an address of a file.
fn symbol_in(path: &Path, address: u64) -> Option<(String, u64)> {
    let file = File::open(path).unwrap();
    let pieces = query(&builder().build(), &source(&file, false), Input::VirtOffset(address))?;
    Some((pieces[0].symbol.clone()?, pieces[0].offset?))
}

#[test]
fn takes_no_symbol_beyond_its_end() {
    let directory = scratch("stripped");
    let path = directory.join("stripped");
    fs::write(&path, minimal_elf()).unwrap();
    assert_eq!(symbol_in(&path, 0x1000), Some(("exported".into(), 0)));
    assert_eq!(symbol_in(&path, 0x100f), Some(("exported".into(), 15)));
    assert_eq!(symbol_in(&path, 0x1010), None);
    assert_eq!(symbol_in(&path, 0x1104), None, "a symbol without a size could end anywhere");
    assert_eq!(symbol_in(&path, 0xfff), None);
    fs::remove_dir_all(directory).unwrap();
}

#[test]
fn survives_broken_files() {
    let directory = scratch("broken");
    let path = directory.join("broken");
    let whole = minimal_elf();
    for index in 0..whole.len() {
        for value in [0, 0x7f, 0xff] {
            let mut bent = whole.clone();
            bent[index] = value;
            fs::write(&path, &bent).unwrap();
            let file = File::open(&path).unwrap();
            let _ = Headers::read(&file);
            for with_lines in [false, true] {
                let _ = query(&builder().build(), &source(&file, with_lines), Input::VirtOffset(0x1104));
            }
        }
    }
    fs::remove_dir_all(directory).unwrap();
}

/// A 64-bit ELF file with a symbol table and nothing else: `exported`, 16 bytes at 0x1000, and `sizeless` at
/// 0x1100.
fn minimal_elf() -> Vec<u8> {
    fn put(out: &mut Vec<u8>, fields: &[(u64, usize)]) {
        for (value, size) in fields {
            let bytes = value.to_le_bytes();
            out.extend(&bytes[..*size]);
        }
    }
    let names = b"\0.symtab\0.strtab\0exported\0sizeless\0";
    let (names_at, symbols_at, sections_at) = (64, 104, 104 + 3 * 24);
    let mut elf = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(
        &mut elf,
        &[(3, 2), (62, 2), (1, 4), (0, 8), (0, 8), (sections_at, 8), (0, 4), (64, 2), (56, 2), (0, 2)],
    );
    put(&mut elf, &[(64, 2), (3, 2), (2, 2)]);
    elf.extend(names);
    elf.resize(104, 0);
    put(&mut elf, &[(0, 24 - 16), (0, 8), (0, 8)]);
    put(&mut elf, &[(17, 4), (0x12, 1), (0, 1), (1, 2), (0x1000, 8), (16, 8)]);
    put(&mut elf, &[(26, 4), (0x12, 1), (0, 1), (1, 2), (0x1100, 8), (0, 8)]);
    put(&mut elf, &[(0, 8); 8]);
    let section = |out: &mut Vec<u8>, name, kind, at, size, link, entry| {
        put(
            out,
            &[
                (name, 4),
                (kind, 4),
                (0, 8),
                (0, 8),
                (at, 8),
                (size, 8),
                (link, 4),
                (1, 4),
                (8, 8),
                (entry, 8),
            ],
        );
    };
    section(&mut elf, 1, 2, symbols_at, 3 * 24, 2, 24);
    section(&mut elf, 9, 3, names_at, names.len() as u64, 0, 0);
    elf
}
