//! Functions → names, files and lines.

use std::{
    collections::HashMap,
    ops::Range,
    time::{Duration, Instant},
};

use super::{
    code::{self, CompiledFrom},
    heap::{HeapObject, V8Heap, small},
    lines::{ScriptLines, position},
};

/// How many functions are remembered. When there are more, all are dropped and read again.
const MAX_FUNCTIONS: usize = 4_096;

/// How many scripts are remembered to look for functions in them. There may be more.
const MAX_SCRIPTS: usize = 256;

/// Functions of a script that are looked at.
const MAX_LISTED: u32 = 8_192;

/// How long to wait before looking for functions in all scripts again.
const LIST_EVERY: Duration = Duration::from_secs(1);

/// Variables of a function that are in the heap.
const MAX_VARIABLES: u64 = 4_096;

/// Variables whose names are in the description of the scope itself. If there are more, it refers to a table
/// of them.
const MAX_INLINE_VARIABLES: u64 = 75;

/// Bytes of a table of source positions.
const MAX_TABLE: u32 = 64 << 10;

/// Where the code of a function is, in each version: the first member.
const FUNCTION_DATA: u64 = 8;

/// A function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ScriptFunction {
    pub(super) symbol: String,
    pub(super) file: Option<String>,
    script: HeapObject,
    /// Its characters in the script.
    range: Option<Range<u32>>,
}

/// The functions of a process.
#[derive(Default)]
pub(super) struct Functions {
    /// The functions of code that is not optimized.
    by_code: HashMap<HeapObject, HeapObject>,
    scripts: Vec<HeapObject>,
    listed: Option<Instant>,
    lines: ScriptLines,
}

impl Functions {
    /// The function that has this `Code` object, which is not optimized. `closure` is the word for the function
    /// object (`JSFunction`) of a frame that runs it. If it does not lead there, it may be another function of a
    /// known script.
    pub(super) fn of_code(
        &mut self,
        heap: V8Heap<'_>,
        code: HeapObject,
        closure: Option<u64>,
    ) -> Option<HeapObject> {
        let has_it = |function: &HeapObject| heap.member(*function, FUNCTION_DATA) == Some(code);
        if let Some(function) = closure.and_then(|closure| of_closure(heap, closure)).filter(has_it) {
            self.learn(code, function);
            return Some(function);
        }
        if let Some(known) = self.by_code.get(&code).copied().filter(has_it) {
            return Some(known);
        }
        if self.listed.is_none_or(|listed| listed.elapsed() >= LIST_EVERY) {
            self.list(heap);
            self.listed = Some(Instant::now());
        }
        self.by_code.get(&code).copied().filter(has_it)
    }

    fn learn(&mut self, code: HeapObject, function: HeapObject) {
        if self.by_code.len() >= MAX_FUNCTIONS {
            self.by_code.clear();
        }
        self.by_code.insert(code, function);
    }

    /// Learns the functions of all known scripts: each script has a list of them.
    fn list(&mut self, heap: V8Heap<'_>) {
        let layout = heap.layout;
        self.scripts.retain(|script| heap.type_of(*script) == Some(layout.script_type));
        for script in self.scripts.clone() {
            let list = heap.member(script, layout.script_functions);
            let functions = list.and_then(|list| heap.weak_items(list, MAX_LISTED)).unwrap_or_default();
            for function in functions {
                if heap.type_of(function) == Some(layout.shared_type)
                    && heap.member(function, layout.shared_script) == Some(script)
                    && let Some(code) = heap.member_of_type(function, FUNCTION_DATA, layout.code_type)
                {
                    self.learn(code, function);
                }
            }
        }
    }

    /// Names a function. Nothing is remembered: another one may take its place, with members that have the same
    /// addresses.
    pub(super) fn describe(&mut self, heap: V8Heap<'_>, function: HeapObject) -> Option<ScriptFunction> {
        if heap.type_of(function) != Some(heap.layout.shared_type) {
            return None;
        }
        let described = ScriptFunction::read(heap, function, &mut self.lines)?;
        let script = described.script;
        if self.scripts.len() < MAX_SCRIPTS && !self.scripts.contains(&script) {
            self.scripts.push(script);
        }
        Some(described)
    }

    /// The line of the instruction at an offset in the bytecode of a function, by its table of positions.
    pub(super) fn line(
        &mut self,
        heap: V8Heap<'_>,
        function: &ScriptFunction,
        (bytecode, table): (HeapObject, &[u8]),
        offset: i32,
    ) -> Option<u32> {
        let size = small(heap.word(bytecode, heap.layout.array_length)?)?;
        let range = function.range.as_ref()?;
        // A table of another function, or something else in its place, leads elsewhere.
        let position = position(table, size, offset).filter(|it| (range.start..=range.end).contains(it))?;
        self.lines.line(heap, function.script, position)
    }
}

