//! `cargo xtask`: every task of this repository, setup included.

mod apt;
mod bench;
mod command;
mod compiler;
mod dist;
mod ebpf;
mod kernels;
mod linker;
mod lint;
mod modules;
mod names;
mod platform;
mod report;
mod rotel;
mod run;
mod suite;
mod test;
mod tools;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use platform::Platform;

/// Sets up, builds, runs and tests tcpclose.
///
/// Each command first installs the tools that it needs and does not find, and announces each installation.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build both halves and run tcpclose, through sudo when this is not root
    Run {
        /// Arguments for tcpclose
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Check format and lints, then run every test, those that load programs into the kernel included, on
    /// this host and on other kernels
    Test(test::Args),
    /// Build both halves
    Build {
        /// Build the user half without optimisations
        #[arg(long)]
        debug: bool,
        /// The platform to build the user half for, as rustc calls it, if it is not this one
        #[arg(long, value_name = "TRIPLE", value_parser = Platform::parse)]
        target: Option<&'static Platform>,
        /// Features of the user half that are not built by default, as cargo takes them: otlp
        #[arg(long)]
        features: Option<String>,
    },
    /// Check the format, the lints, the order of modules and the names of types
    #[command(alias = "clippy")]
    Lint,
    /// Measure what tracing costs, per connection
    Bench(bench::Args),
    /// Build the release: static binaries, tarballs, Debian packages, checksums
    Dist(dist::Args),
    /// Build a container image that holds the static binary alone
    Image(dist::image::Args),
    /// Write the test fixtures that are generated from source
    Fixtures,
    /// Install missing tools, and print the tools that are used
    Setup,
}

fn main() -> ExitCode {
    match start(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One message without a backtrace: RUST_BACKTRACE is meant for tcpclose.
            command::say(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn start(task: Task) -> anyhow::Result<()> {
    let workspace = workspace::Workspace::find()?;
    match task {
        Task::Run { args } => Err(run::run(&workspace, &args)),
        Task::Test(args) => test::test(&workspace, &args),
        Task::Build { debug, target, features } => {
            let platform = target.unwrap_or_else(Platform::host);
            ebpf::build(&workspace, &tools::for_building()?)?;
            tools::for_platform(platform)?;
            run::build_user_half(&workspace, platform, !debug, features.as_deref()).map(drop)
        }
        Task::Lint => lint::lint(&workspace, &tools::for_building()?),
        Task::Bench(args) => bench::bench(&workspace, &args),
        Task::Dist(args) => dist::dist(&workspace, &args),
        Task::Image(args) => dist::image::image(&workspace, &args),
        Task::Fixtures => {
            let mut test = workspace.cargo("test");
            test.args(["--package", "tcpclose-user", "--lib", "members_c_is_generated"]);
            command::run(test.env("TCPCLOSE_UPDATE_FIXTURES", "1"))
        }
        Task::Setup => {
            let tools = tools::for_building()?;
            tools::for_testing(Platform::host())?;
            rotel::find_or_install()?;
            tools::for_machines(Platform::host())?;
            println!("{tools}");
            Ok(())
        }
    }
}
