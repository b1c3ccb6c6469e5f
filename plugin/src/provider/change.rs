//! A change of a provider's settings: tried, recorded, and only then in effect.
//!
//! ```text
//!   connect with the new settings ──► open what is sealed ──► record ──► work by them
//!        └───── a refusal of either leaves all as it was
//! ```

use std::error::Error;
use std::sync::Arc;

use thiserror::Error;

use super::{KeyProvider, ProviderError};
use crate::api::CredentialKind;
use crate::model::envelope::{KekId, Stanza};
use crate::secret::SecretBytes;
use crate::store::StoreError;

pub(crate) struct SettingsChange<'a> {
    /// The JSON of the new settings, checked.
    pub settings: &'a serde_json::Value,
    /// What to log in with from now on, where it is not what the provider was unlocked with.
    pub credential: Option<&'a SecretBytes>,
    /// One stanza of each KEK that the new settings must open; none if nothing is to be tried.
    pub trial: Option<&'a [Stanza]>,
    /// The providers of this host.
    pub others: &'a [Arc<dyn KeyProvider>],
    /// Has the keystore note the new settings.
    pub record: &'a dyn Fn() -> Result<(), StoreError>,
}

/// Why nothing was changed.
#[derive(Debug, Error)]
pub(crate) enum ChangeError {
    #[error(transparent)]
    Keystore(#[from] StoreError),
    #[error("the new settings make no sense")]
    Settings(#[source] Box<dyn Error + Send + Sync>),
    /// The trial can't be made with what it is unlocked with.
    #[error("needs another credential then")]
    NeedsCredential(CredentialKind),
    #[error("{0}")]
    Refused(ProviderError),
    #[error("{server} does not do: {why}")]
    Server { server: String, why: String },
    #[error("KEK {kek} does not open what is sealed under it")]
    StaysShut {
        kek: KekId,
        #[source]
        source: ProviderError,
    },
    /// What is kept on disk is bound to the policy that it was enrolled with.
    #[error("keeps KEKs across a reboot, which is set together with the policy of its cache")]
    Persists,
    #[error("the token is that of provider '{0}'")]
    TokenInUse(String),
}

impl From<ProviderError> for ChangeError {
    fn from(error: ProviderError) -> Self {
        Self::Refused(error)
    }
}

/// Has `open` open `stanzas` one by one: what is trouble of the whole is no verdict about a key.
pub(super) fn try_each(
    stanzas: &[Stanza],
    open: impl Fn(&[&Stanza]) -> Result<(), ProviderError>,
) -> Result<(), ChangeError> {
    let all: Vec<_> = stanzas.iter().collect();
    if all.is_empty() || open(&all).is_ok() {
        return Ok(());
    }
    for stanza in all {
        open(&[stanza]).map_err(|source| ChangeError::StaysShut {
            kek: stanza.kek.clone(),
            source,
        })?;
    }
    Ok(())
}
