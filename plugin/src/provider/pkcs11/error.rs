//! Why a token did not do as asked: its own answers, and what they mean for a provider.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use cryptoki::context::Function;
use cryptoki::error::{Error, RvError};
use thiserror::Error;

use super::mechanism::Missing;
use super::settings::TokenChoice;
use crate::model::problem::chain;
use crate::provider::{ErrorClass, PinRefusal, ProviderError};

/// Why the token did not do as asked.
#[derive(Debug, Error)]
pub(super) enum TokenError {
    /// No thread for the module, or not any more.
    #[error("can't start a thread for the module")]
    Thread(#[source] io::Error),
    /// The module is in a call that does not end, or was too slow.
    #[error("the module has not answered for {:.1} s", .0.as_secs_f64())]
    Silent(Duration),
    /// Not a PKCS#11 module; the reason names it.
    #[error("can't load the PKCS#11 module: {0}")]
    Load(String),
    #[error("the module {} is in use with other arguments for C_Initialize", .0.display())]
    OtherInitArgs(PathBuf),
    #[error("the arguments of C_Initialize hold a NUL")]
    InitArgs,
    #[error("there is no {wanted}; the module has {found}")]
    NoToken { wanted: TokenChoice, found: String },
    #[error("{count} tokens match '{wanted}': choose one by its serial number")]
    Ambiguous { wanted: TokenChoice, count: usize },
    #[error("the {wanted} is another one: its serial number is {found} and not {expected}")]
    AnotherToken {
        wanted: TokenChoice,
        expected: String,
        found: String,
    },
    #[error("the token refuses the PIN")]
    Pin(PinRefusal),
    /// What any provider can say of one call.
    #[error(transparent)]
    Provider(#[from] ProviderError),
    #[error(transparent)]
    Missing(#[from] Missing),
    #[error("the token made a key that could leave it")]
    NotKept,
    #[error("the token keeps a key that it has destroyed")]
    NotDestroyed,
    /// An object of ours without what it must have.
    #[error("an object in the token is incomplete")]
    NoValue,
    #[error("no memory for a key (is RLIMIT_MEMLOCK too low?)")]
    Memory(#[source] io::Error),
    #[error("{}", answer(.0))]
    Call(Error),
}

impl From<Error> for TokenError {
    fn from(error: Error) -> Self {
        Self::Call(error)
    }
}

/// The function and the code: what cryptoki says of a code is a paragraph of the specification.
fn answer(error: &Error) -> String {
    match error {
        Error::Pkcs11(rv, function) => format!("C_{function:?} answers {rv:?}"),
        error => error.to_string(),
    }
}

impl TokenError {
    /// Whether a new session, or a module initialized anew, may help.
    pub(super) fn is_loss(&self) -> bool {
        match self {
            Self::NoToken { .. } => true,
            Self::Call(error) => is_lost(error),
            _ => false,
        }
    }

    /// Whether the token, or its module, is not there now, and may be later.
    pub(super) fn is_absence(&self) -> bool {
        match self {
            Self::Silent(_) | Self::Load(_) => true,
            // A service that the module asks may not be up yet; what it says then is the module's own. A login that failed for an
            // unknown reason may have cost a try.
            Self::Call(Error::Pkcs11(rv, function)) if !matches!(function, Function::Login) => {
                self.is_loss() || class(*rv) == ErrorClass::Trouble
            }
            _ => self.is_loss(),
        }
    }

    pub(super) fn is_about_the_pin(&self) -> bool {
        matches!(self, Self::Pin(_) | Self::Provider(ProviderError::WrongPin(_)))
    }

    /// Whether it is about the token as a whole, and so about the provider's status.
    pub(super) fn is_trouble(&self) -> bool {
        match self {
            Self::Call(Error::Pkcs11(rv, _)) => class(*rv) != ErrorClass::Key,
            Self::Provider(_) | Self::Pin(_) | Self::Missing(_) | Self::Memory(_) => false,
            _ => true,
        }
    }
}

impl From<TokenError> for ProviderError {
    fn from(error: TokenError) -> Self {
        let said = chain(&error);
        match error {
            TokenError::Provider(error) => error,
            TokenError::Pin(refusal) => Self::WrongPin(refusal),
            TokenError::Memory(error) => Self::internal("getting memory for a key")(error),
            TokenError::Thread(error) => Self::internal("calling the module")(error),
            TokenError::OtherInitArgs(_)
            | TokenError::InitArgs
            | TokenError::Missing(_)
            | TokenError::NotKept
            | TokenError::NotDestroyed
            | TokenError::NoValue
            | TokenError::Ambiguous { .. }
            | TokenError::AnotherToken { .. } => Self::Unusable(said),
            TokenError::Silent(_) | TokenError::Load(_) | TokenError::NoToken { .. } => {
                Self::Unreachable(said)
            }
            TokenError::Call(Error::Pkcs11(rv, _)) => match class(rv) {
                ErrorClass::Key => Self::Tampered,
                ErrorClass::Client => Self::CredentialRefused(said),
                ErrorClass::Trouble => Self::Unreachable(said),
                ErrorClass::ForGood => Self::Refused(said),
            },
            TokenError::Call(_) => Self::Unreachable(said),
        }
    }
}

/// What an answer is about, wherever nothing more is known. Codes of vendors, and those that may be anything, are trouble: it may
/// pass, and proves nothing of a key.
fn class(rv: RvError) -> ErrorClass {
    match rv {
        RvError::EncryptedDataInvalid
        | RvError::EncryptedDataLenRange
        | RvError::WrappedKeyInvalid
        | RvError::WrappedKeyLenRange
        | RvError::SignatureInvalid
        | RvError::SignatureLenRange
        | RvError::DataInvalid
        | RvError::DataLenRange => ErrorClass::Key,
        RvError::PinIncorrect
        | RvError::PinInvalid
        | RvError::PinLenRange
        | RvError::PinExpired
        | RvError::PinLocked
        | RvError::PinTooWeak
        | RvError::UserPinNotInitialized
        | RvError::UserTypeInvalid => ErrorClass::Client,
        RvError::ActionProhibited
        | RvError::ArgumentsBad
        | RvError::AttributeReadOnly
        | RvError::AttributeSensitive
        | RvError::AttributeTypeInvalid
        | RvError::AttributeValueInvalid
        | RvError::FunctionNotSupported
        | RvError::FunctionRejected
        | RvError::KeySizeRange
        | RvError::KeyTypeInconsistent
        | RvError::KeyFunctionNotPermitted
        | RvError::KeyNotWrappable
        | RvError::KeyUnextractable
        | RvError::MechanismInvalid
        | RvError::MechanismParamInvalid
        | RvError::SessionReadOnly
        | RvError::TemplateIncomplete
        | RvError::TemplateInconsistent
        | RvError::TokenWriteProtected
        | RvError::UnwrappingKeySizeRange
        | RvError::UnwrappingKeyTypeInconsistent
        | RvError::WrappingKeySizeRange
        | RvError::WrappingKeyTypeInconsistent => ErrorClass::ForGood,
        _ => ErrorClass::Trouble,
    }
}

/// Whether the answer says that token, session or handle are no more.
pub(super) fn is_lost(error: &Error) -> bool {
    let Error::Pkcs11(rv, _) = error else {
        return false;
    };
    matches!(
        rv,
        RvError::DeviceRemoved
            | RvError::DeviceError
            | RvError::TokenNotPresent
            | RvError::TokenNotRecognized
            | RvError::SlotIdInvalid
            | RvError::SessionHandleInvalid
            | RvError::SessionClosed
            | RvError::UserNotLoggedIn
            | RvError::CryptokiNotInitialized
            | RvError::ObjectHandleInvalid
            | RvError::KeyHandleInvalid
            | RvError::WrappingKeyHandleInvalid
            | RvError::UnwrappingKeyHandleInvalid
            | RvError::OperationActive
            | RvError::GeneralError
            | RvError::FunctionFailed
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(rv: RvError, function: Function) -> TokenError {
        TokenError::Call(Error::Pkcs11(rv, function))
    }

    #[test]
    fn answers_lead_to_the_class_that_they_are_about() {
        for (rv, wanted) in [
            (RvError::EncryptedDataInvalid, ErrorClass::Key),
            (RvError::WrappedKeyInvalid, ErrorClass::Key),
            (RvError::PinExpired, ErrorClass::Client),
            (RvError::UserPinNotInitialized, ErrorClass::Client),
            (RvError::MechanismInvalid, ErrorClass::ForGood),
            (RvError::KeyFunctionNotPermitted, ErrorClass::ForGood),
            (RvError::TokenWriteProtected, ErrorClass::ForGood),
            (RvError::GeneralError, ErrorClass::Trouble),
            (RvError::FunctionFailed, ErrorClass::Trouble),
            (RvError::DeviceMemory, ErrorClass::Trouble),
            (RvError::KeyHandleInvalid, ErrorClass::Trouble),
            (RvError::VendorDefined(0x8000_0001), ErrorClass::Trouble),
        ] {
            let error = ProviderError::from(said(rv, Function::Decrypt));
            assert_eq!(error.class(), wanted, "{error:?}");
        }
    }

    #[test]
    fn a_service_that_is_not_up_is_absent_and_a_login_without_a_reason_is_not() {
        for rv in [
            RvError::GeneralError,
            RvError::FunctionFailed,
            RvError::VendorDefined(7),
        ] {
            assert!(said(rv, Function::Initialize).is_absence(), "{rv:?}");
        }
        assert!(!said(RvError::VendorDefined(7), Function::Login).is_absence());
        assert!(!said(RvError::PinIncorrect, Function::Login).is_absence());
        assert!(!said(RvError::MechanismInvalid, Function::OpenSession).is_absence());
    }
}
