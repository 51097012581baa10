//! The tool in a container: beside another one whose namespaces it shares, and for all containers of the
//! host. The capabilities are those that the guide names.

use std::{
    env, fs,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tcpclose_tests::{
    expect::{but, differences, known},
    netns::Namespace,
    program::Program,
    scratch::Scratch,
    servers::{PYTHON, is_missing},
    until,
};

const PODMAN: &str = "/usr/bin/podman";
const RUNC: &str = "/usr/sbin/runc";

/// The capabilities of the tool, as the guide states them.
const CAPABILITIES: [&str; 3] = ["BPF", "PERFMON", "SYS_PTRACE"];

/// The Kubernetes namespace of the tenants' pods.
const POD_NAMESPACE: &str = "tests";

/// Where podman keeps what it knows of its containers.
const CONTAINERS: &str = "/var/lib/containers/storage/overlay-containers";

/// Where programs and libraries are on the host.
const PROGRAMS: [&str; 3] = ["/usr", "/lib", "/lib64"];

/// The output of podman, without the newline at its end.
fn podman(args: &[&str]) -> Result<String> {
    let output = Command::new(PODMAN).args(args).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "podman {}: {errors}", args.join(" "));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// An image without a distribution; removed on drop.
struct ContainerImage(String);

impl ContainerImage {
    /// Makes an image that consists of these files, each with its place there.
    fn of(name: &str, files: &[(PathBuf, PathBuf)]) -> Result<Self> {
        let context = Scratch::new()?;
        let root = context.path().join("root");
        fs::create_dir(&root)?;
        for (file, place) in files {
            let to = root.join(place.strip_prefix("/").unwrap_or(place));
            fs::create_dir_all(to.parent().context("a file without a folder")?)?;
            fs::copy(file, &to).with_context(|| format!("copying {}", file.display()))?;
        }
        let recipe = context.path().join("Containerfile");
        fs::write(&recipe, "FROM scratch\nCOPY root /\n")?;
        let tag = unique(name);
        let context = context.path().to_string_lossy().into_owned();
        podman(&["build", "--quiet", "--tag", &tag, "--file", &recipe.to_string_lossy(), &context])?;
        Ok(Self(tag))
    }

    /// The tool, at `/tcpclose`, and the libraries that it needs if it is not static.
    fn of_tool() -> Result<Self> {
        let tool = env::var("TCPCLOSE_BIN").context("TCPCLOSE_BIN does not name the tool's binary")?;
        let listed = Command::new("ldd").arg(&tool).output()?;
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let libraries = listed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
        let files = libraries.map(|library| (library.clone(), library));
        Self::of("tool", &files.chain([(tool.into(), "/tcpclose".into())]).collect::<Vec<_>>())
    }
}

impl Drop for ContainerImage {
    fn drop(&mut self) {
        // It is of no use to the host, and nothing depends on its removal.
        let _ = podman(&["rmi", "--force", &self.0]);
    }
}

/// A name that no other image or container has: the tests run at the same time.
fn unique(name: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("tcpclose-tests-{name}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// A running container; killed on drop.
struct Container {
    name: String,
    program: Program,
}

impl Container {
    /// Runs `command` in a container of this image. Its processes are few, and its limits are those that this
    /// host allows.
    fn start(name: &str, image: &ContainerImage, options: &[&str], command: &[&str]) -> Result<Self> {
        let name = unique(name);
        let mut podman = Command::new(PODMAN);
        podman.args(["--runtime", RUNC, "run", "--interactive", "--rm", "--name", &name]);
        podman.args(["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1000:1000"]);
        podman.args(options).arg(&image.0).args(command);
        // podman itself runs in this namespace, and gives the container another one.
        let program = Program::start(&Namespace::new()?, podman)?;
        Ok(Self { name, program })
    }

    /// A container in which the tenant runs and has reported that it is ready.
    fn tenant(name: &str, image: &ContainerImage) -> Result<Self> {
        Self::tenant_in(name, image, &["--network", "none"])
    }

    /// Same as [`Container::tenant`], in these namespaces.
    fn tenant_in(name: &str, image: &ContainerImage, namespaces: &[&str]) -> Result<Self> {
        let servers = format!("{}/servers:/servers:ro", env!("CARGO_MANIFEST_DIR"));
        let programs = PROGRAMS.map(|folder| format!("{folder}:{folder}:ro"));
        let mut options = vec!["--memory", "96m", "--memory-swap", "96m"];
        options.extend(namespaces);
        options.extend(["--volume", &servers]);
        // As Kubernetes has them with CRI-O.
        let pod = format!("io.kubernetes.pod.name=pod-of-{name}");
        let namespace = format!("io.kubernetes.pod.namespace={POD_NAMESPACE}");
        options.extend(["--annotation", &pod, "--annotation", &namespace]);
        options.extend(programs.iter().flat_map(|folder| ["--volume", folder]));
        let container = Self::start(name, image, &options, &[PYTHON, "/servers/tenant.py"])?;
        let line = container.program.line()?;
        ensure!(line == "ready", "the tenant says {line}");
        Ok(container)
    }

    fn inspect(&self, what: &str) -> Result<String> {
        podman(&["inspect", "--format", what, &self.name])
    }

    /// The id that its first process has in its own pid namespace.
    fn inner_pid(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.inspect("{{.State.Pid}}")?))?;
        let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).context("no NSpid")?;
        Ok(ids.split_whitespace().last().context("no id")?.parse()?)
    }

    /// Makes the tenant act, and returns what it has done.
    fn act(&mut self) -> Result<Deeds> {
        self.program.tell("go")?;
        let mut numbers = Vec::new();
        loop {
            let line = self.program.line()?;
            if line == "done" {
                break;
            }
            numbers.extend(line.split(' ').filter_map(|word| word.parse::<u64>().ok()));
        }
        let [reset, leak, descriptor, victim, victims] = numbers[..] else {
            anyhow::bail!("the tenant has said {numbers:?}");
        };
        Ok(Deeds { id: self.inspect("{{.Id}}")?, reset, leak, descriptor, victim, victims })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = podman(&["rm", "--force", "--time", "0", &self.name]);
    }
}

