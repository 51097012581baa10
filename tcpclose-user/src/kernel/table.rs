//! The kernel half's table of live sockets (`table.rs` there), in its current state.

use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData},
};
use memmap2::{MmapOptions, MmapRaw};
use tcpclose_common::{
    record::ConnectionRecord,
    table::{Bucket, WAYS},
};

/// The table. Its buckets are mapped into memory, so that a walk takes no system calls.
pub struct ConnectionTable {
    buckets: MmapRaw,
    entries: Array<MapData, ConnectionRecord>,
    overflow: HashMap<MapData, u64, ConnectionRecord>,
    overflow_teardowns: HashMap<MapData, u64, u64>,
}

impl ConnectionTable {
    /// Takes the maps from the object.
    ///
    /// # Errors
    /// The object has no such maps, or the buckets cannot be mapped.
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self> {
        let mut take =
            |name: &str| ebpf.take_map(name).with_context(|| format!("the object has no map {name}"));
        let Map::Array(buckets) = take("BUCKETS")? else {
            anyhow::bail!("the map BUCKETS is no array");
        };
        let info = buckets.info().context("cannot tell the size of the map BUCKETS")?;
        let length = usize::try_from(info.max_entries())? * size_of::<Bucket>();
        let buckets = MmapOptions::new()
            .len(length)
            .map_raw_read_only(buckets.fd().as_fd().as_raw_fd())
            .context("cannot map the table of sockets into memory")?;
        Ok(Self {
            buckets,
            entries: take("ENTRIES")?.try_into()?,
            overflow: take("OVERFLOW")?.try_into()?,
            overflow_teardowns: take("TEARDOWNS")?.try_into()?,
        })
    }

    /// How many sockets found their bucket full and have an entry elsewhere.
    pub fn overflow(&self) -> u64 {
        self.overflow.keys().flatten().count() as u64
    }

    /// Whether there is an entry that satisfies `is_wanted`.
    pub fn any(&self, is_wanted: impl Fn(&ConnectionRecord) -> bool) -> bool {
        let of_table = self.ways().filter(|way| way.address != 0);
        let mut entries = of_table.filter_map(|way| self.entries.get(&way.entry, 0).ok());
        entries.any(|entry| is_wanted(&entry))
            || self.overflow.iter().flatten().any(|(_, entry)| is_wanted(&entry))
    }

    /// The address of each socket in a teardown state, and when it entered the first one: nanoseconds of
    /// `CLOCK_BOOTTIME`, or [`BEFORE_TRACE`](tcpclose_common::table::BEFORE_TRACE). A socket may appear
    /// twice: a walk through a hash map restarts if the key that it had reached was removed.
    pub fn teardowns(&self) -> impl Iterator<Item = (u64, u64)> {
        let of_table = self.ways().filter(|way| way.since != 0 && way.address != 0);
        of_table.map(|way| (way.address, way.since)).chain(self.overflow_teardowns.iter().flatten())
    }

    fn ways(&self) -> impl Iterator<Item = Way> {
        #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins at a page")]
        let buckets = self.buckets.as_ptr().cast::<Bucket>();
        let count = self.buckets.len() / size_of::<Bucket>();
        (0..count * WAYS as usize).map(move |entry| {
            let (index, way) = (entry / WAYS as usize, entry % WAYS as usize);
            // SAFETY: inside of the mapping, which lives as long as `self`, and aligned as a bucket is.
            // Programs write the words while they are read here.
            let (address, since) = unsafe {
                let bucket = buckets.add(index);
                let (address, since) = (&raw const (*bucket).addresses[way], &raw const (*bucket).since[way]);
                (address.read_volatile(), since.read_volatile())
            };
            Way { entry: u32::try_from(entry).unwrap_or(u32::MAX), address, since }
        })
    }
}

/// A socket's place in a bucket.
struct Way {
    /// Number of its entry.
    entry: u32,
    /// Address of the socket; 0 if there is none.
    address: u64,
    /// See [`Bucket::since`].
    since: u64,
}
