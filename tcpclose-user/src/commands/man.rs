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
/// The standard output cannot be written. A reader that has gone is none.
pub fn page() -> Result<()> {
    print(&render()?)
}

/// Writes the completions for a shell to the standard output.
///
/// # Errors
/// The standard output cannot be written. A reader that has gone is none.
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

/// The subsection of one subcommand: its sections of a page of its own, without their headings.
fn section(subcommand: &Command) -> io::Result<Vec<u8>> {
    // Every subcommand has --help, which need not be repeated.
    let mut subcommand = subcommand.clone().mut_args(|arg| {
        let is_help = arg.get_id() == "help";
        arg.hide(is_help)
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
    use std::process::Command as Process;

    use super::*;

    /// Every option of every subcommand, by the name that a user types.
    fn options(command: &Command) -> Vec<String> {
        let own = command.get_arguments().filter(|arg| !arg.is_hide_set()).filter_map(clap::Arg::get_long);
        let own = own.map(|name| format!("--{name}"));
        own.chain(command.get_subcommands().flat_map(options)).collect()
    }

    #[test]
    fn the_page_has_every_subcommand_and_option() {
        let page = String::from_utf8(render().unwrap()).unwrap().replace("\\-", "-");
        let command = Cli::command();
        for option in options(&command) {
            assert!(page.contains(&option), "{option} is missing:\n{page}");
        }
        for subcommand in command.get_subcommands() {
            let heading = format!(".SS \"tcpclose {}", subcommand.get_name());
            assert!(page.contains(&heading), "{heading} is missing:\n{page}");
        }
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
            for option in options(&Cli::command()) {
                // fish has `-l name` for `--name`.
                let (long, fish) = (option.as_str(), format!("-l {}", &option[2..]));
                assert!(script.contains(long) || script.contains(&fish), "{shell}: {option}");
            }
        }
    }
}
