//! Helpers of several targets: files made of fuzzed bytes, mapped into an imaginary process.

use std::{
    fs,
    io::Write as _,
    ops::Range,
    os::unix::fs::{MetadataExt as _, fchown},
    panic,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tcpclose_user::{
    processes::{Image, mappings::Modules},
    stacks::runtimes::BinarySymbols,
};

/// Where [`mapped`] maps the file.
pub const BASE: u64 = 0x10_0000;

/// A file in memory that is removed when it is dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes a file with this content. It does not belong to root, whose files are trusted more.
    pub fn new(content: &[u8]) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        // Files are told apart by their inode and times, so each is a new one.
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("/dev/shm/tcpclose-fuzz-{}-{number}", std::process::id()));
        let mut file = fs::File::create(&path).expect("/dev/shm is writable");
        file.write_all(content).expect("/dev/shm has room");
        // Without privileges it keeps this user as its owner, which is sufficient unless that is root.
        let _ = fchown(&file, Some(65534), Some(65534));
        Self(path)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// An image whose only executable mapping is this file, in this process.
    pub fn mapped(&self) -> Arc<Image> {
        let metadata = fs::metadata(&self.0).expect("it was just written");
        let (end, inode, path) =
            (BASE + metadata.len().next_multiple_of(4096), metadata.ino(), self.0.display());
        let maps = format!("{BASE:x}-{end:x} r-xp 00000000 00:00 {inode} {path}\n");
        let pid = std::process::id();
        let mappings = Modules::default().mappings(pid, maps.as_bytes(), None);
        Arc::new(Image { pid, mm: 1, mappings, ..Image::default() })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The symbols of a file, with their addresses.
pub struct Symbols(pub Vec<(String, Range<u64>)>);

impl BinarySymbols for Symbols {
    fn dynamic(&self, name: &str) -> Option<Range<u64>> {
        self.0.iter().find(|(it, _)| it == name).map(|(_, range)| range.clone())
    }

    fn dynamic_with(&self, prefix: &str) -> Vec<(String, Range<u64>)> {
        self.0.iter().filter(|(name, _)| name.starts_with(prefix)).cloned().collect()
    }

    fn local(&self, name: &str) -> Option<Range<u64>> {
        self.dynamic(name)
    }
}

/// Lets panics unwind, where libFuzzer would abort at once: a panic of a crate that is caught is not a
/// finding. A panic that is not caught still ends the target.
pub fn allow_caught_panics() {
    panic::set_hook(Box::new(|_| {}));
}

/// Splits a number off the front; 0 if there are no bytes left.
pub fn word(data: &mut &[u8]) -> u64 {
    let Some((word, rest)) = data.split_first_chunk() else {
        *data = &[];
        return 0;
    };
    *data = rest;
    u64::from_le_bytes(*word)
}
