//! The command line: how the tool ends, what it traces, what it leaves out, and what it reports when it
//! fails.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io::Read,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use nix::{
    libc,
    sys::{
        signal::Signal,
        stat::{Mode, SFlag, makedev, mknod},
    },
    unistd::mkfifo,
};
use serde_json::{Value, json};
use tcpclose_tests::{
    bed::{Bed, Connection, Side, endpoint},
    contract,
    expect::{known, mismatches, one_of},
    features::Feature,
    netns, peer,
    scenario::routes,
    scratch::Scratch,
    tool::{Ended, Launch},
};

/// Opens and ends one connection.
fn one_connection(bed: &mut Bed) -> Result<Connection> {
    let connection = bed.established()?;
    bed.peer(Side::Client).ask("close")?;
    bed.peer(Side::Server).ask("receive-end")?;
    bed.peer(Side::Server).ask("close")?;
    Ok(connection)
}

#[test]
fn signals_end_it_with_what_it_read_and_a_summary() -> Result<()> {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut bed = Bed::new(routes::loopback_ipv4())?;
        let tool = Launch::new()?.trace(bed.namespaces()).start()?;
        one_connection(&mut bed)?;
        // The signal follows immediately: records that are already in the ring buffer must still be written.
        tool.signal(signal)?;
        let ended = tool.wait()?.successful()?;
        ensure!(ended.lines.len() == 2, "{signal}: 2 lines were expected\n{ended}");
    }
    Ok(())
}

#[test]
fn closed_stdout_ends_it() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let tool = Launch::new()?.trace(bed.namespaces()).head(1).start()?;
    one_connection(&mut bed)?;
    tool.wait()?.successful()?;
    Ok(())
}

#[test]
fn count_ends_it() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let tool = Launch::new()?.trace(bed.namespaces()).args(["--count", "3"]).start()?;
    one_connection(&mut bed)?;
    one_connection(&mut bed)?;
    let ended = tool.wait()?.successful()?;
    ensure!(ended.lines.len() == 3, "3 lines were expected\n{ended}");
    Ok(())
}

#[test]
fn duration_ends_it() -> Result<()> {
    let bed = Bed::new(routes::loopback_ipv4())?;
    let ended =
        Launch::new()?.trace(bed.namespaces()).args(["--duration", "100ms"]).start()?.wait()?.successful()?;
    ensure!(ended.lines.is_empty(), "nothing happened\n{ended}");
    Ok(())
}

#[test]
fn wrong_usage_exits_with_2() -> Result<()> {
    for args in [
        ["--no-such-option", "1"],
        ["--stack", "all"],
        ["--cause", "bad_luck"],
        ["--duration", "soon"],
        ["--linger", "soon"],
        ["--address", "10.0.0.0/33"],
    ] {
        let ended = Launch::new()?.args(args).run()?.with_code(2)?;
        ensure!(ended.stderr.contains(args[0]), "stderr does not name {}\n{ended}", args[0]);
        ensure!(ended.lines.is_empty(), "stdout is not empty\n{ended}");
    }
    Ok(())
}

#[test]
fn without_privilege_it_names_what_is_missing() -> Result<()> {
    let ended = Launch::new()?.as_nobody(&[])?.run()?.with_code(1)?;
    let stderr = ended.stderr.to_lowercase();
    for capability in ["cap_bpf", "cap_perfmon"] {
        ensure!(stderr.contains(capability), "stderr does not name {capability}\n{ended}");
    }
    Ok(())
}

/// The arguments that make the tool run a command.
fn command<I: IntoIterator<Item: Into<OsString>>>(words: I) -> Vec<OsString> {
    [OsString::from("--")].into_iter().chain(words.into_iter().map(Into::into)).collect()
}

/// Makes the tool run a command in a bed's namespace. The server there does not descend from the command.
fn run_command(bed: &Bed, args: Vec<OsString>) -> Result<Ended> {
    Launch::new()?.inside(bed.namespace(Side::Client))?.args(["-o", "json"]).args(args).run()
}

