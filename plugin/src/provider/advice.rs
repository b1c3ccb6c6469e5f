//! What leads out of a refusal, for the kind of provider that refuses: no command that it has not.

use super::kind::{KeysAt, Kind, TrustBy};
use super::{ChangeError, PinRefusal, ProviderError};
use crate::api::words;
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};

impl ProviderError {
    /// The exit code for this refusal of the provider called `name`, and what helps. Its kind is not known where its record can't be
    /// used.
    pub(crate) fn advice(&self, name: &str, kind: Option<&Kind>) -> (Code, Option<Advice>) {
        let trust = kind.map_or(TrustBy::Nobody, |kind| kind.trust);
        let keys = kind.map(|kind| kind.keys);
        let name = || name.to_owned();
        let by_trust = |command: fn(String) -> Advice, settings: fn(String) -> Advice| match trust {
            TrustBy::Command => command(name()),
            TrustBy::Settings => settings(name()),
            TrustBy::Nobody => Advice::ShowProvider(name()),
        };
        let (code, next) = match self {
            Self::LockedByPin if keys == Some(KeysAt::Host) => (Code::Locked, Advice::UnlockByPin(name())),
            Self::Locked | Self::LockedBecause(_) | Self::LockedByPin => {
                (Code::Locked, Advice::UnlockProvider(name()))
            }
            Self::WrongPin(PinRefusal::UnlockedByAnother) => (Code::Failed, Advice::LockProvider(name())),
            Self::WrongPin(PinRefusal::Blocked | PinRefusal::NoneIsSet) => {
                (Code::Locked, Advice::NewPin(name()))
            }
            Self::WrongPin(PinRefusal::NotTheLastTry) => (Code::Locked, Advice::LogInElsewhere(name())),
            Self::WrongCredential | Self::WrongPin(_) => (Code::Locked, Advice::UnlockProvider(name())),
            Self::NotBackedUp if keys == Some(KeysAt::Host) => {
                (Code::WouldLoseKey, Advice::BackUpProvider(name()))
            }
            Self::NotBackedUp => (Code::WouldLoseKey, Advice::ShowProvider(name())),
            Self::Unreachable(_) | Self::Trouble(_) => (Code::Unreachable, Advice::ShowProvider(name())),
            Self::NotTrusted(_) | Self::NotSignedByOurs(_) => (
                Code::NotTrusted,
                by_trust(Advice::TrustProvider, Advice::TrustSigner),
            ),
            Self::CertificateRefused(_) => (
                Code::NotTrusted,
                by_trust(Advice::SetIdentity, Advice::OtherCertificate),
            ),
            Self::CertificateWanted(_) => (
                Code::NotTrusted,
                by_trust(Advice::SetIdentity, Advice::LogInByCertificate),
            ),
            Self::CredentialRefused(_) => (Code::NotTrusted, Advice::UnlockProvider(name())),
            Self::ServerSealed => (Code::Locked, Advice::UnsealServer),
            Self::RefusesUs(_) | Self::TurnedAway(_) | Self::IdentityDamaged(_) => (
                Code::NotTrusted,
                by_trust(Advice::SetIdentity, Advice::TransitTrust),
            ),
            Self::Unusable(_) | Self::Refused(_) | Self::BesideTheQuestion(_) | Self::KekUnusable { .. } => {
                (Code::Failed, Advice::ShowProvider(name()))
            }
            Self::UnknownMechanism(_) => (Code::Failed, Advice::Upgrade),
            Self::UnknownKek(_) => (Code::Failed, Advice::RestoreKek(name())),
            Self::Internal { .. } => (Code::Failed, Advice::Journal),
            // About an envelope: what helps is told where that is known.
            Self::Tampered | Self::Payload(_) => return (Code::Failed, None),
        };
        (code, Some(next))
    }
}

impl ChangeError {
    /// For the user of the provider called `name`.
    pub(crate) fn problem(&self, name: &str, kind: Option<&Kind>) -> Problem {
        let again = || {
            Advice::from("the same command with other values").or_else(Advice::SetUntried(name.to_owned()))
        };
        let (code, next) = match self {
            Self::Keystore(error) => return error.into(),
            Self::Settings(_) => (Code::Usage, Advice::ShowProvider(name.to_owned())),
            Self::NeedsCredential(_) => (
                Code::Usage,
                Advice::from("the same command with --passphrase-file FILE")
                    .or_else(Advice::SetUntried(name.to_owned())),
            ),
            Self::Refused(error @ (ProviderError::Locked | ProviderError::LockedBecause(_))) => {
                let unlock = error
                    .advice(name, kind)
                    .1
                    .unwrap_or(Advice::UnlockProvider(name.to_owned()));
                (
                    Code::Locked,
                    unlock
                        .then("the same command")
                        .or_else(Advice::SetUntried(name.to_owned())),
                )
            }
            Self::Refused(error) => (error.advice(name, kind).0, again()),
            Self::Server { .. } => (Code::Unreachable, again()),
            Self::StaysShut { .. } => (Code::WouldLoseKey, again()),
            Self::Persists => (
                Code::Usage,
                Advice::CacheInMemory(name.to_owned()).then("the same command"),
            ),
            Self::TokenInUse(other) => (Code::Usage, Advice::ShowProvider(other.clone())),
        };
        Problem::new(
            code,
            format!("provider '{name}' stays as it was: {}", self.reason()),
        )
        .next(next)
    }

    fn reason(&self) -> String {
        match self {
            Self::Refused(ProviderError::Locked) => "it is locked, so nothing can be tried".to_owned(),
            Self::Refused(_) => format!("with the new settings it {}", chain(self)),
            Self::NeedsCredential(kind) => {
                format!("it logs in by a {} then, and none was given", words(kind))
            }
            Self::Persists => format!("it {}", chain(self)),
            _ => chain(self),
        }
    }
}
