//! Reads the command line, runs what it asks for, and turns errors into words and exit statuses.

use std::process::ExitCode;

use clap::Parser as _;
use tcpclose_user::{
    cli::{Cli, Command},
    commands::{debug, doctor, explain, list, replay, trace},
    event::schema,
    kernel::privilege,
};

fn main() -> ExitCode {
    // Usage errors end here, with status 2.
    let cli = Cli::parse();
    privilege::raise();
    let result = match cli.command {
        Some(Command::Explain { cause }) => {
            explain::print(cause).map(|()| ExitCode::SUCCESS).map_err(anyhow::Error::from)
        }
        Some(Command::Doctor { output, btf }) => doctor::doctor(output, &btf),
        Some(Command::Schema) => {
            print!("{}", schema::pretty());
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Replay(args)) => replay::replay(*args),
        Some(Command::List(args)) => list::list(*args).map(|()| ExitCode::SUCCESS),
        Some(Command::Trace(args)) => run(*args),
        None => run(cli.trace),
    };
    result.unwrap_or_else(|error| {
        eprintln!("tcpclose: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(args: tcpclose_user::cli::TraceArgs) -> anyhow::Result<ExitCode> {
    if args.debug {
        debug::to_stderr();
    }
    // One thread: everything waits for the kernel, and symbols are looked up between two reads.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(trace::trace(args))
}
