//! The command line, as typed.

use std::{net::IpAddr, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use tcpclose_common::record::{MAX_STACK_BYTES, STACK_STEP};

use crate::{event::Cause, kernel::hooks::AcceptHook, kernel::loader::BtfSource, sink::Format};

/// Tells who ended a TCP connection, how, why, and from which line of code.
#[derive(Debug, Parser)]
#[command(name = "tcpclose", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do; `trace` if nothing is said.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Options of `trace`.
    #[command(flatten)]
    pub trace: TraceArgs,
}

/// What there is to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Trace closes and resets until interrupted (the default)
    Trace(Box<TraceArgs>),
    /// Say what a cause means, how it comes about, what to check and what to change; without one, list them all
    Explain {
        /// A value of the field `cause`
        #[arg(value_name = "CAUSE", hide_possible_values = true)]
        cause: Option<Cause>,
    },
    /// List the sockets that are in a teardown state now, who holds them and since when, and the count of every state
    List(Box<ListArgs>),
    /// Say what this kernel and these privileges give, and what to do about the rest. Exits with 0 if everything can be
    /// told, 1 if tracing works with less, 3 if it does not work
    Doctor {
        /// Text, or one JSON object
        #[arg(short, long, value_name = "FORMAT", default_value = "text")]
        output: Format,
        /// As for `trace`
        #[arg(long, value_name = "SOURCE", default_value = "kernel")]
        btf: BtfSource,
    },
    /// Print the JSON Schema of the output
    Schema,
    /// Make the same lines again from a file that `--record` wrote; needs no privilege
    Replay(Box<ReplayArgs>),
}

/// Options of `replay`.
#[derive(Args, Clone, Debug)]
pub struct ReplayArgs {
    /// The recording
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// How to write events
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
    /// End after this many events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Only events that match
    #[command(flatten)]
    pub filter: FilterArgs,
}

/// Options of `trace`.
#[derive(Args, Clone, Debug)]
pub struct TraceArgs {
    /// How to write events
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
    /// Stacks to take: user ones are cheap, kernel ones cost about 5 µs each
    #[arg(long, value_name = "WHICH", default_value = "user")]
    pub stack: Stacks,
    /// How to follow user stacks: `fp`, by frame pointers, which most programs are built without; or `dwarf`, by the tables that
    /// they carry for exceptions, and through Java. For that each connect, accept and close copies up to SIZE bytes of the
    /// stack, which costs it some µs, and this tool some 10 µs
    #[arg(long, value_name = "fp|dwarf[,SIZE]", default_value = "fp")]
    pub call_graph: CallGraph,
    /// How to see who accepts a connection: `auto` takes what costs nothing; `syscall` slows every system call of the
    /// host down by about 40 ns
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub accept_hook: AcceptHook,
    /// Compare the time to live of a RST with that of the connection's first packet, which tells a forged one, on
    /// kernels too where that takes a look at every packet that the host receives; others do it anyway
    #[arg(long)]
    pub ttl: bool,
    /// Tell of sockets that stay in a state of the teardown (`CLOSE_WAIT`, `FIN_WAIT2`, …) longer than this; `off` does not
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub linger: Linger,
    /// Write no events, only the summary at the end
    #[arg(long)]
    pub summary: bool,
    /// End after this long
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub duration: Option<Duration>,
    /// End after this many events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Write the tool's pid to this file once every program is attached
    #[arg(long, value_name = "PATH")]
    pub ready_file: Option<PathBuf>,
    /// Only events that match
    #[command(flatten)]
    pub filter: FilterArgs,
    /// How many live sockets to keep track of; the one longest without an event gives way. Each takes about 600 bytes
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(128..=4_194_304))]
    pub connections: u32,
    /// Where descriptions of the kernel's types come from: `kernel`, a file of raw BTF, or `none`
    #[arg(long, value_name = "SOURCE", default_value = "kernel")]
    pub btf: BtfSource,
    /// Record what the kernel half reports and what the host answers to this file, for `tcpclose replay`
    #[arg(long, value_name = "PATH", hide_short_help = true)]
    pub record: Option<PathBuf>,
    /// Show debug messages of the kernel half and of the tool on stderr
    #[arg(long)]
    pub debug: bool,
    /// Trace this command and its children alone, until it and its connections are over
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<std::ffi::OsString>,
}

/// Options of `list`.
#[derive(Args, Clone, Debug, Default)]
pub struct ListArgs {
    /// How to write: tables for a person, or a `lingering` line for each socket
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
    /// Leave out what has surely been in its state for less than this
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    pub linger: Duration,
    /// Only sockets that match
    #[command(flatten)]
    pub filter: SocketArgs,
}

/// Which events to tell. Values of one option are alternatives; different options must all match.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Filters (repeatable; a list with commas will do)")]
pub struct FilterArgs {
    /// Of these sockets
    #[command(flatten)]
    pub socket: SocketArgs,
    /// Kind of event
    #[arg(long, value_name = "EVENT", value_delimiter = ',')]
    pub event: Vec<EventKind>,
    /// Cause
    #[arg(long, value_name = "CAUSE", value_delimiter = ',', hide_possible_values = true)]
    pub cause: Vec<Cause>,
}

