//! Turns the addresses of stacks into functions, files and lines.
//!
//! A wrong name is worse than none. A name is reported only if the symbol's size shows that the address is in
//! it, if the file is the one that the process has mapped, and if the file has to be trusted only about its
//! own names.
//!
//! Costs, on two shared 3 GHz cores: the first address in a file takes 0.2 ms if there are only dynamic
//! symbols, 5 ms for node's 110 000 symbols, and with debug information about 1 ms for each MB of
//! `.debug_info`, ten times that if it is compressed. Further addresses take 10 µs, or 1 ms in a new
//! compilation unit; cached ones less than 1 µs. Debug information that would take longer than 0.2 s is not
//! read: there are then functions without lines.

mod debug_file;
mod go;
mod headers;
mod kernel;
mod mini;
pub mod perf;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Weak};

use blazesym::symbolize::source::{Elf, Process, Source};
use blazesym::symbolize::{self, CodeInfo, Input, Sym, Symbolized};
use blazesym::{Pid, symbolize::Builder};

use crate::event::Frame;
use crate::processes::Image;
use crate::processes::mappings::{self, Backing, FileIdentity, Mapping, Module};
use crate::stacks::frame::{UnwoundFrame, UnwoundStack};

use self::debug_file::{DebugFile, Places};
use self::headers::Headers;
use self::kernel::Kallsyms;
use self::perf::PerfMap;

/// The number of files whose symbols are cached. Each takes up to four file descriptors.
const MAX_FILES: usize = 48;

/// The number of addresses of a file, and of the vDSO, that are cached.
const MAX_ADDRESSES: usize = 8192;

/// The number of processes whose perf maps are cached.
const MAX_PERF_MAPS: usize = 16;

/// Largest symbol table that is read, in bytes: 2.8 million symbols. More take too long to sort.
const MAX_SYMBOLS: u64 = 64 << 20;

/// Largest `.debug_info` that is read, in bytes: 1 ms for each MB.
const MAX_DEBUG_INFO: u64 = 128 << 20;

/// Largest file with compressed debug information that is read, in bytes: decompressed it has 2.5 times the
/// size, and takes 4 ms for each MB of that.
const MAX_COMPRESSED: u64 = 16 << 20;

/// The functions with which the stack of a goroutine begins, in Go's table and in symbol tables. They have no
/// caller, but no unwind information shows that.
const FIRST_OF_GO: [&str; 2] = ["runtime.goexit", "runtime.goexit.abi0"];

/// Longest name, in bytes; longer ones are cut.
const MAX_NAME: usize = 2048;

/// Symbolizes addresses, and caches the results. It cannot be shared between threads or moved to another one,
/// because blazesym counts references without locks.
#[derive(Debug)]
pub struct Symbolizer {
    debug_files: Places,
    files: HashMap<FileIdentity, FileSymbols>,
    perf: HashMap<(u32, u64), (PerfMap, u64)>,
    vdso: Option<Vdso>,
    kernel: Option<Kallsyms>,
    clock: u64,
}

impl Default for Symbolizer {
    fn default() -> Self {
        Self {
            debug_files: Places::of_environment(),
            files: HashMap::new(),
            perf: HashMap::new(),
            vdso: None,
            kernel: None,
            clock: 0,
        }
    }
}

/// The symbols of one file.
#[derive(Debug)]
struct FileSymbols {
    blazesym: symbolize::Symbolizer,
    headers: Headers,
    /// The sources of names, best first.
    sources: Vec<Source<'static>>,
    /// The source to use if none of them has a name.
    go: Option<go::GoTable>,
    known: HashMap<u64, Arc<[Piece]>>,
    /// It is alive as long as a known process maps the file.
    module: Weak<Module>,
    used: u64,
    identity: FileIdentity,
    /// `sources` refer to these by their descriptors.
    file: File,
    _others: Vec<File>,
}

/// The vDSO of this process: the kernel maps the same one into all.
#[derive(Debug)]
struct Vdso {
    blazesym: symbolize::Symbolizer,
    /// Start and end address; `None` if there is none.
    place: Option<(u64, u64)>,
    known: HashMap<u64, Arc<[Piece]>>,
}

