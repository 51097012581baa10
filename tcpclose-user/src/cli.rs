//! The command line as it is typed. `--help`, the man page and the shell completions are generated from these
//! types.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{PossibleValue, PossibleValuesParser},
};
use clap_complete::Shell;
use ipnet::IpNet;
use tcpclose_common::record::{MAX_STACK_BYTES, STACK_STEP};

use crate::{
    event::{Cause, FindingKind, LingeringKind},
    kernel::hooks::AcceptHook,
    kernel::loader::{BtfSource, DEFAULT_CONNECTIONS},
    sink::Format,
};

/// Show who ended a TCP connection, how, why, and from which line of code
///
/// tcpclose traces the end of every TCP connection of this host, in all network namespaces, and writes one
/// line for each end of a connection (`close`), one for each RST sent or received (`reset`), and one for each
/// socket that stays in a teardown state (`lingering`). Without a subcommand it traces.
///
/// Filters: the values of one option are alternatives, separated by commas or given by repeating the option.
/// Different options must all match.
#[derive(Debug, Parser)]
#[command(name = "tcpclose", version, args_conflicts_with_subcommands = true, after_long_help = after_help())]
pub struct Cli {
    /// Subcommand; `trace` if there is none.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Options of `trace`.
    #[command(flatten)]
    pub trace: TraceArgs,
}

/// Commands to try, and what each does.
pub const EXAMPLES: &[(&str, &str)] = &[
    ("sudo tcpclose", "every close and every reset of this host"),
    ("sudo tcpclose -o json --port 443", "as JSON lines, for connections from or to port 443"),
    ("sudo tcpclose --cause unread_data,linger_zero", "closes and resets with one of these causes"),
    ("sudo tcpclose -- curl https://example.org", "the connections of one command and its children"),
    ("tcpclose explain unread_data", "what a cause means and what to do about it"),
    ("sudo tcpclose list", "the sockets that are in a teardown state now"),
    ("sudo tcpclose doctor", "what this kernel and these privileges allow"),
];

/// Exit statuses and what they mean.
pub const EXIT_STATUS: &[(&str, &str)] = &[
    ("0", "it ended in order: by a signal, a limit, or because nobody reads its output any more"),
    ("1", "it failed: a privilege or the kernel's support is missing, or output cannot be written"),
    ("2", "wrong usage"),
    ("125", "with -- COMMAND: tcpclose itself failed"),
    ("126", "with -- COMMAND: the command cannot be run"),
    ("127", "with -- COMMAND: the command was not found"),
    ("other", "with -- COMMAND: the command's own status, or 128 plus the signal that killed it"),
];

fn after_help() -> String {
    let table = |rows: &[(&str, &str)]| {
        let width = rows.iter().map(|(left, _)| left.len()).max().unwrap_or_default();
        rows.iter().map(|(left, right)| format!("  {left:<width$}  {right}\n")).collect::<Vec<_>>().concat()
    };
    format!("Examples:\n{}\nExit status:\n{}", table(EXAMPLES), table(EXIT_STATUS))
}

