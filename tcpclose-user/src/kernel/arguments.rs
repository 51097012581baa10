//! Where programs on kernel functions (fentry, fexit) find the arguments and the result, according to BTF.
//! Functions gain and lose parameters from one kernel version to the next.

use std::collections::BTreeSet;

use tcpclose_common::offsets::{ABSENT, ArgumentOffsets};

use super::btf::Btf;

/// A value in the context of such a program.
#[derive(Clone, Copy)]
enum What {
    /// The parameter of that name.
    Parameter(&'static str),
    /// What the function returns.
    Result,
}

/// A row of the table: the field of [`ArgumentOffsets`], the function, and the value that the field locates.
type ArgumentRow = (fn(&mut ArgumentOffsets) -> &mut u16, &'static str, What);

const ROWS: &[ArgumentRow] = &[
    (|offsets| &mut offsets.accept_result, "inet_csk_accept", What::Result),
    (|offsets| &mut offsets.reset_sk, "tcp_reset", What::Parameter("sk")),
    (|offsets| &mut offsets.reset_skb, "tcp_reset", What::Parameter("skb")),
    (|offsets| &mut offsets.connect_sk, "tcp_finish_connect", What::Parameter("sk")),
    (|offsets| &mut offsets.connect_skb, "tcp_finish_connect", What::Parameter("skb")),
    (|offsets| &mut offsets.child_sk, "tcp_child_process", What::Parameter("child")),
    (|offsets| &mut offsets.child_skb, "tcp_child_process", What::Parameter("skb")),
];

/// The context holds the arguments, eight bytes each, followed by the result (`btf_ctx_access()` of
/// `kernel/bpf/btf.c`). None of the functions here takes an argument of more than eight bytes.
const SLOT: usize = 8;

/// Looks up every field of [`ArgumentOffsets`]. What BTF does not describe is [`ABSENT`].
pub fn argument_offsets(btf: &Btf<'_>) -> ArgumentOffsets {
    let mut offsets = ArgumentOffsets::ABSENT;
    let functions: BTreeSet<_> = ROWS.iter().map(|(_, function, _)| *function).collect();
    let known = btf.func_params(&functions.into_iter().collect::<Vec<_>>());
    for (slot, function, what) in ROWS {
        let place = known.get(function).and_then(|params| match what {
            What::Parameter(name) => params.iter().position(|param| *param == name.as_bytes()),
            What::Result => Some(params.len()),
        });
        *slot(&mut offsets) = place.and_then(|place| u16::try_from(place * SLOT).ok()).unwrap_or(ABSENT);
    }
    offsets
}

/// The argument of `function` that its programs cannot find, as the end of a sentence; `None` if they find
/// all.
pub fn missing(mut offsets: ArgumentOffsets, function: &str) -> Option<String> {
    let of_function = ROWS.iter().filter(|(_, name, _)| *name == function);
    let absent: Vec<_> = of_function.clone().filter(|(slot, ..)| *slot(&mut offsets) == ABSENT).collect();
    match absent.first() {
        Some((_, _, What::Parameter(name))) if absent.len() < of_function.count() => {
            Some(format!("{function}() of this kernel has no parameter {name}"))
        }
        Some(_) => Some(format!("BTF does not describe {function}()")),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::kernel::btf;

    /// `tcp_reset(sk, skb)` as from 5.15 on, then `tcp_reset(sk)` as in 5.10, then no `tcp_reset()`.
    #[test]
    fn missing_arguments_are_named() {
        let mut offsets = ArgumentOffsets { reset_sk: 0, reset_skb: 8, ..ArgumentOffsets::ABSENT };
        assert_eq!(missing(offsets, "tcp_reset"), None);
        offsets.reset_skb = ABSENT;
        assert_eq!(missing(offsets, "tcp_reset").unwrap(), "tcp_reset() of this kernel has no parameter skb");
        offsets.reset_sk = ABSENT;
        assert_eq!(missing(offsets, "tcp_reset").unwrap(), "BTF does not describe tcp_reset()");
        assert_eq!(missing(offsets, "inet_csk_accept").unwrap(), "BTF does not describe inet_csk_accept()");
    }

    /// As `bpftool btf dump file /sys/kernel/btf/vmlinux` shows them on 6.12, 6.18 and 7.2.
    #[test]
    fn running_kernel() {
        if !fs::exists(btf::VMLINUX).unwrap() {
            eprintln!("skipped: this kernel has no {}", btf::VMLINUX);
            return;
        }
        let bytes = btf::running_kernel().unwrap();
        let offsets = argument_offsets(&Btf::parse(&bytes).unwrap());
        assert_eq!((offsets.reset_sk, offsets.connect_sk, offsets.connect_skb), (0, 0, 8));
        assert_eq!((offsets.child_sk, offsets.child_skb), (8, 16));
        // From 5.15 on, and from 6.10 on with two parameters.
        assert!([8, ABSENT].contains(&offsets.reset_skb), "{offsets:?}");
        assert!([16, 32].contains(&offsets.accept_result), "{offsets:?}");
    }
}
