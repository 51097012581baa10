//! Runs a test program on a host: `rerun NAME PROGRAM [ARGUMENT…]`. See [`tcpclose_tests::rerun`].

use std::{
    env, io,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result};
use tcpclose_tests::rerun::{self, Excuse};

fn main() -> Result<ExitCode> {
    let mut arguments = env::args().skip(1);
    let name = arguments.next().context("the name of the test program is missing")?;
    let program = arguments.next().context("the path of the test program is missing")?;
    let arguments: Vec<_> = arguments.collect();
    let excuse = Excuse::of_host(&name);
    let command = || {
        let mut command = Command::new(&program);
        rerun::share_processors(&mut command);
        command
    };
    let status = rerun::run(&name, command, &arguments, &excuse, &mut io::stdout())?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