/// The names that `explain` accepts: causes, kinds of lingering sockets, and findings.
fn explained_names() -> PossibleValuesParser {
    fn values<T: ValueEnum + 'static>() -> impl Iterator<Item = PossibleValue> {
        T::value_variants().iter().filter_map(ValueEnum::to_possible_value)
    }
    let mut names: Vec<PossibleValue> = Vec::new();
    for value in values::<Cause>().chain(values::<LingeringKind>()).chain(values::<FindingKind>()) {
        // Some findings and one kind have the name of a cause, and share its page.
        if names.iter().all(|known| known.get_name() != value.get_name()) {
            names.push(value.help(None::<&str>));
        }
    }
    PossibleValuesParser::new(names)
}

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Trace closes, resets and lingering sockets until interrupted (the default)
    Trace(Box<TraceArgs>),
    /// Explain a cause, a kind of lingering socket or a finding: what it means, how it comes about, what to
    /// check, what to change
    ///
    /// Without a name it lists all of them, each with one sentence.
    Explain {
        /// A value of the field `cause` or `kind`, such as `unread_data`, `leaked` or `idle_cut`
        #[arg(
            value_name = "NAME",
            hide_possible_values = true,
            value_parser = explained_names()
        )]
        name: Option<String>,
    },
    /// List the sockets that are in a teardown state now, with owners and ages, and count the sockets in
    /// every state
    ///
    /// Filters: the values of one option are alternatives, separated by commas or given by repeating the
    /// option. Different options must all match.
    List(Box<ListArgs>),
    /// Report what this kernel and these privileges allow, and what to do about the rest
    ///
    /// As root it attaches every hook for a moment. Without privileges it reports what is known without
    /// trying. The exit status is 0 if tcpclose works in full, 1 if it works with restrictions, and 3 if it
    /// cannot trace.
    Doctor {
        /// Format of the report: text, or one JSON object
        #[arg(short, long, value_name = "FORMAT", default_value = "text")]
        output: ReportFormat,
        /// Where the descriptions of the kernel's types come from, as for `trace`
        #[arg(long, value_name = "SOURCE", default_value = "kernel")]
        btf: BtfSource,
    },
    /// Print the JSON Schema of the lines that `-o json` writes
    Schema,
    /// Write the same lines again from a file that `--record` wrote; needs no privileges
    Replay(Box<ReplayArgs>),
    /// Diagnose events of one host or several: report faults that only many events together show
    Diagnose(DiagnoseArgs),
    /// Print the manual page: `tcpclose man | man -l -`
    Man,
    /// Print the completions for a shell
    ///
    /// For bash: `tcpclose completions bash > /etc/bash_completion.d/tcpclose`
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Options of `diagnose`.
#[derive(Args, Clone, Debug)]
pub struct DiagnoseArgs {
    /// Files that `-o json` wrote; `-` or no file means the standard input. Both ends of a connection are
    /// joined by their addresses, also across files
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Format of the findings: text, or one JSON object a line
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: ReportFormat,
    /// Write a page with findings, timelines and a flame graph to this file as well
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// Options of `replay`.
#[derive(Args, Clone, Debug)]
pub struct ReplayArgs {
    /// The recording
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// How to write events: text, one JSON object a line, or closing stacks by count at the end
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
    /// Draw the stacks that closed connections as a flame graph in this SVG file
    #[arg(long, value_name = "FILE")]
    pub flamegraph: Option<PathBuf>,
    /// End after this many events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// When to report findings: `end` or `off`
    #[arg(long, value_name = "end|off", default_value = "end")]
    pub findings: Findings,
    /// Only events that match
    #[command(flatten)]
    pub filter: FilterArgs,
}

/// Options of `trace`.
#[derive(Args, Clone, Debug)]
pub struct TraceArgs {
    /// Format of the events: text, one JSON object a line, or closing stacks by count at the end
    ///
    /// `folded` writes one line for each stack that closed connections, with the cause, the process and the
    /// functions from the outermost to the innermost, and the number of connections. Flame graph tools read
    /// it.
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
    /// Draw the stacks that closed connections as a flame graph in this SVG file when the trace ends
    ///
    /// The cause is at the root, or `orderly`; the process follows. It can be searched and zoomed in a
    /// browser.
    #[arg(long, value_name = "FILE")]
    pub flamegraph: Option<PathBuf>,
    /// Which stacks to take
    ///
    /// A user stack is cheap. A kernel stack costs about 5 µs. With `none`, the text has one line for each
    /// event, without the details; JSON has them all.
    #[arg(long, value_name = "WHICH", default_value = "user")]
    pub stack: WhichStacks,
    /// How to unwind user stacks
    ///
    /// `auto` uses the unwind tables that programs carry for exceptions, unwinds Java too, and follows frame
    /// pointers in code that has no tables. A stack that it has not seen before is copied and unwound; after
    /// that the kernel half recognizes it. `dwarf` copies up to SIZE bytes of every stack, which costs the
    /// program some µs and tcpclose about 10 µs. `fp` follows frame pointers in the kernel, which most
    /// programs are built without.
    #[arg(long, value_name = "auto|fp|dwarf[,SIZE]", default_value = "auto")]
    pub call_graph: CallGraph,
    /// How to see who accepts a connection
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub accept_hook: AcceptHook,
    /// Compare the time to live of each RST received with that of the connection's first packet
    ///
    /// A difference reveals a forged RST. On most kernels this costs nothing and is always done. On the
    /// others this option attaches a program to every packet that the host receives.
    #[arg(long)]
    pub ttl: bool,
    /// Report sockets that stay in a teardown state (CLOSE_WAIT, FIN_WAIT2, …) longer than this, or `off`
    ///
    /// A `lingering` line is written when the limit is crossed and again each time the age has doubled.
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub linger: Linger,
    /// When to report findings, which are faults that only many events together show: `end`, `off`, or this
    /// often
    ///
    /// With `-o json` a finding is a line. As text, those at the end come with the summary.
    /// `tcpclose explain` lists them.
    #[arg(long, value_name = "end|off|TIME", default_value = "end")]
    pub findings: Findings,
    /// Write no events, only the summary at the end
    #[arg(long)]
    pub summary: bool,
    /// Stop after this time, such as 30s or 5min
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub duration: Option<Duration>,
    /// Stop after this many events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Write tcpclose's pid to this file once every program is attached
    ///
    /// A new file contains the pid from the moment it appears. A file, FIFO or device that exists is written
    /// to and never replaced.
    #[arg(long, value_name = "PATH")]
    pub ready_file: Option<PathBuf>,
    /// How many live sockets to keep track of
    ///
    /// Each takes about 750 bytes of kernel memory. Beyond this number sockets that have had no event for
    /// long are evicted, and counted as lost.
    #[arg(
        long,
        value_name = "N",
        default_value_t = DEFAULT_CONNECTIONS,
        value_parser = clap::value_parser!(u32).range(128..=4_194_304)
    )]
    pub connections: u32,
    /// Where the descriptions of the kernel's types come from: `kernel`, a file of raw BTF, or `none`
    #[arg(long, value_name = "SOURCE", default_value = "kernel")]
    pub btf: BtfSource,
    /// Serve metrics for Prometheus (OpenMetrics) at /metrics of this address, and /healthz and /readyz
    ///
    /// A port alone means this port of 127.0.0.1.
    #[arg(long, value_name = "[ADDRESS:]PORT", value_parser = metrics_address)]
    pub metrics: Option<SocketAddr>,
    /// Also send each line as a log record to this OpenTelemetry collector, by OTLP over HTTP
    ///
    /// Without URL: where `OTEL_EXPORTER_OTLP_LOGS_ENDPOINT` or `OTEL_EXPORTER_OTLP_ENDPOINT` says, or to
    /// `http://localhost:4318`. It needs a tcpclose that is built with the feature `otlp`.
    #[arg(long, value_name = "URL", num_args = 0..=1, default_missing_value = "")]
    pub otlp: Option<String>,
    /// Give up the capabilities and system calls that are needed only at the start
    ///
    /// The traced command is not restricted.
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub sandbox: Sandbox,
    /// Record the reports of the kernel half and what was looked up on the host to this file, for
    /// `tcpclose replay`
    #[arg(long, value_name = "PATH", hide_short_help = true)]
    pub record: Option<PathBuf>,
    /// Write debug messages of both halves of tcpclose to the standard error
    #[arg(long)]
    pub debug: bool,
    /// Trace this command and its children alone, until it and its connections have ended
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<std::ffi::OsString>,
    /// Filters of events. They come last, because their heading would apply to every option after them.
    #[command(flatten)]
    pub filter: FilterArgs,
}

