//! Reads BTF, the kernel's own description of its types: where members lie, what enumerators are called, how
//! many arguments a tracepoint has. The format: <https://docs.kernel.org/bpf/btf.html>.
//!
//! No crate is suitable: `btf` 0.5.1 needs 110 to 230 ms for a kernel's BTF, aya-obj 0.3 does not expose
//! members, and `btf-rs` is LGPL. This reader takes 5 to 8 ms, and malformed input always yields an error.

use std::collections::{BTreeMap, HashMap};
use std::{fmt, fs};

use anyhow::{Context as _, Result, bail, ensure};
use foldhash::fast::RandomState;

/// Where the kernel exposes its own BTF.
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// The bytes of [`VMLINUX`].
///
/// # Errors
/// The file cannot be read, usually because the kernel was built without BTF.
pub fn running_kernel() -> Result<Vec<u8>> {
    fs::read(VMLINUX).with_context(|| {
        format!("cannot read {VMLINUX}, where a kernel built with CONFIG_DEBUG_INFO_BTF describes its types")
    })
}

/// Size of a pointer in bytes, which BTF does not contain. The kernels that tcpclose runs on are all 64-bit.
const POINTER_SIZE: u64 = 8;
/// The longest name in bytes; the kernel allows no more (`KSYM_NAME_LEN`). Without a limit, a string section
/// without a NUL would be searched to its end for every name.
const MAX_NAME: usize = 511;
/// How many typedefs, qualifiers or array dimensions may be wrapped around a type, and how many anonymous
/// structs around a member. The limit ends loops in broken BTF; the kernel's verifier has the same one
/// (`MAX_RESOLVE_DEPTH`).
const MAX_DEPTH: usize = 32;
/// How many members one lookup may visit; the largest kernel struct has a few hundred. Without this limit, a
/// lookup in a struct whose anonymous members are the struct itself would take practically forever, in spite
/// of the limited depth.
const MAX_MEMBERS: u32 = 10_000;
/// How many types of the same name a lookup considers.
const MAX_NAMESAKES: usize = 16;

/// Kind numbers, `BTF_KIND_*` of `include/uapi/linux/btf.h`.
mod kind {
    pub(super) const INT: u8 = 1;
    pub(super) const PTR: u8 = 2;
    pub(super) const ARRAY: u8 = 3;
    pub(super) const STRUCT: u8 = 4;
    pub(super) const UNION: u8 = 5;
    pub(super) const ENUM: u8 = 6;
    pub(super) const FWD: u8 = 7;
    pub(super) const TYPEDEF: u8 = 8;
    pub(super) const VOLATILE: u8 = 9;
    pub(super) const CONST: u8 = 10;
    pub(super) const RESTRICT: u8 = 11;
    pub(super) const FUNC: u8 = 12;
    pub(super) const FUNC_PROTO: u8 = 13;
    pub(super) const VAR: u8 = 14;
    pub(super) const DATASEC: u8 = 15;
    pub(super) const FLOAT: u8 = 16;
    pub(super) const DECL_TAG: u8 = 17;
    pub(super) const TYPE_TAG: u8 = 18;
    pub(super) const ENUM64: u8 = 19;
}

/// Parsed BTF: an index over its bytes.
#[derive(Debug)]
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// The offset in `types` of each type, that of type `id` at `id - 1`: type 0 is `void` and not stored.
    starts: Vec<u32>,
    /// Ids of structs, unions, enums and typedefs by name, in order; several types may have the same name.
    names: HashMap<&'a [u8], Vec<u32>, RandomState>,
}

/// Where a member lies; see [`Btf::member`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberLocation {
    /// Offset in bytes from the start of the outermost struct.
    pub offset: u64,
    /// Size of the member in bytes.
    pub size: u64,
}

/// Why a member has no [`MemberLocation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// This kernel has no struct or union of that name.
    NoType,
    /// The kernel has the type, but not the member.
    NoMember,
    /// The member is a bit field that does not begin and end at a byte.
    BitField,
    /// The member has another size than its reader expects; both in bytes.
    Size {
        /// What BTF says.
        found: u64,
        /// What the reader needs.
        expected: u64,
    },
    /// The offset, in bytes, does not fit into the 16 bits that the programs use.
    TooFar(u64),
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoType => f.write_str("no such type"),
            Self::NoMember => f.write_str("no such member"),
            Self::BitField => f.write_str("a bit field"),
            Self::Size { found, expected } => write!(f, "{found} bytes; expected {expected}"),
            Self::TooFar(bytes) => write!(f, "{bytes} bytes, which exceeds a 16-bit offset"),
        }
    }
}

