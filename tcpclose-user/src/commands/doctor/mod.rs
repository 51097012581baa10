//! `tcpclose doctor`: reports what this kernel and these privileges allow, line by line, and what to do about
//! the rest. With the privilege to trace it attaches every hook for a moment; without, it reports what is
//! known without trying.

#[cfg(test)]
mod docs;
mod place;
mod text;

use std::{
    io::{self, ErrorKind, Write as _},
    process::ExitCode,
};

use anyhow::Result;
use caps::Capability;
use serde::Serialize;
use tcpclose_common::offsets::StructOffsets;

use crate::{
    cli::ReportFormat,
    kernel::facts::{FACTS, Sources},
    kernel::hooks::{HOOKS, Hook, HookNeed, Kind, Variant},
    kernel::privilege::{self, PRIVILEGES},
    kernel::{TypeFacts, arguments, btf::Btf, tracefs},
    kernel::{
        handle::KernelHalf,
        loader::{self, BtfSource, Request},
    },
};

/// The result of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Mark {
    /// Everything works.
    Ok,
    /// Something is lost, or requires an option.
    Less,
    /// Nothing can be traced.
    No,
    /// For information, or not tried.
    Note,
}

/// A line about the environment or about a capability.
#[derive(Debug, Serialize)]
struct Check {
    name: String,
    mark: Mark,
    found: String,
    lost: Option<String>,
    fix: Option<String>,
}

impl Check {
    fn new(name: impl Into<String>, mark: Mark, found: impl Into<String>) -> Self {
        Self { name: name.into(), mark, found: found.into(), lost: None, fix: None }
    }

    fn lost(mut self, lost: impl Into<String>) -> Self {
        self.lost = Some(lost.into());
        self
    }

    fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

/// The lines about a hook.
#[derive(Debug, Serialize)]
struct HookFinding {
    name: &'static str,
    mark: Mark,
    /// The variants, best first.
    variants: Vec<VariantFinding>,
    /// What is lost here, the fields that are null because of it, and what to do about it.
    lost: Option<&'static str>,
    null: &'static [&'static str],
    fix: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct VariantFinding {
    kind: &'static str,
    at: Vec<&'static str>,
    /// The option that it requires.
    option: Option<&'static str>,
    result: Tried,
    /// Why it does not work, its drawback, or what is known without trying.
    why: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Tried {
    /// It works.
    Attached,
    /// It does not work.
    Refused,
    /// A better variant works.
    NotNeeded,
    /// Trying it was not possible.
    Untried,
}

/// A field of the output that is null, in some events or in all.
#[derive(Debug, Serialize)]
struct Null {
    field: &'static str,
    why: String,
    fix: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Availability {
    Everything,
    Less,
    Nothing,
}

/// The whole report, serialized as `-o json` prints it.
#[derive(Debug, Serialize)]
struct DoctorReport {
    version: &'static str,
    verdict: Availability,
    /// Why nothing can be traced.
    cannot: Option<String>,
    place: Vec<Check>,
    capabilities: Vec<Check>,
    hooks: Vec<HookFinding>,
    null: Vec<Null>,
}

/// Prints the report. The exit status is 0 if tcpclose works in full, 1 if it works with restrictions, and 3
/// if it cannot trace; 2 is for usage errors.
///
/// # Errors
/// The report cannot be written.
pub fn doctor(format: ReportFormat, btf: &BtfSource) -> Result<ExitCode> {
    let report = DoctorReport::make(btf);
    let written = match format {
        ReportFormat::Text => text::write(&mut anstream::stdout().lock(), &report),
        ReportFormat::Json => {
            let line = serde_json::to_string(&report)?;
            writeln!(io::stdout().lock(), "{line}")
        }
    };
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(error.into()),
        _ => {}
    }
    Ok(ExitCode::from(match report.verdict {
        Availability::Everything => 0,
        Availability::Less => 1,
        Availability::Nothing => 3,
    }))
}

impl DoctorReport {
    fn make(btf: &BtfSource) -> Self {
        let facts = btf.facts().map_err(|error| format!("{error:#}"));
        // The hooks stay attached until the end of this function.
        let loaded = loader::load(&Request::rehearsal(btf.clone()));
        let hooks: Vec<_> = if let Ok(loaded) = &loaded {
            HOOKS.iter().map(|hook| rehearsed(hook, loaded)).collect()
        } else {
            let bytes = btf.bytes().unwrap_or_default();
            let types = Btf::parse(&bytes).ok();
            HOOKS.iter().map(|hook| untried(hook, types.as_ref())).collect()
        };
        let null = nulls(&hooks, &sources(facts.as_ref().ok(), loaded.as_ref().ok()));
        let place = place::findings(btf, facts.as_ref().map_err(Clone::clone));
        let capabilities: Vec<_> = PRIVILEGES.iter().map(capability).collect();
        let less = |mark: Mark| mark != Mark::Ok && mark != Mark::Note;
        let marks = place.iter().chain(&capabilities).map(|finding| finding.mark);
        let verdict = match loaded {
            Err(_) => Availability::Nothing,
            Ok(_) if !null.is_empty() || marks.chain(hooks.iter().map(|hook| hook.mark)).any(less) => {
                Availability::Less
            }
            Ok(_) => Availability::Everything,
        };
        let cannot = loaded.err().map(|error| format!("{error:#}"));
        Self { version: env!("CARGO_PKG_VERSION"), verdict, cannot, place, capabilities, hooks, null }
    }
}

fn capability(privilege: &privilege::Privilege) -> Check {
    let name = privilege.capability.to_string();
    if privilege::has(privilege.capability) {
        return Check::new(name, Mark::Ok, privilege.purpose);
    }
    let is_included =
        privilege.need == privilege::CapabilityNeed::Essential && privilege::has(Capability::CAP_SYS_ADMIN);
    if is_included {
        return Check::new(name, Mark::Ok, format!("{} (included in CAP_SYS_ADMIN)", privilege.purpose));
    }
    let mark = match privilege.need {
        privilege::CapabilityNeed::Essential => Mark::No,
        _ if privilege.lost.is_empty() => Mark::Note,
        privilege::CapabilityNeed::Useful | privilege::CapabilityNeed::Minor => Mark::Less,
    };
    let finding = Check::new(name, mark, format!("missing: {}", privilege.purpose));
    if privilege.lost.is_empty() { finding } else { finding.lost(privilege.lost).fix(privilege.grant()) }
}

/// The result of attaching a hook.
fn rehearsed(hook: &'static Hook, loaded: &KernelHalf) -> HookFinding {
    let outcome = loaded.hooks.iter().find(|outcome| std::ptr::eq(outcome.hook, hook));
    let used = outcome.and_then(|outcome| outcome.variant);
    let variants = hook.variants.iter().map(|variant| {
        let refused = outcome.and_then(|outcome| {
            outcome
                .refused
                .iter()
                .find(|(other, _)| std::ptr::eq(*other, variant))
                .map(|(_, why)| why.clone())
        });
        let (result, why) = match (used, refused) {
            (Some(used), _) if std::ptr::eq(used, variant) => {
                (Tried::Attached, Some(variant.worse.to_owned()).filter(|worse| !worse.is_empty()))
            }
            (_, Some(why)) => (Tried::Refused, Some(why)),
            _ => (Tried::NotNeeded, None),
        };
        finding(variant, result, why)
    });
    let mark = match used {
        None if hook.need == HookNeed::Essential => Mark::No,
        Some(variant) if variant.worse.is_empty() && by_default(hook, variant) => Mark::Ok,
        _ => Mark::Less,
    };
    let without = used.is_none_or(|variant| !by_default(hook, variant));
    HookFinding {
        name: hook.name,
        mark,
        variants: variants.collect(),
        lost: without.then_some(hook.lost),
        null: if without { hook.null } else { &[] },
        fix: without.then_some(hook.fix),
    }
}

/// Whether a variant is used without an option of its own. `-- COMMAND` needs no further option for its
/// hooks.
fn by_default(hook: &Hook, variant: &Variant) -> bool {
    hook.need != HookNeed::Extra || variant.when.option().is_none()
}

/// What is known about a hook without attaching it.
fn untried(hook: &'static Hook, types: Option<&Btf<'_>>) -> HookFinding {
    let variants =
        hook.variants.iter().map(|variant| finding(variant, Tried::Untried, Some(outlook(variant, types))));
    HookFinding {
        name: hook.name,
        mark: Mark::Note,
        variants: variants.collect(),
        lost: None,
        null: &[],
        fix: None,
    }
}

fn finding(variant: &Variant, result: Tried, why: Option<String>) -> VariantFinding {
    VariantFinding {
        kind: variant.kind.name(),
        at: variant.programs.iter().map(|(_, at)| *at).collect(),
        option: variant.when.option(),
        result,
        why,
    }
}

/// Whether BTF and tracefs describe what a variant needs.
fn outlook(variant: &Variant, types: Option<&Btf<'_>>) -> String {
    let points = || variant.programs.iter().map(|(_, at)| at.split_once(':').map_or(*at, |(_, point)| point));
    let of_types = |has: fn(&Btf<'_>, &str) -> bool| match types {
        None => "no BTF",
        Some(types) if points().all(|point| has(types, point)) => "BTF has it",
        Some(_) => "BTF does not have it",
    };
    let outlook = match variant.kind {
        Kind::RawTracepoint if types.is_none() => "known only by trying",
        Kind::TypedTracepoint | Kind::RawTracepoint => {
            of_types(|types, point| types.func_proto_params(&format!("btf_trace_{point}")).is_some())
        }
        Kind::FunctionEntry | Kind::FunctionReturn => of_types(|types, function| {
            arguments::missing(arguments::argument_offsets(types), function).is_none()
        }),
        Kind::Iterator => of_types(|types, target| types.size_of(&format!("bpf_iter__{target}")).is_some()),
        Kind::ClassicTracepoint(_) | Kind::SystemCall => match tracefs::find() {
            Ok(Some(tracefs)) => {
                let has = variant.programs.iter().all(|(_, at)| tracefs.has_event(&at.replace(':', "/")));
                if has { "tracefs has it" } else { "tracefs does not have it" }
            }
            Ok(None) => "tracefs is not mounted",
            Err(_) => "tracefs may not be read",
        },
        Kind::TestRun => "known only by trying",
        Kind::Procfs => "no program is needed",
    };
    outlook.to_owned()
}

fn sources(facts: Option<&TypeFacts>, loaded: Option<&KernelHalf>) -> Sources {
    Sources {
        members: facts.map_or(StructOffsets::ABSENT, |facts| facts.offsets),
        registers_helper: loaded.map(|loaded| loaded.has_registers),
        cookie_helper: loaded.map(|loaded| loaded.has_cookie),
        reset_reasons: match (loaded, facts) {
            (Some(loaded), _) => Some(!loaded.reset_reasons.0.is_empty()),
            (None, facts) => facts.map(|facts| !facts.reset_reasons.is_empty()),
        },
        other_processes: privilege::has(Capability::CAP_SYS_PTRACE) && privilege::in_initial_pid_namespace(),
        kernel_symbols: place::kernel_symbols_are_shown(),
    }
}

/// Every field that is null because a hook or another source is missing.
fn nulls(hooks: &[HookFinding], sources: &Sources) -> Vec<Null> {
    let of_hooks = hooks.iter().flat_map(|hook| {
        hook.null.iter().map(|field| Null {
            field,
            why: format!("without the hook `{}`: {}", hook.name, hook.lost.unwrap_or_default()),
            fix: hook.fix.unwrap_or_default().to_owned(),
        })
    });
    let of_facts = FACTS.iter().filter_map(|fact| {
        Some(Null {
            field: fact.field,
            why: fact.source.missing(sources)?,
            fix: fact.source.fix().to_owned(),
        })
    });
    of_hooks.chain(of_facts).collect()
}
