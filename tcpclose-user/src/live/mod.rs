//! Feeds the pipeline from the loaded kernel half: reads the ring, starts searches of descriptors and
//! inspections of sockets, counts losses and, with `--record`, records all of it.

mod start;
mod watch;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    attribute::Attributor,
    cli::Linger,
    compose::Composer,
    correlate::Correlator,
    event::{Event, Lingering, millis},
    host::Running,
    ingest::{
        decode::{Record, decode},
        life::Life,
        reader::{GATHER, Records},
    },
    kernel::{clock::Clock, followed::Followed, handle::KernelHalf, privilege},
    metrics::{self, Metrics},
    pace::Pace,
    pipeline::{Pipeline, StuckPhase},
    processes::{Processes, signals::Signals},
    recording::{RecordedStep, Recorder},
    report::{Going, Report, StackCounts},
    sink::losses::{Losses, UserLosses},
    stacks::{Stacks, interpreters::Interpreters, recipes::RecipeMaps, store::Store},
    stuck::{self, Descriptor, Found, FoundBy, StuckSockets, older::Orphan},
};

/// The options of a trace, apart from those with which the kernel half was loaded.
struct Options {
    /// The age from which sockets in a teardown state are reported.
    linger: Linger,
    /// Size of the kernel half's table of connections.
    connections: u32,
    /// With `-- COMMAND`: its processes.
    followed: Option<Followed>,
    /// Whether threads give up the privileges that they do not need.
    sandbox: bool,
    /// With `--record`: the recording, and its first step.
    recorder: Option<(Recorder, RecordedStep)>,
}

/// How often the ring is read during a search of descriptors.
const SEARCH_STEP: Duration = Duration::from_millis(10);

/// A trace that runs.
pub struct Live {
    kernel: KernelHalf,
    ring: Records,
    pipeline: Pipeline<Running>,
    stuck: StuckSockets,
    /// Keeps inspections of stuck sockets from taking more than a tenth of a CPU.
    pace: Pace,
    /// Keeps searches for the owners of ended sockets from taking more than a tenth of a CPU.
    owners_pace: Pace,
    /// The CPU time that searches of all descriptors have taken since it was last set to 0.
    search_time: Duration,
    losses: Losses,
    /// Records that could not be decoded.
    undecodable: u64,
    recorder: Option<Recorder>,
}

impl Live {
    /// Takes the maps that it needs, begins to watch for new processes, and finds the open sockets that are
    /// older than the trace.
    fn new(mut kernel: KernelHalf, report: Report, options: Options) -> Result<Self> {
        let ring = Records::new(&mut kernel)?;
        let store = Store::new(kernel.take_map("STACKS")?, options.connections);
        let new_processes = kernel.take_map("PROCESSES")?;
        let signals = Signals::new(&mut kernel)?;
        let stuck = StuckSockets::new(&mut kernel, options.linger)?;
        kernel.find_older_sockets();
        let processes = Arc::new(Mutex::new(Processes::of_kernel_half()));
        let interpreters = if kernel.has_recipes { Some(Interpreters::new(&mut kernel)?) } else { None };
        let interpreters = interpreters.map(|it| Arc::new(Mutex::new(it)));
        watch::start(new_processes, Arc::clone(&processes), interpreters.clone(), options.sandbox)?;
        let command_only = options.followed.is_some();
        let recipes = if kernel.has_recipes { Some(RecipeMaps::new(&mut kernel)?) } else { None };
        let stacks = Stacks::new(store, recipes, interpreters, Arc::clone(&processes));
        let host = Running::new(processes, stacks, options.followed, signals, options.recorder.is_some());
        let mut live = Self {
            ring,
            pipeline: Pipeline {
                host,
                correlator: Correlator::default(),
                attributor: Attributor::default(),
                composer: Composer::new(kernel.reset_reasons.clone()),
                report,
                found: Found::default(),
                command_only,
            },
            stuck,
            pace: Pace::default(),
            owners_pace: Pace::default(),
            search_time: Duration::ZERO,
            losses: Losses::new(options.connections),
            undecodable: 0,
            recorder: None,
            kernel,
        };
        if let Some((recorder, start)) = options.recorder {
            live.recorder = Some(recorder);
            live.keep(|| start)?;
        }
        Ok(live)
    }