/// One type record.
#[derive(Clone, Copy)]
struct TypeRecord<'a> {
    kind: u8,
    flag: bool,
    /// The number of elements in `tail`: members, enumerators, parameters.
    count: usize,
    /// A size in bytes or another type's id, depending on the kind.
    value: u32,
    /// The bytes after the common part.
    tail: &'a [u8],
}

/// A member of a struct or union. Its bit offset counts from the start of the type that was searched.
struct BtfMember<'a> {
    name: &'a [u8],
    type_id: u32,
    bit: u64,
    /// Width in bits for a bit field, otherwise 0.
    bits: u64,
}

/// A few names that are looked for among those of all types, most of which differ in their first eight bytes.
struct WantedNames<'l, 'n> {
    names: &'l [&'n str],
    /// The first eight bytes of the names, and masks for shorter ones.
    beginnings: Vec<(u64, u64)>,
}

impl<'l, 'n> WantedNames<'l, 'n> {
    fn new(names: &'l [&'n str]) -> Self {
        let beginning = |name: &&str| {
            let (mut bytes, mut mask) = ([0; 8], [0; 8]);
            for ((byte, mask), from) in bytes.iter_mut().zip(&mut mask).zip(name.bytes()) {
                (*byte, *mask) = (from, u8::MAX);
            }
            (u64::from_le_bytes(bytes), u64::from_le_bytes(mask))
        };
        let mut beginnings: Vec<_> = names.iter().map(beginning).collect();
        beginnings.sort_unstable();
        beginnings.dedup();
        Self { names, beginnings }
    }

    /// The one with which `strings` begin.
    fn find(&self, strings: &[u8]) -> Option<&'n str> {
        if let Some(first) = strings.first_chunk() {
            let word = u64::from_le_bytes(*first);
            if !self.beginnings.iter().any(|(bytes, mask)| word & mask == *bytes) {
                return None;
            }
        }
        let is_it =
            |name: &&str| strings.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0));
        self.names.iter().copied().find(is_it)
    }
}

impl<'a> Btf<'a> {
    /// Indexes raw BTF such as the bytes of [`VMLINUX`].
    ///
    /// # Errors
    /// The bytes are not valid BTF; the error says where.
    pub fn parse(bytes: &'a [u8]) -> Result<Self> {
        let magic = bytes.first_chunk().context("BTF is shorter than its magic number")?;
        match magic {
            [0x9f, 0xeb] => {}
            [0xeb, 0x9f] => bail!("BTF is big-endian; only little-endian BTF can be read"),
            [a, b] => bail!("BTF begins with {a:02x} {b:02x} instead of 9f eb"),
        }
        let version = bytes.get(2).context("BTF ends before its version")?;
        ensure!(*version == 1, "BTF has version {version}; only version 1 can be read");

        let field = |at| u32_at(bytes, at).with_context(|| format!("BTF header ends before byte {}", at + 4));
        let body = bytes.get(index(field(4)?)..).context("BTF header is longer than the BTF")?;
        let section = |what, offset, length| {
            let start = index(offset);
            start.checked_add(index(length)).and_then(|end| body.get(start..end)).with_context(|| {
                format!("BTF {what} section: {length} bytes at {offset} do not fit in {}", body.len())
            })
        };
        let types = section("type", field(8)?, field(12)?)?;
        let strings = section("string", field(16)?, field(20)?)?;
        // From Linux 7.1 on, BTF may describe how long the records of each kind are, for readers older than
        // the kind: https://git.kernel.org/torvalds/c/222edc843c15 "btf: Add BTF kind layout encoding to
        // UAPI".
        let layout = if field(4)? >= 32 { section("layout", field(24)?, field(28)?)? } else { &[] };

        let mut btf = Self { types, strings, starts: Vec::new(), names: HashMap::default() };
        // A type takes 28 bytes on average in kernels 5.10 to 7.2.
        btf.starts.reserve(types.len() / 28);
        let mut at = 0;
        while at < types.len() {
            let id = btf.starts.len() + 1;
            let (Some(name), Some(info)) = (u32_at(types, at), u32_at(types, at + 4)) else {
                bail!("BTF type {id} ends after {} bytes", types.len() - at);
            };
            let (kind, count) = kind_and_count(info);
            let (fixed, each) = tail_size(kind, layout)
                .with_context(|| format!("BTF type {id} is of unknown kind {kind}"))?;
            let end = count.checked_mul(each).and_then(|tail| tail.checked_add(at + 12 + fixed));
            let Some(end) = end.filter(|&end| end <= types.len()) else {
                bail!(
                    "BTF type {id}, kind {kind} with {count} elements, runs past the end of the type section"
                );
            };
            btf.starts.push(u32::try_from(at)?);
            if matches!(kind, kind::STRUCT | kind::UNION | kind::ENUM | kind::ENUM64 | kind::TYPEDEF)
                && name != 0
            {
                btf.names.entry(btf.string(name)).or_default().push(u32::try_from(id)?);
            }
            at = end;
        }
        Ok(btf)
    }

