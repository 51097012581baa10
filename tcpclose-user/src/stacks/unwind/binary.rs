//! Mapped files → their unwind tables, and the runtimes that they contain.

use std::{collections::HashMap, fs::File, sync::Arc};

use framehop::ExplicitModuleSectionInfo;
use object::{Object, ObjectSection as _, ReadCache, ReadRef};

use crate::{
    processes::{
        Image,
        mappings::{Backing, FileIdentity, Mapping},
    },
    stacks::{
        elf::Segments,
        runtimes::{self, RuntimeBinary},
    },
};

/// The number of bytes of tables that are cached, of all files together. When there would be more, all are
/// dropped.
const MAX_TABLES: usize = 256 << 20;

/// The largest size of one table: those of a browser have 20 MB.
const MAX_TABLE: u64 = 64 << 20;

/// The number of files that are cached, including those without tables.
const MAX_FILES: usize = 1024;

/// A cache of executables and libraries.
#[derive(Default)]
pub struct Binaries {
    known: HashMap<FileIdentity, Option<Arc<Binary>>>,
    tables: usize,
}

/// An executable or library.
pub struct Binary {
    pub(super) segments: Segments,
    pub(super) sections: ExplicitModuleSectionInfo<Arc<[u8]>>,
    pub(super) runtimes: Vec<Box<dyn RuntimeBinary>>,
}

impl Binaries {
    /// Reads a mapped file; `None` if the mapping has none, or if it cannot be read.
    pub fn get(&mut self, image: &Image, mapping: &Mapping) -> Option<Arc<Binary>> {
        let Backing::File { module: Some(module), .. } = &mapping.backing else { return None };
        let identity = module.identity();
        if let Some(known) = self.known.get(&identity) {
            return known.clone();
        }
        let file = module.open(image.pid, mapping.start, mapping.end)?;
        let binary = Binary::read(file).map(Arc::new);
        let size = binary.as_ref().map_or(0, |binary| binary.size());
        if self.known.len() >= MAX_FILES || self.tables + size > MAX_TABLES {
            self.known.clear();
            self.tables = 0;
        }
        self.tables += size;
        self.known.insert(identity, binary.clone());
        binary
    }
}

impl Binary {
    fn read(file: File) -> Option<Self> {
        let cache = ReadCache::new(file);
        let file = object::File::parse(&cache).ok().filter(object::Object::is_64)?;
        let range = |name| {
            let section = file.section_by_name(name)?;
            let start = section.address();
            Some(start..start.checked_add(section.size())?)
        };
        let sections = ExplicitModuleSectionInfo {
            text_svma: range(".text"),
            got_svma: range(".got"),
            eh_frame_svma: range(".eh_frame"),
            eh_frame: table(&file, ".eh_frame"),
            eh_frame_hdr_svma: range(".eh_frame_hdr"),
            eh_frame_hdr: table(&file, ".eh_frame_hdr"),
            debug_frame: table(&file, ".debug_frame"),
            ..ExplicitModuleSectionInfo::default()
        };
        Some(Self { segments: Segments::read(&file), sections, runtimes: runtimes::of(&file) })
    }

    /// Whether it has tables to unwind its code.
    pub(super) fn has_tables(&self) -> bool {
        self.sections.eh_frame.is_some() || self.sections.debug_frame.is_some()
    }

    /// Bytes of its tables.
    fn size(&self) -> usize {
        let ExplicitModuleSectionInfo { eh_frame, eh_frame_hdr, debug_frame, .. } = &self.sections;
        let tables = [eh_frame, eh_frame_hdr, debug_frame];
        tables.into_iter().flatten().map(|table| table.len()).sum()
    }
}

/// The content of a section, unless it is compressed or too large.
fn table<'a, R: ReadRef<'a>>(file: &object::File<'a, R>, name: &str) -> Option<Arc<[u8]>> {
    let section = file.section_by_name(name).filter(|section| section.size() <= MAX_TABLE)?;
    let range = section.compressed_file_range().ok()?;
    if range.format != object::CompressionFormat::None {
        return None;
    }
    section.data().ok().map(Arc::from)
}
