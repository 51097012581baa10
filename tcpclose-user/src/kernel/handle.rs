//! The loaded kernel half. It owns the programs, links and maps, and lends other modules those that they
//! need.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, AsRawFd as _, RawFd},
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, RawTracePointRunOptions, TestRun as _,
    maps::{Array, Map, PerCpuArray},
    programs::{Iter, Program, RawTracePoint},
};
use tcpclose_common::{counters::Counters, namespace::PidNamespace};

use super::{
    ResetReasons,
    hooks::{Hook, Variant},
    privilege,
    search::{self, Search},
    table::ConnectionTable,
};

/// The program that examines all descriptors (`hooks/inventory.rs` of the kernel half).
const INVENTORY: &str = "inventory";

/// The program that reads one socket (`hooks/inspect.rs` of the kernel half).
const INSPECT: &str = "inspect";

/// The kernel half at work. Dropping it detaches everything.
#[expect(clippy::struct_excessive_bools, reason = "each says that the kernel offers something else")]
pub struct KernelHalf {
    ebpf: Ebpf,
    table: ConnectionTable,
    /// Names of `enum sk_rst_reason`; empty on kernels without it.
    pub reset_reasons: ResetReasons,
    /// Whether the kernel lets these programs read a socket's cookie.
    pub has_cookie: bool,
    /// Whether the kernel gives them the registers that a task entered it with.
    pub has_registers: bool,
    /// Whether the kernel half recognizes stacks by recipes.
    pub has_recipes: bool,
    /// Whether programs can distinguish network namespaces.
    pub has_netns: bool,
    /// The result of attaching each requested hook.
    pub hooks: Vec<Outcome>,
    /// What is lost on this kernel with these privileges, a sentence each.
    pub losses: Vec<String>,
    /// Descriptors of programs whose skipped runs are losses, because no second copy handles the event.
    guarded: Vec<RawFd>,
    /// Whether the inventory can be run.
    has_inventory: bool,
}

/// The result of attaching a hook.
pub struct Outcome {
    /// The hook.
    pub hook: &'static Hook,
    /// The variant that works; `None` if none does.
    pub variant: Option<&'static Variant>,
    /// The variants that were tried before it, and why they do not work.
    pub refused: Vec<(&'static Variant, String)>,
}

impl Outcome {
    /// Why the refused variants do not work, in one line.
    pub fn why(&self) -> String {
        let reasons: Vec<_> =
            self.refused.iter().map(|(variant, why)| format!("{}: {why}", variant.kind.name())).collect();
        reasons.join("; ")
    }

    fn has(&self, program: &str) -> bool {
        self.variant.is_some_and(|variant| variant.programs.iter().any(|(name, _)| *name == program))
    }
}

impl KernelHalf {
    /// Takes over an object whose programs have been loaded and attached. `guarded` are descriptors of
    /// programs.
    ///
    /// # Errors
    /// The object's table of sockets cannot be used.
    pub(super) fn new(mut ebpf: Ebpf, hooks: Vec<Outcome>, guarded: Vec<RawFd>) -> Result<Self> {
        let has_inventory = hooks.iter().any(|outcome| outcome.has(INVENTORY));
        Ok(Self {
            table: ConnectionTable::new(&mut ebpf)?,
            ebpf,
            reset_reasons: ResetReasons::default(),
            has_cookie: false,
            has_registers: false,
            has_recipes: false,
            has_netns: false,
            hooks,
            losses: Vec::new(),
            guarded,
            has_inventory,
        })
    }

    /// Removes a map from the object and returns it, for the one module that uses it.
    ///
    /// # Errors
    /// The object has no such map, or it is of another type.
    pub fn take_map<T: TryFrom<Map, Error: std::error::Error + Send + Sync + 'static>>(
        &mut self,
        name: &str,
    ) -> Result<T> {
        let map = self.ebpf.take_map(name).with_context(|| format!("the object has no map {name}"))?;
        map.try_into().with_context(|| format!("the map {name} has an unexpected type or cannot be mapped"))
    }

