//! Checks that no two types of the product have the same name, so that a search for a name finds one type.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::modules::rust_files;

/// Fails if two types in the sources of these packages have the same name.
pub(crate) fn check(packages: &[PathBuf]) -> Result<()> {
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in packages {
        for file in rust_files(&package.join("src"))? {
            let text =
                fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            for (number, line) in text.lines().enumerate() {
                if let Some(name) = defined_type(line) {
                    places.entry(name.to_owned()).or_default().push(place(&file, number));
                }
            }
        }
    }
    let ambiguous: Vec<_> = places
        .iter()
        .filter(|(_, places)| places.len() > 1)
        .map(|(name, places)| format!("several types are called {name}: {}", places.join(", ")))
        .collect();
    if !ambiguous.is_empty() {
        bail!("{}", ambiguous.join("\n"));
    }
    Ok(())
}

fn place(file: &Path, number: usize) -> String {
    format!("{}:{}", file.display(), number + 1)
}

/// The name of the type that a line begins to define. Associated types, which are indented, do not count:
/// their names are those of their trait.
fn defined_type(line: &str) -> Option<&str> {
    let item = line.trim_start();
    let is_indented = item.len() < line.len();
    let item = item.strip_prefix("pub").map_or(item, |rest| {
        let rest =
            rest.strip_prefix('(').and_then(|rest| rest.split_once(')')).map_or(rest, |(_, rest)| rest);
        rest.trim_start()
    });
    let (keyword, rest) = item.split_once(' ')?;
    let is_type = match keyword {
        "struct" | "enum" | "union" | "trait" => true,
        "type" => !is_indented,
        _ => false,
    };
    let end = rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len());
    Some(&rest[..end]).filter(|name| is_type && name.starts_with(|c: char| c.is_uppercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_names_of_types() {
        for (line, name) in [
            ("pub struct Life {", Some("Life")),
            ("    struct Waiting;", Some("Waiting")),
            ("pub(super) enum Step<'a> {", Some("Step")),
            ("pub(in crate::kernel) union Word {", Some("Word")),
            ("type Uses = BTreeMap<String, u32>;", Some("Uses")),
            ("    type Err = Error;", None),
            ("pub struct $name { $($field: u64),* }", None),
            ("/// A struct Life", None),
            ("publish(struct_of)", None),
            ("let trait_of = 1;", None),
        ] {
            assert_eq!(defined_type(line), name, "{line}");
        }
    }
}
