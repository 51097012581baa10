//! `--ready-file`: writes the pid to a file once every program is attached, so that whoever started tcpclose
//! can wait for it.

use std::{
    fs::{self, File, Permissions},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::Path,
    thread,
};

use anyhow::{Context as _, Result};

/// Writes this process's pid and a newline to `path`.
///
/// A file, FIFO or device that exists is written into, as a shell's `>` would, and is never replaced. A new
/// file has the pid in it from the moment it appears. Opening a FIFO waits for its reader, so that happens on
/// a thread of its own: tracing goes on meanwhile, and an error there is only printed.
///
/// # Errors
/// The file cannot be created, opened or written.
pub fn write(path: &Path) -> Result<()> {
    let result = match fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_fifo() => {
            let path = path.to_owned();
            let fifo = move || {
                if let Err(error) = overwrite(&path) {
                    eprintln!("tcpclose: cannot write the ready file {}: {error}", path.display());
                }
            };
            thread::Builder::new().name("tcpclose-ready".into()).spawn(fifo).map(drop)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => create(path),
        _ => overwrite(path),
    };
    result.with_context(|| format!("cannot write the ready file {}", path.display()))
}

/// Writes a temporary file in the same directory, and then renames it.
fn create(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let mut file = tempfile::Builder::new()
        .permissions(Permissions::from_mode(0o666)) // less the umask
        .tempfile_in(directory.unwrap_or(Path::new(".")))?;
    write_pid(file.as_file_mut())?;
    match file.persist_noclobber(path) {
        Ok(_) => Ok(()),
        // It is a symbolic link to nothing, or another process has created it meanwhile.
        Err(failed) if failed.error.kind() == ErrorKind::AlreadyExists => write_pid(&mut File::create(path)?),
        Err(failed) => Err(failed.error),
    }
}

fn overwrite(path: &Path) -> io::Result<()> {
    write_pid(&mut File::options().write(true).truncate(true).open(path)?)
}

/// It is a single write, so that a reader of a FIFO reads it as a whole.
fn write_pid(file: &mut File) -> io::Result<()> {
    file.write_all(format!("{}\n", std::process::id()).as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::{
        sys::{
            inotify::{AddWatchFlags, InitFlags, Inotify},
            stat::Mode,
        },
        unistd::mkfifo,
    };

    use super::*;

    fn pid() -> String {
        format!("{}\n", std::process::id())
    }

    #[test]
    fn a_new_file_appears_with_the_pid_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let watch = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        watch.add_watch(directory.path(), AddWatchFlags::IN_ALL_EVENTS).unwrap();
        let path = directory.path().join("ready");
        write(&path).unwrap();
        let events = watch.read_events().unwrap();
        let of_file = events.iter().filter(|event| event.name.as_deref() == path.file_name());
        let masks: Vec<_> = of_file.map(|event| event.mask).collect();
        assert_eq!(masks[0], AddWatchFlags::IN_MOVED_TO, "{events:?}");
        assert!(!masks.contains(&AddWatchFlags::IN_MODIFY), "it changed after it had appeared: {events:?}");
        assert_eq!(fs::read_to_string(&path).unwrap(), pid());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "a temporary file is left");
    }

    #[test]
    fn an_existing_file_is_written_into() {
        let directory = tempfile::tempdir().unwrap();
        let [path, other_name] = ["ready", "hard-link"].map(|name| directory.path().join(name));
        fs::write(&path, "what a longer run has left there").unwrap();
        fs::hard_link(&path, &other_name).unwrap();
        write(&path).unwrap();
        assert_eq!(fs::read_to_string(&other_name).unwrap(), pid());
    }

    #[test]
    fn a_fifo_stays_a_fifo() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ready");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        // There is no reader yet, and the call does not wait for one.
        write(&path).unwrap();
        assert!(fs::metadata(&path).unwrap().file_type().is_fifo());
        assert_eq!(fs::read_to_string(&path).unwrap(), pid());
    }

    #[test]
    fn links_and_devices_stay() {
        let directory = tempfile::tempdir().unwrap();
        let [null, dangling, target] = ["null", "dangling", "target"].map(|name| directory.path().join(name));
        symlink("/dev/null", &null).unwrap();
        symlink(&target, &dangling).unwrap();
        for path in [&null, &dangling] {
            write(path).unwrap();
            assert!(fs::symlink_metadata(path).unwrap().is_symlink(), "{}", path.display());
        }
        assert_eq!(fs::read_to_string(&target).unwrap(), pid());
    }

    #[test]
    fn a_missing_directory_is_an_error_that_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let error = write(&directory.path().join("missing/ready")).unwrap_err();
        assert!(format!("{error:#}").contains("missing/ready"), "{error:#}");
    }
}
