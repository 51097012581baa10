//! `tcpclose man` and `tcpclose completions`: made from the definitions in [`crate::cli`].

use std::io::{self, ErrorKind, Write as _};

use anyhow::Result;
use clap::{Command, CommandFactory as _};
use clap_complete::Shell;
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

use crate::cli::{Cli, EXAMPLES, EXIT_STATUS};

/// Writes the manual page to the standard output, as roff: one page for all subcommands.
///
/// # Errors
/// The standard output cannot be written. It is no error if the reader has closed the pipe.
pub fn page() -> Result<()> {
    print(&render()?)
}

/// Writes the completions for a shell to the standard output.
///
/// # Errors
/// The standard output cannot be written. It is no error if the reader has closed the pipe.
pub fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tcpclose", &mut script);
    print(&script)
}

fn print(bytes: &[u8]) -> Result<()> {
    match io::stdout().lock().write_all(bytes) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn render() -> io::Result<Vec<u8>> {
    let mut command = Cli::command().mut_args(|arg| arg.hide_short_help(false));
    command.build();
    let usage = "tcpclose [OPTIONS] [-- COMMAND...]\ntcpclose SUBCOMMAND [OPTIONS]";
    let man = Man::new(command.clone().override_usage(usage)).manual("User Commands");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    let mut roff = Roff::new();
    roff.control("SH", ["SUBCOMMANDS"]);
    roff.to_writer(&mut page)?;
    for subcommand in command.get_subcommands().filter(|subcommand| subcommand.get_name() != "help") {
        page.extend(section(subcommand)?);
    }
    let mut roff = Roff::new();
    for (title, rows) in [("EXAMPLES", EXAMPLES), ("EXIT STATUS", EXIT_STATUS)] {
        roff.control("SH", [title]);
        for (term, meaning) in rows {
            roff.control("TP", []);
            roff.text([bold(*term)]).text([roman(*meaning)]);
        }
    }
    roff.to_writer(&mut page)?;
    Ok(page)
}

/// The subsection of one subcommand: the sections that it would have on a page of its own, without their
/// headings.
fn section(subcommand: &Command) -> io::Result<Vec<u8>> {
    // Every subcommand has --help, which need not be repeated.
    let mut subcommand = subcommand.clone().mut_args(|arg| {
        let is_hidden = arg.is_hide_set() || arg.get_id() == "help";
        arg.hide(is_hidden)
    });
    let usage = subcommand.render_usage().to_string();
    let mut roff = Roff::new();
    roff.control("SS", [usage.trim_start_matches("Usage: ")]);
    let mut section = Vec::new();
    roff.to_writer(&mut section)?;
    let is_trace = subcommand.get_name() == "trace";
    let man = Man::new(subcommand);
    let mut rest = Vec::new();
    man.render_description_section(&mut rest)?;
    if is_trace {
        let mut roff = Roff::new();
        roff.control("PP", []).text([roman("Its options are those above.")]);
        roff.to_writer(&mut rest)?;
    } else {
        man.render_options_section(&mut rest)?;
    }
    let lines = rest.split_inclusive(|byte| *byte == b'\n');
    section.extend(lines.filter(|line| !line.starts_with(b".SH ")).flatten());
    Ok(section)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        process::Command as Process,
    };

    use super::*;

    /// The options of a command that are shown to users, by their names as typed: `-o`, `--output`.
    fn options(command: &Command) -> BTreeSet<String> {
        let of = |arg: &clap::Arg| {
            let short = arg.get_short().map(|name| format!("-{name}"));
            [short, arg.get_long().map(|name| format!("--{name}"))].into_iter().flatten()
        };
        command.get_arguments().filter(|arg| !arg.is_hide_set()).flat_map(of).collect()
    }

    /// The options that a part of the page explains. They are in bold, in the line below a `.TP`.
    fn explained(part: &str) -> BTreeSet<String> {
        let lines: Vec<&str> = part.lines().collect();
        let terms = lines.windows(2).filter(|pair| pair[0] == ".TP").map(|pair| pair[1]);
        let bold =
            terms.flat_map(|term| term.split("\\fB").skip(1).filter_map(|text| text.split_once("\\fR")));
        bold.map(|(name, _)| name.to_owned()).filter(|name| name.starts_with('-')).collect()
    }

    /// Each subcommand has a part of its own, which explains all of its options and no others.
    #[test]
    fn the_page_has_every_subcommand_and_option() {
        let page = String::from_utf8(render().unwrap()).unwrap().replace("\\-", "-");
        let (common, subcommands) = page.split_once(".SH SUBCOMMANDS").unwrap();
        let (subcommands, _) = subcommands.split_once(".SH EXAMPLES").unwrap();
        let mut parts: BTreeMap<&str, &str> = subcommands
            .split(".SS \"tcpclose ")
            .skip(1)
            .map(|part| (part.split([' ', '"']).next().unwrap(), part))
            .collect();

        let mut command = Cli::command();
        command.build();
        assert_eq!(explained(common), options(&command), "\n{common}");
        for subcommand in command.get_subcommands().filter(|subcommand| subcommand.get_name() != "help") {
            let name = subcommand.get_name();
            let part = parts.remove(name).unwrap_or_else(|| panic!("{name} is missing:\n{subcommands}"));
            let mut expected = options(subcommand);
            // They are explained once, with the options above.
            expected.remove("-h");
            expected.remove("--help");
            if name == "trace" {
                assert!(expected.is_subset(&explained(common)), "{expected:?}");
                expected.clear();
            }
            assert_eq!(explained(part), expected, "{name}:\n{part}");
        }
        assert!(parts.is_empty(), "there are no such subcommands: {parts:?}");
    }

    /// `groff` reports unknown requests and the like with `-ww`.
    #[test]
    fn the_page_is_correct_roff() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), render().unwrap()).unwrap();
        let groff =
            Process::new("groff").args(["-man", "-ww", "-z", "-Kutf8", "-Tutf8"]).arg(file.path()).output();
        let Ok(groff) = groff else {
            eprintln!("skipped: groff is not installed");
            return;
        };
        let complaints = String::from_utf8_lossy(&groff.stderr);
        assert!(groff.status.success() && complaints.is_empty(), "{complaints}");
    }

    #[test]
    fn every_shell_completes_every_option() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tcpclose", &mut script);
            let script = String::from_utf8(script).unwrap();
            let command = Cli::command();
            let long = command.get_subcommands().flat_map(options).chain(options(&command));
            for option in long.filter(|option| option.starts_with("--")) {
                // fish has `-l name` for `--name`.
                let (long, fish) = (option.as_str(), format!("-l {}", &option[2..]));
                assert!(script.contains(long) || script.contains(&fish), "{shell}: {option}");
            }
        }
    }
}
