//! Executable mappings of a process, and the files behind them.
//!
//! A path does not identify a file: in this process's mount namespace it may lead elsewhere, or to a newer
//! version by now, and a function name read from the wrong file would be false. A mapped file is therefore
//! identified by what `stat` reports, and no file is read that was not compared with that.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use nix::sys::stat::{major, minor};

use super::beneath;

/// How many executable mappings of one process are kept. The kernel allows 65530 of all kinds; in a process
/// with thousands of executable ones, those are of code compiled at run time.
const MAX_MAPPINGS: usize = 4096;

/// How many files are kept open, see [`Module`].
const MAX_HELD: usize = 192;

/// The kernel's mark behind the path of a file that has been removed.
const DELETED: &[u8] = b" (deleted)";

/// An executable mapping.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// End address, exclusive.
    pub end: u64,
    /// Offset of `start` in the file, in bytes.
    pub offset: u64,
    /// The address that the file's first byte would have if all of it were mapped here.
    pub base: u64,
    /// What is mapped.
    pub backing: Backing,
}

/// The memory that a mapping refers to.
#[derive(Clone, Debug)]
pub enum Backing {
    /// A file.
    File {
        /// Its path as the process sees it, without the kernel's mark for removed files.
        path: Arc<Path>,
        /// The file; `None` if it could not be inspected, or is not available any more.
        module: Option<Arc<Module>>,
    },
    /// The vDSO, which the kernel maps into every process.
    Vdso,
    /// Not a file, such as the code of a just-in-time compiler.
    Anonymous,
}

impl Backing {
    /// Identifies the file, if it is one that could be inspected.
    pub(super) fn identity(&self) -> Option<FileIdentity> {
        match self {
            Self::File { module, .. } => module.as_ref().map(|module| module.identity()),
            Self::Vdso | Self::Anonymous => None,
        }
    }
}

/// Identifies one version of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl FileIdentity {
    /// `None` if it is not a regular file: only those are opened.
    pub(crate) fn of(metadata: &Metadata) -> Option<Self> {
        metadata.is_file().then(|| Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }

    /// Whether an open file is this one and was not written to since.
    pub fn is(&self, file: &File) -> bool {
        file.metadata().is_ok_and(|metadata| Self::of(&metadata) == Some(*self))
    }

    /// Opens the file at `path` if it is this one.
    pub(crate) fn open(&self, path: &Path) -> Option<File> {
        // Checked before it is opened, because opening a device can have effects; and opened without
        // blocking, in case it has become a pipe meanwhile.
        if Self::of(&fs::metadata(path).ok()?)? != *self {
            return None;
        }
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
        self.is(&file).then_some(file)
    }
}

/// A file that processes have mapped.
///
/// If its path leads to it in this process's mount namespace, it is opened when it is needed. If not, because
/// it was removed or is in another mount namespace, it is kept open from the start: the process and its
/// namespace may no longer exist when the file is needed. At most 192 files are kept open; further ones can
/// be read only while a process maps them. An open file keeps its file system busy, so it is closed some time
/// after the process has exited.
#[derive(Debug)]
pub struct Module {
    identity: FileIdentity,
    host: Option<PathBuf>,
    held: Option<Held>,
}

/// A file that is kept open.
#[derive(Debug)]
pub(super) struct Held {
    file: File,
    /// The number of references to it is the number of files that are kept open.
    _ticket: Arc<()>,
}

impl Held {
    /// Opens the file once more. A duplicate of the descriptor would share its position, and two threads read
    /// the same file at the same time: the one that learns about new processes, and the one that unwinds.
    pub(super) fn open(&self) -> Option<File> {
        File::open(beneath::path(&self.file)).ok()
    }
}

impl Module {
    /// Identifies the file.
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// Whether it is kept open.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Its path in this process's mount namespace.
    pub fn host_path(&self) -> Option<&Path> {
        self.host.as_deref()
    }