/// Options of `list`.
#[derive(Args, Clone, Debug, Default)]
pub struct ListArgs {
    /// Format of the list: tables, or one `lingering` line in JSON for each socket
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: ReportFormat,
    /// Leave out sockets that have certainly been in their state for less than this
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    pub linger: Duration,
    /// Filters of sockets.
    #[command(flatten)]
    pub filter: SocketArgs,
}

/// Filters of events. Values of one option are alternatives; different options must all match.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Filters")]
pub struct FilterArgs {
    /// Filters of the socket that an event is about.
    #[command(flatten)]
    pub socket: SocketArgs,
    /// Events to report
    #[arg(long, value_name = "EVENT", value_delimiter = ',')]
    pub event: Vec<EventKind>,
    /// Cause of a `close` or `reset` (`tcpclose explain` lists them); `lingering` lines are not affected
    #[arg(long, value_name = "CAUSE", value_delimiter = ',', hide_possible_values = true)]
    pub cause: Vec<Cause>,
}

/// Filters of sockets. Values of one option are alternatives; different options must all match.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Filters")]
pub struct SocketArgs {
    /// Process that owns the socket
    #[arg(long, value_name = "PID", value_delimiter = ',')]
    pub pid: Vec<u32>,
    /// Name of the process that owns the socket
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
    /// Network namespace: its inode number (`readlink /proc/PID/ns/net`), `own`, or `host` for all of them
    ///
    /// In a container that has a pid namespace of its own, a trace takes `own` if this option is not given.
    #[arg(long, value_name = "host|own|INODE", value_delimiter = ',')]
    pub netns: Vec<Netns>,
    /// Container id, or the beginning of one
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    pub container: Vec<String>,
    /// Kind of a `lingering` socket; `close` and `reset` lines are not affected
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    pub kind: Vec<LingeringKind>,
}

