//! What this side did to end a connection.

use nix::sys::signal::Signal;

use crate::{
    event::Trigger,
    ingest::life::{Activity, Task},
};

/// What a task did when it acted on a socket, and the name of the signal that it died of.
pub fn trigger(task: Option<&Task>) -> (Option<Trigger>, Option<String>) {
    let trigger = match task.map(|task| task.act) {
        None | Some(Activity::Unknown) => None,
        Some(Activity::Exit) => Some(Trigger::Exit),
        Some(Activity::Signal(number)) => return (Some(Trigger::Signal), Some(signal_name(number))),
        Some(Activity::IoWorker) => Some(Trigger::IoUring),
        Some(Activity::Syscall(number)) => syscall(number),
    };
    (trigger, None)
}

fn syscall(number: i64) -> Option<Trigger> {
    Some(match number {
        libc::SYS_shutdown => Trigger::Shutdown,
        libc::SYS_dup3 => Trigger::Dup,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_dup2 => Trigger::Dup,
        libc::SYS_close_range => Trigger::CloseRange,
        libc::SYS_execve | libc::SYS_execveat => Trigger::Exec,
        libc::SYS_io_uring_setup | libc::SYS_io_uring_enter => Trigger::IoUring,
        // connect(AF_UNSPEC) is not a way to close a descriptor; the cause reports it.
        libc::SYS_connect => return None,
        // It is close() itself, or the call that dropped the last reference: a recv() whose descriptor
        // another thread has closed meanwhile, or the close of a unix socket whose messages contained this
        // one.
        _ => Trigger::Close,
    })
}

/// The first real-time signal as glibc and bash number it: the threading library keeps the first two of the
/// kernel's for itself (`signal(7)`).
const SIGRTMIN: i32 = 34;

/// The name of a signal. Real-time signals are counted from [`SIGRTMIN`].
fn signal_name(number: i32) -> String {
    if let Ok(signal) = Signal::try_from(number) {
        return signal.as_str().to_owned();
    }
    match number - SIGRTMIN {
        0 => "SIGRTMIN".to_owned(),
        beyond if beyond > 0 => format!("SIGRTMIN+{beyond}"),
        _ => format!("SIG{number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::life::examples::task;

    #[test]
    fn triggers() {
        let signal = |name: &str| (Some(Trigger::Signal), Some(name.to_owned()));
        for (act, expected) in [
            (Activity::Exit, (Some(Trigger::Exit), None)),
            (Activity::Signal(libc::SIGKILL), signal("SIGKILL")),
            (Activity::Signal(libc::SIGSEGV), signal("SIGSEGV")),
            (Activity::Signal(32), signal("SIG32")),
            (Activity::Signal(34), signal("SIGRTMIN")),
            (Activity::Signal(36), signal("SIGRTMIN+2")),
            (Activity::Signal(64), signal("SIGRTMIN+30")),
            (Activity::IoWorker, (Some(Trigger::IoUring), None)),
            (Activity::Syscall(libc::SYS_io_uring_enter), (Some(Trigger::IoUring), None)),
            (Activity::Syscall(libc::SYS_close), (Some(Trigger::Close), None)),
            (Activity::Syscall(libc::SYS_recvfrom), (Some(Trigger::Close), None)),
            (Activity::Syscall(libc::SYS_shutdown), (Some(Trigger::Shutdown), None)),
            (Activity::Syscall(libc::SYS_dup3), (Some(Trigger::Dup), None)),
            (Activity::Syscall(libc::SYS_close_range), (Some(Trigger::CloseRange), None)),
            (Activity::Syscall(libc::SYS_execve), (Some(Trigger::Exec), None)),
            (Activity::Syscall(libc::SYS_connect), (None, None)),
            (Activity::Unknown, (None, None)),
        ] {
            assert_eq!(trigger(Some(&task(7, act))), expected, "{act:?}");
        }
        assert_eq!(trigger(None), (None, None));
    }
}
