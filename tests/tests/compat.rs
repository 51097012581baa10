//! 32-bit programs on a 64-bit kernel: their system calls have numbers of their own.

use std::{net::TcpListener, process::Command};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    expect::{differences, shortened},
    features::{self, Feature},
    netns::Namespace,
    tool::Launch,
};

/// Each call, and the trigger that the tool must report for it. In the native table, these numbers stand for
/// other calls.
const CALLS: &[(&str, &str)] = &[
    ("close", "close"),
    ("shutdown", "shutdown"),
    #[cfg(target_arch = "x86_64")]
    ("socketcall", "shutdown"),
    ("dup2", "dup"),
];

#[test]
fn calls_of_a_32_bit_program_have_their_names() -> Result<()> {
    if Feature::Programs32.is_missed() {
        return Ok(());
    }
    let namespace = Namespace::new()?;
    let tool = Launch::new()?.trace([&namespace]).start()?;
    for (call, trigger) in CALLS {
        let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", 0))?))?;
        let port = listener.local_addr()?.port();
        let mut command = Command::new(features::compat()?);
        command.args([port.to_string().as_str(), call]);
        namespace.enter(&mut command)?;
        let mut child = command.spawn()?;
        let (mut server, _) = listener.accept()?;
        ensure!(std::io::copy(&mut server, &mut std::io::sink())? == 0, "the program sent something");
        drop(server);
        ensure!(child.wait()?.success(), "the program could not connect");
        let is_it = |line: &Value| line["event"] == "close" && line["connection"]["remote"]["port"] == port;
        let line = tool.wait_for(&format!("about {call}"), is_it)?;
        let expected = json!({
            "process": {"pid": child.id(), "comm": "compat", "attribution": "syscall"},
            "closed_by": "local",
            "trigger": trigger,
        });
        let differences = differences(&line, &expected);
        ensure!(differences.is_empty(), "{call}: {}\n  {}", shortened(&line), differences.join("\n  "));
    }
    tool.stop()?;
    Ok(())
}
