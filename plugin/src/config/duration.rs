//! Times in settings: `10s`, `500ms`, `2m`, or a number of seconds.

use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

use crate::model::deadlines;

pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    match pause(deserializer)? {
        none if none.is_zero() => Err(de::Error::custom("a duration of 0")),
        some => Ok(some),
    }
}

/// A duration that may be 0.
pub(super) fn pause<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Raw {
        Seconds(f64),
        Text(String),
    }
    let parsed = match Raw::deserialize(deserializer)? {
        Raw::Seconds(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        Raw::Text(text) => parse_duration(&text),
    };
    match parsed {
        Some(value) if value <= deadlines::MAX_SETTING => Ok(value),
        // Its words are those of `expected`.
        _ => Err(de::Error::custom("no duration")),
    }
}

/// None for what is no time, or none that a setting may have.
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let number: f64 = text[..split].parse().ok()?;
    let unit = match text[split..].trim() {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    let duration = Duration::try_from_secs_f64(number * unit).ok()?;
    (duration <= deadlines::MAX_SETTING).then_some(duration)
}
