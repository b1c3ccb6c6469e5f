//! Settings of a provider as an admin reads and writes them: `KEY=VALUE`, one shape for all kinds.
//!
//! A kind names its keys in a table, and where each is in the JSON that the keystore has. What a value may be is decided by the types
//! that this JSON is read into, so there is one place that knows.

use std::error::Error;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

/// One setting of a kind.
#[derive(Debug)]
pub(crate) struct Key {
    pub name: &'static str,
    /// In the JSON.
    pub at: Place,
    pub form: Form,
    pub changes: Changes,
}

/// The names that lead to a setting.
type Place = &'static [&'static str];

impl Key {
    const fn new(name: &'static str, at: Place, form: Form, changes: Changes) -> Self {
        Self {
            name,
            at,
            form,
            changes,
        }
    }

    pub(super) const fn tried(name: &'static str, at: Place, form: Form) -> Self {
        Self::new(name, at, form, Changes::AfterTrial)
    }

    pub(super) const fn free(name: &'static str, at: Place, form: Form) -> Self {
        Self::new(name, at, form, Changes::Freely)
    }

    pub(super) const fn fixed(name: &'static str, at: Place, why: &'static str) -> Self {
        Self::new(name, at, Form::Text, Changes::Never(why))
    }
}

/// How a value is in the JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Text,
    Number,
    /// Texts with commas between them.
    List,
    /// It decides which others there are beside it: what was there goes when it changes.
    Choice,
    /// The same of a number.
    NumberChoice,
}

/// When a new value takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Changes {
    /// At once: it is about what is made from now on.
    Freely,
    /// Once this host has connected with it, and what is sealed has opened.
    AfterTrial,
    /// It stays, and why.
    Never(&'static str),
}

/// A setting and what it is now; `None` where it was not set and has no default.
#[derive(Debug)]
pub(crate) struct Setting {
    pub key: &'static Key,
    pub value: Option<String>,
}

/// What a kind says of its settings.
pub(crate) struct Settings {
    pub keys: &'static [Key],
    /// The JSON of settings with all its defaults, if it makes sense.
    pub check: fn(Value) -> Result<Value, Box<dyn Error + Send + Sync>>,
}

/// New settings.
#[derive(Debug, PartialEq)]
pub(crate) struct Changed {
    pub settings: Value,
    /// Whether they are to be tried first.
    pub is_tried: bool,
}

impl Settings {
    /// All of them, in the order of the table. Nothing of what makes no sense.
    pub(crate) fn read(&self, settings: &Value) -> Vec<Setting> {
        let settings = (self.check)(settings.clone()).unwrap_or_else(|_| settings.clone());
        let read = |key: &'static Key| Setting {
            key,
            value: text(key.at.iter().try_fold(&settings, |value, name| value.get(name))),
        };
        self.keys.iter().map(read).collect()
    }

    /// `settings` with the values of `assigned`; an empty one takes a setting back to its default.
    ///
    /// # Errors
    /// When there is no such setting, it can't be changed, or they make no sense together.
    pub(crate) fn change(
        &self,
        settings: &Value,
        assigned: &[(String, String)],
    ) -> Result<Changed, SettingError> {
        let mut changed = match settings {
            Value::Object(fields) => fields.clone(),
            _ => Map::new(),
        };
        let mut is_tried = false;
        let mut seen: Vec<&str> = Vec::new();
        for (name, value) in assigned {
            let name = name.replace('-', "_");
            let key = self.keys.iter().find(|key| key.name == name);
            let key = key.ok_or_else(|| self.unknown(&name))?;
            if seen.contains(&key.name) {
                return Err(SettingError::Twice(key.name));
            }
            seen.push(key.name);
            match key.changes {
                Changes::Never(why) => return Err(SettingError::Fixed { key: key.name, why }),
                Changes::AfterTrial => is_tried = true,
                Changes::Freely => {}
            }
            put(&mut changed, key, value)?;
        }
        // What decides about others must not take away what was assigned to them.
        for (name, value) in assigned {
            let name = name.replace('-', "_");
            if let Some(key) = self.keys.iter().find(|key| key.name == name) {
                put(&mut changed, key, value)?;
            }
        }
        let settings = (self.check)(Value::Object(changed)).map_err(SettingError::Refused)?;
        Ok(Changed { settings, is_tried })
    }

    fn unknown(&self, name: &str) -> SettingError {
        SettingError::Unknown {
            key: name.to_owned(),
            known: self.keys.iter().map(|key| key.name).collect(),
        }
    }
}

