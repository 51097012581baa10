//! Names of programs, each kept once.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use crate::{
    diagnose::observation::{ProcessFields, Text},
    event::{self, Shared},
};

/// The number of programs that are distinguished. Further programs share the entry `(others)`.
const MOST: usize = 16_384;

/// The number of processes of events that are remembered. When there is no room, all are forgotten.
const SHARED: usize = 1_024;

/// The index of a program in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Who(u32);

impl Who {
    /// The entry of all programs for which there was no room.
    const OTHERS: Self = Self(0);
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Name {
    pub(crate) comm: String,
    pub(crate) exe: Option<String>,
    pub(crate) container: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Names {
    all: Vec<Name>,
    by_comm: HashMap<String, Vec<Who>, RandomState>,
    /// Processes that events share, by their addresses in memory. While they are kept here, no other process
    /// can have the same address.
    shared: HashMap<usize, (Shared<event::Process>, Who), RandomState>,
}

impl Default for Names {
    fn default() -> Self {
        let others = Name { comm: "(others)".to_owned(), ..Name::default() };
        Self { all: vec![others], by_comm: HashMap::default(), shared: HashMap::default() }
    }
}

impl Names {
    pub(crate) fn of(&mut self, process: &ProcessFields<'_>) -> Who {
        let text = |text: &Option<Text<'_>>| text.as_ref().map(|text| text.0.as_ref().to_owned());
        let comm = process.comm.0.as_ref();
        let same = |who: &&Who| {
            let name = self.get(**who);
            name.exe.as_deref() == process.exe.as_ref().map(|exe| exe.0.as_ref())
                && name.container.as_deref() == process.container.as_ref().map(|id| id.0.as_ref())
        };
        if let Some(who) = self.by_comm.get(comm).and_then(|ids| ids.iter().find(same)) {
            return *who;
        }
        let Some(id) = u32::try_from(self.all.len()).ok().filter(|_| self.all.len() < MOST) else {
            return Who::OTHERS;
        };
        let who = Who(id);
        self.all.push(Name {
            comm: comm.to_owned(),
            exe: text(&process.exe),
            container: text(&process.container),
        });
        self.by_comm.entry(comm.to_owned()).or_default().push(who);
        who
    }

    /// The program with this name, of which nothing else is known.
    pub(crate) fn of_comm(&mut self, comm: &str) -> Who {
        self.of(&ProcessFields { pid: 0, tid: None, comm: Text(comm.into()), exe: None, container: None })
    }

    /// The program of an event's process.
    pub(crate) fn of_shared(&mut self, process: &Shared<event::Process>) -> Who {
        if let Some((_, who)) = self.shared.get(&process.address()) {
            return *who;
        }
        let who = self.of(&ProcessFields::from(&**process));
        if self.shared.len() >= SHARED {
            self.shared.clear();
        }
        self.shared.insert(process.address(), (process.clone(), who));
        who
    }

    pub(crate) fn get(&self, who: Who) -> &Name {
        let index = usize::try_from(who.0).unwrap_or_default();
        self.all.get(index).unwrap_or(&self.all[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_program_has_one_place() {
        let mut names = Names::default();
        let process = |comm: &'static str, exe: Option<&'static str>| ProcessFields {
            pid: 1,
            tid: None,
            comm: Text(comm.into()),
            exe: exe.map(|exe| Text(exe.into())),
            container: None,
        };
        let nginx = names.of(&process("nginx", Some("/usr/sbin/nginx")));
        assert_eq!(nginx, names.of(&process("nginx", Some("/usr/sbin/nginx"))));
        assert_ne!(nginx, names.of(&process("nginx", None)));
        assert_eq!(names.get(nginx).exe.as_deref(), Some("/usr/sbin/nginx"));
        for number in 0..MOST {
            let comm = number.to_string();
            names.of(&ProcessFields { comm: Text(comm.into()), ..process("", None) });
        }
        assert_eq!(names.all.len(), MOST);
        let other = names.of(&process("one more", None));
        assert_eq!(names.get(other).comm, "(others)");
    }
}
