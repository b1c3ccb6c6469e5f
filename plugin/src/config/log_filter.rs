//! The setting `log`: levels only, for `tracing` takes any other word for a module and then logs nothing else.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

/// What to log: a level, or levels by module, such as `info,virtseal=debug`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct LogFilter(String);

impl Default for LogFilter {
    fn default() -> Self {
        Self("info".to_owned())
    }
}

impl fmt::Display for LogFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text is not a [`LogFilter`].
#[derive(Debug, Error)]
#[error("{0:?} is not a log level")]
pub(crate) struct NotALogFilter(String);

impl FromStr for LogFilter {
    type Err = NotALogFilter;

    fn from_str(text: &str) -> Result<Self, NotALogFilter> {
        match text.split(',').map(str::trim).find(|part| !is_directive(part)) {
            None => Ok(Self(text.to_owned())),
            Some(part) => Err(NotALogFilter(part.to_owned())),
        }
    }
}

impl TryFrom<String> for LogFilter {
    type Error = NotALogFilter;

    fn try_from(text: String) -> Result<Self, NotALogFilter> {
        text.parse()
    }
}

fn is_directive(text: &str) -> bool {
    let is_module = |name: &str| {
        !name.is_empty()
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
    };
    match text.split_once('=') {
        None => LEVELS.contains(&text),
        Some((module, level)) => is_module(module) && LEVELS.contains(&level),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_levels_are_taken() {
        for good in [
            "error",
            "trace",
            "info,virtseal=debug",
            "warn, virtseal::provider=trace",
        ] {
            assert_eq!(good.parse::<LogFilter>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "loud",
            "INFO!",
            "virtseal",
            "info,",
            "info,virtseal=loud",
            "=info",
            "info,[span]=debug",
        ] {
            assert!(bad.parse::<LogFilter>().is_err(), "{bad:?}");
        }
    }
}
