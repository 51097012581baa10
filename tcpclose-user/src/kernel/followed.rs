//! The processes of `--pid` and of `-- COMMAND`, in a map of the kernel half, which adds their children.

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData};

use super::handle::KernelHalf;

/// The processes whose connections are traced: a handle on the map in which the kernel half keeps them.
pub struct Followed {
    map: HashMap<MapData, u32, u8>,
    /// The process that starts the command, whose own connections do not belong to it.
    parent: Option<u32>,
}

impl Followed {
    /// Takes the map from the kernel half.
    ///
    /// # Errors
    /// The object has no such map.
    pub fn new(kernel: &mut KernelHalf) -> Result<Self> {
        Ok(Self { map: kernel.take_map("FOLLOWED")?, parent: None })
    }

    /// Adds a process.
    ///
    /// # Errors
    /// The map is full.
    pub fn add(&mut self, pid: u32) -> Result<()> {
        self.map.insert(pid, 1, 0).with_context(|| format!("cannot follow process {pid}: the map is full"))
    }

    /// Adds a process for the sake of its children.
    ///
    /// # Errors
    /// The map is full.
    pub fn add_parent(&mut self, pid: u32) -> Result<()> {
        self.parent = Some(pid);
        self.add(pid)
    }

    /// Whether this process is followed for its own sake.
    pub fn contains(&self, pid: u32) -> bool {
        self.parent != Some(pid) && self.map.get(&pid, 0).is_ok()
    }
}
