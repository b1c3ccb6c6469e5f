//! Key providers: what wraps and unwraps data keys.
//!
//! A provider holds KEKs and never gives one out. All calls block and are made on a worker thread with a
//! deadline; `status` answers from memory and never waits for a network.

pub mod cache;
mod error;
pub mod kmip;
pub mod native;
pub mod pkcs11;
pub(crate) mod toolbox;
pub mod transit;

#[cfg(test)]
mod conformance;

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::model::envelope::{EnvelopeError, KekId, Payload, ProviderId, Stanza, VmId};
use crate::secret::SecretBytes;

pub use crate::model::kek::KekScope;
pub use error::ErrorClass;

/// Wraps payloads under KEKs that stay inside.
pub trait KeyProvider: Send + Sync {
    /// Who it is, on every host.
    fn id(&self) -> ProviderId;

    /// What the admin calls it.
    fn name(&self) -> &str;

    /// Whether it can wrap and unwrap now.
    fn status(&self) -> ProviderStatus;

    /// Asks its server or token how it is; returns when `status` has the answer, or when time is up. A kind whose keys are
    /// on this host has nobody to ask.
    fn probe(&self) {}

    /// When it wants to be probed again at the latest, whatever the pace of the others: a token is renewed in time.
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
    fn warnings(&self) -> Vec<String> {
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

    /// Becomes able to unwrap, with the passphrase or PIN in `credential`.
    fn unlock(&self, credential: &SecretBytes) -> Result<(), ProviderError>;
}

/// What an admin calls a provider: 1 to 64 letters, digits, `.`, `_` and `-`, the first a letter or a digit, and
/// not a UUID, so that a name is never taken for an id.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProviderName(String);

impl ProviderName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
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
pub struct NotAProviderName(pub String);

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
pub enum ScopeSetting {
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
pub enum ProviderStatus {
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
    #[must_use]
    pub fn is_usable(&self) -> bool {
        matches!(self, Self::Ready | Self::NotBackedUp | Self::Degraded(_))
    }

    /// What a call comes to that can't wrap in this state.
    #[must_use]
    pub fn refusal(self) -> Option<ProviderError> {
        match self {
            Self::Ready | Self::Degraded(_) => None,
            Self::NotBackedUp => Some(ProviderError::NotBackedUp),
            Self::Locked => Some(ProviderError::Locked),
            Self::Unreachable(reason) => Some(ProviderError::Unreachable(reason)),
            Self::NotTrusted(reason) => Some(ProviderError::NotTrusted(reason)),
        }
    }

    /// The state without its reason.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::NotTrusted(_) => "NotTrusted",
            Self::NotBackedUp => "NotBackedUp",
            Self::Locked => "Locked",
            Self::Unreachable(_) => "Unreachable",
            Self::Degraded(_) => "Degraded",
            Self::Ready => "Ready",
        }
    }
}

impl fmt::Display for ProviderStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotTrusted(reason) | Self::Unreachable(reason) | Self::Degraded(reason) => {
                write!(f, "{} ({reason})", self.as_str())
            }
            Self::NotBackedUp | Self::Locked | Self::Ready => f.write_str(self.as_str()),
        }
    }
}

/// What was seen when a KEK was destroyed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestroyReceipt {
    /// The KEK.
    pub kek: KekId,
    /// Whether the provider can't use it any more.
    pub destroyed: bool,
    /// What is known to be gone, and what may survive (backups).
    pub observed: String,
}

impl DestroyReceipt {
    /// Of a KEK that was left alone because it is not one VM's.
    #[must_use]
    pub fn shared(kek: &KekId, why: &str) -> Self {
        Self {
            kek: kek.clone(),
            destroyed: false,
            observed: format!("left as it is: {why}, so other VMs may need it, on other hosts too"),
        }
    }
}

