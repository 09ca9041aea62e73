//! `docs/configuration.md`, made from the JSON Schema.

use std::fmt::Write;

use serde_json::Value;

const INTRODUCTION: &str = "\
# Configuration

<!-- Made from the JSON Schema. Write it anew with: UPDATE_DOCS=1 cargo test --lib config::reference -->

One YAML file, given by `--config FILE`. `countersign validate --config FILE` reads it and says everything
that is wrong with it, each with file, line, column and a suggestion; `countersign schema` prints its JSON
Schema, which editors use for completion.
";

fn reference() -> String {
    let schema = super::schema();
    let mut page = format!("{INTRODUCTION}\n{}\n", text(&schema, "description"));
    page.push_str("\n## A whole example\n\n```yaml\n");
    page.push_str(include_str!("../../tests/corpora/config/whole.yaml"));
    page.push_str("```\n");
    section(&mut page, &schema, "", &schema);
    page
}

/// A table of a mapping's keys, then those of the mappings in it.
fn section(page: &mut String, root: &Value, path: &str, definition: &Value) {
    let title = if path.is_empty() { "The file" } else { path };
    let _ = write!(page, "\n## {title}\n\n");
    if !path.is_empty() {
        let _ = write!(page, "{}\n\n", text(definition, "description"));
    }
    page.push_str("| Key | Type | Default | Meaning |\n|---|---|---|---|\n");
    let empty = serde_json::Map::new();
    let properties = definition
        .get("properties")
        .and_then(Value::as_object)
        .unwrap_or(&empty);
    let required: Vec<&str> = definition
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let mut below = Vec::new();
    for (key, property) in properties {
        let (item, suffix) = match property.get("items") {
            Some(items) => (items, "[]"),
            None => (property, ""),
        };
        let target = resolve(root, item);
        let default = match property.get("default") {
            Some(Value::String(default)) => format!("`{default}`"),
            Some(default) => format!("`{default}`"),
            None if required.contains(&key.as_str()) => "required".to_owned(),
            None => String::new(),
        };
        let _ = writeln!(
            page,
            "| `{key}` | {} | {default} | {} |",
            type_name(root, property),
            text(property, "description")
                .replace('\n', " ")
                .replace('|', "\\|"),
        );
        if target
            .get("properties")
            .and_then(Value::as_object)
            .is_some_and(|keys| !keys.is_empty())
        {
            let dot = if path.is_empty() { "" } else { "." };
            below.push((format!("{path}{dot}{key}{suffix}"), target));
        }
    }
    for (path, definition) in below {
        section(page, root, &path, definition);
    }
}

fn text<'a>(schema: &'a Value, key: &str) -> &'a str {
    schema.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    schema
        .get("$ref")
        .and_then(Value::as_str)
        .and_then(|reference| root.pointer(reference.trim_start_matches('#')))
        .unwrap_or(schema)
}

fn type_name(root: &Value, schema: &Value) -> String {
    if let Some(items) = schema.get("items") {
        return format!("list of {}", type_name(root, items));
    }
    let schema = resolve(root, schema);
    let values: Vec<&str> = match (schema.get("enum"), schema.get("oneOf")) {
        (Some(Value::Array(values)), _) => values.iter().filter_map(Value::as_str).collect(),
        (_, Some(Value::Array(choices))) => choices
            .iter()
            .filter_map(|choice| choice.get("const").and_then(Value::as_str))
            .collect(),
        _ => Vec::new(),
    };
    if !values.is_empty() {
        let quoted: Vec<String> = values.iter().map(|value| format!("`{value}`")).collect();
        return quoted.join(", ");
    }
    if let Some(values) = schema
        .get("additionalProperties")
        .filter(|value| value.is_object())
    {
        return format!("mapping to {}", type_name(root, values));
    }
    let title = text(schema, "title");
    if !title.is_empty() {
        return title.to_owned();
    }
    match schema.get("type") {
        Some(Value::String(name)) => match name.as_str() {
            "string" => "text".to_owned(),
            "integer" => match (schema.get("minimum"), schema.get("maximum")) {
                (Some(least), Some(most)) if least == most => format!("`{least}`"),
                (Some(least), Some(most)) => format!("number, {least} to {most}"),
                (Some(least), None) => format!("number, {least} or more"),
                _ => "number".to_owned(),
            },
            "boolean" => "`true`, `false`".to_owned(),
            "object" => "mapping".to_owned(),
            other => other.to_owned(),
        },
        _ => "text, number, `true`, `false`".to_owned(),
    }
}

#[test]
fn the_page_is_what_the_schema_says() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let page = reference();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == page,
        "docs/configuration.md is stale: run UPDATE_DOCS=1 cargo test --lib config::reference"
    );
}

#[test]
fn every_key_has_a_meaning() {
    fn walk(schema: &Value, path: &str) {
        for (key, property) in schema
            .get("properties")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            assert!(!text(property, "description").is_empty(), "{path}.{key}");
        }
    }
    let schema = super::schema();
    walk(&schema, "");
    for (name, definition) in schema
        .get("$defs")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        walk(definition, name);
    }
}
