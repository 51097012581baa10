//! A program that the kernel kills for want of memory.

use std::{
    io::{Read, copy, sink},
    net::TcpListener,
};

use anyhow::{Result, ensure};
use serde_json::json;
use tcpclose_tests::{
    groups::MemoryLimit,
    netns::Namespace,
    servers::{PYTHON, start_script},
    tool::Launch,
};

use super::{at, process, wait_for_line};

pub(crate) const NEEDS: &[&str] = &[PYTHON];

pub(crate) fn the_oom_killer_is_named() -> Result<()> {
    let Some(group) = MemoryLimit::new()? else { return Ok(()) };
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
