//! What a KMIP provider needs to know: the `settings` of its keystore row. No secret is among them.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::endpoint::Endpoint;
use super::version::KmipVersion;
use crate::model::cache_policy::CachePolicy;
use crate::model::deadlines::kmip::TIMEOUT_MS;
use crate::model::deadlines::provider::TIMEOUTS_MS;
use crate::model::envelope::ProviderId;
use crate::provider::ScopeSetting;
use crate::provider::cache::NothingToCache;
use crate::provider::setting::{Description, Form, Key, Settings};

pub(in crate::provider) const SETTINGS: Settings = Settings {
    keys: &[
        Key::tried("endpoints", &["endpoints"], Form::List),
        Key::tried("mode", &["mode"], Form::Text),
        Key::tried("kmip_version", &["kmip_version"], Form::Text),
        Key::tried("timeout_ms", &["timeout_ms"], Form::Number),
        Key::free("kek_scope", &["kek_scope"], Form::Text),
        Key::free("cache", &["cache"], Form::Text),
        Description::KEY,
    ],
    check: |json| {
        let settings = serde_json::from_value::<KmipSettings>(json)?.validated()?;
        Ok(serde_json::to_value(settings)?)
    },
};

/// Where a KEK does its work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    /// Fetched and used on this host.
    #[default]
    Local,
    /// At the server, which encrypts and decrypts; the KEK never leaves it.
    Server,
}

/// The settings of a KMIP provider, as the keystore has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KmipSettings {
    /// The servers of one cluster, in the order in which they are asked; never empty.
    pub endpoints: Vec<Endpoint>,
    /// Where KEKs do their work.
    #[serde(default)]
    pub mode: Mode,
    /// Whom one KEK serves.
    #[serde(default)]
    pub kek_scope: ScopeSetting,
    /// Instead of the best version that both sides speak.
    #[serde(default)]
    pub kmip_version: Option<KmipVersion>,
    /// The most time for one call, in milliseconds, with all its retries and failovers.
    #[serde(default = "default_timeout")]
    pub timeout_ms: u64,
    /// How long KEKs are kept for when no server answers; without a word, as [`CachePolicy::default`] in mode local.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CachePolicy>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<Description>,
    /// The provider's id on another host, to be the same one here: both open what the other sealed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ProviderId>,
}

fn default_timeout() -> u64 {
    TIMEOUT_MS
}

impl KmipSettings {
    const MAX_ENDPOINTS: usize = 16;

    pub(super) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// # Errors
    /// For no endpoint, too many, or a timeout that makes no sense.
    pub(super) fn validated(self) -> Result<Self, SettingsError> {
        if !(1..=Self::MAX_ENDPOINTS).contains(&self.endpoints.len()) {
            return Err(SettingsError::Endpoints);
        }
        if !TIMEOUTS_MS.contains(&self.timeout_ms) {
            return Err(SettingsError::Timeout);
        }
        self.check_cache(self.cache.unwrap_or(CachePolicy::None))?;
        Ok(self)
    }

    pub(super) fn check_cache(&self, policy: CachePolicy) -> Result<(), SettingsError> {
        match (self.mode, policy) {
            (Mode::Server, CachePolicy::For(_) | CachePolicy::UntilLock) => {
                Err(NothingToCache::ModeServer.into())
            }
            _ => Ok(()),
        }
    }

    pub(super) fn cache(&self) -> CachePolicy {
        match self.mode {
            Mode::Local => self.cache.unwrap_or_default(),
            Mode::Server => CachePolicy::None,
        }
    }
}

/// Why settings can't be used.
#[derive(Debug, Error)]
pub(crate) enum SettingsError {
    #[error("its settings can't be used")]
    Json(#[from] serde_json::Error),
    #[error("give 1 to {} endpoints, all of one cluster", KmipSettings::MAX_ENDPOINTS)]
    Endpoints,
    #[error("the timeout must be between 0.1 and 60 seconds")]
    Timeout,
    #[error(transparent)]
    Cache(#[from] NothingToCache),
}
