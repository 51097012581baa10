//! A JVM that takes connections from a pool, and does not give them back when something goes wrong.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tcpclose_tests::{
    expect::{at_least, calls},
    netns::{self, Namespace},
    program::Program,
    scratch::Scratch,
    sockets::{self, CLOSE_WAIT, Socket},
    tool::Launch,
    until,
};

use super::{PYTHON, at, part, process, python, start_script, told};

pub(crate) const NEEDS: &[&str] = &[PYTHON, COMPILER, JVM, JCMD, HTTP_CLIENT];

const COMPILER: &str = "/usr/bin/javac";
const JVM: &str = "/usr/bin/java";
const JCMD: &str = "/usr/bin/jcmd";

/// Brings the others that it needs.
const HTTP_CLIENT: &str = "/usr/share/java/httpclient.jar";

const PORT: u16 = 8000;
const LIMIT: usize = 5;

/// Where the source has the mistake.
const GUILTY: &str = "java.lang.String Prices.price(java.lang.String)";

/// A JVM that runs `Prices.java`.
struct Jvm(Program);

impl Jvm {
    /// Has the source compiled and starts it, so that stacks can be followed through compiled methods, and that these
    /// stay as they are.
    fn start(namespace: &Namespace, folder: &Path) -> Result<Self> {
        let source = part("Prices.java");
        netns::run(Command::new(COMPILER).args(["-cp", HTTP_CLIENT, "-d"]).arg(folder).arg(source))?;
        let mut command = Command::new(JVM);
        command.args(["-XX:+PreserveFramePointer", "-XX:TieredStopAtLevel=1", "-cp"]);
        command.arg(format!("{HTTP_CLIENT}:{}", folder.display())).args(["Prices", &LIMIT.to_string()]);
        Ok(Self(Program::start(namespace, command)?))
    }

    /// Has it do something with itself.
    fn jcmd(&self, order: &str) -> Result<String> {
        netns::run(Command::new(JCMD).args([&self.0.pid().to_string(), order]))
    }
}

impl Drop for Jvm {
    fn drop(&mut self) {
        // The JVM leaves it. It may not have written it yet.
        let _ = fs::remove_file(format!("/tmp/perf-{}.map", self.0.pid()));
    }
}

pub(crate) fn pool_runs_dry_and_the_method_is_named() -> Result<()> {
    let namespace = Namespace::new()?;
    let folder = Scratch::new()?;
    let tool = Launch::new()?.trace([&namespace]).args(["--linger", "1s"]).start()?;
    let idle = Duration::from_mins(1).as_secs().to_string();
    let backend = start_script(&namespace, python("backend.py"), &[&PORT.to_string(), &idle])?;
    let mut jvm = Jvm::start(&namespace, folder.path())?;

    // Only compiled methods have names, and a method is compiled when it has been called often.
    let good = format!("500 http://127.0.0.1:{PORT}/");
    until("the JVM has compiled the method", || {
        ensure!(jvm.0.ask(&good)? == "answered=500 failed=0 refused=0 leased=0");
        Ok(jvm.jcmd("Compiler.codelist")?.contains("Prices.price(").then_some(()))
    })?;
    jvm.jcmd("Compiler.perfmap")?;
    // The pool has a connection that was opened before, when nothing was compiled yet.
    let of_client = |socket: &Socket| socket.remote.port() == PORT;
    let older: Vec<_> = sockets::list(&namespace)?.into_iter().filter(of_client).collect();
    ensure!(older.len() == 1, "{older:?}");

    let said = jvm.0.ask(&format!("{} http://127.0.0.1:{PORT}/broken", LIMIT + 2))?;
    ensure!(said == format!("answered=0 failed={LIMIT} refused=2 leased={LIMIT}"), "the client says: {said}");
    let is_held = |socket: &Socket| of_client(socket) && socket.state == CLOSE_WAIT;
    let held = until("the backend has closed all that the pool may have", || {
        let found: Vec<_> = sockets::list(&namespace)?.into_iter().filter(is_held).collect();
        Ok((found.len() == LIMIT).then_some(found))
    })?;

    for socket in held {
        let descriptors = sockets::descriptors(jvm.0.pid(), &socket)?;
        let descriptor = descriptors.first().context("the JVM does not have it")?;
        // Whether the last read took in the end depends on whether that had come by then.
        let kind = if socket.untaken == 0 { "leaked" } else { "unread" };
        let is_older = older.iter().any(|older| older.local == socket.local);
        let opener = if is_older { "Interpreter" } else { GUILTY };
        told(
            &tool,
            &json!({"event": "lingering", "connection": {"local": {"port": socket.local.port()}}}),
            &json!({
                "connection": {"role": "client", "remote": {"port": PORT}},
                "process": process(&jvm.0, "java"),
                "state": "CLOSE_WAIT",
                "kind": kind,
                "unread_bytes": socket.untaken.saturating_sub(1),
                "for_ms": at_least(1000),
                "holders": [{"pid": jvm.0.pid(), "comm": "java", "fd": descriptor}],
                "opener": {"process": process(&jvm.0, "java"), "stack": {"user": calls(opener)}},
            }),
        )?;
    }
    // The backend did what it had to do, at once.
    told(
        &tool,
        &json!({"event": "close", "connection": at("local", PORT)}),
        &json!({"process": process(&backend, "python3"), "closed_by": "local", "ended": "fin"}),
    )?;
    tool.stop()?;
    Ok(())
}
