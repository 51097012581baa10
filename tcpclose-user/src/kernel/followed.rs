//! The processes of `--pid` and of `-- COMMAND`, in a map of the kernel half, which adds their children.

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData};

use super::handle::KernelHalf;

/// The processes whose connections are traced: a handle on the map in which the kernel half keeps them.
pub struct Followed(HashMap<MapData, u32, u8>);

impl Followed {
    /// Takes the map from the kernel half.
    ///
    /// # Errors
    /// The object has no such map.
    pub fn new(kernel: &mut KernelHalf) -> Result<Self> {
        kernel.take_map("FOLLOWED").map(Self)
    }

    /// Adds a process.
    ///
    /// # Errors
    /// The map is full.
    pub fn add(&mut self, pid: u32) -> Result<()> {
        self.0.insert(pid, 1, 0).with_context(|| format!("cannot follow process {pid}: the map is full"))
    }

    /// Whether this process is followed.
    pub fn contains(&self, pid: u32) -> bool {
        self.0.get(&pid, 0).is_ok()
    }
}
