//! The costs of a tool's BPF programs and maps, from the kernel's statistics.

use std::{collections::BTreeMap, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    bed::{Bed, Churn, Ends, LoadExtent},
    tool::{Tracer, field},
};
use crate::command;

/// Statistics of a BPF program's runs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Program {
    pub(crate) name: String,
    pub(crate) runs: f64,
    pub(crate) nanoseconds: f64,
}

/// The programs that a tool holds, by their IDs, with their statistics so far.
fn of(tracer: &Tracer) -> Result<BTreeMap<u32, Program>> {
    let mut programs = BTreeMap::new();
    for text in tracer.held("bpf-prog")? {
        let value =
            |name| field(&text, name).with_context(|| format!("fdinfo shows no {name} on this kernel"));
        let id = value("prog_id")?.parse()?;
        let name = name(id).map_or_else(|| value("prog_tag").map(str::to_owned), Ok)?;
        let (runs, nanoseconds) = (value("run_cnt")?.parse()?, value("run_time_ns")?.parse()?);
        programs.insert(id, Program { name, runs, nanoseconds });
    }
    ensure!(!programs.is_empty(), "it holds no BPF program");
    Ok(programs)
}

/// The time that the programs of a tool have run so far.
pub(crate) fn nanoseconds(tracer: &Tracer) -> Result<f64> {
    Ok(of(tracer)?.values().map(|program| program.nanoseconds).sum())
}

/// The name of a program, which fdinfo does not show.
fn name(id: u32) -> Option<String> {
    let mut bpftool = Command::new(command::find("bpftool")?);
    let shown = command::output(bpftool.args(["--json", "prog", "show", "id", &id.to_string()]))?;
    Some(serde_json::from_str::<Value>(&shown).ok()?["name"].as_str()?.to_owned())
}

/// The cost of each program per connection between two snapshots.
fn spent(before: &BTreeMap<u32, Program>, after: &BTreeMap<u32, Program>, connections: u32) -> Vec<Program> {
    let connections = f64::from(connections);
    let of = |(id, program): (&u32, &Program)| {
        let (runs, nanoseconds) = before.get(id).map_or((0.0, 0.0), |old| (old.runs, old.nanoseconds));
        Program {
            name: program.name.clone(),
            runs: (program.runs - runs) / connections,
            nanoseconds: (program.nanoseconds - nanoseconds) / connections,
        }
    };
    after.iter().map(of).collect()
}

/// The cost of a tool under load.
pub(crate) struct Cost {
    /// The load without statistics of BPF programs, which cost time themselves.
    pub(crate) load: Churn,
    /// The load with them, which is half as long.
    counted: Churn,
    /// The cost of each of its programs per connection.
    pub(crate) programs: Vec<Program>,
    /// CPU time of its process, in µs per connection.
    pub(crate) cpu: f64,
    /// The part of it that was spent in the kernel.
    pub(crate) system: f64,
}

impl Cost {
    /// Runs the load on a tool twice, the second time with statistics of its programs, and waits until the tool
    /// has processed it.
    pub(crate) fn measure(tracer: &mut Tracer, bed: &Bed, extent: LoadExtent, ends: Ends) -> Result<Self> {
        tracer.settle().context("waiting until it is idle before the load")?;
        let (cpu, system, before) = (tracer.cpu()?, tracer.system_time()?, of(tracer)?);
        let load = bed.churn(extent, ends)?;
        tracer.settle().context("waiting until it is idle after the load")?;
        let (cpu, system) = (
            tracer.cpu_since(cpu, load.connections.into())?,
            tracer.system_time_since(system, load.connections.into())?,
        );
        Bed::set_statistics(true)?;
        let counted = bed.churn(extent.half(), ends)?;
        tracer.settle().context("waiting until it is idle after the load with statistics")?;
        Bed::set_statistics(false)?;
        Ok(Self { programs: spent(&before, &of(tracer)?, counted.connections), load, counted, cpu, system })
    }

    /// The number of connections of both loads.
    pub(crate) fn connections(&self) -> u32 {
        self.load.connections + self.counted.connections
    }

    /// The ports that accepted them.
    pub(crate) fn ports(&self) -> [u16; 2] {
        [self.load.port, self.counted.port]
    }

    /// Time in BPF programs, in µs per connection.
    pub(crate) fn bpf(&self) -> f64 {
        self.programs.iter().map(|program| program.nanoseconds).sum::<f64>() / 1e3
    }
}

/// The size of the maps that a tool holds, in MiB.
pub(crate) fn maps(tracer: &Tracer) -> Result<f64> {
    let mut maps = BTreeMap::new();
    for text in tracer.held("bpf-map")? {
        let value =
            |name| field(&text, name).with_context(|| format!("fdinfo shows no {name} on this kernel"));
        maps.insert(value("map_id")?.to_owned(), value("memlock")?.parse::<f64>()?);
    }
    Ok(maps.values().sum::<f64>() / 1_048_576.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_before_the_load_do_not_count() {
        let program = |runs, nanoseconds| {
            BTreeMap::from([(1, Program { name: "set_state".into(), runs, nanoseconds })])
        };
        let spent = spent(&program(10.0, 1000.0), &program(30.0, 5000.0), 4);
        assert_eq!(spent, [Program { name: "set_state".into(), runs: 5.0, nanoseconds: 1000.0 }]);
    }
}