    /// Opens it; if there is no other way, through process `pid`, which maps it from `start` to `end`, if
    /// that process still runs. `None` if the file does not exist any more, or has changed since it was first
    /// seen.
    pub fn open(&self, pid: u32, start: u64, end: u64) -> Option<File> {
        let held = || self.held.as_ref().and_then(Held::open);
        let host = || self.host.as_ref().and_then(|path| self.identity.open(path));
        let mapped = || self.identity.open(&map_file(pid, start, end));
        // A file that is kept open may have been written to as well.
        held().filter(|file| self.identity.is(file)).or_else(host).or_else(mapped)
    }
}

/// All files that some mapping refers to.
#[derive(Debug, Default)]
pub struct Modules {
    known: HashMap<FileIdentity, Weak<Module>>,
    prune_at: usize,
    tickets: Arc<()>,
}

impl Modules {
    /// How many files are kept open.
    pub fn held(&self) -> usize {
        Arc::strong_count(&self.tickets) - 1
    }

    /// Keeps a file open, unless too many are.
    pub(super) fn hold(&self, file: File) -> Option<Held> {
        (self.held() < MAX_HELD).then(|| Held { file, _ticket: self.tickets.clone() })
    }

    /// The executable mappings of a process in the order of addresses, from the content of its
    /// `/proc/PID/maps`. `exe` is the path of its program.
    pub fn mappings(&mut self, pid: u32, maps: &[u8], exe: Option<&Path>) -> Vec<Mapping> {
        // A file is mapped in several pieces, and inspected once.
        let mut seen: HashMap<(Vec<u8>, u64), Option<Arc<Module>>> = HashMap::new();
        let mut mappings = Vec::new();
        for found in parse(maps).take(MAX_MAPPINGS) {
            let Region { start, end, offset, base, device, inode, path } = found;
            let backing = match path {
                b"[vdso]" => Backing::Vdso,
                [b'/', ..] => {
                    let raw = unescape(path);
                    let (path, deleted) = undeleted(&raw);
                    let module = seen
                        .entry((device.to_vec(), inode))
                        .or_insert_with(|| {
                            let map_file = map_file(pid, start, end);
                            let inode = (device, inode);
                            self.module(pid, path, deleted, inode, &map_file, exe)
                        })
                        .clone();
                    Backing::File { path: path.into(), module }
                }
                _ => Backing::Anonymous,
            };
            mappings.push(Mapping { start, end, offset, base, backing });
        }
        mappings
    }

    fn module(
        &mut self,
        pid: u32,
        path: &Path,
        deleted: bool,
        (device, inode): (&[u8], u64),
        map_file: &Path,
        exe: Option<&Path>,
    ) -> Option<Arc<Module>> {
        // The link in map_files leads to the mapped file itself, wherever its path leads by now, and so does
        // the link to the program. Following the former needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
        // Without it the path is used, as the process sees it, if it leads to the inode that is mapped.
        // Device numbers are not compared: those in `maps` are the file system's, which `stat` does not
        // report on btrfs and overlayfs. If the process has exited meanwhile, of which its parent need not know
        // yet, the path is looked up in this process's root directory, and then device numbers are compared.
        let exe_link = PathBuf::from(format!("/proc/{pid}/exe"));
        // A path in `maps` has no symbolic links.
        let seen = (!deleted).then(|| beneath::open(pid, path).ok()).flatten();
        let seen_path = seen.as_ref().map(beneath::path);
        let (link, metadata) = if let Ok(metadata) = fs::metadata(map_file) {
            (map_file, metadata)
        } else if let Some(metadata) = fs::metadata(&exe_link).ok().filter(|_| exe == Some(path)) {
            (exe_link.as_path(), metadata)
        } else if let Some(seen_path) = &seen_path
            && let Some(metadata) = fs::metadata(seen_path).ok().filter(|it| it.ino() == inode)
        {
            (seen_path.as_path(), metadata)
        } else if let Some(metadata) = fs::metadata(path).ok().filter(|it| {
            let is_same = it.ino() == inode && device_text(it.dev()).as_bytes() == device;
            !deleted && is_same && has_exited(&exe_link)
        }) {
            (path, metadata)
        } else {
            return None;
        };
        let identity = FileIdentity::of(&metadata)?;
        if let Some(module) = self.known.get(&identity).and_then(Weak::upgrade) {
            return Some(module);
        }
        let here = fs::metadata(path).ok().and_then(|metadata| FileIdentity::of(&metadata));
        let host = (here == Some(identity)).then(|| path.to_owned());
        let held = if host.is_none() { identity.open(link).and_then(|file| self.hold(file)) } else { None };
        let module = Arc::new(Module { identity, host, held });
        if self.known.len() >= self.prune_at {
            self.known.retain(|_, module| module.strong_count() > 0);
            self.prune_at = (2 * self.known.len()).max(256);
        }
        self.known.insert(identity, Arc::downgrade(&module));
        Some(module)
    }
}