/// Why a provider did not do as asked. The caller adds the provider's and the object's name.
#[derive(Debug, Error)]
pub enum ProviderError {
    /// It must be unlocked first.
    #[error("is locked")]
    Locked,
    /// It must be unlocked first, and what would have done that by itself did not.
    #[error("is locked: {0}")]
    LockedBecause(String),
    /// Its TPM waits for somebody to type the PIN.
    #[error("is locked: it needs its PIN for the TPM")]
    LockedByPin,
    /// It must be backed up first.
    #[error("has not been backed up")]
    NotBackedUp,
    /// The passphrase, PIN or token is wrong.
    #[error("does not accept this passphrase, PIN or token")]
    WrongCredential,
    /// A token refuses the PIN.
    #[error("{0}")]
    WrongPin(PinRefusal),
    /// It has no such KEK.
    #[error("does not know KEK {0}")]
    UnknownKek(KekId),
    /// The stanza is not what this provider wrapped.
    #[error("can't open the wrapped key: it is damaged, tampered with, or from another provider")]
    Tampered,
    /// The stanza's mechanism is unknown here.
    #[error("does not know the mechanism {0:?}: upgrade virtseal")]
    UnknownMechanism(String),
    /// It does not answer.
    #[error("unreachable ({0})")]
    Unreachable(String),
    /// Trust is not established both ways.
    #[error("is not trusted: {0}")]
    NotTrusted(String),
    /// The same of one that trusts whom the CAs of a file, or of this host, have signed.
    #[error("is not trusted: {0}")]
    NotSignedByOurs(String),
    /// Its server must be unsealed first.
    #[error("is locked: its server is sealed")]
    ServerSealed,
    /// Its server ended what it was unlocked with, or does not let that do enough.
    #[error("is not trusted by its server: {0}")]
    CredentialRefused(String),
    /// It answers, and says that something is wrong with it rather than with what it was asked.
    #[error("is in trouble: {0}")]
    Trouble(String),
    /// Its answer is not one to the question: about another key, or without what was asked for.
    #[error("does not answer what it is asked: {0}")]
    BesideTheQuestion(String),
    /// It does not trust this host.
    #[error("does not trust this host: {0}")]
    RefusesUs(String),
    /// It let this host in no further than the handshake, or some of its nodes did: what may be a refusal.
    #[error("turned this host away: {0}")]
    TurnedAway(String),
    /// The same where a client certificate was shown that came with an unlock.
    #[error("turned this host away: {0}")]
    CertificateRefused(String),
    /// It, or what stands before it, wants a client certificate, and none belongs to how this host logs in.
    #[error("turned this host away: {0}")]
    CertificateWanted(String),
    /// It has the KEK, and the KEK may not be used for this.
    #[error("can't use KEK {kek}: {why}")]
    KekUnusable {
        /// The KEK.
        kek: KekId,
        /// Why.
        why: String,
    },
    /// It understands what it is asked, and does not do it.
    #[error("does not do it: {0}")]
    Refused(String),
    /// This host has a record of it that can't be used.
    #[error("can't be used: {0}")]
    Unusable(String),
    /// A payload of the wrong shape.
    #[error("returned a wrong payload")]
    Payload(#[source] EnvelopeError),
    /// A failure of this host: memory, disk, OpenSSL.
    #[error("failed: {context}")]
    Internal {
        /// What was being done.
        context: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl ProviderError {
    /// Wraps a failure of this host, for `map_err`.
    pub fn internal<E>(context: &'static str) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        move |source| Self::Internal {
            context,
            source: source.into(),
        }
    }
}

/// What a token says of a PIN that it does not accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinRefusal {
    /// It is wrong.
    Wrong,
    /// It is wrong, and so were others before.
    FewTries,
    /// It is wrong, and the next wrong one blocks the token.
    LastTry,
    /// The next wrong PIN blocks the token; it was not asked.
    NotTheLastTry,
    /// The token accepts no PIN any more.
    Blocked,
    /// The PIN has come to its end, or none was ever set.
    NoneIsSet,
    /// It was wrong before; the token was not asked.
    KnownToBeWrong,
    /// Another one unlocked the provider; the token was not asked.
    UnlockedByAnother,
}

impl fmt::Display for PinRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Wrong => "does not accept this PIN",
            Self::FewTries => "does not accept this PIN, and counts wrong ones: few tries are left",
            Self::LastTry => "does not accept this PIN: one try is left before the token blocks itself",
            Self::NotTheLastTry => "has one try left before it blocks itself, so the PIN was not sent",
            Self::Blocked => "accepts no PIN any more",
            Self::NoneIsSet => "wants a new PIN before it accepts any: it has none, or that has expired",
            Self::KnownToBeWrong => "has refused this PIN before, so it was not sent to the token again",
            Self::UnlockedByAnother => "is unlocked with another PIN; to check this one, lock it first",
        })
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