/// The part of a frame that does not depend on the process. Several, innermost first, belong to one address
/// if functions are inlined; the last is the function that was compiled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Piece {
    symbol: Option<String>,
    /// From the symbol's start to the address.
    offset: Option<u64>,
    file: Option<String>,
    line: Option<u32>,
    inlined: bool,
}

impl From<go::GoLocation> for Piece {
    fn from(place: go::GoLocation) -> Self {
        let (file, line) = place.line.unzip();
        let symbol = Some(cut(&place.function));
        Self { symbol, offset: Some(place.offset), file, line, inlined: false }
    }
}

/// A stack that is being symbolized.
struct Naming<'a> {
    image: Option<&'a Image>,
    named: Vec<Frame>,
    /// Whether the perf map was read for it.
    perf_read: bool,
}

impl<'a> Naming<'a> {
    fn of(image: Option<&'a Image>) -> Self {
        Self { image, named: Vec::new(), perf_read: false }
    }
}

impl Symbolizer {
    /// Makes a symbolizer with empty caches.
    pub fn new() -> Self {
        Self::default()
    }

    /// Symbolizes the frames of a user stack, innermost first; the first address is an instruction pointer,
    /// all others are return addresses. Without an image, or if nothing is known, a frame has its address and
    /// nulls.
    ///
    /// There are more frames than addresses if functions are inlined: an inlined frame has the address of its
    /// caller and no offset.
    ///
    /// The process may have exited.
    pub fn user(&mut self, image: Option<&Image>, frames: &[u64]) -> Vec<Frame> {
        let mut naming = Naming::of(image);
        for (index, address) in frames.iter().copied().enumerate() {
            self.code(&mut naming, address, target(index, address));
        }
        naming.named
    }

    /// Symbolizes those frames of an unwound stack that have no name yet, as [`user`](Self::user) does.
    pub fn unwound(&mut self, image: Option<&Image>, stack: &UnwoundStack) -> Vec<Frame> {
        let mut naming = Naming::of(image);
        for frame in stack.frames.iter() {
            match frame {
                UnwoundFrame::Instruction(address) => self.code(&mut naming, *address, *address),
                UnwoundFrame::Return(address) => self.code(&mut naming, *address, address.saturating_sub(1)),
                UnwoundFrame::Named(frame) => naming.named.push(Frame::clone(frame)),
            }
        }
        if let Some(last) = naming.named.last_mut()
            && last.symbol.as_deref().is_none_or(|symbol| !FIRST_OF_GO.contains(&symbol))
        {
            last.truncated = stack.truncated;
        }
        naming.named
    }

    fn code(&mut self, naming: &mut Naming<'_>, address: u64, target: u64) {
        let mapping = naming.image.and_then(|image| Some((image, image.mapping(target)?)));
        let Some((image, mapping)) = mapping else {
            naming.named.push(Frame::nameless(address));
            return;
        };
        let module = match &mapping.backing {
            Backing::File { path, .. } => Some(path.to_string_lossy().into_owned()),
            Backing::Vdso => Some("[vdso]".to_owned()),
            Backing::Anonymous => None,
        };
        let mut pieces = match &mapping.backing {
            Backing::File { module: Some(module), .. } => self.file(image, mapping, module, target),
            Backing::Vdso => self.vdso(mapping, target),
            Backing::File { module: None, .. } | Backing::Anonymous => None,
        };
        // A just-in-time compiler may map its memory twice, for which it needs a file: `/memfd:doublemapper`.
        if pieces.is_none() && is_run_time_code(&mapping.backing) {
            pieces = self.compiled(image, target, !naming.perf_read);
            naming.perf_read = true;
        }
        let pieces = pieces.unwrap_or_else(|| Arc::new([Piece::default()]));
        naming.named.extend(pieces.iter().map(|piece| {
            let from_module = module.as_ref().and(address.checked_sub(mapping.base));
            Frame {
                address: hexadecimal(address),
                symbol: piece.symbol.clone(),
                module: module.clone(),
                offset: match (&piece.symbol, piece.inlined) {
                    (_, true) => None,
                    (None, false) => from_module,
                    (Some(_), false) => piece.offset.map(|offset| offset + (address - target)),
                },
                file: piece.file.clone(),
                line: piece.line,
                inlined: piece.inlined,
                truncated: None,
            }
        }));
    }

