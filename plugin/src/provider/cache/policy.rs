//! How long KEKs are kept, and where there are none to keep.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// How long KEKs are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum CachePolicy {
    /// Not at all.
    None,
    /// For this long after each was last fetched.
    For(Duration),
    /// Until the provider is locked, or virtseald ends.
    UntilLock,
}

impl CachePolicy {
    const SHORTEST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(366 * 86_400);

    pub(super) fn keeps(self, age: Duration) -> bool {
        match self {
            Self::None => false,
            Self::For(time) => age < time,
            Self::UntilLock => true,
        }
    }
}

impl Default for CachePolicy {
    fn default() -> Self {
        Self::For(Duration::from_secs(24 * 3600))
    }
}

impl fmt::Display for CachePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = match self {
            Self::None => return f.write_str("none"),
            Self::UntilLock => return f.write_str("until-lock"),
            Self::For(time) => time.as_secs(),
        };
        match seconds {
            hours if hours % 3600 == 0 => write!(f, "{}h", hours / 3600),
            minutes if minutes % 60 == 0 => write!(f, "{}m", minutes / 60),
            seconds => write!(f, "{seconds}s"),
        }
    }
}

/// The text is no [`CachePolicy`].
#[derive(Debug, Error)]
#[error("{0:?} is no cache policy: none, until-lock, or a time from 1s to 366d such as 30m, 4h or 7d")]
pub struct NotACachePolicy(String);

impl FromStr for CachePolicy {
    type Err = NotACachePolicy;

    fn from_str(text: &str) -> Result<Self, NotACachePolicy> {
        let wrong = || NotACachePolicy(text.to_owned());
        match text {
            "none" => return Ok(Self::None),
            "until-lock" => return Ok(Self::UntilLock),
            _ => {}
        }
        let (number, unit) = text
            .char_indices()
            .last()
            .and_then(|(at, unit)| Some((text[..at].parse::<u64>().ok()?, unit)))
            .ok_or_else(wrong)?;
        let seconds = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return Err(wrong()),
        };
        let time = Duration::from_secs(number.saturating_mul(seconds));
        (Self::SHORTEST..=Self::LONGEST)
            .contains(&time)
            .then_some(Self::For(time))
            .ok_or_else(wrong)
    }
}

impl TryFrom<String> for CachePolicy {
    type Error = NotACachePolicy;

    fn try_from(text: String) -> Result<Self, NotACachePolicy> {
        text.parse()
    }
}

impl From<CachePolicy> for String {
    fn from(policy: CachePolicy) -> Self {
        policy.to_string()
    }
}

/// For how long KEKs are kept across a reboot: 24 hours, unless given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PersistTime(Duration);

impl PersistTime {
    /// In whole seconds, never 0.
    #[must_use]
    pub fn as_secs(self) -> u64 {
        self.0.as_secs()
    }

    /// What was recorded.
    #[must_use]
    pub fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl Default for PersistTime {
    fn default() -> Self {
        Self(Duration::from_secs(24 * 3600))
    }
}

impl fmt::Display for PersistTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        CachePolicy::For(self.0).fmt(f)
    }
}

/// The text is no [`PersistTime`].
#[derive(Debug, Error)]
#[error("{0:?} is no time to keep keys across a reboot: a time from 1s to 366d such as 30m, 12h or 3d")]
pub struct NotAPersistTime(String);

impl FromStr for PersistTime {
    type Err = NotAPersistTime;

    fn from_str(text: &str) -> Result<Self, NotAPersistTime> {
        match text.parse() {
            Ok(CachePolicy::For(time)) => Ok(Self(time)),
            _ => Err(NotAPersistTime(text.to_owned())),
        }
    }
}

/// Why there is nothing that a cache could keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NothingToCache {
    /// Derived from the root key, which is in memory while unlocked.
    #[error(
        "a native provider needs no server, so there is nothing to cache: it opens its VMs while it is unlocked"
    )]
    Native,
    /// Encrypts at the server.
    #[error("the keys of a transit provider never leave its server, so there is nothing to cache")]
    Transit,
    /// Encrypts in the token.
    #[error("the keys of a pkcs11 provider never leave its token, so there is nothing to cache")]
    Pkcs11,
    /// Encrypts at the server.
    #[error(
        "with mode server the keys of a kmip provider never leave its server, so there is nothing to cache: that takes \
         mode local"
    )]
    ModeServer,
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
        assert_eq!("3d".parse::<PersistTime>().unwrap().to_string(), "72h");
        assert_eq!(PersistTime::default().to_string(), "24h");
        for bad in ["none", "until-lock", "0s", "367d", ""] {
            assert!(bad.parse::<PersistTime>().is_err(), "{bad}");
        }
    }
}
