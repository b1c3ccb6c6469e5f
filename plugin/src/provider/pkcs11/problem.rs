//! What a user is told when a token can't be added.

use super::{Pkcs11Error, Pkcs11Provider};
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};
use crate::provider::{Addition, PinRefusal, ProviderError, of_kind};

impl Pkcs11Provider {
    /// By the JSON of settings, unlocked by the PIN that is the credential of `new`.
    pub(in crate::provider) fn add(new: &Addition<'_>) -> Result<Self, Problem> {
        let name = new.name.as_str();
        let settings = serde_json::from_str(new.settings).map_err(|error| {
            Problem::from_error(Code::Usage, format!("can't add provider '{name}'"), &error)
                .next(Advice::AddProviderHelp(Some(Self::KIND)))
        })?;
        let pin = new.credential.ok_or(ProviderError::WrongCredential);
        let pin = pin.map_err(|error| Pkcs11Error::Provider(error).problem(name))?;
        let others: Vec<_> = new.others.iter().cloned().filter_map(of_kind).collect();
        Self::create(new.table, new.name, settings, pin, &others).map_err(|error| error.problem(name))
    }
}

impl Pkcs11Error {
    fn problem(&self, name: &str) -> Problem {
        let add = Advice::AddProviderHelp(Some(Pkcs11Provider::KIND));
        let (code, next) = match self {
            Self::Provider(ProviderError::WrongPin(PinRefusal::Blocked | PinRefusal::NoneIsSet)) => (
                Code::Locked,
                Some(
                    "a new PIN (pkcs11-tool --login --login-type so --init-pin), then the same command"
                        .into(),
                ),
            ),
            Self::Provider(ProviderError::WrongPin(PinRefusal::NotTheLastTry)) => (
                Code::Locked,
                Some("pkcs11-tool --login --list-objects with the right PIN, then the same command".into()),
            ),
            Self::Provider(ProviderError::WrongPin(_)) => (
                Code::Locked,
                Some(format!("the same command with the right PIN for '{name}'").into()),
            ),
            Self::Provider(error) => (error.advice(name, None).0, Some(add)),
            Self::ManyProviders(_) => (Code::Usage, Some("the same command with --id UUID".into())),
            Self::TokenInUse(other) => (Code::Exists, Some(Advice::ShowProvider(other.clone()))),
            Self::Settings(_) => (Code::Usage, Some(add)),
            Self::Keystore(error) => return error.into(),
            Self::Json(_) => (Code::Failed, None),
        };
        let message = match self {
            Self::Provider(ProviderError::WrongPin(_)) => format!("the token {}", chain(self)),
            Self::Provider(error) => format!("provider '{name}' {}", chain(error)),
            error => chain(error),
        };
        Problem::new(code, message).advised(next)
    }
}
