//! The stages that an event passes, from the ring buffer to the sink. Each stage hands a value on to the next:
//!
//! | stage | takes | yields |
//! |---|---|---|
//! | [`ingest`](crate::ingest) | bytes of the ring | records |
//! | [`correlate`](crate::correlate) | records | endings |
//! | [`attribute`](crate::attribute) | endings | owners |
//! | [`stacks`](crate::stacks) | stack keys | named stacks |
//! | [`compose`](crate::event::compose), [`judge`](crate::judge) | all of these | events |
//! | [`report`](crate::sink::report) | events | lines |
//!
//! Sockets that stay in a teardown state come from [`stuck`](crate::stuck) and join at the third stage.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::{
    attribute::{self, Attributor, Claim, pace::Pace, watch},
    commands::child::Followed,
    correlate::{Correlator, Ending, LateOwner},
    event::{
        Event, Lingering, Opener, Process, Stack,
        compose::{Composer, LookedUp},
        millis,
    },
    ingest::{
        capture::Capture,
        decode::{Record, decode},
        life::{Life, Task},
        reader::{GATHER, Records},
    },
    kernel::{clock::Clock, handle::KernelHalf},
    sink::{
        losses::{Losses, UserLosses},
        report::{Going, Report},
    },
    stacks::{Stacks, TaskStacks, store::Store},
    stuck::{self, Descriptor, FoundBy, StuckSockets, older::Orphan},
};

/// What the pipeline is told when it is built.
pub struct Options {
    /// From which age on sockets in a teardown state are reported.
    pub linger: crate::cli::Linger,
    /// Size of the kernel half's table of connections.
    pub connections: u32,
    /// Where raw records are kept.
    pub capture: Option<Capture>,
}

/// All stages, and the kernel half that feeds them.
pub struct Pipeline {
    kernel: KernelHalf,
    ring: Records,
    capture: Option<Capture>,
    correlator: Correlator,
    attributor: Attributor,
    stacks: Stacks,
    composer: Composer,
    report: Report,
    stuck: StuckSockets,
    /// Keeps inspections of stuck sockets from taking more than a tenth of a CPU.
    pace: Pace,
    losses: Losses,
    /// Records that could not be decoded.
    undecodable: u64,
}

impl Pipeline {
    /// Takes the maps that the stages need, begins to watch for new processes, and finds the sockets that are older than
    /// the trace. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// The object lacks a map, or a thread cannot be started.
    pub fn new(mut kernel: KernelHalf, report: Report, options: Options) -> Result<Self> {
        let ring = Records::new(&mut kernel)?;
        let store = Store::new(kernel.take_map("STACKS")?, options.connections);
        let processes = kernel.take_map("PROCESSES")?;
        let mut stuck = StuckSockets::new(&mut kernel, options.linger)?;
        kernel.find_older_sockets();
        stuck.find_older();
        let attributor = Attributor::default();
        watch::start(processes, attributor.processes())?;
        Ok(Self {
            ring,
            capture: options.capture,
            correlator: Correlator::default(),
            stacks: Stacks::new(store, attributor.processes()),
            attributor,
            composer: Composer::new(kernel.reset_reasons.clone()),
            report,
            stuck,
            pace: Pace::default(),
            losses: Losses::new(options.connections),
            undecodable: 0,
            kernel,
        })
    }

