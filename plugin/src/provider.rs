//! Key providers: what wraps and unwraps data keys.
//!
//! A provider holds KEKs and never gives one out. All calls block and are made on a worker thread with a
//! deadline; `status` answers from memory and never waits for a network.

mod advice;
pub(crate) mod cache;
mod change;
mod error;
pub(crate) mod kind;
pub(crate) mod kmip;
pub(crate) mod native;
pub(crate) mod pkcs11;
pub(crate) mod setting;
pub(crate) mod toolbox;
pub(crate) mod transit;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod dummy;

use std::any::Any;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::api::{CredentialKind, ProviderState, words};
use crate::model::envelope::{KekId, Payload, ProviderId, Stanza, VmId};
use crate::model::finding::Finding;
use crate::secret::SecretBytes;
use crate::store::ProviderTable;
use cache::KekCache;
use toolbox::locks::LocksNoted;

pub(crate) use crate::model::kek::KekScope;
pub(crate) use change::{ChangeError, SettingsChange};
pub(crate) use error::{ErrorClass, PinRefusal, ProviderError};

/// Wraps payloads under KEKs that stay inside.
pub(crate) trait KeyProvider: Any + Send + Sync {
    /// Its kind, as the keystore has it.
    fn kind(&self) -> &str;

    /// Who it is, on every host.
    fn id(&self) -> ProviderId;

    /// What the admin calls it.
    fn name(&self) -> &str;

    /// Whether it can wrap and unwrap now.
    fn status(&self) -> ProviderStatus;

    /// Asks its server or token how it is; returns when `status` has the answer, or when time is up. A kind whose keys are
    /// on this host has nobody to ask.
    fn probe(&self) {}

    /// When it wants to be probed again at the latest, whatever the pace of the others: a token is renewed in time, or may be taken out.
    fn probe_within(&self) -> Option<Duration> {
        None
    }

    /// Whether a call may wait for something outside of this process: then it gets a thread of its own and a deadline.
    fn may_hang(&self) -> bool {
        true
    }

    /// Why it does nothing now, as a call would say it; nobody is asked.
    fn refuses(&self) -> Option<ProviderError> {
        self.status().refusal()
    }

    /// When its server or token last did as asked; `None` if it has not since virtseald started, or if there is none.
    fn last_answer(&self) -> Option<SystemTime> {
        None
    }

    /// What is about to go wrong while everything works, such as a certificate that ends soon.
    fn warnings(&self) -> Vec<Finding> {
        Vec::new()
    }

    /// Makes the KEK for `scope`, or names the one there is.
    fn create_kek(&self, scope: &KekScope) -> Result<KekId, ProviderError>;

    /// The KEK that is to take the place of `old` for `scope`: a new one if `old` is the one in use, else the one in use.
    /// A kind whose KEKs are retired by another step, as a native root key is, names the one in use.
    fn rotate_kek(&self, scope: &KekScope, old: &KekId) -> Result<KekId, ProviderError>;

    /// Wraps `payload` under `kek`.
    fn wrap(&self, kek: &KekId, payload: &Payload) -> Result<Stanza, ProviderError>;

    /// Unwraps all of `stanzas` in one go, in their order; any failure fails the whole batch.
    fn unwrap_many(&self, stanzas: &[&Stanza]) -> Result<Vec<Payload>, ProviderError>;

    /// Destroys a KEK that serves `vm` alone, where there is something to destroy, and says what was observed. One that serves
    /// others too, who may be on other hosts, stays: what made it knows that, the envelopes of one host do not.
    fn destroy_kek(&self, kek: &KekId, vm: VmId) -> Result<DestroyReceipt, ProviderError>;

    /// Forgets every key in memory: refuses until unlocked.
    fn lock(&self);

    /// The same for the end of this process: what is on disk for the next one stays.
    fn end(&self) {
        self.lock();
    }

    /// The KEKs that it keeps for when its servers don't answer; none for a kind, or a mode, whose KEKs stay where they are.
    fn cache(&self) -> Option<&KekCache> {
        None
    }

    /// Works by other settings from now on. What is locked stays so, and what is unlocked too, where the credential still fits.
    ///
    /// # Errors
    /// Why nothing has changed.
    fn change(&self, change: &SettingsChange<'_>) -> Result<(), ChangeError>;

    /// What is known of its servers or its token, and of how both sides know each other: words, and what they say. Waits for nothing.
    fn details(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// What an unlock needs; `None` where there is nothing to give. Waits for nothing.
    fn asks_for(&self) -> Option<CredentialKind>;

    /// Becomes able to unwrap, with what it [asks for](Self::asks_for) in `credential`.
    fn unlock(&self, credential: &SecretBytes) -> Result<(), ProviderError> {
        self.unlock_since(self.locks(), credential)
    }

    /// The same unless it was locked since `locks` was noted.
    fn unlock_since(&self, locks: LocksNoted, credential: &SecretBytes) -> Result<(), ProviderError>;

    /// What tells whether it is locked later on.
    fn locks(&self) -> LocksNoted;
}

/// What a new provider is made of.
pub(crate) struct Addition<'a> {
    /// Where its row goes.
    pub table: &'a ProviderTable,
    pub name: &'a ProviderName,
    /// The JSON of what its kind needs to know.
    pub settings: &'a str,
    /// A passphrase or PIN, where its kind wants one.
    pub credential: Option<&'a SecretBytes>,
    /// Those that are on this host.
    pub others: Vec<Arc<dyn KeyProvider>>,
}

/// `provider` as what it is; `None` if it is of another kind.
pub(crate) fn of_kind<T: KeyProvider>(provider: Arc<dyn KeyProvider>) -> Option<Arc<T>> {
    let any: Arc<dyn Any + Send + Sync> = provider;
    any.downcast().ok()
}

/// What an admin calls a provider: 1 to 64 letters, digits, `.`, `_` and `-`, the first a letter or a digit, and
/// not a UUID, so that a name is never taken for an id.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ProviderName(String);

impl ProviderName {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ProviderName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text is not a [`ProviderName`].
#[derive(Debug, Error)]
#[error(
    "{0:?} can't be a provider's name: use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or a \
     digit, and no UUID"
)]
pub(crate) struct NotAProviderName(pub String);

