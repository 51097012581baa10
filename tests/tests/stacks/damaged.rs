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

/// A copy of a program in which a section has another content.
fn with_section(program: &Path, section: &str, damage: &mut dyn FnMut(&mut Vec<u8>)) -> Result<PathBuf> {
    let (content, damaged) = (program.with_extension("section"), program.with_extension("damaged"));
    let option = |option: &str| format!("--{option}={section}={}", content.display());
    netns::run(Command::new(OBJCOPY).arg(option("dump-section")).arg(program).arg("/dev/null"))?;
    let mut bytes = fs::read(&content)?;
    let length = bytes.len();
    damage(&mut bytes);
    ensure!(bytes.len() == length, "the section would move the others");
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
        let mut damages: [&mut dyn FnMut(&mut Vec<u8>); 4] = [
            &mut |bytes| bytes.fill(0),
            &mut |bytes| bytes.fill(0xff),
            &mut |bytes| bytes.fill_with(|| next_random(&mut random).to_be_bytes()[0]),
            // The second half belongs to functions that sort before the first half's.
            &mut |bytes| {
                let half = bytes.len() / 2;
                bytes.rotate_left(half);
            },
        ];
        for damage in &mut damages {
            let frames = reported(&with_section(&program, section, *damage)?)?;
            followed.push(ensure_right(&frames).with_context(|| format!("{section}, {followed:?}"))?);
        }
        println!("{section}: functions that were found in spite of the damage: {followed:?}");
        ensure!(followed.iter().any(|found| *found < FUNCTIONS.len()), "{section} is not read");
    }
    Ok(())
}

/// The ring is followed until the stack would grow downwards.
#[test]
fn frame_pointers_that_form_a_ring() -> Result<()> {
    const OPTIONS: [&str; 4] =
        ["-O2", "-fno-omit-frame-pointer", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"];
    if is_missing(&[GCC]) {
        return Ok(());
    }
    let folder = Scratch::new()?;
    let program = compile(GCC, &OPTIONS, "wraps.c", &folder)?;
    let frames = reported(&program)?;
    ensure!(ensure_right(&frames)? == FUNCTIONS.len(), "too few: {}", shortened(&frames));
    let told = frames.as_array().context("no stack")?;
    let last = told.last().context("no frames")?;
    ensure!(told.len() == FUNCTIONS.len() + 1, "too many: {}", shortened(&frames));
    ensure!(!last["truncated"].is_null(), "not truncated: {}", shortened(&frames));
    Ok(())
}
