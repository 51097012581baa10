//! Starts the tool: with arguments, in namespaces, and with restricted privileges.

use std::{
    env,
    ffi::{CStr, CString, OsString},
    fs::{self, File},
    io::{self, ErrorKind},
    mem,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    libc,
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::resource::{Resource, setrlimit},
    unistd::{Gid, Uid, chown, setgid, setgroups, setuid},
};

use super::{Ended, Tool};
use crate::{features::Feature, netns::Namespace, scratch::Scratch, until};

/// The usual limit of locked memory for unprivileged users, in bytes.
const LOCKED: u64 = 64 << 10;

/// The user and group ID of `nobody`.
const NOBODY: u32 = 65534;

/// The way in which the tool is started.
#[derive(Debug)]
pub struct Launch {
    program: OsString,
    args: Vec<OsString>,
    variables: Vec<(OsString, OsString)>,
    /// The steps that its process takes, in this order, before it executes the tool.
    steps: Vec<Step>,
    in_pid_namespace: bool,
    scratch: Scratch,
    most_lines: usize,
    /// Where its standard input comes from; there is none if that is nowhere.
    stdin: Option<File>,
    /// Where its lines go; to the tests if that is nowhere.
    stdout: Option<File>,
}

/// A step that restricts what the tool may do or see.
#[derive(Debug)]
enum Step {
    EnterNetns(File),
    /// Unshares the mount namespace and mounts something at these places.
    Mount(Vec<(&'static CStr, CString)>),
    NewUserNamespace,
    /// Becomes this user, without privileges.
    Become(u32),
    /// Limits the number of processes and threads of the user.
    LimitTasks(u64),
}

impl Step {
    /// Takes the step. It makes system calls and does not allocate, because it runs in a newly forked
    /// process.
    fn take(&self) -> io::Result<()> {
        const NOWHERE: Option<&CStr> = None;
        match self {
            Self::EnterNetns(namespace) => setns(namespace, CloneFlags::CLONE_NEWNET)?,
            Self::Mount(mounts) => {
                unshare(CloneFlags::CLONE_NEWNS)?;
                mount(NOWHERE, c"/", NOWHERE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOWHERE)?;
                for (kind, place) in mounts {
                    mount(Some(*kind), place.as_c_str(), Some(*kind), MsFlags::empty(), NOWHERE)?;
                }
            }
            Self::NewUserNamespace => unshare(CloneFlags::CLONE_NEWUSER)?,
            Self::Become(user) => {
                // The usual limit: the tests may have raised their own.
                setrlimit(Resource::RLIMIT_MEMLOCK, LOCKED, LOCKED)?;
                setgroups(&[])?;
                setgid(Gid::from_raw(*user))?;
                setuid(Uid::from_raw(*user))?;
            }
            Self::LimitTasks(most) => setrlimit(Resource::RLIMIT_NPROC, *most, *most)?,
        }
        Ok(())
    }
}

impl Launch {
    /// A launch without arguments; nothing is started yet.
    pub fn new() -> Result<Self> {
        let program = env::var_os("TCPCLOSE_BIN").context(
            "TCPCLOSE_BIN does not name the tool's binary: run `cargo xtask test`, which builds and names it",
        )?;
        Ok(Self {
            program,
            args: Vec::new(),
            variables: Vec::new(),
            steps: Vec::new(),
            in_pid_namespace: false,
            scratch: Scratch::new()?,
            most_lines: usize::MAX,
            stdin: None,
            stdout: None,
        })
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item: Into<OsString>>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn variable(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    /// Makes the tool write JSON lines for these namespaces only, or for all namespaces if it runs without
    /// the kernel types that identify namespaces.
    #[must_use]
    pub fn trace<'a>(self, namespaces: impl IntoIterator<Item = &'a Namespace>) -> Self {
        if !Feature::Types.is_here() {
            return self.args(["-o", "json", "--btf", "none"]);
        }
        let filters = namespaces.into_iter().flat_map(|one| ["--netns".to_owned(), one.inode().to_string()]);
        self.args(["-o", "json"]).args(filters)
    }

    /// Runs the tool in a network namespace.
    pub fn inside(mut self, namespace: &Namespace) -> Result<Self> {
        self.steps.push(Step::EnterNetns(namespace.file()?));
        Ok(self)
    }

    /// Hides these places from the tool by mounting an empty file system over each that exists. Nothing is
    /// unmounted, because Linux 6.12 crashes on that when lockdown keeps tracefs empty.
    pub fn without(mut self, places: &[&str]) -> Result<Self> {
        let there = places.iter().filter(|place| Path::new(place).exists());
        let mounts = there.map(|place| Ok((c"tmpfs", CString::new(*place)?))).collect::<Result<_>>()?;
        self.steps.push(Step::Mount(mounts));
        Ok(self)
    }

    /// Runs the tool in its own pid namespace, as in a container, with a `/proc` of that namespace.
    #[must_use]
    pub fn in_pid_namespace(mut self) -> Self {
        self.in_pid_namespace = true;
        self.steps.push(Step::Mount(vec![(c"proc", c"/proc".to_owned())]));
        self
    }

    /// Closes the tool's stdout after this many lines, as `head` does.
    #[must_use]
    pub fn head(mut self, lines: usize) -> Self {
        self.most_lines = lines;
        self
    }

    /// Makes the tool append its lines to a file, which the tests do not read.
    pub fn into_file(mut self, path: &Path) -> Result<Self> {
        self.stdout = Some(File::options().append(true).create(true).open(path)?);
        Ok(self)
    }

    /// Joins two tools as a shell does: the second reads what the first writes.
    pub fn piped_into(mut self, mut reader: Self) -> Result<[Self; 2]> {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        self.stdout = Some(write.into());
        reader.stdin = Some(read.into());
        Ok([self, reader])
    }

    /// Runs the tool as `nobody` with only these capabilities.
    pub fn as_nobody(self, capabilities: &[Capability]) -> Result<Self> {
        self.by_user(NOBODY, capabilities)
    }

    /// Runs the tool, with only these capabilities, as a user who has no other processes, and who may have at
    /// most so many processes and threads.
    pub fn with_most_tasks(self, most: u64, capabilities: &[Capability]) -> Result<Self> {
        let mut launch = self.by_user(1_000_000 + std::process::id(), capabilities)?;
        launch.steps.push(Step::LimitTasks(most));
        Ok(launch)
    }

    fn by_user(mut self, user: u32, capabilities: &[Capability]) -> Result<Self> {
        // The build directory may not be accessible to the user.
        let copy = self.scratch.path().join("tcpclose");
        fs::copy(&self.program, &copy).context("copying the tool")?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
        // The tool creates the ready file in this directory.
        chown(self.scratch.path(), Some(Uid::from_raw(user)), None)?;
        if !capabilities.is_empty() {
            grant(&copy, capabilities)?;
        }
        self.program = copy.into();
        self.steps.push(Step::Become(user));
        Ok(self)
    }

    /// Runs the tool in its own user namespace, whose capabilities the kernel does not accept for BPF.
    #[must_use]
    pub fn in_user_namespace(mut self) -> Self {
        self.steps.push(Step::NewUserNamespace);
        self
    }

    /// Starts the tool and waits until it reports that every program is attached.
    pub fn start(self) -> Result<Tool> {
        let ready = self.scratch.path().join("ready");
        let in_pid_namespace = self.in_pid_namespace;
        let mut tool = self.args(["--ready-file".as_ref(), ready.as_os_str()]).spawn()?;
        let pid = until("the tool is ready", || {
            if let Some(status) = tool.child.try_wait()? {
                bail!("it ended before it was ready, with {status}");
            }
            // The tool creates the file before it writes the pid, so an empty file does not mean ready.
            Ok(fs::read_to_string(&ready).ok().filter(|text| !text.trim().is_empty()))
        });
        let named = pid.and_then(|text| Ok(text.trim().parse::<u32>()?));
        let named = match named {
            Ok(pid) => pid,
            Err(error) => {
                tool.child.kill()?;
                return Err(error.context(format!("starting the tool\n{}", tool.wait()?)));
            }
        };
        // The file contains the pid as the tool's own namespace has it; there the tool is the first process.
        let own = if in_pid_namespace { 1 } else { tool.child.id() };
        ensure!(named == own, "the ready file names pid {named}, not {own}");
        Ok(tool)
    }

    /// Starts the tool and waits for it to end.
    pub fn run(self) -> Result<Ended> {
        self.spawn()?.wait()
    }

    /// Runs the tool to its end, for output that is not JSON lines.
    pub fn output(mut self) -> Result<Output> {
        Ok(self.spawn_child()?.wait_with_output()?)
    }

    fn spawn_child(&mut self) -> Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.variables.iter().map(|(name, value)| (name, value)));
        let stdout = self.stdout.take().map_or_else(Stdio::piped, Stdio::from);
        let stdin = self.stdin.take().map_or_else(Stdio::null, Stdio::from);
        command.stdin(stdin).stdout(stdout).stderr(Stdio::piped());
        let steps = mem::take(&mut self.steps);
        // SAFETY: a step only makes system calls and does not allocate.
        unsafe { command.pre_exec(move || steps.iter().try_for_each(Step::take)) };
        // A copy of the tool cannot be started while a child that another thread has just forked still has
        // the file open for writing, which lasts until that child's own exec.
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut spawn = || loop {
            match command.spawn() {
                Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && Instant::now() < deadline => {
                    thread::yield_now();
                }
                result => return result.with_context(|| format!("starting {command:?}")),
            }
        };
        if !self.in_pid_namespace {
            return spawn();
        }
        // `unshare(CLONE_NEWPID)` does not move the caller; it affects only the later children of this
        // thread.
        thread::scope(|scope| {
            let moved = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWPID)?;
                spawn()
            });
            moved.join().unwrap_or_else(|_| bail!("the thread that starts the tool panicked"))
        })
    }

    /// Starts the tool, and does not wait until it is ready: the command that it starts does.
    pub fn spawn(mut self) -> Result<Tool> {
        let child = self.spawn_child()?;
        Tool::of(child, self.most_lines, self.scratch)
    }
}

/// A capability by its number (`linux/capability.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// `CAP_SYS_PTRACE`.
    SysPtrace = 19,
    /// `CAP_PERFMON`.
    Perfmon = 38,
    /// `CAP_BPF`.
    Bpf = 39,
}

/// Sets the file capabilities of a program, as `setcap` does (`struct vfs_cap_data`).
fn grant(program: &Path, capabilities: &[Capability]) -> Result<()> {
    const SECOND_VERSION: u32 = 0x0200_0000;
    const EFFECTIVE: u32 = 1;
    let permitted = capabilities.iter().fold(0_u64, |set, capability| set | 1 << *capability as u64);
    let [low, high] = [permitted & u64::from(u32::MAX), permitted >> 32].map(u32::try_from);
    let words = [SECOND_VERSION | EFFECTIVE, low?, 0, high?, 0];
    let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    let path = CString::new(program.as_os_str().as_bytes())?;
    let name = c"security.capability";
    // SAFETY: the strings and the bytes outlive the call, and the length is that of the bytes.
    let result =
        unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), bytes.as_ptr().cast(), bytes.len(), 0) };
    Errno::result(result).with_context(|| format!("giving capabilities to {}", program.display()))?;
    Ok(())
}
