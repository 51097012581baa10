//! One tool for many tests, each with a window on what it tells: starting a tool takes an emulated processor two seconds,
//! for reading the kernel's types and for the verifier.
//!
//! Such a tool watches all namespaces and goes on until the test program is over: it ends when nobody reads what it writes
//! any more. A test sees the lines of its own
//! namespaces, and everything that may be about them. That nothing more will come is known because the tool holds no line
//! back for longer than two reads of its ring.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Result;
use serde_json::Value;

use crate::{
    bed::Bed,
    expect::differences,
    netns::Namespace,
    scenario,
    tool::{Ended, Launch, Tool, View},
};

/// Connections that are made and told, one after the other, before a window is closed. With each the tool has read its
/// ring to the end once more, and what it lets go then may come behind it.
const ROUNDS: usize = 3;

/// A test's view of a tool.
#[derive(Debug)]
pub struct Window {
    tool: Arc<Tool>,
    view: View,
}

impl Window {
    /// A view of the tool with these arguments, which is started if there is none.
    pub fn open(bed: &Bed, args: &[&str]) -> Result<Self> {
        static TOOLS: Mutex<BTreeMap<Vec<String>, Arc<Tool>>> = Mutex::new(BTreeMap::new());
        let key: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
        // Whoever comes while one is being started waits for that one.
        let mut tools = TOOLS.lock().unwrap_or_else(PoisonError::into_inner);
        let tool = match tools.get(&key) {
            Some(tool) if tool.is_talking() => Arc::clone(tool),
            _ => {
                let mut tool = Launch::new()?.args(["-o", "json"]).args(args.iter().copied()).start()?;
                tool.leave_nothing();
                // An emulator translates programs when they are run first. That takes so long that several tasks may be
                // in the middle of one, and the kernel runs it for one of them alone.
                tell_an_end(&tool, &View::ALL)?;
                let tool = Arc::new(tool);
                tools.insert(key, Arc::clone(&tool));
                tool
            }
        };
        let namespaces = Some(bed.namespaces().map(Namespace::inode).collect());
        let view = View { from: tool.count(), namespaces };
        Ok(Self { tool, view })
    }

    /// [`Tool::wait_until`], of the lines that are to be seen.
    pub fn wait_until(&self, satisfied: impl Fn(&[Value]) -> bool) -> bool {
        self.tool.wait_until_among(&self.view, satisfied)
    }

    /// [`Tool::wait_for`], among those lines.
    pub fn wait_for(&self, what: &str, like: impl Fn(&Value) -> bool) -> Result<Value> {
        self.tool.wait_for_among(&self.view, what, like)
    }

    /// Waits until all that has happened is told, and returns what was to be seen.
    pub fn close(self) -> Result<Ended> {
        let everything = View { namespaces: None, ..self.view };
        for _ in 0..ROUNDS {
            tell_an_end(&self.tool, &everything)?;
        }
        self.tool.said_about(&self.view)
    }
}

/// Has a connection of this process end, and waits until that is told.
fn tell_an_end(tool: &Tool, view: &View) -> Result<()> {
    let line = scenario::end_of_own()?;
    let is_it = |told: &Value| differences(told, &line).is_empty();
    tool.wait_for_among(view, &format!("like {line}"), is_it).map(drop)
}