/// The function (`SharedFunctionInfo`) that has this bytecode, if the function object (`JSFunction`) leads there.
///
/// The garbage collector may have moved that object, and another one may be in its place. What counts is
/// therefore that the function to which it leads has the bytecode.
pub(super) fn of_bytecode(heap: V8Heap<'_>, bytecode: HeapObject, closure: u64) -> Option<HeapObject> {
    of_closure(heap, closure).filter(|function| bytecode_of(heap, *function) == Some(bytecode))
}

/// The function that the word for a function object leads to.
fn of_closure(heap: V8Heap<'_>, closure: u64) -> Option<HeapObject> {
    let closure = heap.moved(HeapObject::of(closure)?)?;
    heap.member_of_type(closure, heap.layout.function_shared, heap.layout.shared_type)
}

/// The bytecode of a function, whether or not it is compiled.
fn bytecode_of(heap: V8Heap<'_>, function: HeapObject) -> Option<HeapObject> {
    let data = heap.member(function, FUNCTION_DATA)?;
    if heap.type_of(data) != Some(heap.layout.code_type) {
        return code::bytecode(heap, data);
    }
    match code::source(heap, data) {
        CompiledFrom::Bytecode(bytecode) => Some(bytecode),
        CompiledFrom::Function(_) | CompiledFrom::Unknown => None,
    }
}

/// Whether a function is interpreted by this copy of the interpreter, which V8 makes with
/// `--interpreted-frames-native-stack`.
pub(super) fn is_interpreted_by(heap: V8Heap<'_>, function: HeapObject, copy: HeapObject) -> bool {
    let Some(data) = heap.member(function, FUNCTION_DATA) else { return false };
    let is_pair = heap.type_of(data) == Some(heap.layout.interpreter_data_type);
    is_pair && [8, 16].iter().any(|offset| heap.member(data, *offset) == Some(copy))
}

/// The table of source positions of bytecode; empty if there is none.
pub(super) fn positions(heap: V8Heap<'_>, bytecode: HeapObject) -> Vec<u8> {
    let table = heap.member(bytecode, heap.layout.positions);
    table.and_then(|table| heap.bytes(table, MAX_TABLE)).unwrap_or_default()
}

impl ScriptFunction {
    fn read(heap: V8Heap<'_>, function: HeapObject, lines: &mut ScriptLines) -> Option<Self> {
        let layout = heap.layout;
        let name = heap.member(function, layout.shared_name)?;
        let (name, range) = match heap.type_of(name)? {
            kind if kind == layout.scope_type => scope(heap, name)?,
            _ => (Some(heap.string(name)?), None),
        };
        let is_script = |it: &HeapObject| heap.type_of(*it) == Some(layout.script_type);
        // A function of V8 itself has none.
        let script = heap.member(function, layout.shared_script).filter(is_script)?;
        let file = heap.member(script, layout.script_name).and_then(|name| heap.string(name));
        let symbol = name.filter(|name| !name.is_empty()).unwrap_or_else(|| {
            let first = range.as_ref().and_then(|range| lines.line(heap, script, range.start));
            first.map_or_else(|| "<anonymous>".to_owned(), |line| format!("<anonymous:{line}>"))
        });
        Some(Self { symbol, file, script, range })
    }
}

/// The name of the function with this scope, and its range in the script.
///
/// A description of a scope (`ScopeInfo`) has flags, of which each version has others, and after some numbers
/// the names of its variables, a word for each, the function's own name and place, its name as V8 has
/// inferred it, and in older versions its range. What is not like this is a scope of another kind.
///
/// <https://github.com/v8/v8/blob/12.4.254/src/objects/scope-info.tq>
fn scope(heap: V8Heap<'_>, scope: HeapObject) -> Option<(Option<String>, Option<Range<u32>>)> {
    let layout = heap.layout;
    let word = |index: u64| heap.word(scope, 8 + 8 * index);
    let object = |index: u64| word(index).and_then(HeapObject::of);
    let range = |index: u64| {
        let number = |index| u32::try_from(small(word(index)?)?).ok();
        let range = number(index)?..number(index + 1)?;
        (range.start <= range.end).then_some(range)
    };
    let variables = u64::try_from(small(word(layout.scope_locals)?)?).ok()?;
    if variables > MAX_VARIABLES {
        return None;
    }
    let names = if variables < MAX_INLINE_VARIABLES { variables } else { 1 };
    let at = layout.scope_variables + names + variables;
    let own = match word(at)? {
        0 => Some(String::new()),
        name => HeapObject::of(name).filter(|it| heap.is_string(*it)).and_then(|it| heap.string(it)),
    };
    let is_number = word(at + 1).and_then(small).is_some();
    let inferred = object(at + 2).filter(|_| is_number).and_then(|name| {
        let is_none = heap.type_of(name) == Some(layout.oddball_type);
        if is_none { Some(String::new()) } else { heap.is_string(name).then(|| heap.string(name))? }
    });
    let is_function = own.is_some() && inferred.is_some();
    let range = if layout.has_positions_first {
        range(layout.scope_variables - 2)
    } else {
        range(if is_function { at + 3 } else { at })
    };
    let name = own.zip(inferred).map(|(own, inferred)| if own.is_empty() { inferred } else { own });
    Some((name, range))
}
