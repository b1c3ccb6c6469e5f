//! Why a provider does not do as asked, and what that is about: the recipients, the cache and the jobs decide by this alone, whatever the protocol said.
//!
//! | class | the cached KEK | a start | a job |
//! | --- | --- | --- | --- |
//! | [`Key`](ErrorClass::Key) | goes, for unknown and unusable KEKs | other stanzas are tried | leaves that envelope behind |
//! | [`Client`](ErrorClass::Client) | stays shut; a plain "not you" empties the cache | refused | waits |
//! | [`Trouble`](ErrorClass::Trouble) | opens | the cache, then refused | waits |
//! | [`ForGood`](ErrorClass::ForGood) | stays shut | refused | leaves that envelope behind, ends `incomplete` |
//!
//! Each protocol has one table of its own that leads here: KMIP's is `kmip/error.rs`.

use std::fmt;

use thiserror::Error;

use crate::model::envelope::{EnvelopeError, KekId};

/// Why a provider did not do as asked. The caller adds the provider's and the object's name.
#[derive(Debug, Error)]
pub(crate) enum ProviderError {
    #[error("is locked")]
    Locked,
    /// It must be unlocked first, and what would have done that by itself did not.
    #[error("is locked: {0}")]
    LockedBecause(String),
    /// Its TPM waits for somebody to type the PIN.
    #[error("is locked: it needs its PIN for the TPM")]
    LockedByPin,
    /// No passphrase opens what it shows itself to its server with.
    #[error("has a damaged identity on disk: {0}")]
    IdentityDamaged(String),
    #[error("has not been backed up")]
    NotBackedUp,
    #[error("does not accept this passphrase, PIN or token")]
    WrongCredential,
    #[error("{0}")]
    WrongPin(PinRefusal),
    #[error("does not know KEK {0}")]
    UnknownKek(KekId),
    /// The stanza is not what this provider wrapped.
    #[error("can't open the wrapped key: it is damaged, tampered with, or from another provider")]
    Tampered,
    #[error("does not know the mechanism {0:?}: upgrade virtseal")]
    UnknownMechanism(String),
    #[error("unreachable ({0})")]
    Unreachable(String),
    #[error("is not trusted: {0}")]
    NotTrusted(String),
    /// The same of one that trusts whom the CAs of a file, or of this host, have signed.
    #[error("is not trusted: {0}")]
    NotSignedByOurs(String),
    #[error("is locked: its server is sealed")]
    ServerSealed,
    /// Its server ended what it was unlocked with, or does not let that do enough.
    #[error("is not trusted by its server: {0}")]
    CredentialRefused(String),
    /// It answers, and says that something is wrong with it rather than with what it was asked.
    #[error("reports a problem: {0}")]
    Trouble(String),
    /// Its answer is not one to the question: about another key, or without what was asked for.
    #[error("does not answer what it is asked: {0}")]
    BesideTheQuestion(String),
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
    KekUnusable { kek: KekId, why: String },
    /// It understands what it is asked, and does not do it.
    #[error("refused the operation: {0}")]
    Refused(String),
    /// This host has a record of it that can't be used.
    #[error("can't be used: {0}")]
    Unusable(String),
    #[error("returned a wrong payload")]
    Payload(#[source] EnvelopeError),
    /// A failure of this host: memory, disk, OpenSSL.
    #[error("failed: {context}")]
    Internal {
        context: &'static str,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl ProviderError {
    /// Wraps a failure of this host, for `map_err`.
    pub(crate) fn internal<E>(context: &'static str) -> impl FnOnce(E) -> Self
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
pub(crate) enum PinRefusal {
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

/// What a refusal is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ErrorClass {
    /// One KEK, or one stanza: the others may be all right.
    Key,
    /// The trust between this host and the server, on either side: nothing opens until an admin mends it.
    Client,
    /// The server, the way to it, or this host, for now: the same may work later.
    Trouble,
    /// The request was understood and is refused, or was answered with something else: no repetition helps.
    ForGood,
}

impl ProviderError {
    /// What it is about.
    pub(crate) fn class(&self) -> ErrorClass {
        match self {
            Self::UnknownKek(_)
            | Self::KekUnusable { .. }
            | Self::Tampered
            | Self::UnknownMechanism(_)
            | Self::Payload(_) => ErrorClass::Key,
            Self::NotTrusted(_)
            | Self::NotSignedByOurs(_)
            | Self::RefusesUs(_)
            | Self::TurnedAway(_)
            | Self::CertificateRefused(_)
            | Self::CertificateWanted(_)
            | Self::CredentialRefused(_)
            | Self::WrongCredential
            | Self::WrongPin(_) => ErrorClass::Client,
            Self::Locked
            | Self::LockedBecause(_)
            | Self::LockedByPin
            | Self::IdentityDamaged(_)
            | Self::NotBackedUp
            | Self::ServerSealed
            | Self::Unreachable(_)
            | Self::Trouble(_)
            | Self::Unusable(_)
            | Self::Internal { .. } => ErrorClass::Trouble,
            Self::Refused(_) | Self::BesideTheQuestion(_) => ErrorClass::ForGood,
        }
    }

    /// Of what each node of a cluster said that was reached, the one that counts; `None` without any.
    ///
    /// A node may lag behind the others: "unknown" counts only if all of them say so, and so does "not you", which empties
    /// a cache. While one is in trouble, none of them has said anything about the key.
    pub(super) fn of_all(answers: Vec<Self>) -> Option<Self> {
        let all_refuse_us = answers.iter().all(|error| matches!(error, Self::RefusesUs(_)));
        let counts = answers.into_iter().min_by_key(|error| match error {
            Self::NotTrusted(_) => 0,
            Self::RefusesUs(_) | Self::TurnedAway(_) => 1,
            other => match other.class() {
                ErrorClass::Client => 1,
                ErrorClass::Trouble => 2,
                ErrorClass::ForGood => 3,
                // One that has the key knows more of it than one that has not.
                ErrorClass::Key if !matches!(other, Self::UnknownKek(_)) => 4,
                ErrorClass::Key => 5,
            },
        })?;
        Some(match counts {
            Self::RefusesUs(why) if !all_refuse_us => Self::TurnedAway(why),
            other => other,
        })
    }
}

impl ProviderError {
    /// The same in other words, where these are of a server or of several.
    pub(super) fn retold(self, words: impl FnOnce(String) -> String) -> Self {
        match self {
            Self::Unreachable(why) => Self::Unreachable(words(why)),
            Self::NotTrusted(why) => Self::NotTrusted(words(why)),
            Self::RefusesUs(why) => Self::RefusesUs(words(why)),
            Self::TurnedAway(why) => Self::TurnedAway(words(why)),
            Self::Trouble(why) => Self::Trouble(words(why)),
            Self::BesideTheQuestion(why) => Self::BesideTheQuestion(words(why)),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unknown() -> ProviderError {
        ProviderError::UnknownKek(KekId("7".into()))
    }

    fn unusable() -> ProviderError {
        ProviderError::KekUnusable {
            kek: KekId("7".into()),
            why: String::new(),
        }
    }

    fn of(answers: Vec<ProviderError>) -> ProviderError {
        ProviderError::of_all(answers).unwrap()
    }

    #[test]
    fn unknown_counts_only_if_all_say_so() {
        assert!(matches!(
            of(vec![unknown(), unknown()]),
            ProviderError::UnknownKek(_)
        ));
        assert!(matches!(
            of(vec![unknown(), unusable()]),
            ProviderError::KekUnusable { .. }
        ));
        let trouble = || ProviderError::Trouble("General Failure".into());
        for answers in [vec![unknown(), trouble()], vec![trouble(), unusable()]] {
            assert_eq!(of(answers).class(), ErrorClass::Trouble);
        }
        assert!(ProviderError::of_all(Vec::new()).is_none());
    }

    #[test]
    fn one_node_that_does_not_let_us_in_empties_no_cache_and_opens_none() {
        let refuses = || ProviderError::RefusesUs("x".into());
        assert!(matches!(
            of(vec![refuses(), refuses()]),
            ProviderError::RefusesUs(_)
        ));
        for other in [unknown(), ProviderError::Trouble(String::new())] {
            assert!(matches!(of(vec![other, refuses()]), ProviderError::TurnedAway(_)));
        }
        let impostor = ProviderError::NotTrusted(String::new());
        assert!(matches!(
            of(vec![refuses(), impostor, unknown()]),
            ProviderError::NotTrusted(_)
        ));
    }
}