/// Which sockets to tell of, likewise.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Filters (repeatable; a list with commas will do)")]
pub struct SocketArgs {
    /// Process that owns the socket
    #[arg(long, value_name = "PID", value_delimiter = ',')]
    pub pid: Vec<u32>,
    /// Name of the thread that owns the socket
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub comm: Vec<String>,
    /// Port at either end
    #[arg(long, value_name = "PORT", value_delimiter = ',')]
    pub port: Vec<u16>,
    /// Port at this end
    #[arg(long, value_name = "PORT", value_delimiter = ',')]
    pub local_port: Vec<u16>,
    /// Port at the other end
    #[arg(long, value_name = "PORT", value_delimiter = ',')]
    pub remote_port: Vec<u16>,
    /// Address or range at either end, such as 10.0.0.0/8
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = cidr)]
    pub address: Vec<IpNet>,
    /// Inode number of the network namespace (`readlink /proc/PID/ns/net`)
    #[arg(long, value_name = "INODE", value_delimiter = ',')]
    pub netns: Vec<u32>,
    /// Container id, or its beginning
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    pub container: Vec<String>,
}

/// Kinds of event that can be filtered; losses are always told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EventKind {
    /// An end is over.
    Close,
    /// A RST.
    Reset,
    /// A socket that stays in a state of the teardown.
    Lingering,
}

/// From what age on sockets count as lingering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linger {
    /// Never.
    Off,
    /// From this one.
    After(Duration),
}

impl FromStr for Linger {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match humantime::parse_duration(text) {
            _ if text == "off" => Ok(Self::Off),
            Ok(age) => Ok(Self::After(age)),
            Err(error) => Err(format!("{error}; needed: an age, such as 30s, or `off`")),
        }
    }
}

/// How user stacks are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallGraph {
    /// By frame pointers, in the kernel.
    FramePointers,
    /// By unwind tables, from a copy of so many bytes.
    Dwarf(u32),
}

/// Enough for most: a web server's stack has 4 KiB, a deep one of Java's 16.
const STACK_BYTES: u32 = 16 << 10;

impl FromStr for CallGraph {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let step = u32::try_from(STACK_STEP).unwrap_or(u32::MAX);
        match text.split_once(',') {
            None if text == "fp" => Ok(Self::FramePointers),
            None if text == "dwarf" => Ok(Self::Dwarf(STACK_BYTES)),
            Some(("dwarf", size)) => match size.parse::<u32>() {
                Ok(size) if (step..=MAX_STACK_BYTES).contains(&size) => {
                    Ok(Self::Dwarf(size.next_multiple_of(step)))
                }
                _ => Err(format!("SIZE is a number of bytes from {step} to {MAX_STACK_BYTES}")),
            },
            _ => Err("neither `fp` nor `dwarf` nor `dwarf,SIZE`".to_owned()),
        }
    }
}

/// Which stacks to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Stacks {
    /// None.
    None,
    /// The program's.
    User,
    /// The kernel's.
    Kernel,
    /// Both.
    Both,
}

/// An address without a prefix length is a range of one.
fn cidr(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| "not an IP address, nor one with a prefix length such as 10.0.0.0/8".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn clap_finds_nothing_wrong() {
        Cli::command().debug_assert();
    }

    #[test]
    fn trace_is_the_default() {
        let said = Cli::parse_from(["tcpclose", "trace", "--port", "80,443"]);
        let unsaid = Cli::parse_from(["tcpclose", "--port", "80", "--port", "443"]);
        let Some(Command::Trace(args)) = said.command else { panic!("{said:?}") };
        assert_eq!(args.filter.socket.port, [80, 443]);
        assert_eq!(unsaid.trace.filter.socket.port, [80, 443]);
    }

    #[test]
    fn the_command_keeps_its_own_options() {
        let cli = Cli::parse_from(["tcpclose", "-o", "json", "--", "curl", "-o", "x"]);
        assert_eq!(cli.trace.command, ["curl", "-o", "x"]);
        assert_eq!(cli.trace.output, Format::Json);
    }

    #[test]
    fn ways_to_follow_stacks() {
        assert_eq!("fp".parse(), Ok(CallGraph::FramePointers));
        assert_eq!("dwarf".parse(), Ok(CallGraph::Dwarf(16_384)));
        assert_eq!("dwarf,1025".parse(), Ok(CallGraph::Dwarf(2_048)));
        assert_eq!("dwarf,65536".parse(), Ok(CallGraph::Dwarf(65_536)));
        for wrong in ["", "dwarf,", "dwarf,65537", "dwarf,1023", "dwarf,-1", "fp,1024", "lbr"] {
            assert!(wrong.parse::<CallGraph>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_address_is_a_range_of_one() {
        assert_eq!(cidr("10.1.2.3").unwrap().to_string(), "10.1.2.3/32");
        assert_eq!(cidr("fd00::/8").unwrap().to_string(), "fd00::/8");
        assert!(cidr("10.0.0.0/33").is_err());
    }
}
