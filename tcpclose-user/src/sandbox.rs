//! Gives up capabilities and system calls that a trace needs only while it starts.
//!
//! Every process of the host is an input of a trace: its name, its files, its memory. An attacker who
//! exploits an error in the code that reads them should gain as little as possible. Each thread restricts
//! itself, because the kernel keeps capabilities and filters for each thread. The traced command is started
//! before, and is not restricted.
//!
//! Landlock would be simpler. But a process that uses it may not inspect processes that do not: the kernel
//! refuses access to their `/proc/PID/exe`, `maps`, `mem` and `fd`, as to a debugger
//! (`hook_ptrace_access_check()` in
//! <https://elixir.bootlin.com/linux/v6.12/source/security/landlock/task.c>). Instead, the filter of system
//! calls forbids opening files for writing, changing directories, and executing programs.

use std::{collections::BTreeMap, env};

use anyhow::{Context as _, Result, anyhow};
use caps::{CapSet, Capability, CapsHashSet};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

/// The capabilities that a running trace uses; the others are dropped.
pub const KEPT: [Capability; 5] = [
    // To read and change maps, to run the iterator, and to inspect sockets.
    Capability::CAP_BPF,
    // To look up other users' processes in `/proc`, and to read files that this user may not read.
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
    // To follow `/proc/PID/map_files`, which leads to files that were removed.
    Capability::CAP_CHECKPOINT_RESTORE,
    // To see addresses in `/proc/kallsyms`.
    Capability::CAP_SYSLOG,
];

/// The file with the kernel's actions for system calls that a filter refuses.
pub const ACTIONS: &str = "/proc/sys/kernel/seccomp/actions_avail";

/// Restricts the calling thread, and the threads that it starts from now on.
///
/// # Errors
/// The kernel refuses one of the steps. The earlier ones remain in effect.
pub fn enter() -> Result<()> {
    restrict(&KEPT, &[])
}

/// Restricts a thread that only talks to another host: it keeps no capability, and may connect.
///
/// # Errors
/// Those of [`enter`].
pub fn enter_for_network() -> Result<()> {
    // A resolver binds the sockets of its questions.
    restrict(&[], &[libc::SYS_socket, libc::SYS_connect, libc::SYS_bind])
}

fn restrict(kept: &[Capability], allowed: &[libc::c_long]) -> Result<()> {
    drop_capabilities(kept).context("cannot drop capabilities")?;
    nix::sys::prctl::set_no_new_privs().context("cannot set no_new_privs")?;
    let filter = filter(allowed).context("cannot make a filter of system calls")?;
    apply_filter(&filter).context("cannot install a filter of system calls")
}

/// Drops all capabilities of the thread except these.
fn drop_capabilities(kept: &[Capability]) -> Result<()> {
    let kept: CapsHashSet = kept.iter().copied().collect();
    let had = caps::read(None, CapSet::Permitted)?;
    let left: CapsHashSet = had.intersection(&kept).copied().collect();
    caps::clear(None, CapSet::Ambient)?;
    // A capability that is no longer permitted cannot stay effective.
    caps::set(None, CapSet::Effective, &left)?;
    caps::set(None, CapSet::Permitted, &left)?;
    Ok(caps::clear(None, CapSet::Inheritable)?)
}

/// System calls that a running trace never makes, and that would serve an attacker: to execute programs, to
/// act on other processes, to reach the network, to change files, the kernel or the thread's own privileges.
const REFUSED: &[libc::c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_pidfd_send_signal,
    libc::SYS_pidfd_getfd,
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_io_uring_setup,
    libc::SYS_openat2,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_mkdirat,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_mknodat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_truncate,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_clock_settime,
    libc::SYS_settimeofday,
    libc::SYS_sethostname,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
];

/// Older calls with the same effects, which only this architecture has.
#[cfg(target_arch = "x86_64")]
const ALSO_REFUSED: &[libc::c_long] = &[
    libc::SYS_creat,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_mknod,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
];
#[cfg(not(target_arch = "x86_64"))]
const ALSO_REFUSED: &[libc::c_long] = &[libc::SYS_renameat];

