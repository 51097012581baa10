//! A program that the kernel kills for want of memory.

use std::{
    fs,
    io::{Read, copy, sink},
    net::TcpListener,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tcpclose_tests::{
    netns::Namespace,
    program::Program,
    servers::{PYTHON, is_missing, start_script},
    tool::Launch,
};

use super::{at, process, wait_for_line};

pub(crate) const NEEDS: &[&str] = &[PYTHON];

/// Where control groups with a limit of memory are made, and the file with the limit: version 1, and
/// version 2.
const HIERARCHIES: [(&str, &str); 2] =
    [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];

/// More than the program needs before it takes more.
const LIMIT: &str = "64M";

/// A control group of this test; removed on drop, when its process has ended.
struct Group(PathBuf);

impl Group {
    /// `None` if this host has no hierarchy with limits of memory.
    fn new() -> Option<Self> {
        for (hierarchy, limit) in HIERARCHIES {
            let folder = Path::new(hierarchy).join(format!("tcpclose-tests-{}", std::process::id()));
            if Path::new(hierarchy).join("cgroup.procs").exists() && fs::create_dir(&folder).is_ok() {
                let group = Self(folder);
                if fs::write(group.0.join(limit), LIMIT).is_ok() {
                    return Some(group);
                }
            }
        }
        None
    }

    fn add(&self, program: &Program) -> Result<()> {
        fs::write(self.0.join("cgroup.procs"), program.pid().to_string()).context("joining the group")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

pub(crate) fn the_oom_killer_is_named() -> Result<()> {
    let Some(group) = Group::new() else {
        let [(first, _), _] = HIERARCHIES;
        ensure!(is_missing(&[first]), "no control group with a limit of memory can be made");
        return Ok(());
    };
    let namespace = Namespace::new()?;
    let tool = Launch::new()?.trace([&namespace]).start()?;
    let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", 0))?))?;
    let port = listener.local_addr()?.port();
    let mut program = start_script(&namespace, "memory.py", &[&port.to_string()])?;
    let (server, _) = listener.accept()?;
    group.add(&program)?;
    program.tell("go")?;
    let ended = program.ended()?;
    ensure!(std::os::unix::process::ExitStatusExt::signal(&ended) == Some(9), "it ended with {ended}");
    ensure!(copy(&mut server.take(1), &mut sink())? == 0, "the program sent something");
    wait_for_line(
        &tool,
        &json!({"event": "close", "connection": at("remote", port)}),
        &json!({
            "process": process(&program, "python3"),
            "trigger": "signal",
            "signal": "SIGKILL",
            "signal_from": {"oom": true},
        }),
    )?;
    tool.stop()?;
    Ok(())
}