    /// Symbolizes the frames of a kernel stack, as [`user`](Self::user) does. A function of the kernel itself
    /// has no module, one of a loadable module has the module's name, and one of a BPF program has `bpf`.
    /// There are no files and lines, and without `CAP_SYSLOG`, which `/proc/kallsyms` requires, no names.
    ///
    /// The first call reads `/proc/kallsyms`, which takes about 0.1 s.
    pub fn kernel(&mut self, frames: &[u64]) -> Vec<Frame> {
        let kernel = self.kernel.get_or_insert_with(Kallsyms::read);
        kernel.update(frames);
        let name = |(index, address): (usize, &u64)| {
            let Some(function) = kernel.find(target(index, *address)) else {
                return Frame::nameless(*address);
            };
            Frame {
                symbol: Some(cut(function.name)),
                module: function.module.map(str::to_owned),
                offset: address.checked_sub(function.start),
                ..Frame::nameless(*address)
            }
        };
        frames.iter().enumerate().map(name).collect()
    }

    /// Closes files that no known process maps. Call it after
    /// [`Processes::sweep`](crate::processes::Processes::sweep).
    pub fn sweep(&mut self) {
        self.files.retain(|_, symbols| symbols.module.strong_count() > 0);
    }

    fn file(
        &mut self,
        image: &Image,
        mapping: &Mapping,
        module: &Arc<Module>,
        address: u64,
    ) -> Option<Arc<[Piece]>> {
        self.clock += 1;
        let identity = module.identity();
        if !self.files.contains_key(&identity) {
            let file = module.open(image.pid, mapping.start, mapping.end)?;
            if self.files.len() >= MAX_FILES {
                let oldest = self.files.iter().min_by_key(|(_, symbols)| symbols.used).map(|(key, _)| *key);
                oldest.and_then(|oldest| self.files.remove(&oldest));
            }
            let Backing::File { path, .. } = &mapping.backing else { return None };
            let found = FileSymbols::open(file, module, |headers| {
                debug_file(&self.debug_files, headers, image, module, path)
            });
            self.files.insert(identity, found);
        }
        let symbols = self.files.get_mut(&identity)?;
        symbols.used = self.clock;
        if symbols.module.strong_count() == 0 {
            symbols.module = Arc::downgrade(module);
        }
        symbols.find((address - mapping.start).checked_add(mapping.offset)?)
    }

    fn vdso(&mut self, mapping: &Mapping, address: u64) -> Option<Arc<[Piece]>> {
        let vdso = self.vdso.get_or_insert_with(Vdso::own);
        // A 32-bit process has another vDSO.
        let (start, end) = vdso.place.filter(|(start, end)| end - start == mapping.end - mapping.start)?;
        let offset = address - mapping.start;
        let Vdso { blazesym, known, .. } = vdso;
        let mut source = Process::new(Pid::Slf);
        (source.debug_syms, source.perf_map, source.map_files) = (false, false, false);
        let source = Source::Process(source);
        let input = Input::AbsAddr(start.checked_add(offset).filter(|address| *address < end)?);
        remember(known, offset, || query(blazesym, &source, input))
    }

    fn compiled(&mut self, image: &Image, address: u64, update: bool) -> Option<Arc<[Piece]>> {
        self.clock += 1;
        let key = (image.pid, image.mm);
        if !self.perf.contains_key(&key) && self.perf.len() >= MAX_PERF_MAPS {
            let oldest = self.perf.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| *key);
            oldest.and_then(|oldest| self.perf.remove(&oldest));
        }
        let (map, used) = self.perf.entry(key).or_default();
        *used = self.clock;
        if update {
            map.update(image);
        }
        let (name, start) = map.find(address)?;
        Some(Arc::new([Piece { symbol: Some(cut(name)), offset: Some(address - start), ..Piece::default() }]))
    }
}