/// A line of `/proc/PID/maps`.
#[derive(Debug, PartialEq, Eq)]
pub struct Region<'a> {
    /// First address.
    pub start: u64,
    /// End address, exclusive.
    pub end: u64,
    offset: u64,
    base: u64,
    /// Major and minor number, as text.
    device: &'a [u8],
    inode: u64,
    /// The path, with the kernel's escapes and mark for removed files; empty if there is none.
    pub path: &'a [u8],
}

/// The executable mappings in the content of a `/proc/PID/maps`. Malformed lines are skipped.
pub fn parse(maps: &[u8]) -> impl Iterator<Item = Region<'_>> {
    // The pieces of a file are adjacent, and the one with its beginning comes first.
    let mut first: Option<(&[u8], u64, u64)> = None;
    maps.split(|byte| *byte == b'\n').filter_map(move |line| {
        let (mut region, permissions) = parse_line(line)?;
        if region.offset == 0 {
            first = Some((region.device, region.inode, region.start));
        }
        region.base = match first {
            Some((device, inode, base)) if (device, inode) == (region.device, region.inode) => base,
            _ => region.start.saturating_sub(region.offset),
        };
        (permissions.get(2) == Some(&b'x')).then_some(region)
    })
}

fn parse_line(line: &[u8]) -> Option<(Region<'_>, &[u8])> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let range = fields.next()?;
    let dash = range.iter().position(|byte| *byte == b'-')?;
    let (start, end) = (hexadecimal(&range[..dash])?, hexadecimal(&range[dash + 1..])?);
    let permissions = fields.next()?;
    let offset = hexadecimal(fields.next()?)?;
    let device = fields.next()?;
    let inode = str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let path = fields.next().unwrap_or_default().trim_ascii_start();
    (start < end).then_some((Region { start, end, offset, base: start, device, inode, path }, permissions))
}

fn hexadecimal(digits: &[u8]) -> Option<u64> {
    u64::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()
}

/// The kernel writes a line feed in a path as `\012`.
pub fn unescape(path: &[u8]) -> Vec<u8> {
    let mut rest = path;
    let mut plain = Vec::with_capacity(path.len());
    while let Some((byte, tail)) = rest.split_first() {
        if let Some(tail) = rest.strip_prefix(b"\\012") {
            plain.push(b'\n');
            rest = tail;
        } else {
            plain.push(*byte);
            rest = tail;
        }
    }
    plain
}

/// The path of a file without the kernel's mark for removed files, and whether it had that mark.
pub fn undeleted(path: &[u8]) -> (&Path, bool) {
    match path.strip_suffix(DELETED) {
        Some(path) => (Path::new(OsStr::from_bytes(path)), true),
        None => (Path::new(OsStr::from_bytes(path)), false),
    }
}

/// A device number in the form of `/proc/PID/maps`.
fn device_text(device: u64) -> String {
    format!("{:02x}:{:02x}", major(device), minor(device))
}

/// Whether a process, given by the link to its program, has released its memory, as one does that exits. Then
/// the link leads nowhere. Whoever may not follow it may not read the mappings either.
fn has_exited(exe_link: &Path) -> bool {
    fs::read_link(exe_link).is_err()
}

