//! One tool shared by many tests, each of which sees the lines of its own window. Starting a tool takes two
//! seconds on an emulated processor, for parsing the kernel's BTF and for the verifier.
//!
//! A shared tool traces all namespaces and runs until the test program is over: it ends when the reader of
//! its output is gone. A test sees the lines of its own namespaces and those that may be about them. A window
//! can tell that its output is complete because the tool delays no line by more than a tenth of a second from
//! the read of its ring buffer that found what the line is about.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use serde_json::{Value, json};

use crate::{
    bed::{Bed, endpoint},
    expect::differences,
    netns::Namespace,
    tool::{Ended, Launch, Tool, View},
};

/// How long the tool keeps an ending back at most, from the read that found it.
pub const PATIENCE: Duration = Duration::from_millis(100);

/// Connections that are ended and reported, one after the other, once that time is over and before a window
/// is closed. The read that reports the first of them may have begun before, and lines that the read of the
/// second one releases may follow that one's.
const ROUNDS: usize = 3;

/// The view that one test has of a shared tool.
#[derive(Debug)]
pub struct Window {
    tool: Arc<Tool>,
    view: View,
}

impl Window {
    /// Opens a view of the tool with these arguments, and starts the tool if it is not running.
    pub fn open(bed: &Bed, args: &[&str]) -> Result<Self> {
        static TOOLS: Mutex<BTreeMap<Vec<String>, Arc<Tool>>> = Mutex::new(BTreeMap::new());
        let key: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
        // A test that arrives while the tool is being started waits for it.
        let mut tools = TOOLS.lock().unwrap_or_else(PoisonError::into_inner);
        let tool = match tools.get(&key) {
            Some(tool) if tool.is_talking() => Arc::clone(tool),
            _ => {
                let mut tool = Launch::new()?.args(["-o", "json"]).args(args.iter().copied()).start()?;
                tool.share();
                // An emulator translates a BPF program when it first runs. That takes so long that several
                // tasks may enter the program at once, and the kernel then runs it for only one of them.
                wait_for_own_end(&tool, &View::ALL)?;
                let tool = Arc::new(tool);
                tools.insert(key, Arc::clone(&tool));
                tool
            }
        };
        let namespaces = Some(bed.namespaces().map(Namespace::inode).collect());
        let view = View { from: tool.count(), namespaces };
        Ok(Self { tool, view })
    }

    /// Same as [`Tool::wait_until`], for the lines of the window.
    pub fn wait_until(&self, satisfied: impl Fn(&[Value]) -> bool) -> bool {
        self.tool.wait_until_among(&self.view, satisfied)
    }

    /// Same as [`Tool::wait_for`], for the lines of the window.
    pub fn wait_for(&self, what: &str, like: impl Fn(&Value) -> bool) -> Result<Value> {
        self.tool.wait_for_among(&self.view, what, like)
    }

    /// Waits until everything that has happened is reported, and returns the lines of the window.
    pub fn close(self) -> Result<Ended> {
        let everything = View { namespaces: None, ..self.view };
        wait_for_own_end(&self.tool, &everything)?;
        // All that had happened has been read.
        let read = Instant::now();
        while read.elapsed() < PATIENCE {
            wait_for_own_end(&self.tool, &everything)?;
        }
        for _ in 0..ROUNDS {
            wait_for_own_end(&self.tool, &everything)?;
        }
        self.tool.stderr_about(&self.view)
    }
}

/// Opens and ends a connection of this process over the loopback of this thread's namespace. Returns the
/// known fields of the expected line of the client's end.
pub fn end_of_own() -> Result<Value> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let line = json!({
        "event": "close",
        "connection": {
            "local": endpoint(client.local_addr()?),
            "remote": endpoint(client.peer_addr()?),
            "netns": fs::metadata("/proc/thread-self/ns/net")?.ino(),
        },
    });
    drop((listener.accept()?, client));
    Ok(line)
}

/// Ends a connection of this process, and waits until the tool reports it.
fn wait_for_own_end(tool: &Tool, view: &View) -> Result<()> {
    let line = end_of_own()?;
    let is_it = |written: &Value| differences(written, &line).is_empty();
    tool.wait_for_among(view, &format!("like {line}"), is_it).map(drop)
}