    /// The log of the programs, for `--debug`.
    ///
    /// # Errors
    /// The programs have no log.
    pub fn logger(&mut self) -> Result<aya_log::EbpfLogger<&'static dyn log::Log>> {
        self.kernel.logger()
    }

    /// Waits until there is something in the ring that is worth reading. Safe to cancel.
    ///
    /// # Errors
    /// The ring cannot be polled any more.
    pub async fn ready(&mut self) -> Result<()> {
        self.ring.ready().await
    }

    /// How often to call [`Self::report_stuck`]; `None` for never.
    pub fn stuck_period(&self) -> Option<Duration> {
        self.stuck.period()
    }

    /// Whether a connection of a followed process is still alive.
    pub fn followed_alive(&self) -> bool {
        let followed = self.report.followed();
        followed.is_some_and(|followed: &Followed| self.kernel.any_alive(|pid| followed.contains(pid)))
    }

    /// Reads the ring to its end and reports what is complete.
    ///
    /// # Errors
    /// Output or the capture cannot be written.
    pub fn read(&mut self) -> Result<Going> {
        self.composer.clock.synchronize();
        let now = Clock::boot_now();
        if self.drain()? == Going::Done {
            return Ok(Going::Done);
        }
        let arrivals = self.correlator.arrivals();
        if self.correlator.lacks_owners() && self.kernel.search_owners() {
            // What the search found is in the ring at once.
            if self.drain()? == Going::Done {
                return Ok(Going::Done);
            }
            if self.kernel.searches_whole_host() {
                self.correlator.searched(arrivals);
            }
        }
        let (kernel, attributor) = (&self.kernel, &mut self.attributor);
        let ready = self.correlator.caught_up(now, |inodes| {
            if kernel.can_search_descriptors() {
                vec![false; inodes.len()]
            } else {
                attributor.find_owners(inodes)
            }
        });
        for ending in ready {
            if self.end(&ending)? == Going::Done {
                return Ok(Going::Done);
            }
        }
        self.report_losses()?;
        if self.correlator.is_waiting() {
            self.ring.read_again_soon();
        }
        self.flush()
    }

    /// Reads the ring to its end.
    fn drain(&mut self) -> Result<Going> {
        // Each time, because what the inventory and the inspections write clears the request, and would be the only
        // thing to wake the reader.
        self.ring.request_wakeup()?;
        loop {
            let batch = self.ring.batch();
            if batch.is_empty() {
                return Ok(Going::On);
            }
            for bytes in batch {
                if let Some(capture) = &mut self.capture {
                    capture.write(&bytes).context("cannot write to the file given with --record")?;
                }
                let complete = match decode(&bytes) {
                    Ok(record) => self.take_in(record),
                    Err(error) => {
                        log::warn!("{error}");
                        self.undecodable += 1;
                        None
                    }
                };
                if let Some(ending) = complete
                    && self.end(&ending)? == Going::Done
                {
                    return Ok(Going::Done);
                }
            }
        }
    }

    /// Hands a record to the stage that it is for. Returns the ending that it completes.
    fn take_in(&mut self, record: Record) -> Option<Ending> {
        match record {
            Record::Close(life) => return self.correlator.close(life),
            Record::Reset(life, reset) => return self.correlator.reset(life, reset),
            Record::Closer(id, task) => return self.correlator.closer(id, task),
            Record::StillOpen(id, task) => self.correlator.still_open(id, task),
            Record::Descriptor(id, task, fd) => {
                self.stuck.descriptor(id, Descriptor { fd, holder: FoundBy::Iterator(task) });
            }
            Record::Stuck(life) => self.stuck.inspected(life, Clock::boot_now()),
            Record::Stack(copy, bytes) => self.stacks.copied(&copy, &bytes),
            // Notices of new processes have a ring of their own.
            Record::Process(_) => {}
        }
        None
    }

    /// Reports an ending.
    fn end(&mut self, ending: &Ending) -> Result<Going> {
        let claim = ending.late_owner.as_ref().map(|owner| match owner {
            LateOwner::Closed(task) => Claim::Closed(task),
            LateOwner::Holds(task) => Claim::Holds(task),
        });
        let life = &ending.life;
        let process = self.attributor.owner(life, claim, ending.unheld);
        let looked_up = LookedUp { process, opener: self.opener(life), stack: self.stack(life.own_actor()) };
        let events = self.composer.ending(ending, looked_up);
        if ending.is_end {
            for task in [life.opener, life.actor].into_iter().flatten() {
                self.stacks.release(task.user_stack.unwrap_or(0));
            }
        }
        for event in events {
            if self.report.event(event)? == Going::Done {
                let _ = self.flush()?;
                return Ok(Going::Done);
            }
        }
        Ok(Going::On)
    }

    fn opener(&mut self, life: &Life) -> Option<Opener> {
        let process: Process = self.attributor.opener(life)?;
        Some(Opener { process: Some(process), stack: self.stack(life.opener.as_ref()) })
    }

    fn stack(&mut self, task: Option<&Task>) -> Option<Stack> {
        let task = task?;
        let (user, kernel) = (task.user_stack.unwrap_or(0), task.kernel_stack.unwrap_or(0));
        self.stacks.named(&TaskStacks { pid: task.pid, mm: task.mm, user, kernel })
    }

    /// Reports the sockets that are stuck in a teardown state and due, unless the last inspection was too expensive.
    ///
    /// # Errors
    /// Those of [`Self::read`]; or the kernel refuses to change a map.
    pub fn report_stuck(&mut self) -> Result<Going> {
        let mut pace = self.pace;
        let going = pace.run(|| self.report_due()).unwrap_or(Ok(Going::On));
        self.pace = pace;
        going
    }

    fn report_due(&mut self) -> Result<Going> {
        self.composer.clock.synchronize();
        let due = self.stuck.due(Clock::boot_now());
        if self.inspect(&due, Report::event)? == Going::Done {
            return Ok(Going::Done);
        }
        for orphan in self.stuck.due_orphans() {
            let event = self.orphan(&orphan);
            if self.report.event(event)? == Going::Done {
                let _ = self.flush()?;
                return Ok(Going::Done);
            }
        }
        self.flush()
    }

    /// Inspects sockets in a teardown state and hands the events of those that are stuck to `report`.
    fn inspect(
        &mut self,
        addresses: &[u64],
        report: impl Fn(&mut Report, Event) -> Result<Going>,
    ) -> Result<Going> {
        for addresses in addresses.chunks(stuck::BATCH) {
            // Earlier records must not fill the ring.
            if self.drain()? == Going::Done {
                return Ok(Going::Done);
            }
            let pass = self.stuck.begin()?;
            if !addresses.iter().all(|address| self.kernel.inspect(*address, pass)) {
                break;
            }
            if self.drain()? == Going::Done {
                return Ok(Going::Done);
            }
            if self.stuck.lacks_holders() {
                if self.kernel.can_search_descriptors() {
                    self.kernel.search_descriptors();
                    if self.drain()? == Going::Done {
                        return Ok(Going::Done);
                    }
                } else {
                    self.stuck.look_up_holders();
                }
            }
            for stuck in self.stuck.take_found() {
                let claim = stuck.holder().map(FoundBy::claim);
                let process = self.attributor.owner(&stuck.life, claim, false);
                let opener = self.opener(&stuck.life);
                if let Some(event) = self.composer.stuck(&stuck, process, opener)
                    && report(&mut self.report, event)? == Going::Done
                {
                    let _ = self.flush()?;
                    return Ok(Going::Done);
                }
            }
        }
        self.flush()
    }

    /// The event of a socket without a descriptor that was stuck before the trace.
    fn orphan(&self, (socket, at_least): &Orphan) -> Event {
        let processes = self.attributor.processes();
        let line = socket.lingering(Clock::now(), &mut attribute::lock(&processes));
        Event::Lingering(Box::new(Lingering { for_ms: Some(millis(*at_least)), ..line }))
    }

    /// Closes files that are held open for programs that have ended.
    pub fn sweep(&mut self) {
        self.attributor.sweep();
        self.stacks.sweep();
    }

    /// Reads what is left in the ring and reports what was held back; sockets that are still stuck go to the summary.
    ///
    /// # Errors
    /// Those of [`Self::read`].
    pub fn finish(&mut self) -> Result<()> {
        if self.report.is_full() {
            return Ok(());
        }
        let addresses = self.stuck.all();
        if self.inspect(&addresses, Report::still_stuck)? == Going::Done {
            return Ok(());
        }
        while self.read()? == Going::On && self.correlator.is_waiting() {
            // What is held back is reported with the second read.
            std::thread::sleep(GATHER / 10);
        }
        Ok(())
    }

    fn report_losses(&mut self) -> Result<()> {
        for lost in self.losses.news(&self.kernel, self.user_losses()) {
            self.report.lost(lost)?;
        }
        Ok(())
    }

    fn user_losses(&self) -> UserLosses {
        UserLosses {
            undecodable: self.undecodable + watch::undecodable(),
            stacks: self.stacks.lost(),
            output: self.report.unwritten(),
        }
    }

    fn flush(&mut self) -> Result<Going> {
        if let Some(capture) = &mut self.capture {
            capture.flush().context("cannot write to the file given with --record")?;
        }
        self.report.flush()
    }

    /// Writes the summary of a trace that took this long to stderr.
    pub fn summarize(&mut self, took: Duration) {
        let lost = self.losses.totals(&self.kernel, self.user_losses());
        self.report.summarize(took, &lost, self.stacks.without_callers() > 0);
    }
}