/// What a tenant has done: ports of clients, a descriptor, and a process by its id in the container.
struct Deeds {
    id: String,
    reset: u64,
    leak: u64,
    descriptor: u64,
    victim: u64,
    victims: u64,
}

impl Deeds {
    /// The lines that must be written about it, where `pid` returns the tenant's and the victim's process ids
    /// as seen by the tool, and `names` are those that it is to find.
    fn lines(&self, pid: u64, victim: Value, names: &Value) -> Vec<Value> {
        let at = |port: u64| json!({"local": {"port": port}});
        let of =
            |pid: Value| but(json!({"pid": pid, "comm": "python3", "container": self.id}), names.clone());
        let (process, dead) = (of(json!(pid)), of(victim));
        vec![
            json!({
                "event": "close",
                "connection": at(self.reset),
                "process": process,
                "cause": "linger_zero",
            }),
            json!({
                "event": "lingering",
                "connection": at(self.leak),
                "process": process,
                "kind": "leaked",
                "holders": [{"pid": pid, "fd": self.descriptor}],
            }),
            json!({
                "event": "close",
                "connection": at(self.victims),
                "process": dead,
                "signal": "SIGKILL",
                "signal_from": {"oom": true},
            }),
        ]
    }
}

/// The tool in a container.
struct ContainedTool {
    container: Container,
    lines: Vec<Value>,
    _ready: Scratch,
}

impl ContainedTool {
    fn start(image: &ContainerImage, namespaces: &[&str], arguments: &[&str]) -> Result<Self> {
        let ready = Scratch::new()?;
        let volume = format!("{}:/ready", ready.path().display());
        // As in deploy/kubernetes.
        let mut options = vec!["--cap-drop", "all", "--volume", &volume, "--read-only"];
        options.extend(["--security-opt", "no-new-privileges"]);
        // The profile of older engines forbids bpf() to programs without CAP_SYS_ADMIN.
        options.extend(["--security-opt", "seccomp=unconfined"]);
        options.extend(CAPABILITIES.iter().flat_map(|capability| ["--cap-add", capability]));
        options.extend(namespaces);
        let mut command =
            vec!["/tcpclose", "--output", "json", "--linger", "1s", "--ready-file", "/ready/pid"];
        command.extend(arguments);
        let container = Container::start("tool", image, &options, &command)?;
        let file = ready.path().join("pid");
        until("the tool is ready", || Ok(fs::metadata(&file).ok().filter(|file| file.len() > 0)))?;
        Ok(Self { container, lines: Vec::new(), _ready: ready })
    }

    /// Waits for a line that contains everything in `expected`.
    fn wait_for(&mut self, expected: &Value) -> Result<Value> {
        loop {
            let known = self.lines.iter().find(|line| differences(line, expected).is_empty());
            if let Some(line) = known {
                return Ok(line.clone());
            }
            let line = self.container.program.line();
            let line = line.with_context(|| format!("no line has {expected}: {:#?}", self.lines))?;
            self.lines.push(serde_json::from_str(&line)?);
        }
    }
}

/// Whether the stack of a line leads from `close()` to the beginning of the program.
fn has_whole_stack(line: &Value) -> Result<()> {
    let frames = line["stack"]["user"].as_array().context("no stack")?;
    let first = frames.first().and_then(|frame| frame["symbol"].as_str()).unwrap_or_default();
    ensure!(first.contains("close"), "the innermost frame is {first}");
    let last = frames.last().context("an empty stack")?;
    ensure!(frames.len() > 3 && last["truncated"].is_null(), "the stack ends early: {frames:#?}");
    Ok(())
}