/// An absolute path as seen from another root directory.
pub(crate) fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn map_file(pid: u32, start: u64, end: u64) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/map_files/{start:x}-{end:x}"))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn reads_the_executable_lines() {
        let text = b"\
55d000000000-55d000001000 r--p 00000000 fe:00 77                         /usr/bin/a b\n\
55d000001000-55d000003000 r-xp 00001000 fe:00 77                         /usr/bin/a b\n\
55d000003000-55d000004000 rw-p 00003000 fe:00 77                         /usr/bin/a b\n\
7f0000000000-7f0000001000 r-xp 00000000 00:00 0 \n\
7f0000002000-7f0000003000 r-xp 00005000 fe:00 78                         /usr/lib/l.so (deleted)\n\
7fff00000000-7fff00002000 r-xp 00000000 00:00 0                          [vdso]\n";
        let found: Vec<_> = parse(text).map(|it| (it.start, it.offset, it.base, it.path)).collect();
        assert_eq!(
            found,
            [
                (0x55d0_0000_1000, 0x1000, 0x55d0_0000_0000, &b"/usr/bin/a b"[..]),
                (0x7f00_0000_0000, 0, 0x7f00_0000_0000, b""),
                (0x7f00_0000_2000, 0x5000, 0x7eff_ffff_d000, b"/usr/lib/l.so (deleted)"),
                (0x7fff_0000_0000, 0, 0x7fff_0000_0000, b"[vdso]"),
            ]
        );
    }

    #[test]
    fn leaves_out_what_it_does_not_understand() {
        let text = b"\n-\nzz-1 r-xp 0 0 0\n2-1 r-xp 0 0:0 0\n1-2\n1-2 r-xp\n1-2 r-xp 0 0:0 x /a\n1-2 r-xp 0 \
                     0:0 9 /a\xff";
        let found: Vec<_> = parse(text).map(|it| it.path.to_vec()).collect();
        assert_eq!(found, [b"/a\xff"]);
    }

    /// Between its exit and the moment when its parent asks for its status, a process has no files, but an id.
    #[test]
    fn files_of_a_process_that_exits_meanwhile_are_known() {
        let mut cat = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let pid = cat.id();
        let of_program = |maps: &[u8]| parse(maps).any(|region| region.path.ends_with(b"/cat"));
        let maps = loop {
            let maps = fs::read(format!("/proc/{pid}/maps")).unwrap();
            if of_program(&maps) {
                break maps;
            }
        };
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        drop(cat.stdin.take());
        let mut rest = Vec::new();
        cat.stdout.take().unwrap().read_to_end(&mut rest).unwrap();
        while fs::read_link(format!("/proc/{pid}/exe")).is_ok() {}
        let mappings = Modules::default().mappings(pid, &maps, Some(&exe));
        let (mut files, mut known) = (0, 0);
        for mapping in &mappings {
            if let Backing::File { module, .. } = &mapping.backing {
                files += 1;
                known += u32::from(module.as_ref().is_some_and(|module| module.open(pid, 0, 0).is_some()));
            }
        }
        assert!(files > 0 && known == files, "{known} of {files}: {mappings:?}");
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        cat.wait().unwrap();
    }

    #[test]
    fn each_reader_of_a_removed_file_has_its_own_position() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "text").unwrap();
        let held = Modules::default().hold(File::open(&path).unwrap()).unwrap();
        fs::remove_file(&path).unwrap();
        let readers = [held.open().unwrap(), held.open().unwrap()];
        let read = |mut reader: &File| {
            let mut half = [0; 2];
            reader.read_exact(&mut half).unwrap();
            half
        };
        assert_eq!(
            [&readers[0], &readers[1], &readers[0], &readers[1]].map(read),
            [*b"te", *b"te", *b"xt", *b"xt"]
        );
    }

    #[test]
    fn takes_paths_apart() {
        assert_eq!(unescape(b"/a\\012b\\0123\\01"), b"/a\nb\n3\\01");
        assert_eq!(undeleted(b"/a (deleted)"), (Path::new("/a"), true));
        assert_eq!(device_text(nix::sys::stat::makedev(0xfe, 1)), "fe:01");
        assert_eq!(device_text(nix::sys::stat::makedev(0x103, 0xabc)), "103:abc");
        assert_eq!(undeleted(b"/a"), (Path::new("/a"), false));
        assert_eq!(below(Path::new("/proc/1/root"), Path::new("/a/b")), Path::new("/proc/1/root/a/b"));
    }
}
