//! The stages that an event passes, from a record to the sink. Each stage hands a value on to the next:
//!
//! | stage | takes | yields |
//! |---|---|---|
//! | [`ingest`](crate::ingest) | bytes of the ring | records |
//! | [`correlate`](crate::correlate) | records | endings |
//! | [`attribute`](crate::attribute) | endings | owners |
//! | [`stacks`](crate::stacks) | stack keys | named stacks |
//! | [`compose`](crate::compose), [`judge`](crate::judge) | all of these | events |
//! | [`report`](crate::report) | events | lines |
//!
//! Sockets that stay in a teardown state come from [`stuck`](crate::stuck) and join at the third stage.
//!
//! A trace feeds it ([`live`](crate::live)), or a recording ([`replay`](crate::commands::replay)). It asks
//! its [`Host`] for facts that are not in a record.

use anyhow::Result;

use crate::{
    attribute::{Attributor, Claim},
    compose::{Composer, LookedUp},
    correlate::{Correlator, Ending, LateOwner},
    event::{Attribution, Event, Holder, Opener, Process, Shared, SignalFrom, Stack},
    host::Host,
    ingest::{
        decode::Record,
        life::{Activity, LaterAct, Life, Task},
    },
    report::{Going, Report},
    stacks::TaskStacks,
    stuck::{Descriptor, Found, FoundBy, Stuck},
};

/// The stages behind the ring.
pub struct Pipeline<H> {
    /// Answers what records do not contain.
    pub host: H,
    /// Joins records into endings.
    pub correlator: Correlator,
    /// Finds the owners of sockets.
    pub attributor: Attributor,
    /// Makes events.
    pub composer: Composer,
    /// Writes them.
    pub report: Report,
    /// The sockets that were inspected since the last report.
    pub found: Found,
    /// Only events of the traced command's processes are reported.
    pub command_only: bool,
}

/// When the reported sockets are stuck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StuckPhase {
    /// While the trace runs: an event each.
    Now,
    /// When the trace ends: they are counted in the summary.
    AtEnd,
}

