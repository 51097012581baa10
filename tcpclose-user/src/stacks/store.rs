//! Keys in records → unnamed stacks, which are in the kernel half's map or were unwound here.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
};

use aya::maps::{HashMap as BpfHashMap, MapData};
use foldhash::fast::RandomState as Quick;
use tcpclose_common::{recipe::KEY_BIT, stack::StackTrace};

use crate::stacks::frame::UnwoundStack;

/// How many stacks of the kernel half are cached: as many as its map holds. When there are more, all are
/// dropped and read again.
const MAX_STACKS: usize = 8_192;

/// The number of released keys that still lead to a stack: a RST may be reported after the end of its
/// connection.
const MAX_RELEASED: usize = 4_096;

/// How many different stacks that were unwound here are kept. When there are more, the least recently used
/// quarter of those that no recipe leads to is dropped.
const MAX_UNWOUND: usize = 16_384;

/// Reads stacks from the kernel half's map, and keeps those that were unwound here.
///
/// A stack that was unwound has a key of its own, by which the kernel half reports it when it recognizes it.
/// The key of a copy leads to that key.
pub struct Store {
    map: BpfHashMap<MapData, u64, StackTrace>,
    known: HashMap<u64, Arc<[u64]>, Quick>,
    /// Programs have few places that open and close sockets.
    unwound: HashMap<u64, CachedStack, Quick>,
    hasher: RandomState,
    clock: u64,
    copies: HashMap<u64, u64, Quick>,
    /// The keys of `copies` and some that were released, oldest first.
    order: VecDeque<u64>,
    /// How many `copies` may be kept.
    capacity: usize,
    released: VecDeque<u64>,
    /// Stacks that were evicted before they were read.
    lost: u64,
}

struct CachedStack {
    stack: UnwoundStack,
    /// When it was last used, by the store's clock.
    used: u64,
}

impl Store {
    /// Reads from `map`, and keeps unwound stacks for this many connections, each with an opener and an
    /// actor. When there are more, the oldest are dropped and counted as lost.
    pub fn new(map: BpfHashMap<MapData, u64, StackTrace>, connections: u32) -> Self {
        Self {
            map,
            known: HashMap::default(),
            unwound: HashMap::default(),
            hasher: RandomState::new(),
            clock: 0,
            copies: HashMap::default(),
            order: VecDeque::new(),
            capacity: usize::try_from(connections).unwrap_or(usize::MAX).saturating_mul(2),
            released: VecDeque::new(),
            lost: 0,
        }
    }

    /// Keeps a stack that was unwound from the copy with this key. Returns the stack's own key. `is_needed`
    /// accepts the keys of stacks that may be reported again.
    pub fn keep(&mut self, copy: u64, stack: UnwoundStack, is_needed: impl Fn(u64) -> bool) -> u64 {
        // One in 2^64 pairs of stacks has the same key; then the second stack gets the next key.
        let mut key = self.hasher.hash_one(&stack) | KEY_BIT;
        while self.unwound.get(&key).is_some_and(|known| known.stack != stack) {
            key = key.wrapping_add(1) | KEY_BIT;
        }
        self.clock += 1;
        if !self.unwound.contains_key(&key) {
            self.make_room(is_needed);
        }
        self.unwound.entry(key).or_insert(CachedStack { stack, used: 0 }).used = self.clock;
        while self.copies.len() >= self.capacity {
            let Some(oldest) = self.order.pop_front() else { break };
            self.lost += u64::from(self.copies.remove(&oldest).is_some());
        }
        if self.order.len() >= self.capacity.saturating_mul(2) {
            let Self { order, copies, .. } = self;
            order.retain(|key| copies.contains_key(key));
        }
        self.order.push_back(copy);
        self.copies.insert(copy, key);
        key
    }

    fn make_room(&mut self, is_needed: impl Fn(u64) -> bool) {
        if self.unwound.len() < MAX_UNWOUND {
            return;
        }
        let mut times: Vec<_> = self.unwound.values().map(|unwound| unwound.used).collect();
        let (_, oldest, _) = times.select_nth_unstable(MAX_UNWOUND / 4);
        let oldest = *oldest;
        self.unwound.retain(|key, unwound| unwound.used > oldest || is_needed(*key));
    }

    /// Drops the key of a copy after [`MAX_RELEASED`] others have been released.
    pub fn release(&mut self, key: u64) {
        if !self.copies.contains_key(&key) {
            return;
        }
        self.released.push_back(key);
        if self.released.len() > MAX_RELEASED
            && let Some(oldest) = self.released.pop_front()
        {
            self.copies.remove(&oldest);
        }
    }

    /// The own key of a stack that was unwound here, from that key or from that of a copy.
    pub fn own_key(&mut self, key: u64) -> Option<u64> {
        let own = self.copies.get(&key).copied().unwrap_or(key);
        let unwound = self.unwound.get_mut(&own)?;
        self.clock += 1;
        unwound.used = self.clock;
        Some(own)
    }

    /// A stack that was unwound here, by its own key.
    pub fn unwound(&self, key: u64) -> Option<UnwoundStack> {
        self.unwound.get(&key).map(|unwound| unwound.stack.clone())
    }

    /// The addresses of a stack in the kernel half's map, innermost first; `None` if none was taken, or if it
    /// was evicted.
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

    /// The number of stacks that were evicted before they were read.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}