    /// The log of the programs.
    ///
    /// # Errors
    /// The object has no log.
    pub fn logger(&mut self) -> Result<aya_log::EbpfLogger<&'static dyn log::Log>> {
        aya_log::EbpfLogger::init(&mut self.ebpf).context("the programs have no log")
    }

    /// Whether sockets that stay in a teardown state can be inspected.
    pub fn can_inspect(&self) -> bool {
        self.hooks.iter().any(|outcome| outcome.has(INSPECT))
    }

    /// Whether the kernel allows searching descriptors with an iterator.
    pub fn can_search_descriptors(&self) -> bool {
        self.has_inventory
    }

    /// Whether a search covers every process of the host. An iterator shows the processes of the pid
    /// namespace that it is read in.
    pub fn searches_whole_host(&self) -> bool {
        self.has_inventory && privilege::in_initial_pid_namespace()
    }

    /// Records every TCP socket that is open now. Two passes, because the role of a connection depends on
    /// whether there is a listener, whose process may come later in the order of processes.
    pub fn find_older_sockets(&mut self) {
        for _ in 0..2 {
            self.search_descriptors();
        }
    }

    /// Searches all descriptors, and returns at the end of the search. The results are in the table of
    /// sockets and in the ring then.
    pub fn search_descriptors(&mut self) {
        self.descriptors(|iterator| search::run(&iterator));
    }

    /// Starts a search of all descriptors; `None` if the kernel does not allow it. The results arrive in the
    /// ring meanwhile.
    pub fn start_search(&mut self) -> Option<Search> {
        self.descriptors(|iterator| Ok(Search::start(iterator)))
    }

    fn descriptors<T>(&mut self, search: impl FnOnce(File) -> io::Result<T>) -> Option<T> {
        if !self.has_inventory {
            return None;
        }
        let result = open_iterator(&mut self.ebpf).and_then(|iterator| Ok(search(iterator)?));
        result.map_err(|error| self.search_failed(&error)).ok()
    }

    /// Records that a search has failed, so that none is tried again.
    pub fn search_failed(&mut self, error: &anyhow::Error) {
        log::warn!("cannot search all descriptors, and will not try again: {error:#}");
        self.has_inventory = false;
    }

    /// Reads the socket at `address`, if it is still in a teardown state, into a record in the ring. The
    /// inventory pass numbered `pass` will then report its holders. Returns whether the program could be run.
    pub fn inspect(&self, address: u64, pass: u16) -> bool {
        let result = self.run_inspect(address, pass);
        if let Err(error) = &result {
            log::warn!("cannot inspect a socket: {error:#}");
        }
        result.is_ok()
    }

    fn run_inspect(&self, address: u64, pass: u16) -> Result<()> {
        let program: &RawTracePoint =
            self.ebpf.program(INSPECT).context("the object has no such program")?.try_into()?;
        let mut options = RawTracePointRunOptions::new();
        options.args[..2].copy_from_slice(&[address, u64::from(pass)]);
        program.test_run(options)?;
        Ok(())
    }

    /// The sum of the kernel half's counters over all CPUs.
    pub fn counters(&self) -> Counters {
        let counters =
            self.ebpf.map("COUNTERS").and_then(|map| PerCpuArray::<_, Counters>::try_from(map).ok());
        let Some(cpus) = counters.and_then(|counters| counters.get(&0, 0).ok()) else {
            return Counters::default();
        };
        cpus.iter().fold(Counters::default(), |sum, cpu| sum.plus(cpu))
    }

    /// Descriptors of the loaded programs.
    pub fn programs(&self) -> Vec<RawFd> {
        let fd = |(_, program): (_, &Program)| Some(program.fd().ok()?.as_fd().as_raw_fd());
        self.ebpf.programs().filter_map(fd).collect()
    }

    /// How many runs of programs without a second copy the kernel has skipped because they were running on
    /// that CPU already. Kernels from 5.12 on count them; it is 0 on older ones, which skip none.
    pub fn skipped_runs(&self) -> u64 {
        self.guarded.iter().map(|fd| skipped_runs(*fd)).sum()
    }

    /// The process id of tcpclose in the initial pid namespace; `None` if it runs in another one and its id
    /// is not known.
    pub fn own_pid(&mut self) -> Option<u32> {
        if privilege::in_initial_pid_namespace() {
            return Some(std::process::id());
        }
        // The program that examines descriptors records it.
        self.search_descriptors();
        let namespace =
            self.ebpf.map("PID_NAMESPACE").and_then(|map| Array::<_, PidNamespace>::try_from(map).ok());
        let own = namespace?.get(&0, 0).ok()?.own;
        (own != 0).then_some(own)
    }

    /// The table of live sockets.
    pub fn table(&self) -> &ConnectionTable {
        &self.table
    }

    /// Whether a live connection was opened or acted on by a process that `is_ours` accepts.
    pub fn any_alive(&self, is_ours: impl Fn(u32) -> bool) -> bool {
        let ours = |pid: u32| pid != 0 && is_ours(pid);
        self.table.any(|connection| {
            connection.ended == 0 && (ours(connection.opener.pid) || ours(connection.actor.pid))
        })
    }
}

/// The file of the iterator over all descriptors.
fn open_iterator(ebpf: &mut Ebpf) -> Result<File> {
    let program: &mut Iter =
        ebpf.program_mut(INVENTORY).context("the object has no such program")?.try_into()?;
    let link = program.attach().context("cannot attach the iterator")?;
    program.take_link(link)?.into_file().context("cannot open the iterator")
}

fn skipped_runs(program: RawFd) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{program}")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("recursion_misses:"));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn a_file_that_is_no_program_skips_nothing() {
        let file = std::fs::File::open("/proc/self/stat").unwrap();
        assert_eq!(skipped_runs(file.as_raw_fd()), 0);
        assert_eq!(skipped_runs(-1), 0);
    }
}
