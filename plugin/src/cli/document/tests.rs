//! The schema of all documents, as docs/reference/json-schema.json has it.
//!
//! `RENEW=1 cargo test -p virtseal --lib document::` writes that file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::Command;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use super::{Refusal, VERSION, documents};
use crate::cli::commands;

/// Prints a record a line, which are not of this schema but of the audit log's.
const LINE_BY_LINE: &str = "audit show";

fn schema() -> Value {
    let mut generator = SchemaSettings::draft2020_12().for_serialize().into_generator();
    let mut definitions = BTreeMap::new();
    let mut commands: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    let refusal = "RefusalDocument";
    for (name, printed_by, schema) in documents(&mut generator) {
        let name = format!("{name}Document");
        for command in printed_by {
            commands.entry(command).or_default().push(reference(&name));
        }
        definitions.insert(name, schema.to_value());
    }
    definitions.insert(
        refusal.to_owned(),
        Refusal::json_schema(&mut generator).to_value(),
    );
    let all: Vec<_> = definitions.keys().map(|name| reference(name)).collect();
    commands.insert(LINE_BY_LINE, Vec::new());
    for printed in commands.values_mut() {
        printed.push(reference(refusal));
    }
    for (name, schema) in generator.take_definitions(true) {
        let before = definitions.insert(name.clone(), schema);
        assert!(before.is_none(), "two definitions are called {name}");
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": format!("What virtseal --json prints, version {VERSION}"),
        "description": "docs/reference/json.md says what of this can be relied on",
        "anyOf": all,
        "commands": commands.into_iter().map(|(command, printed)| (command.to_owned(), json!({ "anyOf": printed }))).collect::<serde_json::Map<_, _>>(),
        "$defs": definitions,
    })
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/$defs/{name}") })
}

fn reference_page(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../docs/reference")
        .join(name)
}

#[test]
fn the_schema_is_what_the_documentation_has() {
    let made = serde_json::to_string_pretty(&schema()).unwrap() + "\n";
    let file = reference_page("json-schema.json");
    if std::env::var_os("RENEW").is_some() {
        std::fs::write(&file, &made).unwrap();
    }
    let there = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        there == made,
        "{} is not of this version: RENEW=1 cargo test -p virtseal --lib document::",
        file.display()
    );
}

/// The paths of all commands without commands of their own; and of `jobs`, which is both.
fn leaves(command: &Command, path: &str, found: &mut BTreeSet<String>) {
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        let path = format!("{path} {}", sub.get_name()).trim_start().to_owned();
        if !sub.has_subcommands() || !sub.is_subcommand_required_set() {
            found.insert(path.clone());
        }
        leaves(sub, &path, found);
    }
}

#[test]
fn every_command_has_a_document() {
    let mut command = commands();
    command.build();
    let mut all = BTreeSet::new();
    leaves(&command, "", &mut all);
    let schema = schema();
    let named: BTreeSet<_> = schema["commands"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(named, all);
}

#[test]
fn what_is_told_in_words_has_a_code() {
    let schema = schema();
    let definitions = schema["$defs"].as_object().unwrap();
    let mut found = 0;
    for (name, definition) in definitions {
        for list in [
            "steps", "done", "notes", "lost", "survives", "warnings", "findings", "damaged",
        ] {
            let Some(items) = definition["properties"][list].get("items") else {
                continue;
            };
            let of = items["$ref"].as_str().unwrap_or_default();
            let code = &schema["$defs"][of.trim_start_matches("#/$defs/")]["properties"]["code"];
            assert!(code.is_object(), "{list} of {name} are words alone");
            found += 1;
        }
    }
    assert!(found > 15, "only {found} lists");
}

/// What the schema is there for: all of it can be told from the name.
#[test]
fn every_word_is_snake_case_and_every_time_is_utc() {
    let schema = schema();
    let mut open = vec![("", &schema["$defs"])];
    let (mut wrong, mut times) = (Vec::new(), 0);
    while let Some((name, value)) = open.pop() {
        match value {
            Value::Object(members) => {
                if members.get("format").is_some_and(|format| format == "date-time") {
                    times += 1;
                    wrong.extend((members.get("pattern") != Some(&json!("Z$"))).then(|| name.to_owned()));
                }
                let words = members.get("properties").and_then(Value::as_object);
                let words = words.into_iter().flat_map(serde_json::Map::keys);
                wrong.extend(words.filter(|word| !is_snake_case(word)).cloned());
                open.extend(members.iter().map(|(name, value)| (name.as_str(), value)));
            }
            Value::Array(items) => open.extend(items.iter().map(|item| (name, item))),
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(times > 6, "only {times} times");
}

fn is_snake_case(word: &str) -> bool {
    word.chars()
        .all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_')
}
