//! Why a KMIP server did not answer as hoped, and what that is to the rest of virtseal.

use thiserror::Error;

use super::message::ProtocolError;
use super::message::Refusal;
use super::tag::{Operation, Reason};
use crate::provider::ProviderError;

/// What became of one exchange with one server.
#[derive(Clone, Debug, Error)]
pub(super) enum KmipError {
    /// No connection, or no answer in time.
    #[error("{0}")]
    Unreachable(String),
    /// The server is not the one that is trusted.
    #[error("{0}")]
    NotTrusted(String),
    /// The server does not trust us.
    #[error("{0}")]
    RefusesUs(String),
    /// An answer that is no KMIP.
    #[error("unreadable answer: {0}")]
    Unreadable(String),
    /// A call was refused.
    #[error("{operation:?} refused: {refusal}")]
    Refused { operation: Operation, refusal: Refusal },
}

impl KmipError {
    /// Whether the same may work a second later.
    pub(super) fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Unreadable(_))
    }

    pub(super) fn refused(operation: Operation, refusal: Refusal) -> Self {
        if refusal.reason == Reason::AUTHENTICATION_NOT_SUCCESSFUL {
            return Self::RefusesUs(refusal.to_string());
        }
        Self::Refused { operation, refusal }
    }
}

impl From<ProtocolError> for KmipError {
    fn from(error: ProtocolError) -> Self {
        Self::Unreadable(error.to_string())
    }
}

impl From<KmipError> for ProviderError {
    fn from(error: KmipError) -> Self {
        match error {
            KmipError::Unreachable(reason) => Self::Unreachable(reason),
            KmipError::NotTrusted(reason) => Self::NotTrusted(reason),
            KmipError::RefusesUs(reason) => Self::RefusesUs(reason),
            KmipError::Unreadable(_) => Self::Unreachable(error.to_string()),
            KmipError::Refused { .. } => Self::Refused(error.to_string()),
        }
    }
}
