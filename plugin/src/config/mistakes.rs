//! What is wrong in a configuration file, in words and with its line: the parser has neither.

use std::collections::BTreeMap;

use super::policy::Policies;
use super::settings::Config;
use crate::model::nearest;

/// The number of the line, and what is wrong there.
pub(super) type Mistake = (usize, String);

/// Why the parser refuses this text, as far as that is found.
pub(super) fn explain(text: &str) -> Option<Mistake> {
    no_settings(text)
        .or_else(|| unknown_key(text))
        .or_else(|| unknown_policy(text))
        .or_else(|| bad_value(text))
}

/// The keys at the top level, each with the number of its line.
pub(super) fn keys(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().filter_map(|(index, line)| {
        let key = line.split_once(':')?.0.trim_end();
        let is_key = !key.is_empty()
            && key
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        is_key.then_some((index + 1, key))
    })
}

/// YAML of another shape, of which the parser would tell in words of Rust.
fn no_settings(text: &str) -> Option<Mistake> {
    let found: serde_yaml::Value = serde_yaml::from_str(text).ok()?;
    let what = "settings are lines such as 'hook_deadline: 10s'";
    (!found.is_mapping()).then(|| (1, what.to_owned()))
}

fn unknown_key(text: &str) -> Option<Mistake> {
    let (line, key) = keys(text).find(|(_, key)| !Config::KEYS.contains(key))?;
    Some((line, format!("unknown key '{key}'; {}", hint_for(key))))
}

fn unknown_policy(text: &str) -> Option<Mistake> {
    let settings: BTreeMap<String, serde_yaml::Value> = serde_yaml::from_str(text).ok()?;
    let key = Policies::unknown_key(settings.get("policy")?)?;
    let (section, _) = keys(text).find(|(_, key)| *key == "policy")?;
    let line = text
        .lines()
        .enumerate()
        .skip(section - 1)
        .find(|(_, line)| line.contains(&key));
    let hint = nearest(&key, Policies::KEYS)
        .unwrap_or_else(|| format!("policy has {} and {}", Policies::KEYS.join(", "), Policies::VMS));
    let line = line.map_or(section, |(index, _)| index + 1);
    Some((line, format!("unknown key '{key}'; {hint}")))
}

/// A key that is set twice.
pub(super) fn repeated_key(text: &str) -> Option<Mistake> {
    let mut seen = BTreeMap::new();
    keys(text).find_map(|(line, key)| {
        let first = seen.insert(key, line)?;
        Some((line, format!("'{key}' is set in line {first} already")))
    })
}

/// The first setting whose value is refused, while the text is YAML.
fn bad_value(text: &str) -> Option<Mistake> {
    let settings: BTreeMap<String, serde_yaml::Value> = serde_yaml::from_str(text).ok()?;
    let is_refused = |key: &str, value: &serde_yaml::Value| {
        let alone = BTreeMap::from([(key, value)]);
        serde_yaml::to_value(alone).is_ok_and(|alone| serde_yaml::from_value::<Config>(alone).is_err())
    };
    keys(text).find_map(|(line, key)| {
        let value = settings.get(key).filter(|value| is_refused(key, value))?;
        let (found, expected) = (shown(value), Config::expected(key));
        Some((line, format!("{key}: {found} is not {expected}")))
    })
}

/// In one line, and not a long one.
fn shown(value: &serde_yaml::Value) -> String {
    let text = serde_yaml::to_string(value).unwrap_or_default();
    let text = text.trim().replace('\n', " ");
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("'{}…'", &text[..end]),
        None => format!("'{}'", text.trim_matches(['\'', '"'])),
    }
}

fn hint_for(key: &str) -> String {
    if key == "require_sealed" {
        return "it is the hook's, which works with this daemon down: set it in /etc/virtseal/hook.conf"
            .into();
    }
    nearest(key, Config::KEYS).unwrap_or_else(|| format!("valid keys are {}", Config::KEYS.join(", ")))
}

fn nearest(key: &str, valid: &[&str]) -> Option<String> {
    let meant = nearest::nearest(key, valid.iter().copied(), 4)?;
    Some(format!("perhaps '{meant}' is meant"))
}
