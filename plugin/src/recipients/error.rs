//! Why a provider does not do as asked, as an exit code and what leads out.

use thiserror::Error;

use super::OpenError;
use crate::model::advice::Advice;
use crate::model::envelope::{EnvelopeError, ProviderId};
use crate::model::problem::{Code, Problem, chain};
use crate::provider::ProviderError;
use crate::provider::native::NativeProvider;

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
