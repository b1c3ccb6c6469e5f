//! Why a provider does not do as asked, as an exit code and what leads out.

use thiserror::Error;

use super::OpenError;
use crate::model::advice::Advice;
use crate::model::envelope::EnvelopeError;
use crate::model::problem::{Code, Problem, chain};
use crate::model::subject::Subject;
use crate::provider::ProviderError;
use crate::provider::kind::Kind;

#[derive(Debug, Error)]
#[error("there is no key provider {name:?} on this host{hint}")]
pub(crate) struct UnknownProvider {
    pub name: String,
    /// Which one may be meant.
    pub hint: String,
}

impl From<UnknownProvider> for Problem {
    fn from(error: UnknownProvider) -> Self {
        Self::new(Code::NotFound, error.to_string())
            .about(Subject::Provider(error.name))
            .next(Advice::ListProviders)
    }
}

/// Why there is no new envelope.
#[derive(Debug, Error)]
pub(crate) enum SealError {
    #[error("there is no key provider on this host")]
    NoProvider,
    #[error(transparent)]
    UnknownProvider(#[from] UnknownProvider),
    /// The policy names a provider that is not here.
    #[error("the recipients in virtseald.yaml name {0:?}, and there is no such key provider on this host")]
    UnknownRecipient(String),
    #[error("provider '{name}'")]
    Refused {
        name: String,
        kind: Option<&'static Kind>,
        #[source]
        source: ProviderError,
    },
    #[error("can't make an envelope")]
    Envelope(#[from] EnvelopeError),
    #[error("what was wrapped does not open again")]
    NotVerified(#[source] OpenError),
    #[error("provider '{0}' unwraps another key than it was given")]
    AnotherKey(String),
    #[error("no memory for a key (is RLIMIT_MEMLOCK too low?)")]
    Memory(#[source] std::io::Error),
}

impl SealError {
    /// The exit code and what leads out.
    pub(crate) fn advice(&self) -> (Code, Option<Advice>) {
        match self {
            Self::NoProvider => (Code::NotFound, Some(Advice::AddNative)),
            Self::UnknownProvider(_) | Self::UnknownRecipient(_) => {
                (Code::NotFound, Some(Advice::ListProviders))
            }
            Self::Refused { name, kind, source } => source.advice(name, *kind),
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
            SealError::Refused { source, name, .. } => {
                Self::new(code, format!("{error} {}", chain(source))).about(Subject::Provider(name.clone()))
            }
            error => Self::new(code, chain(error)),
        };
        failure.advised(next)
    }
}