/// The formats of a report, which is complete before its first line is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// For people
    #[default]
    Text,
    /// JSON, for programs
    Json,
}

/// Events that can be filtered; losses are always reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EventKind {
    /// One end of a connection is closed.
    Close,
    /// A RST was sent or received.
    Reset,
    /// A socket stays in a teardown state.
    Lingering,
}

/// The address of `--metrics`: a port alone is one of the loopback interface.
fn metrics_address(text: &str) -> Result<SocketAddr, String> {
    let port = text.parse().map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    port.or_else(|_| text.parse()).map_err(|_| {
        "needed: a port, or an address and a port, such as 9435, 0.0.0.0:9435 or [::]:9435".to_owned()
    })
}

/// Whether a trace restricts itself once it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sandbox {
    /// As far as the kernel allows
    Auto,
    /// Not at all
    Off,
}

/// A network namespace, as `--netns` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Netns {
    /// All of the host's.
    Host,
    /// The one that tcpclose runs in.
    Own,
    /// The one with this inode number.
    Inode(u32),
}

impl FromStr for Netns {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "host" => Ok(Self::Host),
            "own" => Ok(Self::Own),
            _ => text.parse().map(Self::Inode).map_err(|_| {
                "needed: `host`, `own`, or an inode number as `readlink /proc/PID/ns/net` prints it"
                    .to_owned()
            }),
        }
    }
}

/// The age from which on a socket in a teardown state is reported (`--linger`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linger {
    /// Never.
    Off,
    /// From this age on.
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

/// When a trace reports findings (`--findings`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Findings {
    /// Never.
    Off,
    /// When it ends.
    AtEnd,
    /// When it ends, and this often while it runs.
    Every(Duration),
}

impl Findings {
    /// The shortest time between two reports.
    const SHORTEST: Duration = Duration::from_secs(1);
}

impl FromStr for Findings {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let needed = "needed: `end`, `off`, or a time of at least 1s, such as 5m";
        match humantime::parse_duration(text) {
            _ if text == "off" => Ok(Self::Off),
            _ if text == "end" => Ok(Self::AtEnd),
            Ok(time) if time >= Self::SHORTEST => Ok(Self::Every(time)),
            Ok(_) => Err(needed.to_owned()),
            Err(error) => Err(format!("{error}; {needed}")),
        }
    }
}

/// How user stacks are unwound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallGraph {
    /// By unwind tables and whatever else is right for the program, from a copy of those stacks that are new.
    Auto,
    /// By frame pointers, in the kernel.
    FramePointers,
    /// By unwind tables, from a copy of this many bytes of the stack.
    Dwarf(u32),
}

/// Enough for most programs: a web server uses about 4 KiB of stack, deep Java code 16 KiB.
const STACK_BYTES: u32 = 16 << 10;

/// With `auto`, which copies a stack once: node's event loop alone has 12 KiB of events on its stack.
pub const AUTO_STACK_BYTES: u32 = 32 << 10;

