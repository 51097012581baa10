//! Checks the tables in docs/kernels.md against the code.
//! `UPDATE_DOCS=1 cargo test --package tcpclose-user doctor::docs` writes them.

use std::{env, fs, path::Path};

use crate::{kernel::facts::FACTS, kernel::hooks::HOOKS, kernel::privilege::PRIVILEGES};

/// A table of Markdown.
fn table(columns: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let row = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let head: Vec<_> = columns.iter().map(ToString::to_string).collect();
    let body: String = rows.map(|cells| row(&cells)).collect();
    format!("{}|{}\n{body}", row(&head), "---|".repeat(columns.len()))
}

fn code(words: &[&str]) -> String {
    let quoted: Vec<_> = words.iter().map(|word| format!("`{word}`")).collect();
    quoted.join(", ")
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

fn hooks() -> String {
    let rows = HOOKS.iter().map(|hook| {
        let variants = hook.variants.iter().map(|variant| match variant.when.option() {
            Some(option) => format!("{} (with `{option}`)", variant.kind.name()),
            None => variant.kind.name().to_owned(),
        });
        let variants = variants.collect::<Vec<_>>().join(", else ");
        vec![format!("`{}`", hook.name), variants, hook.lost.to_owned(), or_dash(&code(hook.null))]
    });
    table(&["hook", "variants", "lost without it", "null without it"], rows)
}

fn variants() -> String {
    let mut seen = Vec::new();
    let variants = HOOKS.iter().flat_map(|hook| hook.variants);
    let rows = variants.filter_map(|variant| {
        let row =
            vec![variant.kind.name().to_owned(), variant.kind.needs().to_owned(), or_dash(variant.worse)];
        (!seen.contains(&row)).then(|| {
            seen.push(row.clone());
            row
        })
    });
    table(&["variant", "needs", "drawback"], rows)
}

fn facts() -> String {
    let rows = FACTS.iter().map(|fact| vec![format!("`{}`", fact.field), fact.source.needs()]);
    table(&["field", "null without"], rows)
}

fn privileges() -> String {
    let rows = PRIVILEGES.iter().map(|privilege| {
        vec![privilege.capability.to_string(), privilege.purpose.to_owned(), or_dash(privilege.lost)]
    });
    table(&["capability", "for", "lost without it"], rows)
}

#[test]
fn tables_in_kernels_md_are_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kernels.md");
    let before = fs::read_to_string(&path).unwrap();
    let mut after = before.clone();
    let tables =
        [("hooks", hooks()), ("variants", variants()), ("facts", facts()), ("capabilities", privileges())];
    for (name, table) in tables {
        let (begin, end) = (format!("<!-- table: {name} -->\n"), "<!-- end -->");
        let (head, rest) = after.split_once(&begin).unwrap_or_else(|| panic!("there is no {begin}"));
        let (_, tail) = rest.split_once(end).unwrap_or_else(|| panic!("{name} has no {end}"));
        after = format!("{head}{begin}{table}{end}{tail}");
    }
    if env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &after).unwrap();
    } else {
        assert!(
            before == after,
            "docs/kernels.md differs from the code; UPDATE_DOCS=1 writes this:\n{after}"
        );
    }
}