fn put(settings: &mut Map<String, Value>, key: &Key, value: &str) -> Result<(), SettingError> {
    let number = || {
        let number = value.parse::<u64>().map(Value::from);
        number.map_err(|_| SettingError::NoNumber {
            key: key.name,
            value: value.to_owned(),
        })
    };
    let new = match key.form {
        _ if value.is_empty() => None,
        Form::Text | Form::Choice => Some(Value::from(value)),
        Form::Number | Form::NumberChoice => Some(number()?),
        Form::List => Some(value.split(',').map(|part| Value::from(part.trim())).collect()),
    };
    let (last, way) = key.at.split_last().expect("a setting is somewhere");
    let mut at = settings;
    for name in way {
        let inner = at.entry(*name).or_insert_with(|| Value::Object(Map::new()));
        at = match inner {
            Value::Object(fields) => fields,
            _ => return Ok(()),
        };
    }
    let is_choice = matches!(key.form, Form::Choice | Form::NumberChoice);
    match new {
        Some(new) if is_choice && at.get(*last) != Some(&new) => {
            at.clear();
            at.insert((*last).to_owned(), new);
        }
        Some(new) => drop(at.insert((*last).to_owned(), new)),
        None => drop(at.remove(*last)),
    }
    Ok(())
}

fn text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let parts: Vec<_> = parts.iter().filter_map(|part| text(Some(part))).collect();
            Some(parts.join(","))
        }
        other => Some(other.to_string()),
    }
}