impl FromStr for ProviderName {
    type Err = NotAProviderName;

    fn from_str(text: &str) -> Result<Self, NotAProviderName> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let valid = (1..=64).contains(&text.len())
            && text.as_bytes()[0].is_ascii_alphanumeric()
            && text.bytes().all(fits)
            && text.parse::<ProviderId>().is_err();
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(NotAProviderName(text.to_owned()))
        }
    }
}

/// Whom a provider makes its KEKs for, whoever asks: the setting `kek_scope`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ScopeSetting {
    /// One for each VM.
    #[default]
    Vm,
    /// One for all VMs of the provider.
    Provider,
}

impl ScopeSetting {
    /// Whom the KEK serves that is made when one for `asked` is wanted.
    fn scope(self, asked: &KekScope) -> KekScope {
        match self {
            Self::Vm => *asked,
            Self::Provider => KekScope::Provider,
        }
    }
}

/// Whether a provider can be used, from worst to best.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", content = "reason")]
pub(crate) enum ProviderStatus {
    /// Trust is not established both ways.
    NotTrusted(String),
    /// Able to unwrap, refuses to wrap until a backup was made.
    NotBackedUp,
    /// Refuses until unlocked.
    Locked,
    /// Does not answer.
    Unreachable(String),
    /// Answers, with something wrong.
    Degraded(String),
    /// Wraps and unwraps.
    Ready,
}

impl ProviderStatus {
    /// Whether it unwraps, as far as that is known.
    pub(crate) fn is_usable(&self) -> bool {
        matches!(self, Self::Ready | Self::NotBackedUp | Self::Degraded(_))
    }

    /// What a call comes to that can't wrap in this state.
    pub(crate) fn refusal(self) -> Option<ProviderError> {
        match self {
            Self::Ready | Self::Degraded(_) => None,
            Self::NotBackedUp => Some(ProviderError::NotBackedUp),
            Self::Locked => Some(ProviderError::Locked),
            Self::Unreachable(reason) => Some(ProviderError::Unreachable(reason)),
            Self::NotTrusted(reason) => Some(ProviderError::NotTrusted(reason)),
        }
    }

    /// Without its reason.
    pub(crate) fn state(&self) -> ProviderState {
        match self {
            Self::NotTrusted(_) => ProviderState::NotTrusted,
            Self::NotBackedUp => ProviderState::NotBackedUp,
            Self::Locked => ProviderState::Locked,
            Self::Unreachable(_) => ProviderState::Unreachable,
            Self::Degraded(_) => ProviderState::Degraded,
            Self::Ready => ProviderState::Ready,
        }
    }
}

impl fmt::Display for ProviderStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotTrusted(reason) | Self::Unreachable(reason) | Self::Degraded(reason) => {
                write!(f, "{} ({reason})", words(&self.state()))
            }
            Self::NotBackedUp | Self::Locked | Self::Ready => f.write_str(&words(&self.state())),
        }
    }
}

/// What was seen when a KEK was destroyed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DestroyReceipt {
    pub kek: KekId,
    /// Whether the provider can't use it any more.
    pub destroyed: bool,
    /// What is known to be gone, and what may survive (backups).
    pub observed: String,
}

impl DestroyReceipt {
    /// Of a KEK that was left alone because it is not one VM's.
    pub(crate) fn shared(kek: &KekId, why: &str) -> Self {
        Self {
            kek: kek.clone(),
            destroyed: false,
            observed: format!("left as it is: {why}, so other VMs may need it, on other hosts too"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_plain_and_no_uuids() {
        for good in ["main", "a", "hsm-1.example_com", "0day"] {
            assert_eq!(good.parse::<ProviderName>().unwrap().as_str(), good);
        }
        let long = "x".repeat(65);
        for bad in [
            "",
            "-f",
            ".x",
            "a b",
            "a/b",
            "ö",
            "a\n",
            &long,
            "6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7",
            "6b2f9b3e58c34fd59aa10d1f44a3e9b7",
        ] {
            assert!(bad.parse::<ProviderName>().is_err(), "{bad:?}");
        }
    }
}