    /// Finds a member by its path, such as `sock.__sk_common.skc_family`: the name of a struct or union, then
    /// members. Anonymous structs and unions on the way are searched too, as in C.
    ///
    /// # Errors
    /// The type or the member does not exist, or the member is not made of whole bytes.
    pub fn member(&self, path: &str) -> Result<MemberLocation, Absent> {
        let (root, members) = path.split_once('.').unwrap_or((path, ""));
        let mut why = Absent::NoType;
        for ty in self.named(root) {
            if !ty.is_composite() {
                continue;
            }
            match self.member_of(ty, members) {
                // Unrelated types may have the same name; the one that has the member is meant.
                Err(absent) => why = absent,
                found => return found,
            }
        }
        Err(why)
    }

    /// The size in bytes of the first struct or union called `name` that has one.
    pub fn size_of(&self, name: &str) -> Option<u64> {
        self.named(name).find(|ty| ty.is_composite() && ty.value > 0).map(|ty| ty.value.into())
    }

    /// The enumerators of `enum name`, by value, with `prefix` removed from their names. Empty if there is no
    /// such enum.
    pub fn enum_values(&self, name: &str, prefix: &str) -> BTreeMap<i64, String> {
        let mut values = BTreeMap::new();
        for ty in self.named(name) {
            let width = match ty.kind {
                kind::ENUM => 8,
                kind::ENUM64 => 12,
                _ => continue,
            };
            for element in ty.tail.chunks_exact(width).take(ty.count) {
                let (Some(name), Some(low)) = (u32_at(element, 0), u32_at(element, 4)) else { continue };
                let value = match (u32_at(element, 8), ty.flag) {
                    (Some(high), _) => (u64::from(high) << 32 | u64::from(low)).cast_signed(),
                    (None, true) => low.cast_signed().into(),
                    (None, false) => low.into(),
                };
                let name = String::from_utf8_lossy(self.string(name));
                values.entry(value).or_insert_with(|| name.strip_prefix(prefix).unwrap_or(&name).to_owned());
            }
            if !values.is_empty() {
                break;
            }
        }
        values
    }

    /// The number of parameters of the function that a typedef points to.
    ///
    /// For each tracepoint the kernel has such a typedef, `btf_trace_<name>`. Its first parameter, a
    /// `void *`, is internal to tracing; raw tracepoint programs get the others.
    pub fn func_proto_params(&self, typedef: &str) -> Option<usize> {
        self.named(typedef).find_map(|ty| {
            let pointer =
                Some(ty).filter(|ty| ty.kind == kind::TYPEDEF).and_then(|ty| self.resolve(ty.value))?;
            let function =
                Some(pointer).filter(|ty| ty.kind == kind::PTR).and_then(|ty| self.resolve(ty.value))?;
            (function.kind == kind::FUNC_PROTO).then_some(function.count)
        })
    }