impl FromStr for CallGraph {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let step = u32::try_from(STACK_STEP).unwrap_or(u32::MAX);
        match text.split_once(',') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "fp" => Ok(Self::FramePointers),
            None if text == "dwarf" => Ok(Self::Dwarf(STACK_BYTES)),
            Some(("dwarf", size)) => match size.parse::<u32>() {
                Ok(size) if (step..=MAX_STACK_BYTES).contains(&size) => {
                    Ok(Self::Dwarf(size.next_multiple_of(step)))
                }
                _ => Err(format!("SIZE must be a number of bytes from {step} to {MAX_STACK_BYTES}")),
            },
            _ => Err("needed: `auto`, `fp`, `dwarf` or `dwarf,SIZE`".to_owned()),
        }
    }
}

/// Which stacks to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WhichStacks {
    /// No stacks.
    None,
    /// The program's stack.
    User,
    /// The kernel's stack.
    Kernel,
    /// Both stacks.
    Both,
}

/// Parses a range of addresses. An address without a prefix length is a range of one.
fn cidr(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| "needed: an IP address, or a range such as 10.0.0.0/8".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn trace_is_the_default() {
        let explicit = Cli::parse_from(["tcpclose", "trace", "--port", "80,443"]);
        let implicit = Cli::parse_from(["tcpclose", "--port", "80", "--port", "443"]);
        let Some(Command::Trace(args)) = explicit.command else { panic!("{explicit:?}") };
        assert_eq!(args.filter.socket.port, [80, 443]);
        assert_eq!(implicit.trace.filter.socket.port, [80, 443]);
    }

    #[test]
    fn the_command_keeps_its_own_options() {
        let cli = Cli::parse_from(["tcpclose", "-o", "json", "--", "curl", "-o", "x"]);
        assert_eq!(cli.trace.command, ["curl", "-o", "x"]);
        assert_eq!(cli.trace.output, Format::Json);
    }

    #[test]
    fn only_filters_are_under_their_heading() {
        let command = Cli::command();
        let trace = command.find_subcommand("trace").unwrap();
        for arg in trace.get_arguments() {
            let is_filter = FilterArgs::augment_args(clap::Command::new("x"))
                .get_arguments()
                .any(|other| other.get_id() == arg.get_id());
            assert_eq!(arg.get_help_heading().is_some(), is_filter, "{}", arg.get_id());
        }
    }

    #[test]
    fn call_graphs() {
        assert_eq!("auto".parse(), Ok(CallGraph::Auto));
        assert_eq!("fp".parse(), Ok(CallGraph::FramePointers));
        assert_eq!("dwarf".parse(), Ok(CallGraph::Dwarf(16_384)));
        assert_eq!("dwarf,1025".parse(), Ok(CallGraph::Dwarf(2_048)));
        assert_eq!("dwarf,65536".parse(), Ok(CallGraph::Dwarf(65_536)));
        for wrong in ["", "dwarf,", "dwarf,65537", "dwarf,1023", "dwarf,-1", "fp,1024", "lbr"] {
            assert!(wrong.parse::<CallGraph>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn findings() {
        assert_eq!("end".parse(), Ok(Findings::AtEnd));
        assert_eq!("off".parse(), Ok(Findings::Off));
        assert_eq!("5m".parse(), Ok(Findings::Every(Duration::from_mins(5))));
        for wrong in ["", "0s", "999ms", "on", "-5m"] {
            assert!(wrong.parse::<Findings>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn kinds_are_named_as_in_the_output() {
        let cli = Cli::parse_from(["tcpclose", "--kind", "half_closed,leaked"]);
        assert_eq!(cli.trace.filter.socket.kind, [LingeringKind::HalfClosed, LingeringKind::Leaked]);
        for kind in LingeringKind::value_variants() {
            assert_eq!(LingeringKind::from_str(&kind.to_string(), false).as_ref(), Ok(kind));
        }
    }

    #[test]
    fn an_address_is_a_range_of_one() {
        assert_eq!(cidr("10.1.2.3").unwrap().to_string(), "10.1.2.3/32");
        assert_eq!(cidr("fd00::/8").unwrap().to_string(), "fd00::/8");
        assert!(cidr("10.0.0.0/33").is_err());
    }
}