impl<H: Host> Pipeline<H> {
    /// Passes a record to its stage, and reports the ending that it completes.
    ///
    /// The module that feeds the pipeline handles copies of stacks, notices of processes, and inspected
    /// sockets itself.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn record(&mut self, record: Record<'_>) -> Result<Going> {
        let complete = match record {
            Record::Close(life) => self.correlator.close(life),
            Record::Reset(life, reset) => self.correlator.reset(life, reset),
            Record::Closer(id, task) => self.correlator.closer(id, task),
            Record::StillOpen(id, task) => {
                self.correlator.still_open(id, task);
                None
            }
            Record::Descriptor(id, task, fd) => {
                self.found.descriptor(id, Descriptor { fd, holder: FoundBy::Iterator(task) });
                None
            }
            Record::Act(id, act) => {
                self.correlator.act(id, act);
                None
            }
            Record::Stuck(_) | Record::Stack(..) | Record::Interpreted(_) | Record::Process(_) => None,
        };
        match complete {
            Some(ending) => self.end(&ending),
            None => Ok(Going::On),
        }
    }

    /// To be called when the ring was read to its end; `now` was read before that. Reports the endings that
    /// have waited long enough. `find_owners` is that of [`Correlator::caught_up`].
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn caught_up(
        &mut self,
        now: u64,
        find_owners: impl FnOnce(&mut H, &[u64]) -> Vec<bool>,
    ) -> Result<Going> {
        let Self { correlator, host, .. } = self;
        for ending in correlator.caught_up(now, |inodes| find_owners(host, inodes)) {
            if self.end(&ending)? == Going::Done {
                return Ok(Going::Done);
            }
        }
        Ok(Going::On)
    }

    fn end(&mut self, ending: &Ending) -> Result<Going> {
        let claim = ending.late_owner.as_ref().map(|owner| match owner {
            LateOwner::Closed(task) => Claim::Closed(task),
            LateOwner::Holds(task) => Claim::Holds(task),
        });
        let life = &ending.life;
        let process = self.attributor.owner(life, claim, ending.unheld, &mut self.host);
        let later = |act: &LaterAct| (*act, self.local_pid(&act.task), self.host.stack(&keys(&act.task)));
        let looked_up = LookedUp {
            later_acts: ending.later_acts.iter().filter(|act| !act.destroyed).map(later).collect(),
            process,
            opener: self.opener(life),
            stack: self.stack(life.own_actor()),
            signal_from: self.signal_from(life.own_actor()),
            destroyed_by: self.destroyed_by(ending),
            holders: Vec::new(),
        };
        if ending.is_end {
            let later = ending.later_acts.iter().map(|act| &act.task);
            for task in life.opener.iter().chain(&life.actor).chain(later) {
                self.host.release(&keys(task));
            }
        }
        let Self { composer, host, report, command_only, .. } = self;
        for event in composer.ending(ending, looked_up) {
            if is_wanted(host, *command_only, &event) && report.event(event)? == Going::Done {
                return Ok(Going::Done);
            }
        }
        Ok(Going::On)
    }

    /// Reports the sockets that were found to be stuck.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn stuck(&mut self, when: StuckPhase) -> Result<Going> {
        for mut stuck in self.found.take() {
            // For a socket that still waits, the last act of this side says more than the first one.
            if let Some(last) = self.correlator.later_acts(stuck.life.id).last() {
                stuck.life.actor = Some(last.task);
            }
            let Some(event) = self.stuck_event(&stuck) else { continue };
            match when {
                StuckPhase::Now => {
                    if self.event(event)? == Going::Done {
                        return Ok(Going::Done);
                    }
                }
                StuckPhase::AtEnd => {
                    if is_wanted(&mut self.host, self.command_only, &event) {
                        self.report.still_stuck(&event);
                    }
                }
            }
        }
        Ok(Going::On)
    }

    fn stuck_event(&mut self, stuck: &Stuck) -> Option<Event> {
        let claim = stuck.holder().map(FoundBy::claim);
        let process = self.attributor.owner(&stuck.life, claim, false, &mut self.host);
        let actor = stuck.life.own_actor();
        let looked_up = LookedUp {
            process,
            opener: self.opener(&stuck.life),
            stack: self.stack(actor),
            signal_from: self.signal_from(actor),
            holders: stuck.descriptors.iter().map(|descriptor| self.holder(descriptor)).collect(),
            ..LookedUp::default()
        };
        self.composer.stuck(stuck, looked_up)
    }

    fn holder(&mut self, descriptor: &Descriptor) -> Holder {
        let (pid, host_pid) = match &descriptor.holder {
            FoundBy::Iterator(task) => (self.local_pid(task), Some(task.pid)),
            FoundBy::Procfs(holder) => (Some(holder.pid), holder.host_pid()),
        };
        Holder { pid, host_pid, comm: descriptor.holder.comm(), fd: descriptor.fd }
    }

    /// The process id of a task in the pid namespace of tcpclose.
    fn local_pid(&mut self, task: &Task) -> Option<u32> {
        self.host.program(task.pid, task.mm).pid.of(task.pid)
    }

    /// Reports an event, unless only those of the command are reported and it belongs to another process.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn event(&mut self, event: Event) -> Result<Going> {
        let is_wanted = is_wanted(&mut self.host, self.command_only, &event);
        if is_wanted { self.report.event(event) } else { Ok(Going::On) }
    }

    fn opener(&mut self, life: &Life) -> Option<Opener> {
        let process = self.attributor.opener(life, &mut self.host)?;
        Some(Opener { process: Some(process), stack: self.stack(life.opener.as_ref()) })
    }

    /// Who sent the signal that ended a task.
    fn signal_from(&mut self, task: Option<&Task>) -> Option<SignalFrom> {
        match task?.act {
            Activity::Signal(number) => self.host.signal_from(task?.pid, number),
            _ => None,
        }
    }

    /// The process that destroyed the socket from outside. If the socket was in the accept queue of a
    /// listener that was destroyed, that is the task that acted.
    fn destroyed_by(&mut self, ending: &Ending) -> Option<Shared<Process>> {
        let outsider = ending.life.actor.filter(|_| ending.life.own_actor().is_none());
        let seen = ending.later_acts.iter().find(|act| act.destroyed).map(|act| act.task);
        Some(self.attributor.acted(&seen.or(outsider)?, Attribution::Syscall, &mut self.host))
    }

    fn stack(&mut self, task: Option<&Task>) -> Option<Stack> {
        self.host.stack(&keys(task?))
    }
}

/// Whether an event is to be reported: with `command_only`, if its process belongs to the command that is
/// traced.
fn is_wanted(host: &mut impl Host, command_only: bool, event: &Event) -> bool {
    !command_only
        || event.process().and_then(|process| process.host_pid).is_some_and(|pid| host.is_followed(pid))
}

/// The keys of a task's stacks.
fn keys(task: &Task) -> TaskStacks {
    // A worker of io_uring has no user stack. Kernels before 6.15 follow whatever its registers contain,
    // because it borrows the process's memory: get_perf_callchain() in kernel/events/callchain.c.
    let user = task.user_stack.filter(|_| task.act != Activity::IoWorker).unwrap_or(0);
    let kernel = task.kernel_stack.unwrap_or(0);
    TaskStacks { pid: task.pid, mm: task.mm, user, kernel }
}
