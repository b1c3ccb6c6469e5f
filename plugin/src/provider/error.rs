//! What a refusal is about: the recipients, the cache and the jobs decide by this alone, whatever the protocol said.
//!
//! | class | the cached KEK | a start | a job |
//! | --- | --- | --- | --- |
//! | [`Key`](ErrorClass::Key) | goes, for unknown and unusable KEKs | other stanzas are tried | leaves that envelope behind |
//! | [`Client`](ErrorClass::Client) | stays shut; a plain "not you" empties the cache | refused | waits |
//! | [`Trouble`](ErrorClass::Trouble) | opens | the cache, then refused | waits |
//! | [`ForGood`](ErrorClass::ForGood) | stays shut | refused | leaves that envelope behind, ends `incomplete` |
//!
//! Each protocol has one table of its own that leads here: KMIP's is `kmip/error.rs`.

use super::ProviderError;

/// What a refusal is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ErrorClass {
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
    #[must_use]
    pub fn class(&self) -> ErrorClass {
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
    #[must_use]
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::KekId;

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
