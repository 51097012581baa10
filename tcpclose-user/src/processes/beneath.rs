//! Opens files as a process sees them, without following its symbolic links.
//!
//! Whoever is root in a container decides what its directories are. A symbolic link there that is followed
//! here leads to a file of the host: `/proc/PID/root` is left as soon as a link has an absolute path.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Component, Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, open as open_path, openat},
    sys::stat::Mode,
};

/// A descriptor of what `path` leads to for process `pid`. It cannot be read from; [`read`] can.
///
/// # Errors
/// A part of the path is a symbolic link (`ELOOP`, `ENOTDIR`), or is not there.
pub fn open(pid: u32, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let root = format!("/proc/{pid}/root");
    // The first one is a link of the kernel, which is to be followed.
    let root =
        open_path(root.as_str(), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let names = path.components().filter(|part| !matches!(part, Component::RootDir | Component::CurDir));
    let mut names = names.peekable();
    let mut at = root;
    while let Some(name) = names.next() {
        let is_last = names.peek().is_none();
        let flags = if is_last { flags } else { flags | OFlag::O_DIRECTORY };
        let Component::Normal(name) = name else { return Err(io::ErrorKind::InvalidInput.into()) };
        at = openat(&at, name, flags, Mode::empty())?;
    }
    Ok(at)
}

/// The path at which a descriptor can be opened again, to be read.
pub fn path(descriptor: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}

/// Opens a regular file to read it. Nothing else is opened: a pipe would block, and a device might act.
///
/// # Errors
/// It is no regular file, or may not be read.
pub fn read(descriptor: &OwnedFd) -> io::Result<File> {
    let path = path(descriptor);
    if !path.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    File::open(path)
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Read as _, os::unix::fs::symlink, process};

    use nix::unistd::mkfifo;

    use super::*;

    #[test]
    fn only_regular_files_without_links() {
        let folder = tempfile::tempdir().unwrap();
        // `/tmp` itself may be a link here.
        let folder = folder.path().canonicalize().unwrap();
        fs::create_dir_all(folder.join("a/b")).unwrap();
        fs::write(folder.join("a/b/file"), "text").unwrap();
        symlink(folder.join("a/b/file"), folder.join("link")).unwrap();
        symlink(folder.join("a"), folder.join("directory")).unwrap();
        symlink("a", folder.join("relative")).unwrap();
        mkfifo(&folder.join("pipe"), Mode::S_IRWXU).unwrap();
        let text = |name: &str| {
            let mut text = String::new();
            read(&open(process::id(), &folder.join(name))?)?.read_to_string(&mut text)?;
            Ok::<_, io::Error>(text)
        };
        assert_eq!(text("a/b/file").unwrap(), "text");
        for name in ["link", "directory/b/file", "relative/b/file", "pipe", "a", "a/../a/b/file", "missing"] {
            assert!(text(name).is_err(), "{name}");
        }
        assert!(read(&open(process::id(), Path::new("/dev/null")).unwrap()).is_err());
    }
}
