//! The separate file with the symbols and debug information of a stripped one: in the directories where
//! distributions install it, at the place that the stripped file names, and in the caches of debuginfod's
//! clients (gdb, perf, `debuginfod-find`). Nothing is downloaded here.
//!
//! <https://sourceware.org/gdb/current/onlinedocs/gdb.html/Separate-Debug-Files.html>
//! <https://man7.org/linux/man-pages/man3/debuginfod_find_debuginfo.3.html> (the cache)

use std::{
    env,
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use super::{MAX_SYMBOLS, has_cheap_lines, headers::Headers};
use crate::processes::mappings::{FileIdentity, below};

/// Where distributions install debug files.
const INSTALLED: &str = "/usr/lib/debug";

/// Largest debug file whose checksum is computed, which takes 0.1 s. The checksum is needed only for programs
/// without a build id.
const MAX_CHECKED: u64 = 128 << 20;

/// A debug file that belongs to the program.
#[derive(Debug)]
pub(super) struct DebugFile {
    pub(super) file: File,
    /// Whether lines can be read from it as well.
    pub(super) with_lines: bool,
}

/// The directories in which debug files may be.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// The caches of debuginfod's clients.
    caches: Vec<PathBuf>,
    /// The user who has run sudo, whose cache may be used like root's.
    caller: Option<u32>,
}

impl Places {
    /// Those of root and of the user who has run sudo.
    pub(super) fn of_environment() -> Self {
        let caller = env::var("SUDO_UID").ok().and_then(|uid| uid.parse().ok());
        let named = env::var_os("DEBUGINFOD_CACHE_PATH").map(PathBuf::from);
        let own = env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cache")));
        let callers = caller.and_then(home_of).map(|home| home.join(".cache"));
        let caches = [own, callers].into_iter().flatten().map(|cache| cache.join("debuginfod_client"));
        Self { caches: named.into_iter().chain(caches).collect(), caller }
    }

    /// The debug file of the program with these headers, whose path is `program`, as seen from the root
    /// directory `root`.
    pub(super) fn find(&self, headers: &Headers, program: &Path, root: &Path) -> Option<DebugFile> {
        self.candidates(headers, program, root).iter().find_map(|path| self.open(headers, path))
    }

    /// The paths at which gdb looks, in its order.
    fn candidates(&self, headers: &Headers, program: &Path, root: &Path) -> Vec<PathBuf> {
        let mut candidates = Vec::new();
        let id = headers.build_id.as_deref().filter(|id| id.len() >= 8).map(hexadecimal);
        if let Some((first, rest)) = id.as_ref().and_then(|id| id.split_at_checked(2)) {
            let path = PathBuf::from(format!("{INSTALLED}/.build-id/{first}/{rest}.debug"));
            candidates.push(below(root, &path));
        }
        let link = headers.debug_link.as_ref().map(|(name, _)| Path::new(OsStr::from_bytes(name)));
        // The program may be malicious, so the link must not lead to another directory.
        let link = link.filter(|link| link.file_name() == Some(link.as_os_str()));
        if let Some((name, folder)) = link.zip(program.parent()) {
            let installed = below(Path::new(INSTALLED), folder);
            for folder in [folder, &folder.join(".debug"), &installed] {
                candidates.push(below(root, &folder.join(name)));
            }
        }
        let cached = |id: String| self.caches.iter().map(move |cache| cache.join(&id).join("debuginfo"));
        candidates.extend(id.into_iter().flat_map(cached));
        candidates
    }

