//! Why a provider does not do as asked, as an exit code and what leads out.

use thiserror::Error;

use super::OpenError;
use crate::model::advice::Advice;
use crate::model::envelope::{EnvelopeError, ProviderId};
use crate::model::problem::{Code, Problem, chain};
use crate::provider::native::NativeProvider;
use crate::provider::{PinRefusal, ProviderError};

/// No provider has this name or id.
#[derive(Debug, Error)]
#[error("there is no key provider {0:?} on this host")]
pub struct UnknownProvider(pub String);

impl From<UnknownProvider> for Problem {
    fn from(error: UnknownProvider) -> Self {
        Self::new(Code::NotFound, error.to_string()).next(Advice::ListProviders)
    }
}

/// Why there is no new envelope.
#[derive(Debug, Error)]
pub enum SealError {
    /// There is no provider at all.
    #[error("there is no key provider on this host")]
    NoProvider,
    /// None has the name that was given.
    #[error(transparent)]
    UnknownProvider(#[from] UnknownProvider),
    /// The policy names a provider that is not here.
    #[error("the recipients in virtseald.yaml name {0:?}, and there is no such key provider on this host")]
    UnknownRecipient(String),
    /// The provider does not wrap.
    #[error("provider '{name}'")]
    Refused {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: ProviderError,
    },
    /// The envelope can't be made.
    #[error("can't make an envelope")]
    Envelope(#[from] EnvelopeError),
    /// What was wrapped does not open.
    #[error("what was wrapped does not open again")]
    NotVerified(#[source] OpenError),
    /// What was wrapped opens to something else.
    #[error("provider '{0}' unwraps another key than it was given")]
    AnotherKey(String),
    /// No secret memory.
    #[error("no memory for a key (is RLIMIT_MEMLOCK too low?)")]
    Memory(#[source] std::io::Error),
}

impl SealError {
    /// The exit code and what leads out.
    #[must_use]
    pub fn advice(&self) -> (Code, Option<Advice>) {
        match self {
            Self::NoProvider => (Code::NotFound, Some(Advice::AddNative)),
            Self::UnknownProvider(_) | Self::UnknownRecipient(_) => {
                (Code::NotFound, Some(Advice::ListProviders))
            }
            Self::Refused { name, source } => source.advice(name),
            Self::NotVerified(error) => (error.code(), error.next()),
            Self::Envelope(_) | Self::AnotherKey(_) | Self::Memory(_) => (Code::Failed, None),
        }
    }
}

impl From<SealError> for Problem {
    fn from(error: SealError) -> Self {
        let (code, next) = error.advice();
        let failure = match &error {
            // The provider's own words go on from its name.
            SealError::Refused { source, .. } => Self::new(code, format!("{error} {}", chain(source))),
            error => Self::new(code, chain(error)),
        };
        failure.advised(next)
    }
}

/// How a provider comes back that is not on this host: only native ones have a backup of their own. `kind` is known if it
/// was deleted here.
#[must_use]
pub fn bring_back(id: ProviderId, name: String, kind: Option<&str>) -> Advice {
    match kind {
        Some(NativeProvider::KIND) => Advice::RestoreProvider(name),
        Some(kind) => Advice::AddAgain {
            kind: kind.to_owned(),
            name,
            id,
        },
        None => Advice::BringBack { name, id },
    }
}

impl ProviderError {
    /// The exit code for this refusal of the provider called `name`, and what helps.
    #[must_use]
    pub fn advice(&self, name: &str) -> (Code, Option<Advice>) {
        let name = name.to_owned();
        match self {
            Self::LockedByPin => (Code::Locked, Some(Advice::UnlockByPin(name))),
            Self::Locked | Self::LockedBecause(_) => (Code::Locked, Some(Advice::UnlockProvider(name))),
            Self::WrongPin(PinRefusal::UnlockedByAnother) => (Code::Failed, Some(Advice::LockProvider(name))),
            Self::WrongPin(PinRefusal::Blocked | PinRefusal::NoneIsSet) => {
                (Code::Locked, Some(Advice::NewPin(name)))
            }
            Self::WrongPin(PinRefusal::NotTheLastTry) => (Code::Locked, Some(Advice::LogInElsewhere(name))),
            Self::WrongCredential | Self::WrongPin(_) => (Code::Locked, Some(Advice::UnlockProvider(name))),
            Self::NotBackedUp => (Code::WouldLoseKey, Some(Advice::BackUpProvider(name))),
            Self::Unreachable(_) | Self::Trouble(_) => (Code::Unreachable, Some(Advice::ShowProvider(name))),
            Self::NotTrusted(_) => (Code::NotTrusted, Some(Advice::TrustProvider(name))),
            Self::NotSignedByOurs(_) => (Code::NotTrusted, Some(Advice::TrustSigner(name))),
            Self::CertificateRefused(_) => (Code::NotTrusted, Some(Advice::OtherCertificate(name))),
            Self::CertificateWanted(_) => (Code::NotTrusted, Some(Advice::LogInByCertificate(name))),
            Self::CredentialRefused(_) => (Code::NotTrusted, Some(Advice::UnlockProvider(name))),
            Self::ServerSealed => (Code::Locked, Some(Advice::UnsealServer)),
            Self::RefusesUs(_) | Self::TurnedAway(_) => (Code::NotTrusted, Some(Advice::SetIdentity(name))),
            Self::Unusable(_) | Self::Refused(_) | Self::BesideTheQuestion(_) => {
                (Code::Failed, Some(Advice::ShowProvider(name)))
            }
            Self::UnknownMechanism(_) => (Code::Failed, Some(Advice::Upgrade)),
            Self::UnknownKek(_) => (Code::Failed, Some(Advice::RestoreKek(name))),
            Self::KekUnusable { .. } => (Code::Failed, Some(Advice::ShowProvider(name))),
            Self::Internal { .. } => (Code::Failed, Some(Advice::Journal)),
            // About an envelope: what helps is told where that is known.
            Self::Tampered | Self::Payload(_) => (Code::Failed, None),
        }
    }
}
