//! Why a KMIP server did not answer as hoped, and what that is to the rest of virtseal: the one table of this protocol.

use thiserror::Error;

use super::message::ProtocolError;
use super::message::Refusal;
use super::tag::{Operation, Reason};
use crate::model::envelope::KekId;
use crate::provider::ProviderError;

/// What became of one exchange with one server.
#[derive(Clone, Debug, Error)]
pub(super) enum KmipError {
    #[error("{0}")]
    NoConnection(String),
    /// No answer in time, or none any more.
    #[error("{0}")]
    NoAnswer(String),
    /// It closed the connection before its first answer, after it had asked for our certificate.
    #[error(
        "it closed the connection before its first answer, after it had asked for the client certificate ({0})"
    )]
    TurnedAway(String),
    /// The server is not the one that is trusted.
    #[error("{0}")]
    NotTrusted(String),
    #[error("{0}")]
    RefusesUs(String),
    #[error("{0}")]
    Trouble(String),
    #[error("{0}")]
    BesideTheQuestion(String),
    #[error("{operation:?} refused: {refusal}")]
    Refused { operation: Operation, refusal: Refusal },
}

/// What a refusal is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum About {
    /// The key is not there.
    UnknownKey,
    /// The key is there, or is somebody else's; for a call without a key: it is refused for good.
    Key,
    /// Who asks.
    Client,
    /// The server. Also what gives no reason, or one that is not in the standard: it has said nothing of the key.
    Server,
    Request,
}

impl Reason {
    /// KMIP 2.1, section 11.48, and what 1.x has besides.
    pub(super) fn about(self) -> About {
        match self.0 {
            // Item, Object Not Found; Object Destroyed.
            0x01 | 0x36 | 0x37 => About::UnknownKey,
            // Cryptographic Problem, Illegal Operation, Permission Denied, Object Archived, formats of a key, Key Value Not
            // Present, Sensitive, Not Extractable, Usage Limit Exceeded, Illegal Object Type, Incompatible Usage Mask, Invalid
            // Object Type, what wraps it, Not Authorised, Wrong Key Lifecycle State, Constraint Violation.
            0x0A..=0x0D
            | 0x10..=0x13
            | 0x16
            | 0x17
            | 0x1A
            | 0x28
            | 0x29
            | 0x30
            | 0x32
            | 0x39
            | 0x40..=0x43
            | 0x4B => About::Key,
            // Authentication Not Successful, Attestation Required and Failed, Invalid Ticket, Bad Password.
            0x03 | 0x14 | 0x15 | 0x19 | 0x25 => About::Client,
            // Invalid Message, Operation Not Supported, Missing Data, Invalid Field, Feature Not Supported, Index Out Of
            // Bounds, Application Namespace Not Supported, Object Already Exists, attributes and types, Codec Error,
            // correlation values, names that must be unique, unknown items, Unsupported Protocol Version, Object Group.
            0x04..=0x08
            | 0x0E
            | 0x0F
            | 0x18
            | 0x1B..=0x24
            | 0x26
            | 0x2B..=0x2F
            | 0x34
            | 0x35
            | 0x3B..=0x3F
            | 0x4A => About::Request,
            // Response Too Large, Canceled, Internal Server Error, Server Limit Exceeded, Protection Storage Unavailable,
            // PKCS#11, Duplicate Process Request, General Failure, and whatever else.
            _ => About::Server,
        }
    }
}

impl KmipError {
    /// Whether the same may work a second later.
    pub(super) fn is_transient(&self) -> bool {
        matches!(self, Self::NoConnection(_) | Self::NoAnswer(_))
    }

    /// The refusal of a call that is about no key, or that nobody could do.
    pub(super) fn refused(operation: Operation, refusal: Refusal) -> Self {
        match refusal.reason.about() {
            About::Client => Self::RefusesUs(refusal.to_string()),
            About::Server => Self::Trouble(format!("{operation:?}: {refusal}")),
            About::UnknownKey | About::Key | About::Request => Self::Refused { operation, refusal },
        }
    }

