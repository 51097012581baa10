//! Keys in records → unnamed stacks: those in the kernel half's map, and those that were unwound here.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
};

use aya::maps::{HashMap as BpfHashMap, MapData};
use tcpclose_common::stack::Stack;

use crate::stacks::frame::UnwoundFrame;

/// How many stacks of the kernel half are cached: as many as its map holds. When there are more, all are dropped and read
/// again.
const MAX_STACKS: usize = 8_192;

/// How many released keys still lead to a stack: a RST may be reported after the end of its connection.
const MAX_RELEASED: usize = 4_096;

/// Reads stacks from the kernel half's map, and keeps those that were unwound here.
pub struct Store {
    map: BpfHashMap<MapData, u64, Stack>,
    known: HashMap<u64, Arc<[u64]>>,
    unwound: HashMap<u64, Arc<[UnwoundFrame]>>,
    /// The keys of `unwound` and some that were released, oldest first.
    order: VecDeque<u64>,
    /// How many stacks `unwound` may have.
    capacity: usize,
    released: VecDeque<u64>,
    /// Equal stacks share their frames: programs have few places that close sockets.
    shared: HashSet<Arc<[UnwoundFrame]>>,
    /// Stacks that were evicted before they were read.
    lost: u64,
}

impl Store {
    /// Reads from `map`, and keeps unwound stacks for this many connections, each with an opener and an actor. When there
    /// are more, the oldest are dropped and counted as lost.
    pub fn new(map: BpfHashMap<MapData, u64, Stack>, connections: u32) -> Self {
        Self {
            map,
            known: HashMap::new(),
            unwound: HashMap::new(),
            order: VecDeque::new(),
            capacity: usize::try_from(connections).unwrap_or(usize::MAX).saturating_mul(2),
            released: VecDeque::new(),
            shared: HashSet::new(),
            lost: 0,
        }
    }

    /// Keeps a stack that was unwound here.
    pub fn keep(&mut self, key: u64, frames: Vec<UnwoundFrame>) {
        let frames: Arc<[UnwoundFrame]> = frames.into();
        let frames = if let Some(known) = self.shared.get(&frames) {
            Arc::clone(known)
        } else {
            if self.shared.len() >= MAX_STACKS {
                self.shared.retain(|frames| Arc::strong_count(frames) > 1);
            }
            if self.shared.len() < MAX_STACKS {
                self.shared.insert(Arc::clone(&frames));
            }
            frames
        };
        while self.unwound.len() >= self.capacity {
            let Some(oldest) = self.order.pop_front() else { break };
            self.lost += u64::from(self.unwound.remove(&oldest).is_some());
        }
        if self.order.len() >= self.capacity.saturating_mul(2) {
            let Self { order, unwound, .. } = self;
            order.retain(|key| unwound.contains_key(key));
        }
        self.order.push_back(key);
        self.unwound.insert(key, frames);
    }

    /// Drops an unwound stack after [`MAX_RELEASED`] others have been released.
    pub fn release(&mut self, key: u64) {
        if !self.unwound.contains_key(&key) {
            return;
        }
        self.released.push_back(key);
        if self.released.len() > MAX_RELEASED
            && let Some(oldest) = self.released.pop_front()
        {
            self.unwound.remove(&oldest);
        }
    }

    /// A stack that was unwound here.
    pub fn unwound(&self, key: u64) -> Option<Arc<[UnwoundFrame]>> {
        self.unwound.get(&key).cloned()
    }

    /// The addresses of a stack in the kernel half's map, innermost first; `None` if none was taken, or if it was evicted.
    pub fn frames(&mut self, key: u64) -> Option<Arc<[u64]>> {
        if key == 0 {
            return None;
        }
        if let Some(frames) = self.known.get(&key) {
            return Some(Arc::clone(frames));
        }
        let Ok(stack) = self.map.get(&key, 0) else {
            self.lost += 1;
            return None;
        };
        let count = usize::try_from(stack.count).unwrap_or(0).min(stack.frames.len());
        let frames: Arc<[u64]> = stack.frames[..count].into();
        if self.known.len() >= MAX_STACKS {
            self.known.clear();
        }
        self.known.insert(key, Arc::clone(&frames));
        Some(frames)
    }

    /// How many were evicted before they were read.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}