/// Commands of `bpf()` that create programs, maps and links, or make them outlive this process: `enum
/// bpf_cmd` of <https://elixir.bootlin.com/linux/v6.12/source/include/uapi/linux/bpf.h>. The iterator needs
/// `BPF_LINK_CREATE`.
const REFUSED_BPF: [u64; 6] = [
    0,  // BPF_MAP_CREATE
    5,  // BPF_PROG_LOAD
    6,  // BPF_OBJ_PIN
    8,  // BPF_PROG_ATTACH
    17, // BPF_RAW_TRACEPOINT_OPEN
    18, // BPF_BTF_LOAD
];

/// The filter: calls of [`REFUSED`] fail with `EPERM`, unless they are `allowed`, and all others are allowed.
/// A list of allowed calls alone would have to contain every call of every version of libc.
fn filter(allowed: &[libc::c_long]) -> Result<BpfProgram> {
    let refused = REFUSED.iter().chain(ALSO_REFUSED).filter(|call| !allowed.contains(call));
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = refused.map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_openat, writing(2)?);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, writing(1)?);
    let commands = REFUSED_BPF.iter().map(|command| rule(0, SeccompCmpOp::Eq, *command));
    rules.insert(libc::SYS_bpf, commands.collect::<Result<_>>()?);
    // The x32 ABI has the same calls under other numbers.
    #[cfg(target_arch = "x86_64")]
    for (call, rule) in rules.clone() {
        const X32: i64 = 0x4000_0000;
        rules.insert(call | X32, rule);
    }
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let arch = env::consts::ARCH.try_into().map_err(|_| anyhow!("no filters for {}", env::consts::ARCH))?;
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch)?.try_into()?)
}

/// The rules for a call whose argument `flags` would open a file for writing, or create one.
fn writing(flags: u8) -> Result<Vec<SeccompRule>> {
    let modes =
        [(libc::O_ACCMODE, libc::O_WRONLY), (libc::O_ACCMODE, libc::O_RDWR), (libc::O_CREAT, libc::O_CREAT)];
    let rule = |(mask, value): (i32, i32)| {
        rule(flags, SeccompCmpOp::MaskedEq(mask.cast_unsigned().into()), value.cast_unsigned().into())
    };
    modes.into_iter().map(rule).collect()
}

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File, OpenOptions},
        io::ErrorKind,
        net::TcpListener,
        process::Command,
        thread,
    };

    use super::*;

    /// The result of `work` in a thread that has restricted itself.
    fn restricted<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        let thread = thread::spawn(move || {
            enter().unwrap();
            work()
        });
        thread.join().unwrap()
    }

    #[test]
    fn files_are_read_and_not_written() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "before").unwrap();
        let (path, new) = (file.path().to_owned(), file.path().with_extension("new"));
        restricted(move || {
            assert_eq!(fs::read_to_string(&path).unwrap(), "before");
            let refused = [
                fs::write(&path, "after").unwrap_err(),
                OpenOptions::new().append(true).open(&path).unwrap_err(),
                OpenOptions::new().read(true).write(true).open(&path).unwrap_err(),
                File::create(&new).unwrap_err(),
                fs::remove_file(&path).unwrap_err(),
                fs::rename(&path, &new).unwrap_err(),
            ];
            for error in refused {
                assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
            }
        });
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "before");
    }

    #[test]
    fn nothing_is_executed_and_nobody_is_called() {
        restricted(|| {
            assert_eq!(Command::new("true").status().unwrap_err().kind(), ErrorKind::PermissionDenied);
            assert_eq!(TcpListener::bind("127.0.0.1:0").unwrap_err().kind(), ErrorKind::PermissionDenied);
        });
        assert!(Command::new("true").status().unwrap().success(), "other threads are not restricted");
    }

    #[test]
    fn capabilities_are_those_that_are_kept() {
        let before = caps::read(None, CapSet::Permitted).unwrap();
        restricted(move || {
            for set in [CapSet::Permitted, CapSet::Effective] {
                let left = caps::read(None, set).unwrap();
                assert!(left.iter().all(|capability| KEPT.contains(capability)), "{left:?}");
                assert!(KEPT.iter().all(|kept| left.contains(kept) || !before.contains(kept)), "{left:?}");
            }
            assert!(caps::read(None, CapSet::Inheritable).unwrap().is_empty());
            let status = fs::read_to_string("/proc/thread-self/status").unwrap();
            assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
        });
    }
}