    /// The log of the programs, for `--debug`.
    ///
    /// # Errors
    /// The programs have no log.
    pub fn logger(&mut self) -> Result<aya_log::EbpfLogger<&'static dyn log::Log>> {
        self.kernel.logger()
    }

    /// Begins to count for `--metrics`, and returns the metrics.
    pub fn serve_metrics(&mut self) -> metrics::SharedMetrics {
        let metrics = Arc::new(Mutex::new(Metrics::new(self.kernel.programs())));
        self.pipeline.report.count_in(Arc::clone(&metrics));
        metrics
    }

    /// Waits until there is something in the ring that is worth reading. Safe to cancel.
    ///
    /// # Errors
    /// The ring cannot be polled any more.
    pub async fn ready(&mut self) -> Result<()> {
        self.ring.ready().await
    }

    /// Starts to look for sockets that were stuck before the trace. Call it once the trace is ready.
    pub fn find_older_stuck(&mut self) {
        self.stuck.find_older();
    }

    /// How often to call [`Self::report_stuck`]; `None` for never.
    pub fn stuck_period(&self) -> Option<Duration> {
        self.stuck.period()
    }

    /// Whether a connection of a followed process is still alive.
    pub fn followed_alive(&self) -> bool {
        self.kernel.any_alive(|pid| self.pipeline.host.follows(pid))
    }

    /// Reads the ring to its end and reports what is complete.
    ///
    /// # Errors
    /// The output or the recording cannot be written.
    pub fn read(&mut self) -> Result<Going> {
        synchronize(&mut self.pipeline.composer.clock, self.recorder.as_mut())?;
        let mut now = Clock::boot_now();
        if self.drain()? == Going::Done {
            return Ok(Going::Done);
        }
        let arrivals = self.pipeline.correlator.arrivals();
        if self.pipeline.correlator.is_owner_overdue(now) && self.owners_pace.is_due() {
            self.search_time = Duration::ZERO;
            if self.search_descriptors()? == Going::Done {
                return Ok(Going::Done);
            }
            self.owners_pace.took(self.search_time);
            if self.kernel.searches_whole_host() {
                self.keep(|| RecordedStep::Searched(arrivals))?;
                self.pipeline.correlator.searched(arrivals);
            }
            // On a busy host, the search may have waited long for a CPU. For endings that have arrived
            // meanwhile, the wait for an owner begins now.
            now = Clock::boot_now();
            if self.drain()? == Going::Done {
                return Ok(Going::Done);
            }
        }
        let can_search = self.kernel.can_search_descriptors();
        let is_recorded = self.recorder.is_some();
        let mut recorded = Vec::new();
        let going = self.pipeline.caught_up(now, |host, inodes| {
            let found = if can_search { vec![false; inodes.len()] } else { host.find_holders(inodes) };
            if is_recorded {
                recorded.clone_from(&found);
            }
            found
        })?;
        self.keep(|| RecordedStep::CaughtUp { now, found: recorded })?;
        if going == Going::Done {
            return self.done();
        }
        self.report_losses()?;
        if self.pipeline.correlator.is_waiting() {
            self.ring.read_again_soon();
        }
        self.flush()
    }

    /// Searches all descriptors, and reads the ring until that is done. Endings that need no owner are
    /// reported meanwhile.
    fn search_descriptors(&mut self) -> Result<Going> {
        let Some(search) = self.kernel.start_search() else { return Ok(Going::On) };
        loop {
            let result = search.wait(SEARCH_STEP);
            if self.drain()? == Going::Done || self.flush()? == Going::Done {
                return Ok(Going::Done);
            }
            match result {
                None => {}
                Some(Ok(took)) => {
                    self.search_time += took;
                    return Ok(Going::On);
                }
                Some(Err(error)) => {
                    self.kernel.search_failed(&error.into());
                    return Ok(Going::On);
                }
            }
        }
    }

    /// Reads the ring to its end.
    fn drain(&mut self) -> Result<Going> {
        // The wake-up is requested each time, because records of the inventory and of inspections clear the
        // request, and no later record would wake the reader.
        self.ring.request_wakeup()?;
        while let Some(bytes) = self.ring.next_record()? {
            let record = match decode(bytes) {
                Ok(record) => record,
                Err(error) => {
                    log::warn!("{error}");
                    self.undecodable += 1;
                    continue;
                }
            };
            // Records also arrive while others are handled, for instance while a program's symbols are read.
            let clock = &mut self.pipeline.composer.clock;
            if record.at().is_some_and(|at| clock.may_have_been_set(at)) {
                synchronize(clock, self.recorder.as_mut())?;
            }
            let going = match record {
                Record::Interpreted(list) => {
                    self.pipeline.host.interpreted(*list);
                    continue;
                }
                Record::Stack(copy, stack) => {
                    self.pipeline.host.stack_copied(&copy, stack);
                    // A recording contains the named frames instead.
                    continue;
                }
                Record::Stuck(life) => {
                    let bytes = bytes.to_vec();
                    self.inspected(life, &bytes)?;
                    continue;
                }
                record => self.pipeline.record(record)?,
            };
            if let Some(recorder) = &mut self.recorder {
                recorder.record(bytes).context(UNWRITTEN)?;
                self.keep_answers()?;
            }
            if going == Going::Done {
                return self.done();
            }
        }
        Ok(Going::On)
    }

    /// Handles a socket that was inspected.
    fn inspected(&mut self, life: Box<Life>, record: &[u8]) -> Result<()> {
        let at = Clock::boot_now();
        let age = self.stuck.inspected(&life, at);
        if !self.stuck.is_old_enough(&age) {
            return Ok(());
        }
        if let Some(recorder) = &mut self.recorder {
            let stuck::age::Age { since, at_least, at_most } = age;
            recorder.step(&RecordedStep::Inspected { at, since, at_least, at_most }).context(UNWRITTEN)?;
            recorder.record(record).context(UNWRITTEN)?;
        }
        self.pipeline.found.socket(life, at, age);
        Ok(())
    }

    /// Reports the sockets that are stuck in a teardown state and due, unless the last inspection was too
    /// expensive.
    ///
    /// # Errors
    /// Those of [`Self::read`]; or the kernel refuses to change a map.
    pub fn report_stuck(&mut self) -> Result<Going> {
        let mut pace = self.pace;
        self.search_time = Duration::ZERO;
        if let Some(going) = pace.run(|| self.report_due()) {
            pace.took(self.search_time);
            self.pace = pace;
            return going;
        }
        Ok(Going::On)
    }

    fn report_due(&mut self) -> Result<Going> {
        synchronize(&mut self.pipeline.composer.clock, self.recorder.as_mut())?;
        let due = self.stuck.due(self.kernel.table(), Clock::boot_now());
        if self.inspect(&due, StuckPhase::Now)? == Going::Done {
            return Ok(Going::Done);
        }
        for orphan in self.stuck.due_orphans() {
            let lingering = Box::new(self.orphan(&orphan));
            self.keep(|| RecordedStep::Orphan(lingering.clone()))?;
            if self.pipeline.event(Event::Lingering(lingering))? == Going::Done {
                return self.done();
            }
        }
        self.flush()
    }

    /// Inspects sockets in a teardown state and reports those that are stuck.
    fn inspect(&mut self, addresses: &[u64], when: StuckPhase) -> Result<Going> {
        for addresses in addresses.chunks(stuck::BATCH) {
            // The ring must not be full of earlier records.
            if self.drain()? == Going::Done {
                return Ok(Going::Done);
            }
            // Results that are left from a failed inspection are out of date.
            self.pipeline.found = Found::default();
            let pass = self.stuck.begin()?;
            if !addresses.iter().all(|address| self.kernel.inspect(*address, pass)) {
                break;
            }
            if self.drain()? == Going::Done {
                return Ok(Going::Done);
            }
            if self.pipeline.found.lacks_holders() && self.find_holders()? == Going::Done {
                return Ok(Going::Done);
            }
            let going = self.pipeline.stuck(when)?;
            self.keep(|| RecordedStep::Stuck { at_end: when == StuckPhase::AtEnd })?;
            if going == Going::Done {
                return self.done();
            }
        }
        self.flush()
    }

    /// Finds the processes that have the inspected sockets open.
    fn find_holders(&mut self) -> Result<Going> {
        if self.kernel.can_search_descriptors() {
            return self.search_descriptors();
        }
        if !privilege::in_initial_pid_namespace() {
            // The ids in `/proc` are not those of the kernel half.
            return Ok(Going::On);
        }
        for (id, fd, holder) in self.pipeline.found.look_up_holders() {
            let step = || RecordedStep::Descriptor {
                address: id.address,
                born: id.born,
                fd,
                holder: (*holder).clone(),
            };
            self.keep(step)?;
            self.pipeline.found.descriptor(id, Descriptor { fd, holder: FoundBy::Procfs(holder) });
        }
        Ok(Going::On)
    }

    /// The event of a socket without a descriptor that was stuck before the trace.
    fn orphan(&self, (socket, at_least): &Orphan) -> Lingering {
        let line = socket.lingering(Clock::now(), &mut self.pipeline.host.processes());
        Lingering { for_ms: Some(millis(*at_least)), ..line }
    }

    /// Closes files that are held open for programs that have ended.
    pub fn sweep(&mut self) {
        self.pipeline.host.sweep();
    }

    /// Reports the findings that are new.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn report_findings(&mut self) -> Result<Going> {
        self.pipeline.report.new_findings(Clock::now())
    }

    /// Reads the rest of the ring, and reports what was held back, the findings, and output that is complete
    /// only at the end. Sockets that are still stuck are counted in the summary.
    ///
    /// # Errors
    /// Those of [`Self::read`], and the flame graph cannot be written.
    pub fn finish(&mut self) -> Result<()> {
        self.read_rest()?;
        if self.pipeline.report.is_reader_gone() {
            // A recording is to contain what the output has lost.
            self.report_losses()?;
            let _ = self.flush()?;
        }
        self.pipeline.report.last_findings()?;
        self.pipeline.report.finish_export()?;
        self.report_losses()?;
        self.pipeline.report.finish()
    }

    fn read_rest(&mut self) -> Result<()> {
        if self.pipeline.report.is_full() {
            return Ok(());
        }
        let addresses = self.stuck.all(self.kernel.table());
        if self.inspect(&addresses, StuckPhase::AtEnd)? == Going::Done {
            return Ok(());
        }
        while self.read()? == Going::On && self.pipeline.correlator.is_waiting() {
            // Endings that are held back are reported with the second read.
            std::thread::sleep(GATHER / 10);
        }
        Ok(())
    }

    /// Writes the summary of a trace that took this long to stderr.
    pub fn summarize(&mut self, took: Duration) {
        let lost = self.losses.totals(&self.kernel, self.user_losses());
        let counters = self.kernel.counters();
        let stacks = StackCounts {
            copied: counters.stacks_copied,
            recognized: counters.stacks_recognized,
            without_callers: self.pipeline.host.stacks.without_callers(),
        };
        self.pipeline.report.summarize(took, &lost, &stacks);
    }

    fn report_losses(&mut self) -> Result<()> {
        for lost in self.losses.news(&self.kernel, self.user_losses()) {
            self.keep(|| RecordedStep::Lost(lost.clone()))?;
            self.pipeline.report.lost(lost)?;
        }
        Ok(())
    }

    fn user_losses(&self) -> UserLosses {
        UserLosses {
            undecodable: self.undecodable + watch::undecodable(),
            stacks: self.pipeline.host.stacks.lost(),
            output: self.pipeline.report.unwritten(),
            export: self.pipeline.report.unexported(),
        }
    }

    /// Adds a step to the recording, if there is one, and the answers that the step needed.
    fn keep(&mut self, step: impl FnOnce() -> RecordedStep) -> Result<()> {
        if let Some(recorder) = &mut self.recorder {
            recorder.step(&step()).context(UNWRITTEN)?;
            self.keep_answers()?;
        }
        Ok(())
    }

    fn keep_answers(&mut self) -> Result<()> {
        if let Some(recorder) = &mut self.recorder {
            for (question, answer) in self.pipeline.host.fresh_answers() {
                recorder.step(&RecordedStep::Answer(question, answer)).context(UNWRITTEN)?;
            }
        }
        Ok(())
    }

    fn done(&mut self) -> Result<Going> {
        let _ = self.flush()?;
        Ok(Going::Done)
    }

    fn flush(&mut self) -> Result<Going> {
        if let Some(recorder) = &mut self.recorder {
            recorder.flush().context(UNWRITTEN)?;
        }
        self.pipeline.report.flush()
    }
}

/// Reads the clocks again.
fn synchronize(clock: &mut Clock, recorder: Option<&mut Recorder>) -> Result<()> {
    clock.synchronize();
    let (wall_minus_boot, suspended) = clock.offsets();
    if let Some(recorder) = recorder {
        recorder.step(&RecordedStep::Clock { wall_minus_boot, suspended }).context(UNWRITTEN)?;
    }
    Ok(())
}

/// What failed when the recording cannot be written.
const UNWRITTEN: &str = "cannot write to the file given with --record";
