//! Names of the kernel's functions, from `/proc/kallsyms`.
//!
//! blazesym reads that file too, but it drops the names of modules, and takes the nearest symbol below an
//! address, however far away it is. As modules and BPF programs come and go, that yields wrong names.

use std::fs;
use std::time::{Duration, Instant};

/// The last known symbol of a module has no known end: an address must be in the same page.
const PAGE: u64 = 4096;

/// The shortest time between two reads. If an address is not found, the file is read again, because a module
/// may have been loaded. Reading takes 50 ms, and the file never contains code of just-in-time compilers.
const READ_AGAIN: Duration = Duration::from_mins(1);

/// The kernel's functions.
#[derive(Debug, Default)]
pub(super) struct Kallsyms {
    text: String,
    /// Sorted by address; symbols of equal addresses are in the order of the file.
    symbols: Vec<Symbol>,
    read: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Symbol {
    address: u64,
    code: bool,
    /// Position in `text`, and length.
    name: (u32, u16),
    /// Position in `text`, and length; 0 for the kernel itself.
    module: (u32, u16),
}

/// A function of the kernel.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Function<'a> {
    pub(super) name: &'a str,
    /// `None` for the kernel itself.
    pub(super) module: Option<&'a str>,
    pub(super) start: u64,
}

impl Kallsyms {
    /// Reads those of the running kernel. The result is empty without `CAP_SYSLOG`, or if `kptr_restrict` is
    /// 2.
    pub(super) fn read() -> Self {
        // Names are ASCII, except perhaps in an out-of-tree module.
        let text = fs::read("/proc/kallsyms").unwrap_or_default();
        let parsed = Self::parse(String::from_utf8(text).unwrap_or_default());
        Self { read: Some(Instant::now()), ..parsed }
    }

    fn parse(text: String) -> Self {
        let place = |part: &str| {
            let start = part.as_ptr() as usize - text.as_ptr() as usize;
            Some((u32::try_from(start).ok()?, u16::try_from(part.len()).ok()?))
        };
        let mut symbols: Vec<Symbol> = text
            .lines()
            .filter_map(|line| {
                // `ffffffff81000000 T name`; for modules a tab and `[module]` follow.
                let mut fields = line.split_ascii_whitespace();
                let address = u64::from_str_radix(fields.next()?, 16).ok().filter(|address| *address != 0)?;
                let code = matches!(fields.next()?, "t" | "T" | "w" | "W");
                let name = place(fields.next()?)?;
                let module = fields.next().and_then(|it| it.strip_prefix('[')?.strip_suffix(']'));
                Some(Symbol { address, code, name, module: module.and_then(place).unwrap_or_default() })
            })
            .collect();
        symbols.sort_by_key(|symbol| symbol.address);
        Self { text, symbols, read: None }
    }

    /// Reads the file again if one of these addresses is not found.
    pub(super) fn update(&mut self, frames: &[u64]) {
        let may = self.read.is_none_or(|read| read.elapsed() >= READ_AGAIN);
        if may && frames.iter().any(|address| self.find(*address).is_none()) {
            *self = Self::read();
        }
    }

    /// The function at an address.
    pub(super) fn find(&self, address: u64) -> Option<Function<'_>> {
        let behind = self.symbols.partition_point(|symbol| symbol.address <= address);
        let start = self.symbols.get(behind.checked_sub(1)?)?.address;
        let first = self.symbols.partition_point(|symbol| symbol.address < start);
        // Of several names of one function, the first is the one that the kernel prints.
        let symbol = self.symbols.get(first..behind)?.iter().find(|symbol| symbol.code)?;
        let module = self.slice(symbol.module);
        let next = self.symbols.get(behind);
        let is_inside = match next {
            Some(next) if self.slice(next.module) == module => true,
            _ => address / PAGE == start / PAGE,
        };
        is_inside.then(|| Function {
            name: self.slice(symbol.name),
            module: (!module.is_empty()).then_some(module),
            start,
        })
    }

    fn slice(&self, (start, length): (u32, u16)) -> &str {
        let start = start as usize;
        self.text.get(start..start + usize::from(length)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_functions_and_nothing_else() {
        let kernel = Kallsyms::parse(
            "ffffffff81000200 T tcp_close\nffffffff81000100 T __x64_sys_close\nffffffff81000100 t alias\n\
             ffffffff81009000 D jiffies\nffffffff81003000 T _etext\n\
             ffffffffc0000010 t nf_hook\t[nf_conntrack]\nffffffffc0000800 t nf_exit\t[nf_conntrack]\n\
             0000000000000000 A fixed\nffffffffc0008000 t bpf_prog_1\t[bpf]\n\nzz t x\n1 t\n"
                .into(),
        );
        let name =
            |address| kernel.find(address).map(|it| (it.name.to_owned(), it.module, address - it.start));
        assert_eq!(name(0xffff_ffff_8100_0000), None);
        assert_eq!(name(0xffff_ffff_8100_0104), Some(("__x64_sys_close".into(), None, 4)));
        assert_eq!(name(0xffff_ffff_8100_2fff), Some(("tcp_close".into(), None, 0x2dff)));
        assert_eq!(name(0xffff_ffff_8100_9001), None, "data");
        assert_eq!(name(0xffff_ffff_c000_0020), Some(("nf_hook".into(), Some("nf_conntrack"), 0x10)));
        assert_eq!(name(0xffff_ffff_c000_0fff), Some(("nf_exit".into(), Some("nf_conntrack"), 0x7ff)));
        assert_eq!(name(0xffff_ffff_c000_1000), None, "behind the module's last page");
        assert_eq!(name(0xffff_ffff_c000_8001), Some(("bpf_prog_1".into(), Some("bpf"), 1)));
        assert_eq!(name(u64::MAX), None);
    }

    #[test]
    fn makes_do_without() {
        let hidden = Kallsyms::parse("0000000000000000 T tcp_close\n".into());
        assert_eq!(hidden.find(0), None);
        assert_eq!(hidden.find(1), None);
        assert_eq!(Kallsyms::default().find(1), None);
    }
}
