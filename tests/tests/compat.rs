//! 32-bit programs on a 64-bit kernel: their system calls have numbers of their own.

use std::{net::TcpListener, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    expect::{differences, shortened},
    netns::Namespace,
    scratch::Scratch,
    tool::Launch,
};

const GCC: &str = "/usr/bin/gcc";

/// Each call, and the trigger that the tool must report for it. In the native table, these numbers stand for
/// other calls.
const CALLS: [(&str, &str); 4] =
    [("close", "close"), ("shutdown", "shutdown"), ("socketcall", "shutdown"), ("dup2", "dup")];

#[cfg(target_arch = "x86_64")]
#[test]
fn calls_of_a_32_bit_program_have_their_names() -> Result<()> {
    if !Path::new(GCC).exists() {
        println!("skipped: {GCC} is not here");
        return Ok(());
    }
    let namespace = Namespace::new()?;
    let folder = Scratch::new()?;
    let program = folder.path().join("compat");
    let mut compiler = Command::new(GCC);
    compiler.args(["-m32", "-nostdlib", "-static", "-no-pie", "-O1", "-fno-stack-protector", "-o"]);
    compiler.arg(&program).arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat.c"));
    let output = compiler.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let tool = Launch::new()?.trace([&namespace]).start()?;
    for (call, trigger) in CALLS {
        let listener = namespace.inside(|| Ok(TcpListener::bind(("127.0.0.1", 0))?))?;
        let port = listener.local_addr()?.port();
        let mut command = Command::new(&program);
        command.args([&port.to_string(), call]);
        namespace.enter(&mut command)?;
        let mut child = command.spawn().context("this kernel does not run 32-bit programs")?;
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
