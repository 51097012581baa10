//! Stacks that cannot be followed to their end, because the program's unwind tables are damaged or its frame
//! pointers form a ring. What is reported is the beginning of the right stack, and says that it is not whole.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tcpclose_tests::{expect::shortened, netns, scratch::Scratch, servers::is_missing, tool::Launch};

use super::{Connected, GCC, compile, next_random};

const OBJCOPY: &str = "/usr/bin/objcopy";

/// The functions of the program, innermost first.
const FUNCTIONS: [&str; 3] = ["hang_up", "serve", "main"];

/// The sections with unwind tables: the tables, and the index by which a function's table is found.
const SECTIONS: [&str; 2] = [".eh_frame", ".eh_frame_hdr"];

/// Runs a program that closes when asked to. Returns the reported stack.
fn reported(program: &Path) -> Result<Value> {
    let mut connected = Connected::start(program, &[], Launch::new()?)?;
    connected.program.tell("go")?;
    connected.reported()
}

/// Whether the stack is `close()`, and then the innermost functions of the program; and whether its last frame
/// tells why there are no more of them.
fn ensure_right(frames: &Value) -> Result<usize> {
    let told = frames.as_array().context("no stack")?;
    let shown = || shortened(frames);
    let of_program = told.iter().skip(1).take(FUNCTIONS.len());
    for (frame, function) in of_program.clone().zip(FUNCTIONS) {
        ensure!(frame["symbol"] == function, "{} instead of {function}: {}", frame["symbol"], shown());
    }
    let last = told.last().context("no frames")?;
    ensure!(told.len() > FUNCTIONS.len() || !last["truncated"].is_null(), "not truncated: {}", shown());
    Ok(of_program.len())
}

/// Changes the content of a section, but not its size. The last argument is the state of a random generator.
type Damage = fn(&mut [u8], &mut u64);

/// The second half of tables is that of functions that sort before those of the first half.
const DAMAGES: [Damage; 4] = [
    |bytes, _| bytes.fill(0),
    |bytes, _| bytes.fill(0xff),
    |bytes, random| bytes.fill_with(|| next_random(random).to_be_bytes()[0]),
    |bytes, _| bytes.rotate_left(bytes.len() / 2),
];

/// A copy of a program in which a section is damaged.
fn with_damage(program: &Path, section: &str, damage: impl FnOnce(&mut [u8])) -> Result<PathBuf> {
    let (content, damaged) = (program.with_extension("section"), program.with_extension("damaged"));
    let option = |option: &str| format!("--{option}={section}={}", content.display());
    netns::run(Command::new(OBJCOPY).arg(option("dump-section")).arg(program).arg("/dev/null"))?;
    let mut bytes = fs::read(&content)?;
    damage(&mut bytes);
    fs::write(&content, bytes)?;
    netns::run(Command::new(OBJCOPY).arg(option("update-section")).arg(program).arg(&damaged))?;
    Ok(damaged)
}

#[test]
fn tables_with_damage() -> Result<()> {
    if is_missing(&[GCC, OBJCOPY]) {
        return Ok(());
    }
    let folder = Scratch::new()?;
    let program = compile(GCC, &["-O2", "-g", "-fomit-frame-pointer"], "hang_up.c", &folder)?;
    ensure!(ensure_right(&reported(&program)?)? == FUNCTIONS.len(), "not whole without damage");
    let mut random = 1;
    for section in SECTIONS {
        let mut followed = Vec::new();
        for damage in DAMAGES {
            let frames = reported(&with_damage(&program, section, |bytes| damage(bytes, &mut random))?)?;
            followed.push(ensure_right(&frames).with_context(|| format!("{section}, {followed:?}"))?);
        }
        println!("{section}: functions that were found in spite of the damage: {followed:?}");
        ensure!(followed.iter().any(|found| *found < FUNCTIONS.len()), "{section} is not read");
    }
    Ok(())
}

/// The ring is followed until a caller's part of the stack would be below that of its callee: in a file with
/// tables, which do not cover these functions, and in one without any.
#[test]
fn frame_pointers_that_form_a_ring() -> Result<()> {
    const OPTIONS: [&str; 5] =
        ["-DRING", "-O2", "-fno-omit-frame-pointer", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"];
    if is_missing(&[GCC, OBJCOPY]) {
        return Ok(());
    }
    let folder = Scratch::new()?;
    let with_tables = compile(GCC, &OPTIONS, "hang_up.c", &folder)?;
    let without = with_tables.with_extension("without");
    let mut objcopy = Command::new(OBJCOPY);
    objcopy.args(SECTIONS.map(|section| format!("--remove-section={section}")));
    netns::run(objcopy.arg(&with_tables).arg(&without))?;
    for program in [with_tables, without] {
        let frames = reported(&program)?;
        let last = frames.as_array().and_then(|told| told.last()).context("no frames")?;
        let shown = || format!("{}: {}, {last}", program.display(), shortened(&frames));
        ensure!(ensure_right(&frames)? == FUNCTIONS.len(), "too few: {}", shown());
        let told = frames.as_array().context("no stack")?;
        ensure!(told.len() == FUNCTIONS.len() + 1, "too many: {}", shown());
        ensure!(!last["truncated"].is_null(), "not truncated: {}", shown());
    }
    Ok(())
}