/// The command connects at once and exits, so the tool must be attached before it starts. Its program is
/// known although it has exited.
#[test]
fn command_is_traced_alone_and_passes_its_status() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let address = bed.listen()?;
    let program = peer::program()?;
    let words = ["once".to_owned(), address.ip().to_string(), address.port().to_string(), "7".to_owned()];
    bed.peer(Side::Server).tell("serve 1")?;
    let ended =
        run_command(&bed, command([program].into_iter().chain(words.map(OsString::from))))?.with_code(7)?;
    bed.peer(Side::Server).finish("serve 1")?;
    // The process exits a fraction of a millisecond after it has connected, so its executable may be unknown.
    let exe = one_of(&[json!(null), json!(bed.peer(Side::Server).exe()?)]);
    let expected = json!({
        "event": "close",
        "closed_by": "local",
        "trigger": "close",
        "process": {"exe": exe, "pid": known()},
        "connection": {"remote": endpoint(address), "role": "client"},
        "opener": {"process": {"exe": exe}},
    });
    let mismatches = mismatches(&ended.lines, &[expected]);
    ensure!(mismatches.is_empty(), "{mismatches}\n{ended}");
    Ok(())
}

#[test]
fn children_of_command_are_traced() -> Result<()> {
    let mut bed = Bed::new(routes::loopback_ipv4())?;
    let address = bed.listen()?;
    let program = peer::program()?.into_string().ok().context("the peer's path is not text")?;
    let once = format!("'{program}' once {} {} 0", address.ip(), address.port());
    bed.peer(Side::Server).tell("serve 2")?;
    let ended =
        run_command(&bed, command(["sh", "-c", &format!("{once} & {once}; wait; exit 3")]))?.with_code(3)?;
    bed.peer(Side::Server).finish("serve 2")?;
    let expected = json!({"event": "close", "connection": {"remote": endpoint(address)}});
    let mismatches = mismatches(&ended.lines, &[expected.clone(), expected]);
    ensure!(mismatches.is_empty(), "{mismatches}\n{ended}");
    Ok(())
}

/// The statuses are those of `env` and `timeout`: 127 for a command that is not found, 126 for one that
/// cannot be executed.
#[test]
fn a_command_that_cannot_be_started_is_reported() -> Result<()> {
    let bed = Bed::new(routes::loopback_ipv4())?;
    for (program, code) in [("/no/such/program", 127), ("no-such-program", 127), ("/etc/passwd", 126)] {
        let ended = run_command(&bed, command([program]))?.with_code(code)?;
        ensure!(ended.stderr.contains(program), "stderr does not name the program\n{ended}");
    }
    Ok(())
}

/// A failure of the tool itself has a status that distinguishes it from a failure of the command; without a
/// command it is 1.
#[test]
fn its_own_failure_is_not_the_commands() -> Result<()> {
    Launch::new()?.as_nobody(&[])?.args(["--", "true"]).run()?.with_code(125)?;
    Launch::new()?.as_nobody(&[])?.run()?.with_code(1)?;
    Ok(())
}

/// `--ready-file` writes into a FIFO or a device as any program would, and does not replace it with a regular
/// file.
#[test]
fn ready_file_may_be_a_fifo_or_a_device() -> Result<()> {
    let bed = Bed::new(routes::loopback_ipv4())?;
    let scratch = Scratch::new()?;
    let started = |path: &Path| {
        let options = ["--duration".as_ref(), "100ms".as_ref(), "--ready-file".as_ref(), path.as_os_str()];
        Launch::new()?.trace(bed.namespaces()).args(options).run()?.successful()
    };

    let fifo = scratch.path().join("fifo");
    mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR)?;
    // Opened for reading and writing, so that neither end blocks until the other is opened.
    let mut open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&fifo)?;
    started(&fifo)?;
    ensure!(fs::symlink_metadata(&fifo)?.file_type().is_fifo(), "the FIFO was replaced");
    let mut written = [0; 64];
    let length = open.read(&mut written).context("nothing was written to the FIFO")?;
    let pid = str::from_utf8(&written[..length])?;
    ensure!(pid.trim().parse::<u32>().is_ok_and(|pid| pid > 1), "{pid:?} is not a pid");

    // A device node of the test with the number of /dev/null.
    let device = scratch.path().join("null");
    mknod(&device, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, makedev(1, 3))?;
    started(&device)?;
    ensure!(fs::symlink_metadata(&device)?.file_type().is_char_device(), "the device was replaced");
    Ok(())
}