fn is_impossible() -> bool {
    is_missing(&[PODMAN, RUNC, PYTHON])
}

#[test]
fn a_sidecar_reports_its_neighbour_by_the_ids_inside() -> Result<()> {
    if is_impossible() {
        return Ok(());
    }
    let (empty, image) = (ContainerImage::of("tenant", &[])?, ContainerImage::of_tool()?);
    let (mut tenant, mut stranger) =
        (Container::tenant("tenant", &empty)?, Container::tenant("stranger", &empty)?);
    let shared = format!("container:{}", tenant.name);
    let mut tool = ContainedTool::start(&image, &["--pid", &shared, "--network", &shared], &[])?;
    let strange = stranger.act()?;
    let deeds = tenant.act()?;
    let mut netns = None;
    // The runtime's files are not those of a container.
    let names = json!({"container_name": null, "pod": null});
    for expected in deeds.lines(1, json!(deeds.victim), &names) {
        let line = tool.wait_for(&expected)?;
        if line["cause"] == "linger_zero" {
            has_whole_stack(&line)?;
            netns = Some(line["connection"]["netns"].clone());
            let host_pid: u64 = tenant.inspect("{{.State.Pid}}")?.parse()?;
            ensure!(line["process"]["host_pid"] == host_pid, "{line:#}");
        }
    }
    for line in &tool.lines {
        ensure!(Some(&line["connection"]["netns"]) == netns.as_ref(), "of another namespace: {line:#}");
        ensure!(line["process"]["container"] != strange.id, "of a stranger: {line:#}");
    }
    Ok(())
}

#[test]
fn with_the_pids_of_the_host_all_containers_are_reported() -> Result<()> {
    if is_impossible() {
        return Ok(());
    }
    let (empty, image) = (ContainerImage::of("tenant", &[])?, ContainerImage::of_tool()?);
    let mut tenants = [Container::tenant("one", &empty)?, Container::tenant("other", &empty)?];
    let ids = tenants.iter().map(|tenant| tenant.inspect("{{.Id}}")).collect::<Result<Vec<_>>>()?.join(",");
    let mut options = vec!["--pid", "host", "--network", "none"];
    // As the DaemonSet has the folder of its runtime.
    let files = format!("{CONTAINERS}:{CONTAINERS}:ro");
    options.extend(["--volume", &files]);
    let mut tool = ContainedTool::start(&image, &options, &["--container", &ids])?;
    for (tenant, name) in tenants.iter_mut().zip(["one", "other"]) {
        let pod = json!({"name": format!("pod-of-{name}"), "namespace": POD_NAMESPACE});
        let names = json!({"container_name": tenant.name, "pod": pod});
        let pid: u64 = tenant.inspect("{{.State.Pid}}")?.parse()?;
        let deeds = tenant.act()?;
        // The id of the victim on the host is not known to the tenant.
        for expected in deeds.lines(pid, known(), &names) {
            let line = tool.wait_for(&expected)?;
            ensure!(line["process"]["pid"] == line["process"]["host_pid"], "{line:#}");
            if line["cause"] == "linger_zero" {
                has_whole_stack(&line)?;
            }
        }
    }
    Ok(())
}

/// As in Kubernetes, the first process of the pod belongs to neither container.
#[test]
fn a_sidecar_outlives_its_neighbour_and_not_its_pod() -> Result<()> {
    if is_impossible() {
        return Ok(());
    }
    let (empty, image) = (ContainerImage::of("tenant", &[])?, ContainerImage::of_tool()?);
    let pod = Container::tenant("pod", &empty)?;
    let shared = format!("container:{}", pod.name);
    let namespaces = ["--pid", &shared, "--network", &shared];
    let mut tool = ContainedTool::start(&image, &namespaces, &[])?;
    let names = json!({"container_name": null, "pod": null});
    let mut seen = Vec::new();
    for name in ["first", "second"] {
        let mut tenant = Container::tenant_in(name, &empty, &namespaces)?;
        let pid = tenant.inner_pid()?;
        let deeds = tenant.act()?;
        for expected in deeds.lines(pid, json!(deeds.victim), &names) {
            tool.wait_for(&expected)?;
        }
        seen.push((deeds.id, pid));
        podman(&["rm", "--force", "--time", "0", &tenant.name])?;
    }
    ensure!(seen[0].0 != seen[1].0 && seen[0].1 != seen[1].1, "it is the same container: {seen:?}");
    podman(&["kill", "--signal", "KILL", &pod.name])?;
    let ended = tool.container.program.ended()?;
    ensure!(ended.code() == Some(128 + 9), "the kernel ends the processes of a pid namespace: {ended}");
    Ok(())
}