    /// The refusal of a call that is about `kek`.
    pub(super) fn refused_key(kek: &KekId, operation: Operation, refusal: &Refusal) -> ProviderError {
        match (refusal.reason.about(), Self::refused(operation, refusal.clone())) {
            (About::UnknownKey, _) => ProviderError::UnknownKek(kek.clone()),
            (About::Key, refused) => ProviderError::KekUnusable {
                kek: kek.clone(),
                why: refused.to_string(),
            },
            (_, other) => other.into(),
        }
    }

    /// What an answer that could be read, and was not as hoped, says of the server that gave it.
    pub(super) fn of_server(error: &ProviderError) -> Option<Self> {
        match error {
            ProviderError::Trouble(why) => Some(Self::Trouble(why.clone())),
            ProviderError::BesideTheQuestion(why) => Some(Self::BesideTheQuestion(why.clone())),
            ProviderError::RefusesUs(why) => Some(Self::RefusesUs(why.clone())),
            _ => None,
        }
    }
}

impl From<ProtocolError> for KmipError {
    fn from(error: ProtocolError) -> Self {
        match error {
            ProtocolError::Ttlv(error) => Self::Trouble(format!("unreadable answer: {error}")),
            ProtocolError::Shape
            | ProtocolError::Count { .. }
            | ProtocolError::AnotherKey
            | ProtocolError::Missing(_) => Self::BesideTheQuestion(error.to_string()),
        }
    }
}

impl From<ProtocolError> for ProviderError {
    fn from(error: ProtocolError) -> Self {
        KmipError::from(error).into()
    }
}

impl From<KmipError> for ProviderError {
    fn from(error: KmipError) -> Self {
        match error {
            KmipError::NoConnection(reason) | KmipError::NoAnswer(reason) => Self::Unreachable(reason),
            KmipError::TurnedAway(_) => Self::TurnedAway(error.to_string()),
            KmipError::NotTrusted(reason) => Self::NotTrusted(reason),
            KmipError::RefusesUs(reason) => Self::RefusesUs(reason),
            KmipError::Trouble(reason) => Self::Trouble(reason),
            KmipError::BesideTheQuestion(reason) => Self::BesideTheQuestion(reason),
            KmipError::Refused { .. } => Self::Refused(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::ErrorClass;

    #[test]
    fn every_reason_has_one_class() {
        let class = |reason: u32, of_a_key: bool| {
            let refusal = Refusal::of(Reason(reason));
            match of_a_key {
                true => KmipError::refused_key(&KekId("7".into()), Operation::Get, &refusal).class(),
                false => ProviderError::from(KmipError::refused(Operation::Create, refusal)).class(),
            }
        };
        for (reason, of_a_key, of_none) in [
            (0x01, ErrorClass::Key, ErrorClass::ForGood),
            (0x37, ErrorClass::Key, ErrorClass::ForGood),
            (0x0C, ErrorClass::Key, ErrorClass::ForGood),
            (0x43, ErrorClass::Key, ErrorClass::ForGood),
            (0x35, ErrorClass::ForGood, ErrorClass::ForGood),
            (0x05, ErrorClass::ForGood, ErrorClass::ForGood),
            (0x03, ErrorClass::Client, ErrorClass::Client),
            (0x25, ErrorClass::Client, ErrorClass::Client),
            (0x2A, ErrorClass::Trouble, ErrorClass::Trouble),
            (0x3A, ErrorClass::Trouble, ErrorClass::Trouble),
            (0x44, ErrorClass::Trouble, ErrorClass::Trouble),
            (0x100, ErrorClass::Trouble, ErrorClass::Trouble),
            // No reason, and one of a maker's own.
            (0, ErrorClass::Trouble, ErrorClass::Trouble),
            (0x8000_0042, ErrorClass::Trouble, ErrorClass::Trouble),
        ] {
            assert_eq!(class(reason, true), of_a_key, "{reason:#x}");
            assert_eq!(class(reason, false), of_none, "{reason:#x}");
        }
    }
}
