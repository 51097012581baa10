//! Checks that no top-level modules of a crate use each other in a circle. None of the modules in a circle
//! can be read, tested or changed alone, and the compiler does not report it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

/// The modules that each module uses.
type Uses = BTreeMap<String, BTreeSet<String>>;

/// Fails if top-level modules of the crate in the folder `package` use each other in a circle.
pub(crate) fn check(package: &Path) -> Result<()> {
    let source = package.join("src");
    let mut uses = Uses::new();
    for file in rust_files(&source)? {
        let module = module_of(&source, &file);
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        uses.entry(module).or_default().extend(modules_used(&text));
    }
    // A name that is not a module is an item of the crate root.
    let modules: BTreeSet<_> = uses.keys().cloned().collect();
    for (module, used) in &mut uses {
        used.retain(|name| name != module && modules.contains(name));
    }
    if let Some(cycle) = find_cycle(&uses) {
        bail!("{}: modules use each other in a circle: {}", source.display(), cycle.join(" -> "));
    }
    Ok(())
}

/// The Rust files below a folder.
pub(crate) fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(files)
}

/// The top-level module that a file belongs to: its first folder below `source`, or its own name.
fn module_of(source: &Path, file: &Path) -> String {
    let relative = file.strip_prefix(source).unwrap_or(file);
    let first = relative.iter().next().map_or(relative, Path::new);
    first.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// The first names of all paths that begin with `crate::`, outside comments.
fn modules_used(text: &str) -> BTreeSet<String> {
    let code: String =
        text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n");
    let mut used = BTreeSet::new();
    for (start, path) in code.match_indices("crate::") {
        let is_whole_word = !code[..start].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$');
        if is_whole_word {
            // A comma at the end of a list is followed by no name.
            used.extend(first_names(&code[start + path.len()..]).into_iter().filter(|name| !name.is_empty()));
        }
    }
    used
}

/// The names that may come first in a path: one, or those of a list in braces, without the lists in it.
fn first_names(path: &str) -> Vec<String> {
    let Some(list) = path.strip_prefix('{') else { return vec![name(path)] };
    let mut names = vec![name(list)];
    let mut depth = 1;
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 1 => break,
            '}' => depth -= 1,
            ',' if depth == 1 => names.push(name(&list[at + 1..])),
            _ => {}
        }
    }
    names
}

/// The name at the beginning of a text.
fn name(text: &str) -> String {
    text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// A way from a module back to itself.
fn find_cycle(uses: &Uses) -> Option<Vec<String>> {
    let mut free_of_cycles = BTreeSet::new();
    uses.keys().find_map(|module| cycle_from(module, uses, &mut Vec::new(), &mut free_of_cycles))
}

/// Follows the uses of `module`, which the modules of `path` lead to, until one leads back into `path`.
fn cycle_from<'a>(
    module: &'a str,
    uses: &'a Uses,
    path: &mut Vec<&'a str>,
    free_of_cycles: &mut BTreeSet<&'a str>,
) -> Option<Vec<String>> {
    if free_of_cycles.contains(module) {
        return None;
    }
    if let Some(start) = path.iter().position(|earlier| *earlier == module) {
        return Some(path[start..].iter().chain([&module]).map(ToString::to_string).collect());
    }
    path.push(module);
    let mut next = uses.get(module).into_iter().flatten();
    let cycle = next.find_map(|used| cycle_from(used, uses, path, free_of_cycles));
    path.pop();
    free_of_cycles.insert(module);
    cycle
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(uses: &[(&str, &[&str])]) -> Uses {
        let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        uses.iter().map(|(module, used)| ((*module).to_owned(), owned(used))).collect()
    }

    #[test]
    fn names_the_modules_of_a_cycle() {
        let tree = graph(&[("a", &["b", "c"]), ("b", &["d"]), ("c", &["d"]), ("d", &[])]);
        assert_eq!(find_cycle(&tree), None);
        let back = graph(&[("a", &["b"]), ("b", &["c", "d"]), ("c", &[]), ("d", &["e"]), ("e", &["b"])]);
        assert_eq!(find_cycle(&back).unwrap(), ["b", "d", "e", "b"]);
    }

    #[test]
    fn reads_every_form_of_a_path() {
        let text = "
            use crate::one::Item;
            use crate::{
                three::{Item, four::Item},
                two, five as other,
            };
            // crate::comment::Item
            fn run() { crate::six::run(); $crate::macros!(); scrate::other::run(); }
        ";
        let expected = ["five", "one", "six", "three", "two"].map(str::to_owned);
        assert_eq!(modules_used(text), BTreeSet::from(expected));
    }

    #[test]
    fn a_file_belongs_to_its_first_folder() {
        let module = |file: &str| module_of(Path::new("a/src"), &Path::new("a/src").join(file));
        assert_eq!(module("stacks/unwind/mod.rs"), "stacks");
        assert_eq!(module("tcp.rs"), "tcp");
    }
}