/// Why settings are not changed.
#[derive(Debug, Error)]
pub(crate) enum SettingError {
    #[error("there is no setting '{key}' of this kind of provider: {}", list(.known))]
    Unknown { key: String, known: Vec<&'static str> },
    #[error("'{key}' can't be changed: {why}")]
    Fixed { key: &'static str, why: &'static str },
    #[error("'{0}' is given twice")]
    Twice(&'static str),
    #[error("'{key}' is a number, and not {value:?}")]
    NoNumber { key: &'static str, value: String },
    #[error("the new settings make no sense")]
    Refused(#[source] Box<dyn Error + Send + Sync>),
}

fn list(known: &[&str]) -> String {
    match known {
        [] => "it has none".to_owned(),
        known => format!("it has {}", known.join(", ")),
    }
}

/// What an admin notes of a provider: up to 256 characters in one line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Description(String);

impl Description {
    pub(crate) const KEY: Key = Key::free("description", &["description"], Form::Text);
    const MAX: usize = 256;
}

/// The text is no [`Description`].
#[derive(Debug, Error)]
#[error("a description is one line of up to {} characters", Description::MAX)]
pub(crate) struct NoDescription;

impl TryFrom<String> for Description {
    type Error = NoDescription;

    fn try_from(text: String) -> Result<Self, NoDescription> {
        match text.chars().count() <= Self::MAX && !text.chars().any(char::is_control) {
            true => Ok(Self(text)),
            false => Err(NoDescription),
        }
    }
}

impl From<Description> for String {
    fn from(description: Description) -> Self {
        description.0
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::provider::kind::{KINDS, Kind};

    fn change(kind: &str, settings: &Value, assigned: &[(&str, &str)]) -> Result<Changed, SettingError> {
        let assigned: Vec<_> = assigned
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        Kind::named(kind).unwrap().settings.change(settings, &assigned)
    }

    fn value(kind: &str, settings: &Value, key: &str) -> Option<String> {
        let all = Kind::named(kind).unwrap().settings.read(settings);
        all.into_iter()
            .find(|setting| setting.key.name == key)
            .unwrap()
            .value
    }

    #[test]
    fn what_is_read_can_be_written_and_changes_nothing() {
        for (kind, settings) in [
            ("native", json!({"description": "of the lab"})),
            (
                "kmip",
                json!({"endpoints": ["a:1", "[::1]:2"], "kmip_version": "1.4", "cache": "4h"}),
            ),
            (
                "transit",
                json!({"address": "https://kms:8200", "auth": {"method": "approle", "role_id": "r"}, "ca": "/ca.pem"}),
            ),
            (
                "transit",
                json!({"address": "https://kms:8200", "auth": {"method": "token"}, "kek_scope": "provider", "key": "vms"}),
            ),
            (
                "pkcs11",
                json!({"module": "/m.so", "token": {"label": "kek"}, "serial": "07", "host": "h"}),
            ),
            (
                "pkcs11",
                json!({"module": "/m.so", "token": {"slot": 7}, "key_bits": 128}),
            ),
        ] {
            let row = Kind::named(kind).unwrap();
            let whole = (row.settings.check)(settings).unwrap();
            let read = row.settings.read(&whole);
            let assigned: Vec<_> = read
                .into_iter()
                .filter(|setting| !matches!(setting.key.changes, Changes::Never(_)))
                .filter_map(|setting| Some((setting.key.name.to_owned(), setting.value?)))
                .collect();
            assert!(!assigned.is_empty());
            assert_eq!(
                row.settings.change(&whole, &assigned).unwrap().settings,
                whole,
                "{kind}"
            );
        }
    }

    #[test]
    fn a_value_is_what_its_type_takes() {
        let kmip = json!({"endpoints": ["kms1"]});
        let new = change(
            "kmip",
            &kmip,
            &[("endpoints", "kms1, kms2:5697"), ("timeout-ms", "900")],
        )
        .unwrap();
        assert!(new.is_tried);
        assert_eq!(
            value("kmip", &new.settings, "endpoints").unwrap(),
            "kms1:5696,kms2:5697"
        );
        assert_eq!(value("kmip", &new.settings, "timeout_ms").unwrap(), "900");
        for (key, bad) in [
            ("endpoints", ""),
            ("endpoints", "https://kms1"),
            ("timeout_ms", "soon"),
            ("timeout_ms", "1"),
            ("mode", "cloud"),
            ("cache", "often"),
            ("description", "two\nlines"),
            ("kek_scopes", "vm"),
        ] {
            assert!(change("kmip", &kmip, &[(key, bad)]).is_err(), "{key}={bad}");
        }
        let twice = change("kmip", &kmip, &[("cache", "4h"), ("cache", "5h")]);
        assert!(matches!(twice, Err(SettingError::Twice("cache"))));
        let together = change("kmip", &kmip, &[("mode", "server"), ("cache", "none")]);
        assert_eq!(
            value("kmip", &together.unwrap().settings, "mode").unwrap(),
            "server"
        );
    }

    #[test]
    fn an_empty_value_is_the_default() {
        let kmip =
            json!({"endpoints": ["kms1"], "kmip_version": "1.2", "description": "old", "timeout_ms": 900});
        let new = change(
            "kmip",
            &kmip,
            &[("kmip_version", ""), ("description", ""), ("timeout_ms", "")],
        )
        .unwrap();
        assert_eq!(value("kmip", &new.settings, "kmip_version"), None);
        assert_eq!(value("kmip", &new.settings, "description"), None);
        assert_eq!(value("kmip", &new.settings, "timeout_ms").unwrap(), "4500");
    }

    #[test]
    fn another_way_to_log_in_leaves_nothing_of_the_first() {
        let vault = json!({"address": "https://kms:8200", "auth": {"method": "approle", "role_id": "r"}});
        let cert = change("transit", &vault, &[("cert_role", "hosts"), ("auth", "cert")])
            .unwrap()
            .settings;
        assert_eq!(
            cert["auth"],
            json!({"method": "cert", "role": "hosts", "mount": "cert"})
        );
        assert!(change("transit", &cert, &[("auth", "approle")]).is_err());
        assert!(change("transit", &vault, &[("auth", "token"), ("role_id", "r")]).is_err());
        let token = change(
            "pkcs11",
            &json!({"module": "/m.so", "token": {"label": "a"}}),
            &[("slot", "7")],
        );
        assert_eq!(token.unwrap().settings["token"], json!({"slot": 7}));
    }

    #[test]
    fn what_would_close_what_is_sealed_stays() {
        let shared = json!({"address": "https://kms:8200", "auth": {"method": "token"}, "kek_scope": "provider", "key": "vms"});
        assert!(matches!(
            change("transit", &shared, &[("key", "others")]),
            Err(SettingError::Fixed { key: "key", .. })
        ));
        assert!(change("transit", &shared, &[("kek_scope", "vm")]).is_err());
    }

    #[test]
    fn every_kind_can_be_described() {
        for kind in KINDS {
            let keys = kind.settings.keys;
            assert!(keys.iter().any(|key| key.name == "description"), "{}", kind.name);
        }
    }
}
