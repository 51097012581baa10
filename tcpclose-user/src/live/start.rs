//! Starts a trace: loads the kernel half as the options of the command line require, and prepares everything
//! that processes its records.

use std::ffi::OsString;

use anyhow::{Context as _, Result};
use tcpclose_common::params::Params;

use super::{Live, Options};
#[cfg(feature = "otlp")]
use crate::otlp::OtlpSink;
use crate::{
    cli::{AUTO_STACK_BYTES, CallGraph, Findings, Linger, Netns, Sandbox, TraceArgs, WhichStacks},
    failure::Failure,
    filter::Filter,
    kernel::{
        followed::Followed,
        handle::KernelHalf,
        loader::{self, Request},
        privilege,
    },
    recording::{RecordedStep, Recorder},
    report::Report,
    sink::{Output, Sink, flamegraph::FlameGraph},
    stacks::unwind,
};

impl Live {
    /// Loads and attaches the kernel half. In a separate pid namespace without `--netns`, only this network
    /// namespace is traced. It must be called in a tokio runtime.
    ///
    /// # Errors
    /// The kernel half cannot be loaded, or does not support an option; a thread cannot be started; or a file
    /// cannot be written.
    pub fn start(args: &TraceArgs) -> Result<Self> {
        let mut filters = args.filter.clone();
        let is_contained = !privilege::in_initial_pid_namespace();
        let chose_own_netns = is_contained && filters.socket.netns.is_empty();
        if chose_own_netns {
            filters.socket.netns.push(Netns::Own);
        }
        let filter = Filter::new(filters);
        let flame_graph = args.flamegraph.as_deref().map(FlameGraph::create).transpose()?;
        let mut kernel = loader::load(&request(args, &filter))?;
        let export = args.otlp.as_deref().map(|url| export(url, args.sandbox)).transpose()?;
        if filter.is_about_namespaces() && !kernel.has_netns {
            return Err(no_namespaces().into());
        }
        for loss in &kernel.losses {
            eprintln!("tcpclose: {loss}");
        }
        if chose_own_netns {
            eprintln!(
                "tcpclose: in a separate pid namespace: tracing this network namespace alone; --netns host \
                 traces all of them"
            );
        }
        let followed = follow(&mut kernel, &filter, &args.command)?;
        let output = if args.summary {
            Output::nowhere()
        } else {
            Output::stdout(args.output, args.stack != WhichStacks::None)
        };
        let output = output.with_second(export);
        let recorder = recorder(&kernel, args)?;
        let mut report = Report::new(vec![filter], output, args.count).with_flame_graph(flame_graph);
        if args.findings != Findings::Off {
            report = report.with_findings();
        }
        let options = Options {
            linger: args.linger,
            connections: args.connections,
            followed,
            recorder,
            sandbox: args.sandbox == Sandbox::Auto,
        };
        Self::new(kernel, report, options)
    }
}

/// The sink of `--otlp`, whose thread is started before this one gives up sockets.
#[cfg(feature = "otlp")]
fn export(url: &str, sandbox: Sandbox) -> Result<Box<dyn Sink + Send>> {
    Ok(Box::new(OtlpSink::start(url, sandbox == Sandbox::Auto)?))
}

#[cfg(not(feature = "otlp"))]
fn export(_: &str, _: Sandbox) -> Result<Box<dyn Sink + Send>> {
    Err(Failure {
        failed: "cannot export lines (--otlp)".to_owned(),
        found: "a tcpclose that was built without it".to_owned(),
        needed: "the feature `otlp`".to_owned(),
        fix: "cargo xtask build --features otlp, or let a collector read the lines of -o json".to_owned(),
    }
    .into())
}

/// The configuration of the kernel half.
fn request(args: &TraceArgs, filter: &Filter) -> Request {
    let mut params = Params::NONE;
    filter.to_kernel(&mut params);
    params.by_process *= u32::from(privilege::in_initial_pid_namespace());
    params.user_stack = u32::from(matches!(args.stack, WhichStacks::User | WhichStacks::Both));
    params.kernel_stack = u32::from(matches!(args.stack, WhichStacks::Kernel | WhichStacks::Both));
    if params.user_stack != 0 && args.call_graph != CallGraph::FramePointers {
        (params.stack_bytes, params.recipes) = match args.call_graph {
            CallGraph::Dwarf(bytes) => (bytes, 0),
            CallGraph::Auto | CallGraph::FramePointers => (AUTO_STACK_BYTES, 1),
        };
    }
    params.registers = unwind::REGISTERS;
    params.ttl = u32::from(args.ttl);
    params.stuck = u32::from(args.linger != Linger::Off);
    let follow_children = !args.command.is_empty();
    params.by_process |= u32::from(follow_children);
    Request {
        follow_children,
        accept_hook: args.accept_hook,
        connections: args.connections,
        log: args.debug.then_some(aya_log::Level::Debug),
        ..Request::new(params, args.btf.clone())
    }
}

/// With `--record`: the recording, and its first step.
fn recorder(kernel: &KernelHalf, args: &TraceArgs) -> Result<Option<(Recorder, RecordedStep)>> {
    let Some(path) = &args.record else { return Ok(None) };
    let recorder = Recorder::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let arguments = std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned());
    let start = RecordedStep::Start {
        reset_reasons: kernel.reset_reasons.0.clone(),
        stacks: args.stack != WhichStacks::None,
        command: !args.command.is_empty(),
        arguments: arguments.take_while(|argument| argument != "--").collect(),
    };
    Ok(Some((recorder, start)))
}

/// The failure of a trace that is limited to network namespaces, on a kernel where the programs cannot
/// distinguish them.
fn no_namespaces() -> Failure {
    Failure {
        failed: "cannot trace some network namespaces and not others".to_owned(),
        found: "a kernel without BTF, whose programs cannot tell them apart".to_owned(),
        needed: "BTF (CONFIG_DEBUG_INFO_BTF), or to trace all network namespaces of the host".to_owned(),
        fix: "--btf FILE with the BTF of this kernel, or --netns host".to_owned(),
    }
}

/// Makes the kernel half follow the processes of `--pid` and, with `-- COMMAND`, this process, whose only
/// child will be the command. Returns the table of followed processes if there is a command.
fn follow(kernel: &mut KernelHalf, filter: &Filter, command: &[OsString]) -> Result<Option<Followed>> {
    let mut followed = Followed::new(kernel)?;
    // In another pid namespace, the kernel half does not know these ids, and the user half alone decides.
    if privilege::in_initial_pid_namespace() {
        for pid in filter.pids() {
            followed.add(*pid)?;
        }
    }
    if command.is_empty() {
        return Ok(None);
    }
    let own = kernel.own_pid().context(
        "cannot follow the command in a separate pid namespace: this kernel does not show its process ids in \
         the initial namespace; in a container use --pid host",
    )?;
    followed.add_parent(own)?;
    Ok(Some(followed))
}
