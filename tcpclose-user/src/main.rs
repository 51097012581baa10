//! Reads the command line, runs the subcommand, and turns errors into messages and exit statuses.

use std::process::ExitCode;

use clap::Parser as _;
use tcpclose_user::{
    cli::{Cli, Command, TraceArgs},
    commands::{child, debug, diagnose, doctor, explain, list, man, replay, trace},
    event::schema,
    kernel::privilege,
};

fn main() -> ExitCode {
    give_back_large_memory();
    // clap exits with 2 on wrong usage.
    let cli = Cli::parse();
    privilege::raise();
    let result = match cli.command {
        Some(Command::Explain { name }) => explain::print(name.as_deref()).map(|()| ExitCode::SUCCESS),
        Some(Command::Doctor { output, btf }) => doctor::doctor(output, &btf),
        Some(Command::Schema) => {
            print!("{}", schema::pretty());
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Diagnose(args)) => diagnose::diagnose(&args).map(|()| ExitCode::SUCCESS),
        Some(Command::Replay(args)) => replay::replay(*args),
        Some(Command::Man) => man::page().map(|()| ExitCode::SUCCESS),
        Some(Command::Completions { shell }) => man::completions(shell).map(|()| ExitCode::SUCCESS),
        Some(Command::List(args)) => list::list(*args).map(|()| ExitCode::SUCCESS),
        Some(Command::Trace(args)) => return trace(&args),
        None => return trace(&cli.trace),
    };
    result.unwrap_or_else(|error| {
        report(&error);
        ExitCode::FAILURE
    })
}

/// Makes glibc's allocator map large blocks by themselves, and so give them back when they are freed. By
/// default it stops doing so once one was freed, and the megabytes that parsing the kernel's BTF and the
/// symbols of programs takes would stay.
fn give_back_large_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no other thread has been started.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 256 << 10);
    }
}

fn trace(args: &TraceArgs) -> ExitCode {
    let has_command = !args.command.is_empty();
    run(args).unwrap_or_else(|error| {
        report(&error);
        if has_command { child::exit_code_of_failure(&error).into() } else { ExitCode::FAILURE }
    })
}

fn run(args: &TraceArgs) -> anyhow::Result<ExitCode> {
    if args.debug {
        debug::to_stderr();
    }
    // One thread is enough: everything waits for the kernel, and symbols are looked up between two reads.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(trace::trace(args))
}

fn report(error: &anyhow::Error) {
    eprintln!("tcpclose: {error:#}");
}