    /// The names of the parameters of each of these functions. A function that the kernel does not have is
    /// not in the result. Functions are half of all types and seldom looked up, so they are not indexed: this
    /// walks all types, which takes about a millisecond.
    pub fn func_params<'n>(&self, functions: &[&'n str]) -> HashMap<&'n str, Vec<&'a [u8]>> {
        let wanted = WantedNames::new(functions);
        let mut found = HashMap::new();
        for (nth, start) in self.starts.iter().enumerate() {
            let start = index(*start);
            let (Some(name), Some(info)) = (u32_at(self.types, start), u32_at(self.types, start + 4)) else {
                continue;
            };
            let (kind, _) = kind_and_count(info);
            if kind != kind::FUNC {
                continue;
            }
            let Some(function) = wanted.find(self.strings_from(name)) else { continue };
            let proto = u32::try_from(nth + 1).ok().and_then(|id| self.resolve(self.get(id)?.value));
            if let Some(proto) = proto.filter(|ty| ty.kind == kind::FUNC_PROTO) {
                let params = proto.tail.chunks_exact(8).take(proto.count);
                let names = params.map(|param| self.string(u32_at(param, 0).unwrap_or(0)));
                found.entry(function).or_insert_with(|| names.collect());
            }
            if found.len() == functions.len() {
                break;
            }
        }
        found
    }

    /// BTF in which only typedefs and functions of these names have their names, each under its id. Every
    /// other type is a nameless placeholder; it ends with the last one that has a name.
    ///
    /// Programs are attached by the id of a type. To find it, aya parses all of the kernel's BTF, which takes
    /// several times as long, and 15 MB, with its types.
    pub fn named_only(&self, names: &[&str]) -> Vec<u8> {
        const SIZE: usize = 12;
        let words = |words: [u32; 3]| words.map(u32::to_le_bytes).concat();
        let wanted = WantedNames::new(names);
        let mut strings = vec![0];
        let mut types = words([0, u32::from(kind::FWD) << 24, 0]).repeat(self.starts.len());
        let mut last = 0;
        for (nth, (record, start)) in types.chunks_exact_mut(SIZE).zip(&self.starts).enumerate() {
            let start = index(*start);
            if let (Some(name), Some(info)) = (u32_at(self.types, start), u32_at(self.types, start + 4))
                && let (kind @ (kind::TYPEDEF | kind::FUNC), _) = kind_and_count(info)
                && let Some(name) = wanted.find(self.strings_from(name))
                && let Ok(offset) = u32::try_from(strings.len())
            {
                record.copy_from_slice(&words([offset, u32::from(kind) << 24, 0]));
                strings.extend_from_slice(name.as_bytes());
                strings.push(0);
                last = nth + 1;
            }
        }
        types.truncate(last * SIZE);
        let length = |section: &[u8]| u32::try_from(section.len()).unwrap_or(0);
        // Magic number, version and flags; length of this; then where the sections are, and how long.
        let header = [0x0001_eb9f, 24, 0, length(&types), length(&types), length(&strings)];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
        bytes.reserve_exact(types.len() + strings.len());
        bytes.extend(types);
        bytes.extend(strings);
        bytes
    }

    fn named(&self, name: &str) -> impl Iterator<Item = TypeRecord<'a>> {
        self.names
            .get(name.as_bytes())
            .into_iter()
            .flatten()
            .take(MAX_NAMESAKES)
            .filter_map(|&id| self.get(id))
    }

    fn get(&self, id: u32) -> Option<TypeRecord<'a>> {
        let nth = index(id).checked_sub(1)?;
        let start = index(*self.starts.get(nth)?);
        let end = self.starts.get(nth + 1).map_or(self.types.len(), |&next| index(next));
        let record = self.types.get(start..end)?;
        let info = u32_at(record, 4)?;
        let (kind, count) = kind_and_count(info);
        Some(TypeRecord {
            kind,
            flag: info >> 31 == 1,
            count,
            value: u32_at(record, 8)?,
            tail: record.get(12..)?,
        })
    }

    /// The strings from `offset` on; empty if there are none.
    fn strings_from(&self, offset: u32) -> &'a [u8] {
        self.strings.get(index(offset)..).unwrap_or_default()
    }

    /// The string at `offset`; empty if there is none, or if it is longer than [`MAX_NAME`].
    fn string(&self, offset: u32) -> &'a [u8] {
        let rest = self.strings_from(offset);
        let end = rest.iter().take(MAX_NAME + 1).position(|&byte| byte == 0);
        end.map_or(&[], |end| &rest[..end])
    }

    /// Type `id`, without the typedefs and qualifiers around it.
    fn resolve(&self, mut id: u32) -> Option<TypeRecord<'a>> {
        for _ in 0..MAX_DEPTH {
            let ty = self.get(id)?;
            match ty.kind {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = ty.value;
                }
                _ => return Some(ty),
            }
        }
        None
    }

    fn size(&self, mut ty: TypeRecord<'a>) -> Option<u64> {
        let mut elements = 1u64;
        for _ in 0..MAX_DEPTH {
            match ty.kind {
                kind::ARRAY => {
                    elements = elements.checked_mul(u32_at(ty.tail, 8)?.into())?;
                    ty = self.resolve(u32_at(ty.tail, 0)?)?;
                }
                kind::PTR => return elements.checked_mul(POINTER_SIZE),
                kind::INT | kind::STRUCT | kind::UNION | kind::ENUM | kind::ENUM64 | kind::FLOAT => {
                    return elements.checked_mul(ty.value.into());
                }
                _ => return None,
            }
        }
        None
    }

    fn member_of(&self, mut ty: TypeRecord<'a>, path: &str) -> Result<MemberLocation, Absent> {
        let mut bit = 0;
        let mut width = 0;
        for name in path.split('.') {
            let mut budget = MAX_MEMBERS;
            // A bit field has no members, so `width` here is that of the last name.
            let member = self.find(ty, name.as_bytes(), MAX_DEPTH, &mut budget).ok_or(Absent::NoMember)?;
            bit += member.bit;
            width = member.bits;
            ty = self.resolve(member.type_id).ok_or(Absent::NoMember)?;
        }
        // Before Linux 5.0, BTF describes a bit field as an integer of few bits, and the struct has no
        // widths.
        if let (kind::INT, 0, Some(int)) = (ty.kind, width, u32_at(ty.tail, 0)) {
            let bits = u64::from(int & 0xff);
            if bits != u64::from(ty.value) * 8 {
                bit += u64::from(int >> 16 & 0xff);
                width = bits;
            }
        }
        if bit % 8 != 0 || width % 8 != 0 {
            return Err(Absent::BitField);
        }
        let size = if width > 0 { width / 8 } else { self.size(ty).ok_or(Absent::NoMember)? };
        Ok(MemberLocation { offset: bit / 8, size })
    }

    /// Finds a member of `ty` or of an anonymous struct or union inside it.
    fn find(&self, ty: TypeRecord<'a>, name: &[u8], depth: usize, budget: &mut u32) -> Option<BtfMember<'a>> {
        if !ty.is_composite() || name.is_empty() {
            return None;
        }
        let depth = depth.checked_sub(1)?;
        for element in ty.tail.chunks_exact(12).take(ty.count) {
            *budget = budget.checked_sub(1)?;
            let member = self.read_member(element, ty.flag)?;
            if member.name == name {
                return Some(member);
            }
            if member.name.is_empty()
                && let Some(inner) = self.resolve(member.type_id)
                && let Some(found) = self.find(inner, name, depth, budget)
            {
                return Some(BtfMember { bit: member.bit + found.bit, ..found });
            }
        }
        None
    }

    fn read_member(&self, element: &[u8], has_widths: bool) -> Option<BtfMember<'a>> {
        let name = self.string(u32_at(element, 0)?);
        let type_id = u32_at(element, 4)?;
        let at = u32_at(element, 8)?;
        let (bit, bits) = if has_widths { (at & 0x00ff_ffff, at >> 24) } else { (at, 0) };
        Some(BtfMember { name, type_id, bit: bit.into(), bits: bits.into() })
    }
}

