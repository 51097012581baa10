//! Files that are mapped → the parts of them that it takes to follow a stack.

use std::{collections::HashMap, fs::File, sync::Arc};

use framehop::ExplicitModuleSectionInfo;
use object::{Object, ObjectSection as _, ObjectSymbol as _, ReadCache, ReadRef};

use super::hotspot;
use crate::{
    attribute::{
        maps::{Backing, Identity, Mapping},
        process::Image,
    },
    stacks::symbolize::elf::Load,
};

/// Bytes of tables that are kept of all files together. Beyond it all are forgotten, and read again.
const MAX_TABLES: usize = 256 << 20;

/// Bytes of the tables of one file: those of a browser have 20 MB.
const MAX_TABLE: u64 = 64 << 20;

/// How many files are remembered, also those that have no tables.
const MAX_FILES: usize = 1024;

/// What was read of files, by file.
#[derive(Default)]
pub(super) struct Programs {
    known: HashMap<Identity, Option<Arc<Program>>>,
    tables: usize,
}

/// What is needed of one file.
pub(super) struct Program {
    loads: Vec<Load>,
    pub(super) sections: ExplicitModuleSectionInfo<Arc<[u8]>>,
    /// If it is a Java virtual machine.
    pub(super) hotspot: Option<hotspot::Symbols>,
}

impl Programs {
    /// What is needed of a mapped file; `None` if there is none, or if it has nothing that would help.
    pub(super) fn of(&mut self, image: &Image, mapping: &Mapping) -> Option<Arc<Program>> {
        let Backing::File { module: Some(module), .. } = &mapping.backing else { return None };
        let identity = module.identity();
        if let Some(known) = self.known.get(&identity) {
            return known.clone();
        }
        let file = module.open(image.pid, mapping.start, mapping.end)?;
        let program = Program::read(file).map(Arc::new);
        let size = program.as_ref().map_or(0, |program| program.size());
        if self.known.len() >= MAX_FILES || self.tables + size > MAX_TABLES {
            self.known.clear();
            self.tables = 0;
        }
        self.tables += size;
        self.known.insert(identity, program.clone());
        program
    }
}

impl Program {
    fn read(file: File) -> Option<Self> {
        let cache = ReadCache::new(file);
        let file = object::File::parse(&cache).ok().filter(object::Object::is_64)?;
        let place = |name| {
            let section = file.section_by_name(name)?;
            let start = section.address();
            Some(start..start.checked_add(section.size())?)
        };
        let sections = ExplicitModuleSectionInfo {
            text_svma: place(".text"),
            got_svma: place(".got"),
            eh_frame_svma: place(".eh_frame"),
            eh_frame: table(&file, ".eh_frame"),
            eh_frame_hdr_svma: place(".eh_frame_hdr"),
            eh_frame_hdr: table(&file, ".eh_frame_hdr"),
            debug_frame: table(&file, ".debug_frame"),
            ..ExplicitModuleSectionInfo::default()
        };
        let address = |name: &[u8]| {
            let symbol = file.dynamic_symbols().find(|symbol| symbol.name_bytes() == Ok(name))?;
            Some(symbol.address())
        };
        let hotspot = hotspot::Symbols::find(address);
        Some(Self { loads: Load::all(&file), sections, hotspot })
    }

    /// What is added to an address in the file to have that in memory.
    pub(super) fn bias(&self, mapping: &Mapping) -> Option<u64> {
        let end = mapping.offset.checked_add(mapping.end - mapping.start)?;
        // A piece need not begin at the beginning of a page, but its mapping does.
        let is_mapped =
            |load: &&Load| load.offset < end && mapping.offset < load.offset.saturating_add(load.size);
        let load = self.loads.iter().find(is_mapped)?;
        let start = load.address.wrapping_add(mapping.offset).wrapping_sub(load.offset);
        mapping.start.checked_sub(start)
    }

    fn size(&self) -> usize {
        let ExplicitModuleSectionInfo { eh_frame, eh_frame_hdr, debug_frame, .. } = &self.sections;
        [eh_frame, eh_frame_hdr, debug_frame]
            .iter()
            .filter_map(|table| table.as_ref())
            .map(|table| table.len())
            .sum()
    }
}

/// The content of a section; not of one that is compressed or too large.
fn table<'a, R: ReadRef<'a>>(file: &object::File<'a, R>, name: &str) -> Option<Arc<[u8]>> {
    let section = file.section_by_name(name).filter(|section| section.size() <= MAX_TABLE)?;
    let range = section.compressed_file_range().ok()?;
    if range.format != object::CompressionFormat::None {
        return None;
    }
    section.data().ok().map(Arc::from)
}
