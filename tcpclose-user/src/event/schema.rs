//! The reference of the output: the JSON Schema of a line, generated from the types that are written.
//!
//! `docs/schema.json` is the checked-in copy, so that a change to the output contract shows up in review; the
//! black-box tests validate every line against it. `UPDATE_DOCS=1 cargo test --package tcpclose-user schema`
//! rewrites it.

use schemars::Schema;
use schemars::generate::SchemaSettings;

use crate::event::Event;

/// The JSON Schema of one line of `-o json`.
pub fn schema() -> Schema {
    // This is the contract of what is written, not of what can be read: only there, a field that may be null
    // is always present.
    SchemaSettings::draft2020_12().for_serialize().into_generator().into_root_schema_for::<Event>()
}

/// The same as text: indented, with a newline at its end, as `tcpclose schema` prints it.
pub fn pretty() -> String {
    format!("{:#}\n", schema().to_value())
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, env, fs, path::Path};

    use serde_json::Value;

    use crate::event::examples;
    use crate::event::schema::{pretty, schema};

    /// Every schema of the property `key` of `node`, and whether the property is always present.
    fn properties<'a>(root: &'a Value, node: &'a Value, key: &str) -> Vec<(&'a Value, bool)> {
        let mut found = Vec::new();
        if let Some(property) = node.get("properties").and_then(|all| all.get(key)) {
            let required = node["required"].as_array().is_some_and(|all| all.iter().any(|name| name == key));
            found.push((property, required));
        }
        if let Some(reference) = node.get("$ref").and_then(Value::as_str) {
            let target = root.pointer(reference.strip_prefix('#').expect("a local reference"));
            found.extend(properties(root, target.expect("a definition"), key));
        }
        for other in ["anyOf", "oneOf"].iter().filter_map(|name| node.get(*name)?.as_array()).flatten() {
            found.extend(properties(root, other, key));
        }
        found
    }

    /// The names of all properties of `node`, for each form that it may have.
    fn forms<'a>(root: &'a Value, node: &'a Value) -> Vec<BTreeSet<&'a str>> {
        let own = node.get("properties").and_then(Value::as_object).into_iter().flat_map(|all| all.keys());
        let own: BTreeSet<&str> = own.map(String::as_str).collect();
        let mut parts = Vec::new();
        if let Some(reference) = node.get("$ref").and_then(Value::as_str) {
            parts.extend(forms(root, root.pointer(&reference[1..]).expect("a definition")));
        }
        for other in ["anyOf", "oneOf"].iter().filter_map(|name| node.get(*name)?.as_array()).flatten() {
            parts.extend(forms(root, other));
        }
        if parts.is_empty() {
            return vec![own];
        }
        parts.into_iter().map(|part| part.union(&own).copied().collect()).collect()
    }

    fn items<'a>(root: &'a Value, node: &'a Value) -> &'a Value {
        if let Some(items) = node.get("items") {
            return items;
        }
        let reference = node["$ref"].as_str().expect("items or a reference");
        items(root, root.pointer(&reference[1..]).expect("a definition"))
    }

    fn check(root: &Value, node: &Value, value: &Value, path: &str) {
        match value {
            Value::Object(fields) => {
                let written: BTreeSet<&str> = fields.keys().map(String::as_str).collect();
                let described = forms(root, node);
                assert!(
                    described.contains(&written),
                    "{path}: {written:?} are written, and the schema describes {described:?}"
                );
                for (key, value) in fields {
                    let path = format!("{path}.{key}");
                    let found = properties(root, node, key);
                    let [(property, required)] = found[..] else {
                        panic!("{path} is described {} times", found.len());
                    };
                    assert!(required, "{path} is always written, and the schema does not say so");
                    check(root, property, value, &path);
                }
            }
            Value::Array(values) => {
                for value in values {
                    check(root, items(root, node), value, path);
                }
            }
            _ => {}
        }
    }

    #[test]
    fn a_line_has_the_fields_of_its_schema() {
        let schema = schema().to_value();
        for event in examples::all() {
            let value = serde_json::to_value(&event).expect("serializable");
            let variants = schema["oneOf"].as_array().expect("one schema an event");
            let variant = variants
                .iter()
                .find(|variant| variant["properties"]["event"]["const"] == value["event"])
                .expect("a schema for each event");
            check(&schema, variant, &value, value["event"].as_str().expect("a name"));
        }
    }

    /// What is not known is null, and is never left out.
    fn requires_all_properties(node: &Value) {
        if let Some(properties) = node["properties"].as_object() {
            let required: Vec<_> =
                node["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            for name in properties.keys() {
                assert!(required.contains(&name.as_str()), "{name} may be left out: {node:#}");
            }
        }
        match node {
            Value::Object(fields) => fields.values().for_each(requires_all_properties),
            Value::Array(items) => items.iter().for_each(requires_all_properties),
            _ => {}
        }
    }

    #[test]
    fn every_field_is_always_written() {
        requires_all_properties(&schema().to_value());
    }

    #[test]
    fn checked_in_copy_is_what_the_types_say() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/schema.json");
        let generated = pretty();
        if env::var_os("UPDATE_DOCS").is_some() {
            fs::write(&path, &generated).expect("docs/schema.json is writable");
            return;
        }
        let checked_in = fs::read_to_string(&path).unwrap_or_default();
        let differs = |(one, other): &(&str, &str)| one != other;
        let first = checked_in.lines().zip(generated.lines()).find(differs);
        assert!(
            checked_in == generated,
            "docs/schema.json is not the schema that the types generate. If the change to the output \
             contract is intended, rewrite the file and commit it: \
             UPDATE_DOCS=1 cargo test --package tcpclose-user schema\n\
             First difference (file, types): {first:?}"
        );
    }

    #[test]
    fn prints_itself_as_json() {
        let printed: Value = serde_json::from_str(&pretty()).expect("JSON");
        assert_eq!(printed, schema().to_value());
        assert_eq!(printed["title"], "Event");
        assert!(pretty().ends_with("}\n"));
    }
}