/// The output of a subcommand that must succeed.
fn printed(args: &[&str]) -> Result<String> {
    let output = Launch::new()?.args(args).output()?;
    ensure!(output.status.success(), "{}: {output:?}", args.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}

/// The long options in the help of a subcommand.
fn options_in(help: &str) -> Vec<&str> {
    let words = help.split(|one: char| !one.is_ascii_alphanumeric() && one != '-');
    words.filter(|word| word.len() > 2 && word.starts_with("--")).collect()
}

#[test]
fn man_page_has_every_option() -> Result<()> {
    let page = printed(&["man"])?;
    ensure!(page.lines().any(|line| line.starts_with(".TH tcpclose")), "not a man page: {page}");
    let page = page.replace(r"\-", "-");
    let help = printed(&["trace", "--help"])?;
    let options = options_in(&help);
    ensure!(options.contains(&"--linger"), "{options:?}");
    let missing: Vec<_> = options.into_iter().filter(|option| !page.contains(option)).collect();
    ensure!(missing.is_empty(), "the man page lacks {missing:?}");
    Ok(())
}

#[test]
fn completions_are_scripts_of_the_shell() -> Result<()> {
    let scratch = Scratch::new()?;
    let script = scratch.path().join("tcpclose");
    fs::write(&script, printed(&["completions", "bash"])?)?;
    let mut bash = Command::new("bash");
    let complete = netns::run(bash.args(["--norc", "-c", r#". "$0" && complete -p tcpclose"#]).arg(&script))?;
    ensure!(complete.contains("tcpclose"), "bash completes nothing: {complete}");
    let scripts = [("bash", "--linger"), ("zsh", "#compdef tcpclose"), ("fish", "complete -c tcpclose")];
    for (shell, text) in scripts {
        ensure!(printed(&["completions", shell])?.contains(text), "{shell}: no {text}");
    }
    Ok(())
}

/// The JSON report of `doctor` and its exit status.
fn doctor(launch: Launch, args: &[&str]) -> Result<(Value, Option<i32>)> {
    let output = launch.args(["doctor", "-o", "json"]).args(args).output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(text.lines().count() == 1, "one line was expected: {text}");
    let report = serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))?;
    Ok((report, output.status.code()))
}

/// The names of the items in a list whose field has this value.
fn names<'a>(report: &'a Value, list: &str, field: &str, value: &str) -> Vec<&'a str> {
    let items = report[list].as_array().into_iter().flatten();
    items.filter(|item| item[field] == value).filter_map(|item| item["name"].as_str()).collect()
}

/// As root, `doctor` tries every hook. What it reports as working has also worked for the other tests.
#[test]
fn doctor_tries_every_hook() -> Result<()> {
    let (report, code) = doctor(Launch::new()?, &[])?;
    ensure!(report["cannot"].is_null(), "tracing works, but doctor reports that it cannot: {report:#}");
    let hooks = report["hooks"].as_array().context("no hooks")?;
    for hook in hooks {
        let results: Vec<_> =
            hook["variants"].as_array().into_iter().flatten().map(|one| &one["result"]).collect();
        ensure!(results.iter().all(|result| **result != "untried"), "not tried: {hook:#}");
        ensure!(
            !hook.to_string().contains("the object has no"),
            "the hook table names a program that the object lacks: {hook:#}"
        );
        ensure!(hook["mark"] != "ok" || results.iter().any(|result| **result == "attached"), "{hook:#}");
        // A kernel with BTF takes typed tracepoints. If the verifier refuses one, a classic tracepoint takes
        // its place, at a higher price, and no other test notices.
        let typed = hook["variants"].as_array().into_iter().flatten().find(|one| one["kind"] == "tp_btf");
        let is_taken = typed.is_none_or(|one| one["result"] != "refused");
        ensure!(!Feature::Types.is_here() || is_taken, "{hook:#}");
    }
    ensure!(names(&report, "hooks", "mark", "ok").contains(&"sock:inet_sock_set_state"), "{report:#}");
    let less = report["null"].as_array().is_some_and(|null| !null.is_empty());
    let (verdict, expected) = if less { ("less", 1) } else { ("everything", 0) };
    ensure!(report["verdict"] == verdict && code == Some(expected), "{code:?} {report:#}");
    Ok(())
}