    /// Opens a debug file if it is that of the program with these headers, and can be read in reasonable
    /// time.
    fn open(&self, headers: &Headers, path: &Path) -> Option<DebugFile> {
        let file = FileIdentity::of(&fs::metadata(path).ok()?)?.open(path)?;
        let found = Headers::read(&file)?;
        let is_its = match (&headers.build_id, &headers.debug_link) {
            (Some(id), _) => found.build_id.as_ref() == Some(id),
            (None, Some((_, expected))) => checksum(&file) == Some(*expected),
            (None, None) => false,
        };
        if !is_its || found.symbols > MAX_SYMBOLS {
            return None;
        }
        // blazesym opens files that this one names.
        let is_trusted = self.is_trusted(&file);
        let with_lines = (is_trusted || !found.refers) && has_cheap_lines(&found, &file, is_trusted);
        Some(DebugFile { file, with_lines })
    }

    /// Whether only users who may read everything anyway could have written it.
    fn is_trusted(&self, file: &File) -> bool {
        let is_ours = |uid| uid == 0 || Some(uid) == self.caller;
        file.metadata().is_ok_and(|metadata| is_ours(metadata.uid()) && metadata.mode() & 0o022 == 0)
    }
}

fn hexadecimal(id: &[u8]) -> String {
    let mut text = String::new();
    for byte in id {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The home directory in `/etc/passwd`. A static binary cannot ask the C library for it, which would load
/// other libraries.
fn home_of(uid: u32) -> Option<PathBuf> {
    let users = fs::read_to_string("/etc/passwd").ok()?;
    home_in(&users, uid).map(PathBuf::from)
}

fn home_in(users: &str, uid: u32) -> Option<&str> {
    users.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let is_it = fields.next()?.parse() == Ok(uid);
        fields.nth(2).filter(|home| is_it && home.starts_with('/'))
    })
}

/// The CRC-32 of a file's content, by which a debug link identifies it.
fn checksum(file: &File) -> Option<u32> {
    if file.metadata().ok()?.size() > MAX_CHECKED {
        return None;
    }
    let mut hasher = crc32fast::Hasher::new();
    let mut piece = vec![0; 64 << 10];
    let mut offset = 0;
    loop {
        match file.read_at(&mut piece, offset).ok()? {
            0 => return Some(hasher.finalize()),
            length => {
                hasher.update(&piece[..length]);
                offset += length as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_where_gdb_does() {
        let headers = Headers {
            build_id: Some((0xa0..0xb4).collect()),
            debug_link: Some((b"tool.debug".to_vec(), 0)),
            ..Headers::default()
        };
        let places = Places { caches: vec!["/c".into()], caller: None };
        let id = "a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3";
        let expected = [
            &format!("/usr/lib/debug/.build-id/a0/{id}.debug"),
            "/opt/bin/tool.debug",
            "/opt/bin/.debug/tool.debug",
            "/usr/lib/debug/opt/bin/tool.debug",
            &format!("/c/a0{id}/debuginfo"),
        ];
        let program = Path::new("/opt/bin/tool");
        assert_eq!(places.candidates(&headers, program, Path::new("/")), expected.map(PathBuf::from));
        let seen = places.candidates(&headers, program, Path::new("/proc/1/root"));
        assert_eq!(seen[1], Path::new("/proc/1/root/opt/bin/tool.debug"));
        assert_eq!(seen[4], Path::new(expected[4]), "caches are this host's");
    }

    #[test]
    fn a_link_leads_to_no_other_directory() {
        for name in ["../secret", "/etc/shadow", "a/b", "..", ".", ""] {
            let headers = Headers { debug_link: Some((name.into(), 0)), ..Headers::default() };
            let found = Places::default().candidates(&headers, Path::new("/bin/a"), Path::new("/"));
            assert!(found.is_empty(), "{name}: {found:?}");
        }
    }

    #[test]
    fn knows_homes() {
        let users = "root:x:0:0:root:/root:/bin/sh\n\nbroken\n+:::\n\
                     me:x:1000:1000:Me,,:/home/me:/bin/sh\nx:x:7:7::rel:\n";
        assert_eq!(home_in(users, 1000), Some("/home/me"));
        assert_eq!(home_in(users, 0), Some("/root"));
        assert_eq!((home_in(users, 7), home_in(users, 8)), (None, None));
    }
}
