//! Stack keys in records → stacks with names.
//!
//! The kernel half takes a stack in one of three ways. It recognizes one that was unwound here before, by its
//! recipe ([`recipes`]). If there is none, it copies the stack's memory into the ring, and [`unwind`] unwinds
//! that copy here. With `--call-graph fp` it follows frame pointers and keeps the addresses in a map, from
//! which [`store`] reads them. Then [`symbolize`] turns addresses into functions, files and lines.

pub mod elf;
pub mod frame;
pub mod interpreters;
pub mod memory;
pub mod recipes;
pub mod runtimes;
pub mod store;
pub mod symbolize;
pub mod unwind;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use foldhash::fast::RandomState;
use tcpclose_common::{
    record::{Interpreted, StackCopy},
    stack::MAX_FRAMES,
};

use nix::time::{ClockId, clock_gettime};

use self::{
    recipes::{RecipeMaps, Start},
    store::Store,
    symbolize::Symbolizer,
    unwind::Unwinder,
};
use crate::{
    event::{self, Frame, Frames, Truncated},
    processes::{Image, Processes, lock},
};

/// The number of named stacks that are cached. When the cache is full, all are dropped and named again when
/// next needed.
const MAX_NAMED: usize = 4_096;

/// The number of lists of interpreters' frames that may wait for their copies. Each list is followed by its
/// copy, unless that was lost. When there are more, all are dropped.
const MAX_LISTS: usize = 256;

/// How long a cached stack that lacks a name or ends early is used before it is named again. A just-in-time
/// compiler may publish the name, or map the code, in the meantime.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// A task and the keys of its stacks, from a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct TaskStacks {
    /// Process id in the initial pid namespace; 0 if there was no task.
    pub pid: u32,
    /// Address of the task's `mm_struct`, which identifies the program image; 0 if it was already released.
    pub mm: u64,
    /// Key of the user stack; 0 if none was taken.
    pub user: u64,
    /// Key of the kernel stack; 0 if none was taken.
    pub kernel: u64,
}

/// Reads, unwinds and names stacks.
pub struct Stacks {
    store: Store,
    unwinder: Unwinder,
    symbolizer: Symbolizer,
    processes: Arc<Mutex<Processes>>,
    /// With `--call-graph auto`.
    recipes: Option<RecipeMaps>,
    /// With `--call-graph auto`.
    interpreters: Option<interpreters::SharedInterpreters>,
    /// Frames of interpreters, by the key of the copy that they belong to.
    lists: HashMap<u64, Interpreted, RandomState>,
    named: HashMap<(u32, u64, Unnamed), Named, RandomState>,
    without_callers: u64,
}

/// The unnamed frames of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Unnamed {
    /// In the kernel half's map, under this key.
    Stored(u64),
    /// Unwound here, with this key of its own.
    Unwound(u64),
}

/// A named stack in the cache.
struct Named {
    frames: Frames,
    /// When to name it again; `None` if nothing is missing from it.
    until: Option<Instant>,
}

impl Stacks {
    /// Reads stacks from `store`, and names them by the program images in `processes`. With `recipes`, the
    /// kernel half is enabled to recognize stacks that were copied and, with `interpreters`, to list the
    /// frames of interpreters.
    pub fn new(
        store: Store,
        recipes: Option<RecipeMaps>,
        interpreters: Option<interpreters::SharedInterpreters>,
        processes: Arc<Mutex<Processes>>,
    ) -> Self {
        Self {
            store,
            recipes,
            interpreters,
            unwinder: Unwinder::default(),
            symbolizer: Symbolizer::default(),
            processes,
            lists: HashMap::default(),
            named: HashMap::default(),
            without_callers: 0,
        }
    }

    /// Stores the frames of an interpreter until the copy that they belong to arrives.
    pub fn interpreted(&mut self, list: Interpreted) {
        if self.lists.len() >= MAX_LISTS {
            self.lists.clear();
        }
        self.lists.insert(list.key, list);
    }

    /// Unwinds the copy of a stack's memory and keeps the frames under the copy's key. Call it as soon as the
    /// record is read: the process may exit, and its mappings with it, at any moment.
    pub fn copied(&mut self, copy: &StackCopy, bytes: &[u8]) {
        let Self { store, unwinder, recipes, interpreters, processes, lists, named, .. } = self;
        let process = (copy.pid, copy.mm);
        let known = image(processes, process, &[]);
        let current = lock(processes).current(copy.pid, copy.mm);
        let is_replaced = |known| current.is_some_and(|current| !Arc::ptr_eq(known, &current));
        if known.as_ref().is_some_and(is_replaced) {
            named.retain(|(pid, mm, _), _| (*pid, *mm) != process);
            if let Some(Err(error)) = recipes.as_mut().map(|recipes| recipes.forget_process(process)) {
                log::warn!("{error:#}; every stack will be copied");
                *recipes = None;
            }
        }
        let list = lists.remove(&copy.key);
        let image = |addresses: &[u64]| image(processes, (copy.pid, copy.mm), addresses);
        let unwound = unwinder.unwind(copy, bytes, list.as_ref(), image);
        if let (Some(interpreters), Some(interpreter)) = (interpreters, unwound.unlisted)
            && let program = known.as_ref().and_then(|image| image.comm.as_deref())
            && let Err(error) = interpreters::lock(interpreters).describe(process, program, interpreter)
        {
            log::warn!("{error:#}; functions of the interpreter in process {} have no names", copy.pid);
        }
        let is_needed = |key| recipes.as_ref().is_some_and(|recipes| recipes.leads_to(key));
        let key = store.keep(copy.key, unwound.stack, is_needed);
        if unwound.words.is_empty() {
            return;
        }
        let StackCopy { pid, mm, code_pages, ip, .. } = *copy;
        let start = Start { pid, mm, code_pages, ip };
        let until = unwound.lifetime.map_or(0, until);
        let learned = recipes.as_mut().map(|recipes| recipes.learn(start, &unwound.words, key, until));
        if let Some(Err(error)) = learned {
            log::warn!("{error:#}; every stack will be copied");
            *recipes = None;
        }
    }