/// Without privileges `doctor` succeeds too, and reports what the kernel has and which privileges are
/// missing.
#[test]
fn doctor_needs_no_privilege() -> Result<()> {
    let (report, code) = doctor(Launch::new()?.as_nobody(&[])?, &[])?;
    ensure!(report["verdict"] == "nothing" && code == Some(3), "{code:?} {report:#}");
    let missing = names(&report, "capabilities", "mark", "no");
    ensure!(missing == ["CAP_BPF", "CAP_PERFMON"], "{report:#}");
    let hooks = report["hooks"].as_array().context("no hooks")?;
    for variant in hooks.iter().flat_map(|hook| hook["variants"].as_array().into_iter().flatten()) {
        ensure!(variant["result"] == "untried", "{variant:#}");
        let has_types = std::fs::exists("/sys/kernel/btf/vmlinux")?;
        if variant["kind"] == "tp_btf" {
            ensure!(variant["why"] == if has_types { "BTF has it" } else { "no BTF" }, "{variant:#}");
        }
    }
    Ok(())
}

/// The kernel does not accept capabilities of a user namespace, so `doctor` does not advise to get more of
/// them.
#[test]
fn doctor_knows_a_user_namespace() -> Result<()> {
    let (report, code) = doctor(Launch::new()?.in_user_namespace(), &[])?;
    ensure!(report["verdict"] == "nothing" && code == Some(3), "{code:?} {report:#}");
    ensure!(names(&report, "place", "mark", "no").contains(&"user namespace"), "{report:#}");
    let cannot = report["cannot"].as_str().context("no reason")?;
    ensure!(cannot.contains("user namespace"), "{cannot}");
    Ok(())
}

/// Without the kernel's types, the fields that need them are null, and tracepoints are classic ones.
#[test]
fn doctor_says_what_is_null_without_btf() -> Result<()> {
    let (report, code) = doctor(Launch::new()?, &["--btf", "none"])?;
    ensure!(report["verdict"] == "less" && code == Some(1), "{code:?} {report:#}");
    let null = report["null"].as_array().context("no list of what is null")?;
    for field in ["connection.bytes_sent", "connection.netns", "idle_ms", "trigger", "opener", "ttl"] {
        ensure!(null.iter().any(|one| one["field"] == field), "{field} is not reported as null: {report:#}");
    }
    for hook in report["hooks"].as_array().into_iter().flatten() {
        let variants = hook["variants"].as_array().into_iter().flatten();
        let attached: Vec<_> =
            variants.filter(|one| one["result"] == "attached").map(|one| &one["kind"]).collect();
        let untyped = ["tracepoint", "/proc", "test_run"];
        ensure!(attached.iter().all(|kind| untyped.iter().any(|one| **kind == *one)), "{hook:#}");
    }
    Ok(())
}

/// The report is meant for pasting: it has no colours, no long lines, and every row of the tables.
#[test]
fn doctor_prints_a_page() -> Result<()> {
    let output = Launch::new()?.args(["doctor"]).output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(!text.contains('\u{1b}'), "colours: {text:?}");
    let longest = text.lines().map(|line| line.chars().count()).max().unwrap_or_default();
    ensure!(longest <= 100, "a line has {longest} columns:\n{text}");
    for name in ["BTF", "tracefs", "lockdown", "RLIMIT_MEMLOCK", "cgroups", "pid namespace", "user namespace"]
    {
        ensure!(text.contains(name), "{name} is missing:\n{text}");
    }
    Ok(())
}

/// The subcommands that print something and exit.
#[test]
fn other_commands_answer() -> Result<()> {
    let explain = contract::causes().into_iter().map(|cause| vec!["explain", cause]);
    let others = ["schema", "--help", "--version", "man", "completions bash", "explain leaked"];
    for args in explain.chain(others.map(|words| words.split(' ').collect())) {
        let output = Launch::new()?.args(&args).output()?;
        ensure!(output.status.success() && !output.stdout.is_empty(), "{}: {output:?}", args.join(" "));
    }
    Ok(())
}

/// The lines of all tests are validated against this file.
#[test]
fn schema_is_the_one_in_the_documentation() -> Result<()> {
    let output = Launch::new()?.args(["schema"]).output()?;
    ensure!(
        String::from_utf8(output.stdout)? == include_str!("../../docs/schema.json"),
        "`tcpclose schema` prints something else than docs/schema.json"
    );
    Ok(())
}
