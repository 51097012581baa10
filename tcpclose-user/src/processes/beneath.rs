//! Opens files as a process sees them, without following its symbolic links.
//!
//! Root in a container controls its directories. A symbolic link in them would lead to a file of the host if
//! it were followed here: a link with an absolute path leaves `/proc/PID/root`.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, open as open_path, openat},
    sys::stat::Mode,
};

/// A descriptor of the file that `path` leads to for process `pid`. It can only be passed to [`read`], not
/// read from.
///
/// # Errors
/// A part of the path is a symbolic link (`ELOOP`, `ENOTDIR`), or does not exist.
pub fn open(pid: u32, path: &Path) -> io::Result<OwnedFd> {
    open_in(Path::new(&format!("/proc/{pid}/root")), path)
}

/// Same as [`open`], for the file that `path` leads to below the directory `root`.
///
/// # Errors
/// As [`open`].
pub fn open_in(root: &Path, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    // The root of a process is a link of the kernel, which has to be followed.
    let root = open_path(root, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
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
pub fn path(descriptor: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}

/// Opens a regular file to read it. Nothing else is opened: a pipe would block, and a device might act.
///
/// # Errors
/// It is not a regular file, or may not be read.
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