    /// The user and kernel stack of a task, with names; `None` if neither was taken, or both are lost.
    pub fn named(&mut self, task: &TaskStacks) -> Option<event::Stack> {
        if task.pid == 0 {
            return None;
        }
        let (user, kernel) = (self.user(task), self.kernel(task));
        (user.is_some() || kernel.is_some()).then_some(event::Stack { user, kernel })
    }

    /// Releases the frames under a key. They are not dropped at once, because a RST of the same connection
    /// may still refer to them.
    pub fn release(&mut self, key: u64) {
        self.store.release(key);
    }

    /// Number of stacks lost so far: evicted before they were read.
    pub fn lost(&self) -> u64 {
        self.store.lost()
    }

    /// Number of stacks so far that consist of the innermost frame only, because the program keeps no frame
    /// pointers.
    pub fn without_callers(&self) -> u64 {
        self.without_callers
    }

    /// Closes files that no known process maps any more. Call it after [`Processes::sweep`].
    pub fn sweep(&mut self) {
        self.symbolizer.sweep();
    }

    fn user(&mut self, task: &TaskStacks) -> Option<Frames> {
        if task.user == 0 {
            return None;
        }
        let process = (task.pid, task.mm);
        let unnamed = match self.store.own_key(task.user) {
            Some(own) => {
                if let Some(recipes) = &mut self.recipes {
                    recipes.used(process, own);
                }
                Unnamed::Unwound(own)
            }
            None => Unnamed::Stored(task.user),
        };
        let key = (task.pid, task.mm, unnamed);
        if let Some(frames) = self.cached(&key) {
            return Some(frames);
        }
        let frames = match unnamed {
            Unnamed::Stored(key) => {
                let frames = self.store.frames(key)?;
                let image = image(&self.processes, process, &frames);
                let (plausible, truncated) = plausible(image.as_deref(), &frames);
                let truncated = match truncated {
                    // Stacks that were unwound here do not depend on frame pointers.
                    Some(Truncated::NoFramePointer) if self.recipes.is_some() => Some(Truncated::NotCopied),
                    other => other,
                };
                self.without_callers += u64::from(truncated == Some(Truncated::NoFramePointer));
                let mut named = self.symbolizer.user(image.as_deref(), plausible);
                if let Some(last) = named.last_mut() {
                    last.truncated = truncated;
                }
                named
            }
            Unnamed::Unwound(key) => {
                let stack = self.store.unwound(key)?;
                let image = image(&self.processes, process, &[]);
                self.symbolizer.unwound(image.as_deref(), &stack)
            }
        };
        Some(self.cache(key, frames))
    }

    fn kernel(&mut self, task: &TaskStacks) -> Option<Frames> {
        if task.kernel == 0 {
            return None;
        }
        let key = (task.pid, task.mm, Unnamed::Stored(task.kernel));
        if let Some(frames) = self.cached(&key) {
            return Some(frames);
        }
        let frames = self.symbolizer.kernel(&self.store.frames(task.kernel)?);
        Some(self.cache(key, frames))
    }

    fn cached(&self, key: &(u32, u64, Unnamed)) -> Option<Frames> {
        let Named { frames, until } = self.named.get(key)?;
        until.is_none_or(|until| Instant::now() < until).then(|| frames.clone())
    }

    fn cache(&mut self, key: (u32, u64, Unnamed), frames: Vec<Frame>) -> Frames {
        let is_final = frames.iter().all(|frame| frame.symbol.is_some() && frame.truncated.is_none());
        let until = (!is_final).then(|| Instant::now() + RETRY_AFTER);
        if self.named.len() >= MAX_NAMED {
            self.named.clear();
        }
        let frames = Frames::from(frames);
        self.named.insert(key, Named { frames: frames.clone(), until });
        frames
    }
}

/// The program image that process `pid` ran with the address space `mm`. Its mappings are read again if they
/// lack one of `addresses`.
fn image(processes: &Mutex<Processes>, (pid, mm): (u32, u64), addresses: &[u64]) -> Option<Arc<Image>> {
    lock(processes).image_for(pid, mm, addresses, Instant::now())
}

/// The leading frames that can be correct, and why there are no more. The kernel follows frame pointers, and
/// reads arbitrary data in a function that keeps none. An address outside every executable mapping is
/// therefore not a frame, and neither is any address after it.
fn plausible<'a>(image: Option<&Image>, frames: &'a [u64]) -> (&'a [u64], Option<Truncated>) {
    let Some(image) = image.filter(|image| !image.mappings.is_empty()) else {
        // Without mappings only the instruction pointer is certain.
        return (&frames[..frames.len().min(1)], Some(Truncated::NoMappings));
    };
    let end = frames.iter().position(|address| image.mapping(*address).is_none());
    let plausible = &frames[..end.unwrap_or(frames.len()).max(1).min(frames.len())];
    let truncated = if plausible.len() == 1 {
        // A system call is made by a function that has a caller.
        Some(Truncated::NoFramePointer)
    } else if plausible.len() < frames.len() {
        Some(Truncated::NoCode)
    } else {
        (frames.len() == MAX_FRAMES).then_some(Truncated::FrameLimit)
    };
    (plausible, truncated)
}

/// `CLOCK_MONOTONIC` after this time.
fn until(lifetime: Duration) -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from((now + lifetime).as_nanos()).unwrap_or(u64::MAX).max(1)
}
