//! Keys in records → frames: reads the kernel half's map of stacks, each stack once.

use std::{collections::HashMap, sync::Arc};

use aya::maps::{HashMap as BpfHashMap, MapData};
use tcpclose_common::stack::Stack;

/// How many stacks are remembered here: as many as the kernel half keeps. Beyond it all are forgotten and read again.
const MAX_STACKS: usize = 8_192;

/// See the module.
pub struct Stacks {
    map: BpfHashMap<MapData, u64, Stack>,
    known: HashMap<u64, Arc<[u64]>>,
    /// Stacks that were evicted before they were read.
    lost: u64,
}

impl Stacks {
    /// Reads from `map`.
    pub fn new(map: BpfHashMap<MapData, u64, Stack>) -> Self {
        Self { map, known: HashMap::new(), lost: 0 }
    }

    /// The frames of a stack, innermost first; `None` if none was taken or if it is gone.
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

    /// How many were evicted before they were read, so far.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}
