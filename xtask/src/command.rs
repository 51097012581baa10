//! Runs other programs, and reports which one failed.

use std::{
    env,
    ffi::OsStr,
    io::{self, BufRead, BufReader, IsTerminal, Write},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// Prints a progress message on stderr; stdout belongs to tcpclose.
pub(crate) fn say(message: &str) {
    eprintln!("xtask: {message}");
}

/// Runs a command to its end; an error names the command and how it ended.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {}", line(command)))?;
    if !status.success() {
        bail!("this command failed ({status}): {}", line(command));
    }
    Ok(())
}

/// Runs a cargo build, and leaves out the line `Finished …` that cargo ends with.
pub(crate) fn run_build(command: &mut Command) -> Result<()> {
    if io::stderr().is_terminal() {
        command.env("CARGO_TERM_COLOR", env::var_os("CARGO_TERM_COLOR").unwrap_or_else(|| "always".into()));
    }
    let mut child =
        command.stderr(Stdio::piped()).spawn().with_context(|| format!("cannot start {}", line(command)))?;
    if let Some(stderr) = child.stderr.take() {
        for text in BufReader::new(stderr).split(b'\n') {
            let text = text.context("cannot read the output of cargo")?;
            if !is_last_word(&text) {
                let mut stderr = io::stderr().lock();
                // A closed stderr is no reason to stop the build.
                let _ = stderr.write_all(&text).and_then(|()| stderr.write_all(b"\n"));
            }
        }
    }
    let status = child.wait().with_context(|| format!("cannot wait for {}", line(command)))?;
    if !status.success() {
        bail!("this command failed ({status}): {}", line(command));
    }
    Ok(())
}

/// Whether this is the line that cargo ends a build with, with or without colours.
fn is_last_word(line: &[u8]) -> bool {
    let word = b"Finished";
    let before = line.windows(word.len()).position(|part| part == word);
    before.is_some_and(|before| line[..before].iter().all(|byte| b" \x1b[;m0123456789".contains(byte)))
}

/// The output of a command, or `None` if it does not exist or fails.
pub(crate) fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A command as one would type it, preceded by the variables that are set for it.
pub(crate) fn line(command: &Command) -> String {
    let variables = command.get_envs().filter_map(|(name, value)| {
        // This is set for every build, and of no use to the reader.
        let shown = name != "CARGO_TARGET_DIR" && name != "CARGO_TERM_COLOR";
        value.filter(|_| shown).map(|value| format!("{}={}", name.display(), quote(value)))
    });
    let words = std::iter::once(command.get_program()).chain(command.get_args()).map(quote);
    variables.chain(words).collect::<Vec<_>>().join(" ")
}

fn quote(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%*".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The path of a program. It also searches the directories of administration tools, which a user's PATH on
/// Debian lacks.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

/// Whether this is a run of a CI system, as all of them set it: nobody reads messages, and the machine is
/// thrown away.
pub(crate) fn is_ci() -> bool {
    env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false")
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    // The owner of a process's directory in /proc is its effective user.
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// The path of sudo, or an error that explains what to do without it.
pub(crate) fn sudo(purpose: &str) -> Result<PathBuf> {
    find("sudo").with_context(|| {
        format!("{purpose} needs root, and there is no sudo here: run this as root, or install sudo")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_it_would_be_typed() {
        let mut command = Command::new("cargo");
        command
            .args(["build", "--config", "a b", "it's"])
            .env("RUSTFLAGS", "-C debuginfo=2")
            .env_remove("RUSTC");
        assert_eq!(line(&command), r"RUSTFLAGS='-C debuginfo=2' cargo build --config 'a b' 'it'\''s'");
    }

    #[test]
    fn only_cargos_last_word_is_left_out() {
        assert!(is_last_word(b"    Finished `release` profile [optimized] target(s) in 0.03s"));
        assert!(is_last_word(b"\x1b[1m\x1b[92m    Finished\x1b[0m `release` profile"));
        assert!(!is_last_word(b"   Compiling xtask v0.1.0"));
        assert!(!is_last_word(b"12 |     Finished,"));
    }

    #[test]
    fn finds_programs_only_where_they_are() {
        assert!(find("sh").is_some());
        assert_eq!(find("there-is-no-such-program"), None);
    }
}
