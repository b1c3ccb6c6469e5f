//! How long KEKs are kept.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zlink::idl;
use zlink::introspect::Type;

use super::{deadlines, stored_as_text};

/// How long KEKs are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum CachePolicy {
    /// Not at all.
    None,
    /// For this long after each was last fetched.
    For(KeepTime),
    /// Until the provider is locked, or virtseald ends.
    UntilLock,
}

impl CachePolicy {
    pub(crate) fn keeps(self, age: Duration) -> bool {
        match self {
            Self::None => false,
            Self::For(time) => age < time.0,
            Self::UntilLock => true,
        }
    }
}

impl Default for CachePolicy {
    fn default() -> Self {
        Self::For(KeepTime::default())
    }
}

impl fmt::Display for CachePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::UntilLock => f.write_str("until-lock"),
            Self::For(time) => time.fmt(f),
        }
    }
}

/// The text is not a [`CachePolicy`].
#[derive(Debug, Error)]
#[error("{0:?} is not a cache policy: none, until-lock, or a time from 1s to 366d such as 30m, 4h or 7d")]
pub(crate) struct NotACachePolicy(String);

impl FromStr for CachePolicy {
    type Err = NotACachePolicy;

    fn from_str(text: &str) -> Result<Self, NotACachePolicy> {
        match text {
            "none" => Ok(Self::None),
            "until-lock" => Ok(Self::UntilLock),
            time => time
                .parse()
                .map(Self::For)
                .map_err(|NotAKeepTime(text)| NotACachePolicy(text)),
        }
    }
}

stored_as_text!(CachePolicy);

/// A time has no word of its own.
impl Type for CachePolicy {
    const TYPE: &'static idl::Type<'static> = &idl::Type::String;
}

/// For how long KEKs are kept, in memory or across a reboot: 24 hours, unless given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct KeepTime(Duration);

impl KeepTime {
    /// In whole seconds, never 0.
    pub(crate) fn as_secs(self) -> u64 {
        self.0.as_secs()
    }

    /// What was recorded.
    pub(crate) fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl Default for KeepTime {
    fn default() -> Self {
        Self(deadlines::provider::CACHE)
    }
}

impl fmt::Display for KeepTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.as_secs() {
            hours if hours % 3600 == 0 => write!(f, "{}h", hours / 3600),
            minutes if minutes % 60 == 0 => write!(f, "{}m", minutes / 60),
            seconds => write!(f, "{seconds}s"),
        }
    }
}

/// The text is not a [`KeepTime`].
#[derive(Debug, Error)]
#[error(
    "{0:?} is not how long keys may be kept across a reboot: give a time from 1s to 366d such as 30m, 12h or 3d"
)]
pub(crate) struct NotAKeepTime(String);

impl FromStr for KeepTime {
    type Err = NotAKeepTime;

    fn from_str(text: &str) -> Result<Self, NotAKeepTime> {
        let seconds = text.char_indices().last().and_then(|(at, unit)| {
            let unit = match unit {
                's' => 1,
                'm' => 60,
                'h' => 3600,
                'd' => 86_400,
                _ => return None,
            };
            Some(text[..at].parse::<u64>().ok()?.saturating_mul(unit))
        });
        let time = seconds.map(Duration::from_secs);
        time.filter(|time| deadlines::provider::CACHES.contains(time))
            .map(Self)
            .ok_or_else(|| NotAKeepTime(text.to_owned()))
    }
}

stored_as_text!(KeepTime);

impl Type for KeepTime {
    const TYPE: &'static idl::Type<'static> = &idl::Type::String;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_read_and_written() {
        for (text, shown) in [
            ("none", "none"),
            ("until-lock", "until-lock"),
            ("4h", "4h"),
            ("7d", "168h"),
            ("90m", "90m"),
            ("120m", "2h"),
            ("45s", "45s"),
        ] {
            let policy: CachePolicy = text.parse().unwrap();
            assert_eq!(policy.to_string(), shown);
            assert_eq!(shown.parse::<CachePolicy>().unwrap(), policy);
        }
        assert_eq!(CachePolicy::default().to_string(), "24h");
        for bad in [
            "",
            "4",
            "h",
            "0s",
            "-1h",
            "4 h",
            "367d",
            "99999999999999999999h",
            "18446744073709551615d",
            "1.5h",
            "4ö",
            "None",
        ] {
            assert!(bad.parse::<CachePolicy>().is_err(), "{bad}");
        }
    }

    #[test]
    fn time_on_disk_is_always_a_time() {
        assert_eq!("3d".parse::<KeepTime>().unwrap().to_string(), "72h");
        assert_eq!(KeepTime::default().to_string(), "24h");
        for bad in ["none", "until-lock", "0s", "367d", ""] {
            assert!(bad.parse::<KeepTime>().is_err(), "{bad}");
        }
    }
}