impl FileSymbols {
    /// `debug_file` finds the separate debug file of the one with these headers.
    fn open(
        file: File,
        module: &Arc<Module>,
        debug_file: impl FnOnce(&Headers) -> Option<DebugFile>,
    ) -> Self {
        let headers = Headers::read(&file).unwrap_or_default();
        // Decompression is not bounded, and a few MB can become many GB, so it is not done for a file that
        // any user may have written.
        let trusted = module.host_path().is_some() && is_roots(&file);
        let (mut sources, mut others) = (vec![], vec![]);
        if headers.debug_info == 0
            && let Some(DebugFile { file, with_lines }) = debug_file(&headers)
        {
            sources.push(source(&file, with_lines));
            others.push(file);
        }
        if headers.symtab == 0 && headers.debug_data.is_some() {
            let both = [mini::symbols(&file, &headers), mini::without(&file, &headers)];
            for file in both.into_iter().flatten() {
                sources.push(source(&file, false));
                others.push(file);
            }
        } else if headers.symbols <= MAX_SYMBOLS {
            // blazesym opens files that this one names, and anyone may have written it.
            let with_lines = !headers.refers && has_cheap_lines(&headers, &file, trusted);
            if with_lines && sources.is_empty() {
                sources.push(source(&file, true));
            }
            sources.push(source(&file, false));
        }
        Self {
            blazesym: builder().build(),
            go: go::GoTable::read(&file, &headers),
            headers,
            sources,
            known: HashMap::new(),
            module: Arc::downgrade(module),
            used: 0,
            identity: module.identity(),
            file,
            _others: others,
        }
    }

    /// Symbolizes an offset in the file.
    fn find(&mut self, offset: u64) -> Option<Arc<[Piece]>> {
        let Self { blazesym, headers, sources, go, known, identity, file, .. } = self;
        remember(known, offset, || {
            // blazesym maps it. If it was written to, names would be wrong; if it was truncated, reading
            // would raise SIGBUS.
            if !identity.is(file) {
                return None;
            }
            let address = headers.segments.address(offset)?;
            let mut found = None;
            for source in sources.iter() {
                let Some(pieces) = query(blazesym, source, Input::VirtOffset(address)) else { continue };
                // A line without a function is better than nothing, but a function is better still.
                found = Some(found.map_or_else(|| Arc::clone(&pieces), |known| completed(known, &pieces)));
                if found.as_deref().and_then(<[Piece]>::last).is_some_and(|piece| piece.symbol.is_some()) {
                    return found;
                }
            }
            let place = go.as_ref().and_then(|table| table.find(file, address));
            place.map(|place| Arc::new([Piece::from(place)]) as Arc<[Piece]>).or(found)
        })
    }
}

/// These pieces with the name of the compiled function that `other` has, if they lack it. Debug information
/// does not contain the length of a function that the compiler has split, but the symbol table does.
fn completed(known: Arc<[Piece]>, other: &[Piece]) -> Arc<[Piece]> {
    match (known.last(), other.last()) {
        (Some(last), Some(named)) if last.symbol.is_none() && named.symbol.is_some() => {
            let mut pieces = known.to_vec();
            if let Some(last) = pieces.last_mut() {
                (last.symbol, last.offset) = (named.symbol.clone(), named.offset);
            }
            pieces.into()
        }
        _ => known,
    }
}

impl Vdso {
    fn own() -> Self {
        let maps = fs::read("/proc/self/maps").unwrap_or_default();
        let place = mappings::parse(&maps).find(|it| it.path == b"[vdso]").map(|it| (it.start, it.end));
        Self { blazesym: builder().build(), place, known: HashMap::new() }
    }
}

fn builder() -> Builder {
    // A file is compared with the mapped one only once, before it is opened, so it must not be reopened
    // later.
    symbolize::Symbolizer::builder().enable_auto_reload(false).set_debug_dirs(Some(["/usr/lib/debug"]))
}

/// The separate debug file of a stripped one.
fn debug_file(
    places: &Places,
    headers: &Headers,
    image: &Image,
    module: &Module,
    path: &Path,
) -> Option<DebugFile> {
    let of_host = places.find(headers, path, Path::new("/"));
    // In another mount namespace, that of a container, debug files may be installed, too.
    let seen = || {
        let root = format!("/proc/{}/root", image.pid);
        places.find(headers, path, Path::new(&root))
    };
    of_host.or_else(|| if module.host_path().is_none() { seen() } else { None })
}

