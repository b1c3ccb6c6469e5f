//! That what a command prints with `--json` is what docs/reference/json-schema.json says of it, in each story that asks.

use std::collections::HashMap;
use std::fs;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, ensure};
use jsonschema::Validator;
use serde_json::{Map, Value, json};

use crate::pages::repository;

/// Prints a record a line.
const LINE_BY_LINE: &str = "audit show";
/// What was asked for is no command.
const REFUSED: &str = "#/$defs/RefusalDocument";

/// Whether these arguments ask for a document.
pub(crate) fn is_promised(arguments: &[&str]) -> bool {
    let options = arguments.iter().take_while(|argument| **argument != "--");
    options.clone().any(|argument| *argument == "--json")
        && !options
            .clone()
            .any(|argument| ["--help", "--version"].contains(argument))
}

/// Checks what a command has printed.
///
/// # Errors
/// It is not one document, or not the one that the schema has for this command and its exit code.
pub(crate) fn check(arguments: &[&str], code: Option<i32>, printed: &str) -> Result<()> {
    let schema = schema()?;
    let command = command_of(schema, arguments);
    if code == Some(0) && command == LINE_BY_LINE {
        let mut lines = printed.lines().map(serde_json::from_str::<Map<_, _>>);
        return lines
            .try_for_each(|line| line.map(drop))
            .with_context(|| format!("no record a line: {printed}"));
    }
    // One that a signal has ended has nothing to say.
    let Some(code) = code else { return Ok(()) };
    let told = || {
        format!(
            "virtseal {} ended with {code} and printed {printed}",
            arguments.join(" ")
        )
    };
    let document: Value =
        serde_json::from_str(printed).with_context(|| format!("no document: {}", told()))?;
    let validator = validator(schema, &command)?;
    let mistakes: Vec<_> = validator
        .iter_errors(&document)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    ensure!(
        mistakes.is_empty(),
        "{}\nwhich is not what docs/reference/json-schema.json has: {}",
        told(),
        mistakes.join("; ")
    );
    let said = document["error"]["code"].as_i64().unwrap_or_default();
    ensure!(
        said == i64::from(code),
        "the error is not the exit code: {}",
        told()
    );
    Ok(())
}

fn schema() -> Result<&'static Value> {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    if let Some(schema) = SCHEMA.get() {
        return Ok(schema);
    }
    let file = repository().join("docs/reference/json-schema.json");
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let mut schema = serde_json::from_str(&text)?;
    close(&mut schema);
    Ok(SCHEMA.get_or_init(|| schema))
}

/// Lets no object have a member that the schema does not name: scripts must take those, and this version has none.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            members.values_mut().for_each(close);
            if members.contains_key("properties") {
                members.entry("additionalProperties").or_insert(json!(false));
            }
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

/// The words of the command, without its options and what it is about.
fn command_of(schema: &Value, arguments: &[&str]) -> String {
    let commands = schema["commands"].as_object();
    let is_begin = |words: &str| {
        let mut names = commands.into_iter().flat_map(Map::keys);
        names.any(|name| name == words || name.starts_with(&format!("{words} ")))
    };
    arguments.iter().fold(String::new(), |words, argument| {
        let longer = format!("{words} {argument}").trim_start().to_owned();
        if is_begin(&longer) { longer } else { words }
    })
}

/// Each is made once.
fn validator(schema: &Value, command: &str) -> Result<Arc<Validator>> {
    static MADE: OnceLock<Mutex<HashMap<String, Arc<Validator>>>> = OnceLock::new();
    let made = MADE.get_or_init(Mutex::default);
    let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(validator) = made.get(command) {
        return Ok(Arc::clone(validator));
    }
    let refused = json!([{ "$ref": REFUSED }]);
    let any_of = schema["commands"][command].get("anyOf").unwrap_or(&refused);
    let of_command = json!({ "$schema": schema["$schema"], "$defs": schema["$defs"], "anyOf": any_of });
    let validator = jsonschema::options()
        .should_validate_formats(true)
        .build(&of_command)
        .map_err(|error| anyhow::anyhow!("no JSON schema: {error}"))?;
    let validator = Arc::new(validator);
    made.insert(command.to_owned(), Arc::clone(&validator));
    Ok(validator)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCKED: &str = r#"{"schema":1,"error":{"code":3,"message":"locked","object":null,"next":null}}"#;

    #[test]
    fn what_the_schema_does_not_have_is_told() -> Result<()> {
        let lock = ["provider", "lock", "main", "--json"];
        assert!(
            is_promised(&lock) && !is_promised(&lock[..3]) && !is_promised(&["status", "--json", "--help"])
        );
        check(&lock, Some(3), LOCKED)?;
        check(&["provider", "lokc", "--json"], Some(3), LOCKED)?;
        for (code, printed) in [
            (0, LOCKED.to_owned()),
            (4, LOCKED.to_owned()),
            (3, String::new()),
            (3, format!("{LOCKED}{LOCKED}")),
            (3, LOCKED.replace("\"schema\":1,", "")),
            (3, LOCKED.replace("\"schema\":1", "\"schema\":2")),
            (3, LOCKED.replace("\"next\":null", "\"next\":null,\"more\":1")),
            (3, LOCKED.replace("null}}", "7}}")),
            (0, r#"{"schema":1,"providers":[]}"#.to_owned()),
        ] {
            assert!(check(&lock, Some(code), &printed).is_err(), "{code}: {printed}");
        }
        check(
            &["--timeout", "1s", "provider", "list", "--json"],
            Some(0),
            r#"{"schema":1,"providers":[]}"#,
        )
    }

    #[test]
    fn commands_are_found_among_options() -> Result<()> {
        let schema = schema()?;
        for (arguments, command) in [
            (&["--json", "jobs"][..], "jobs"),
            (&["jobs", "watch", "3"], "jobs watch"),
            (
                &["--timeout", "1s", "vm", "snapshot", "commit", "web01"],
                "vm snapshot commit",
            ),
            (&["vm", "status", "status"], "vm status"),
            (&["vm"], "vm"),
        ] {
            assert_eq!(command_of(schema, arguments), command, "{arguments:?}");
        }
        Ok(())
    }

    #[test]
    fn times_are_rfc_3339_in_utc() -> Result<()> {
        let job = |time: &str| {
            json!({"schema": 1, "job": {
                "id": 1, "kind": "rekey", "task": "", "vm": null, "path": null, "state": "done", "unit": "envelopes", "total": 0, "seen": 0,
                "changed": 0, "left": 0, "per_second": null, "seconds_left": null, "waiting": null, "reasons": [], "problem": null,
                "envelope": null, "started": time, "updated": time,
            }})
            .to_string()
        };
        let watch = ["jobs", "watch", "--json"];
        check(&watch, Some(0), &job("2026-11-22T15:19:43Z"))?;
        for wrong in [
            "2026-11-22T15:19:43+01:00",
            "1795360783",
            "Nov 22 15:19:43 2026 GMT",
            "Z",
        ] {
            assert!(check(&watch, Some(0), &job(wrong)).is_err(), "{wrong}");
        }
        Ok(())
    }
}