impl TypeRecord<'_> {
    fn is_composite(&self) -> bool {
        matches!(self.kind, kind::STRUCT | kind::UNION)
    }
}

/// The kind of a type and the number of its elements. In Linux 7.2 both fields were extended into the unused
/// bits next to them, which are zero before: `BTF_INFO_KIND` and `BTF_INFO_VLEN` of
/// `include/uapi/linux/btf.h`.
fn kind_and_count(info: u32) -> (u8, usize) {
    ((info >> 24 & 0x7f) as u8, index(info & 0x00ff_ffff))
}

/// The number of bytes that follow the twelve common bytes of a type: once, and for each element. `None` if
/// the kind is unknown.
fn tail_size(kind: u8, layout: &[u8]) -> Option<(usize, usize)> {
    Some(match kind {
        kind::INT | kind::VAR | kind::DECL_TAG => (4, 0),
        kind::ARRAY => (12, 0),
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => (0, 12),
        kind::ENUM | kind::FUNC_PROTO => (0, 8),
        kind::PTR
        | kind::FWD
        | kind::TYPEDEF
        | kind::VOLATILE
        | kind::CONST
        | kind::RESTRICT
        | kind::FUNC
        | kind::FLOAT
        | kind::TYPE_TAG => (0, 0),
        _ => match layout.chunks_exact(4).nth(kind.into()) {
            Some(&[fixed, each, ..]) if kind != 0 => (fixed.into(), each.into()),
            _ => return None,
        },
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

/// tcpclose runs on 64-bit machines, where every `u32` is a valid index.
fn index(value: u32) -> usize {
    value as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{FIXTURES, TypeFacts};

    /// Builds BTF. Types get ids from 1 on, in the order in which they are added.
    #[derive(Default)]
    struct Builder {
        types: Vec<u8>,
        strings: Vec<u8>,
        layout: Vec<u8>,
    }

    impl Builder {
        fn ty(mut self, name: &str, kind: u8, flag: bool, count: u32, value: u32) -> Self {
            let info = u32::from(flag) << 31 | u32::from(kind) << 24 | count;
            let name = self.name(name);
            self.words(&[name, info, value])
        }

        fn int(self, size: u32, bits: u32) -> Self {
            self.ty("int", kind::INT, false, 0, size).words(&[bits])
        }

        fn element(mut self, name: &str, rest: &[u32]) -> Self {
            let name = self.name(name);
            self.words(&[name]).words(rest)
        }

        fn words(mut self, words: &[u32]) -> Self {
            self.types.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            self
        }

        fn name(&mut self, name: &str) -> u32 {
            if self.strings.is_empty() {
                self.strings.push(0);
            }
            if name.is_empty() {
                return 0;
            }
            let at = self.strings.len();
            self.strings.extend_from_slice(name.as_bytes());
            self.strings.push(0);
            u32::try_from(at).unwrap()
        }

        fn bytes(&self) -> Vec<u8> {
            let [types, strings, layout] = [&self.types, &self.strings, &self.layout]
                .map(|section| u32::try_from(section.len()).unwrap());
            let mut bytes = vec![0x9f, 0xeb, 1, 0];
            for word in [32, 0, types, types, strings, types + strings, layout] {
                bytes.extend(word.to_le_bytes());
            }
            [&bytes[..], &self.types, &self.strings, &self.layout].concat()
        }
    }

    fn place(bytes: &[u8], path: &str) -> Result<(u64, u64), Absent> {
        Btf::parse(bytes).unwrap().member(path).map(|place| (place.offset, place.size))
    }

    fn refusal(bytes: &[u8]) -> String {
        Btf::parse(bytes).unwrap_err().to_string()
    }

    /// Every lookup that tcpclose makes, on arbitrary bytes.
    fn ask_everything(bytes: &[u8]) {
        if TypeFacts::parse(bytes).is_ok() {
            let btf = Btf::parse(bytes).unwrap();
            for path in ["sock", "sock.", ".", "sock..sk_err", "sock.sk_kern_sock", "sk_rst_reason.x"] {
                let _ = btf.member(path);
            }
        }
    }

    #[test]
    fn descends_into_anonymous_members() {
        let (_, v7_2) = FIXTURES[5];
        // `bpftool btf dump`: sk_lock at bit 2560, in it two anonymous members, then `slock_owned` with
        // `owned` at 0.
        assert_eq!(place(v7_2, "sock.sk_lock.owned"), Ok((320, 4)));
        assert_eq!(place(v7_2, "sock.__sk_common.skc_num"), Ok((14, 2)));
        assert_eq!(place(v7_2, "sk_buff.dev"), Ok((16, 8)));
        assert_eq!(place(v7_2, "sock.skc_num"), Err(Absent::NoMember), "__sk_common is not anonymous");
        assert_eq!(place(v7_2, "sock.sk_err.x"), Err(Absent::NoMember));
        assert_eq!(place(v7_2, "sock"), Err(Absent::NoMember));
        assert_eq!(place(v7_2, "sock.sk_kern_sock"), Err(Absent::BitField));
        assert_eq!(place(v7_2, "socket_lock_t.owned"), Err(Absent::NoType), "a typedef is no struct");
        assert_eq!(place(v7_2, "no_such.member"), Err(Absent::NoType));
    }

    #[test]
    fn bit_fields_count_when_they_are_whole_bytes() {
        let bytes = Builder::default()
            .int(4, 32)
            .ty("flagged", kind::STRUCT, true, 3, 4)
            .element("three", &[1, 3 << 24])
            .element("eight", &[1, 8 << 24 | 8])
            .element("plain", &[1, 32])
            // Without the flag, the integer has the width.
            .int(4, 8)
            .int(4, 8 << 16 | 3)
            .ty("old", kind::STRUCT, false, 2, 4)
            .element("eight", &[3, 16])
            .element("three", &[4, 0])
            .bytes();
        assert_eq!(place(&bytes, "flagged.three"), Err(Absent::BitField));
        assert_eq!(place(&bytes, "flagged.eight"), Ok((1, 1)));
        assert_eq!(place(&bytes, "flagged.plain"), Ok((4, 4)));
        assert_eq!(place(&bytes, "old.eight"), Ok((2, 1)));
        assert_eq!(place(&bytes, "old.three"), Err(Absent::BitField));
    }

    #[test]
    fn knows_every_kind() {
        let bytes = Builder::default()
            .int(4, 32)
            .ty("", kind::ARRAY, false, 0, 0)
            .words(&[4, 1, 3])
            .ty("tag", kind::TYPE_TAG, false, 0, 1)
            .ty("", kind::ARRAY, false, 0, 0)
            .words(&[3, 1, 5])
            .ty("fwd", kind::FWD, false, 0, 0)
            .ty("double", kind::FLOAT, false, 0, 8)
            .ty("", kind::RESTRICT, false, 0, 6)
            .ty("function", kind::FUNC, false, 1, 0)
            .ty("variable", kind::VAR, false, 0, 1)
            .words(&[1])
            .ty(".data", kind::DATASEC, false, 1, 4)
            .words(&[9, 0, 4])
            .ty("tag", kind::DECL_TAG, false, 0, 12)
            .words(&[u32::MAX])
            .ty("s", kind::STRUCT, false, 2, 68)
            .element("array", &[2, 0])
            .element("float", &[7, 480])
            .ty("big", kind::ENUM64, true, 2, 8)
            .element("BIG_LOW", &[u32::MAX - 1, u32::MAX])
            .element("BIG_HIGH", &[0, 1])
            .ty("small", kind::ENUM, true, 1, 4)
            .element("SMALL_MINUS", &[u32::MAX])
            .ty("unsigned", kind::ENUM, false, 1, 4)
            .element("OTHER", &[u32::MAX])
            .bytes();
        assert_eq!(place(&bytes, "s.array"), Ok((0, 60)));
        assert_eq!(place(&bytes, "s.float"), Ok((60, 8)));
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.size_of("s"), Some(68));
        assert_eq!(btf.size_of("big"), None);
        let values = |name, prefix| Vec::from_iter(btf.enum_values(name, prefix));
        assert_eq!(values("big", "BIG_"), [(-2, "LOW".to_owned()), (1 << 32, "HIGH".to_owned())]);
        assert_eq!(values("small", "SMALL_"), [(-1, "MINUS".to_owned())]);
        assert_eq!(values("unsigned", "SMALL_"), [(u32::MAX.into(), "OTHER".to_owned())]);
        assert_eq!(values("s", ""), []);
    }

    #[test]
    fn unknown_kinds_are_skipped_if_btf_says_how_long_they_are() {
        let mut builder = Builder::default().ty("new", 20, false, 2, 0).words(&[0; 5]).int(4, 32).ty(
            "s",
            kind::STRUCT,
            false,
            0,
            8,
        );
        assert_eq!(refusal(&builder.bytes()), "BTF type 1 is of unknown kind 20");
        builder.layout = vec![0; 20 * 4];
        builder.layout.extend([4, 8, 0, 0]);
        assert_eq!(Btf::parse(&builder.bytes()).unwrap().size_of("s"), Some(8));
    }

    #[test]
    fn counts_parameters_of_tracepoints() {
        // `bpftool btf dump` of each: vlen of the FUNC_PROTO.
        for (kernel, bytes) in FIXTURES {
            let btf = Btf::parse(bytes).unwrap();
            let send_reset = if ["5.10-amd64", "6.1-amd64"].contains(&kernel) { 3 } else { 4 };
            assert_eq!(btf.func_proto_params("btf_trace_tcp_send_reset"), Some(send_reset), "{kernel}");
            assert_eq!(btf.func_proto_params("btf_trace_tcp_receive_reset"), Some(2), "{kernel}");
            assert_eq!(btf.func_proto_params("btf_trace_inet_sock_set_state"), Some(4), "{kernel}");
            assert_eq!(btf.func_proto_params("btf_trace_no_such_event"), None, "{kernel}");
            assert_eq!(btf.func_proto_params("atomic64_t"), None, "{kernel}");
        }
    }

    #[test]
    fn of_namesakes_the_one_with_the_member_counts() {
        let bytes = Builder::default()
            .int(4, 32)
            .ty("sock", kind::STRUCT, false, 0, 0)
            .ty("sock", kind::STRUCT, false, 1, 4)
            .element("sk_err", &[1, 0])
            .bytes();
        assert_eq!(place(&bytes, "sock.sk_err"), Ok((0, 4)));
        assert_eq!(Btf::parse(&bytes).unwrap().size_of("sock"), Some(4));
    }

    #[test]
    fn named_types_keep_their_ids() {
        // By kind and name, of types with one of these names.
        fn ids(btf: &Btf<'_>, names: &[&str]) -> BTreeMap<(u8, String), u32> {
            let all = (1..=u32::try_from(btf.starts.len()).unwrap()).filter_map(|id| {
                let start = index(btf.starts[index(id) - 1]);
                let name = String::from_utf8_lossy(btf.string(u32_at(btf.types, start)?)).into_owned();
                let kind = btf.get(id)?.kind;
                let is_named = [kind::TYPEDEF, kind::FUNC].contains(&kind) && names.contains(&name.as_str());
                is_named.then_some(((kind, name), id))
            });
            all.collect()
        }
        let names =
            ["btf_trace_tcp_send_reset", "inet_csk_accept", "bpf_iter_task_file", "pid_t", "no such type"];
        for (kernel, bytes) in crate::kernel::FIXTURES {
            let whole = Btf::parse(bytes).unwrap();
            let reduced = whole.named_only(&names);
            let reduced = Btf::parse(&reduced).unwrap();
            let expected = ids(&whole, &names);
            let last = expected.values().max().map(|id| index(*id));
            assert_eq!(Some(reduced.starts.len()), last, "{kernel}");
            assert!(expected.len() >= 2, "{kernel}: {expected:?}");
            assert_eq!(ids(&reduced, &names), expected, "{kernel}");
        }
    }

    #[test]
    fn reset_reasons_as_6_10_numbered_them() {
        // include/net/rstreason.h of 6.10, abridged: what is 11 here is 17 from 6.12 on.
        let bytes = Builder::default()
            .ty("sk_rst_reason", kind::ENUM, false, 3, 4)
            .element("SK_RST_REASON_NOT_SPECIFIED", &[0])
            .element("SK_RST_REASON_MPTCP_RST_EUNSPEC", &[11])
            .element("SK_RST_REASON_ERROR", &[18])
            .bytes();
        let reasons = TypeFacts::parse(&bytes).unwrap().reset_reasons;
        let expected = [(0, "NOT_SPECIFIED"), (11, "MPTCP_RST_EUNSPEC"), (18, "ERROR")];
        assert_eq!(reasons, expected.map(|(value, name)| (value, name.to_owned())).into());
    }

    #[test]
    fn refuses_what_is_not_btf() {
        let (_, good) = FIXTURES[0];
        assert_eq!(refusal(b""), "BTF is shorter than its magic number");
        assert_eq!(refusal(b"\x7fELF"), "BTF begins with 7f 45 instead of 9f eb");
        assert_eq!(refusal(b"\xeb\x9f\x01\x00"), "BTF is big-endian; only little-endian BTF can be read");
        assert_eq!(refusal(&good[..2]), "BTF ends before its version");
        assert_eq!(refusal(b"\x9f\xeb\x02\x00"), "BTF has version 2; only version 1 can be read");
        assert_eq!(refusal(&good[..6]), "BTF header ends before byte 8");
        assert_eq!(refusal(&good[..10]), "BTF header is longer than the BTF");
    }

    #[test]
    fn refuses_every_truncation() {
        for (kernel, bytes) in FIXTURES {
            for length in 0..bytes.len() {
                assert!(Btf::parse(&bytes[..length]).is_err(), "{kernel}: the first {length} bytes");
            }
        }
    }

    #[test]
    fn survives_every_shortened_section() {
        let (_, good) = FIXTURES[5];
        let types = u32_at(good, 12).unwrap();
        let strings = u32_at(good, 20).unwrap();
        for (at, length) in [(12, types), (20, strings)] {
            for length in 0..length {
                let mut bytes = good.to_vec();
                bytes[at..at + 4].copy_from_slice(&length.to_le_bytes());
                ask_everything(&bytes);
            }
        }
    }

    #[test]
    fn survives_random_bytes() {
        // xorshift64: the same bytes in every run.
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state >> 16).unwrap() % below
        };
        for round in 0..5_000 {
            let (_, good) = FIXTURES[round % FIXTURES.len()];
            let mut bytes = good.to_vec();
            for _ in 0..=random(8) {
                // Half of them are in the types, where they do the most harm.
                let at = if random(2) == 0 { random(bytes.len()) } else { 24 + random(1200) };
                bytes[at] = u8::try_from(random(256)).unwrap();
            }
            ask_everything(&bytes);
        }
    }

    #[test]
    fn survives_types_that_contain_themselves() {
        // 1: a typedef of itself. 2: an array of itself. 3: its anonymous members are itself.
        let mut builder = Builder::default()
            .ty("loop", kind::TYPEDEF, false, 0, 1)
            .ty("", kind::ARRAY, false, 0, 0)
            .words(&[2, 2, 7])
            .ty("sock", kind::STRUCT, false, 102, 8);
        for _ in 0..100 {
            builder = builder.element("", &[3, 0]);
        }
        let bytes = builder.element("typedef", &[1, 0]).element("array", &[2, 0]).bytes();
        assert_eq!(place(&bytes, "sock.sk_err"), Err(Absent::NoMember));
        assert_eq!(place(&bytes, "sock.array"), Err(Absent::NoMember));
        assert_eq!(Btf::parse(&bytes).unwrap().func_proto_params("loop"), None);
        ask_everything(&bytes);
    }

    #[test]
    fn survives_names_without_end() {
        let mut builder = Builder::default().ty("s", kind::STRUCT, false, 0, 8);
        builder.strings.pop();
        builder.strings.resize(100_000, b'x');
        let bytes = builder.bytes();
        assert_eq!(Btf::parse(&bytes).unwrap().size_of("s"), None);
    }
}