fn has_cheap_lines(headers: &Headers, file: &File, trusted: bool) -> bool {
    let small = || file.metadata().is_ok_and(|metadata| metadata.size() <= MAX_COMPRESSED);
    headers.debug_info > 0
        && headers.debug_info <= MAX_DEBUG_INFO
        && (!headers.compressed || (trusted && small()))
}

/// Whether only root could have written it.
fn is_roots(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.uid() == 0 && metadata.mode() & 0o022 == 0)
}

fn source(file: &File, with_lines: bool) -> Source<'static> {
    let mut elf = Elf::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
    elf.debug_syms = with_lines;
    Source::Elf(elf)
}

/// The result of blazesym; `None` if it finds nothing or fails.
fn query(blazesym: &symbolize::Symbolizer, source: &Source<'_>, input: Input<u64>) -> Option<Arc<[Piece]>> {
    // The files that it reads may be malicious, and in some places it assumes that they are well formed.
    // After a panic its caches are consistent, because it inserts only complete entries.
    let result = catch_unwind(AssertUnwindSafe(|| blazesym.symbolize_single(source, input)));
    match result {
        Ok(Ok(Symbolized::Sym(symbol))) => pieces(&symbol),
        Ok(Ok(Symbolized::Unknown(_))) => None,
        Ok(Err(error)) => {
            log::debug!("no symbols from {source:?}: {error:#}");
            None
        }
        Err(_) => {
            log::debug!("blazesym panicked on {source:?}");
            None
        }
    }
}

fn pieces(symbol: &Sym<'_>) -> Option<Arc<[Piece]>> {
    let Sym { name, offset, size, code_info, inlined, .. } = symbol;
    let place = |info: Option<&CodeInfo<'_>>| {
        let file = info.map(|info| cut(&info.to_path().to_string_lossy()));
        (file, info.and_then(|info| info.line))
    };
    // A symbol without a size may end before the address.
    let is_inside = size.is_some_and(|size| offset < &size) && !name.is_empty();
    let mut pieces: Vec<Piece> = Vec::with_capacity(inlined.len() + 1);
    for function in inlined.iter().rev() {
        let (file, line) = place(function.code_info.as_ref());
        let symbol = (!function.name.is_empty()).then(|| cut(&function.name));
        pieces.push(Piece { symbol, offset: None, file, line, inlined: true });
    }
    let (file, line) = place(code_info.as_deref());
    let symbol = is_inside.then(|| cut(name));
    let offset = is_inside.then_some(*offset as u64);
    let is_known = symbol.is_some() || file.is_some();
    pieces.push(Piece { symbol, offset, file, line, inlined: false });
    is_known.then(|| pieces.into())
}

/// Looks something up once. Failures are cached too.
fn remember(
    known: &mut HashMap<u64, Arc<[Piece]>>,
    key: u64,
    find: impl FnOnce() -> Option<Arc<[Piece]>>,
) -> Option<Arc<[Piece]>> {
    if !known.contains_key(&key) {
        // Programs have few places that open or end connections; one that fills the cache is rare.
        if known.len() >= MAX_ADDRESSES {
            known.clear();
        }
        known.insert(key, find().unwrap_or_default());
    }
    known.get(&key).filter(|pieces| !pieces.is_empty()).cloned()
}

/// The address to symbolize: a return address follows the call, and may be the first address of another line
/// or function.
fn target(index: usize, address: u64) -> u64 {
    if index == 0 { address } else { address.saturating_sub(1) }
}

fn is_run_time_code(backing: &Backing) -> bool {
    match backing {
        Backing::Anonymous => true,
        Backing::Vdso => false,
        Backing::File { path, .. } => {
            path.as_os_str().as_encoded_bytes().starts_with(b"/memfd:") || **path == *Path::new("/dev/zero")
        }
    }
}

fn hexadecimal(address: u64) -> String {
    format!("{address:#x}")
}

fn cut(name: &str) -> String {
    name[..name.floor_char_boundary(MAX_NAME)].to_owned()
}

#[cfg(test)]
mod tests;
